"""Sizes of heads in GGUF files, which need not be width over heads."""

import gguf

from tele_jax import convert
from tests.convert import releases
from tests.convert.test_gguf import bits


def test_the_size_of_a_head_is_named_for_it_need_not_be_width_over_heads(tmp_path):
    """llama.cpp takes width / heads where these keys are missing, and then refuses the rotary size as another one."""
    config, tensors = releases.llama(kv_heads=2, head_dim=16)
    assert config["hidden_size"] // config["num_attention_heads"] != 16
    releases.save(tmp_path / "release", config, tensors)
    cfg, params = convert.load_hf(tmp_path / "release")
    convert.save_hf(tmp_path / "out", cfg, params, format="gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"llama.{key}"].contents() == 16, key
    again, read = convert.load_hf(tmp_path / "out" / "model.gguf")
    assert again == cfg and bits(read) == bits(params)
