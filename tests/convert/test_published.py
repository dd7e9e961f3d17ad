"""The published checkpoints at full size, as lists of tensors: nothing is allocated. Counts: of the released files."""

import math
import tracemalloc

import numpy as np
import pytest

import tele_jax as tele
from tele_jax import convert
from tele_jax.convert import configs, exporting, files

# model, format: tensors, bytes in bfloat16
PUBLISHED = {
    ("telechat_7b", "telechat"): (302, 2 * 7_200_018_432),
    ("telechat_12b", "telechat"): (383, 2 * 12_386_432_000),  # total_size in the index of the released 12B-V2
    ("telechat_52b", "telechat_52b"): (3 + 64 * 7, 105_665_020_032),
    ("tele_flm_52b", "tele_flm"): (3 + 64 * 9, 2 * 52_824_121_344),
    ("tele_flm_52b_instruct", "tele_flm"): (3 + 64 * 9, 2 * 52_832_509_952),
    ("tele_flm_1t", "tele_flm"): (3 + 140 * 9, 2 * 1_083_813_908_480),
}


@pytest.mark.parametrize("model, format", PUBLISHED)
def test_full_size_headers_have_the_published_counts_and_bytes(model, format):
    tensors = convert.tensors(tele.get_model(model), format, "bfloat16")
    shards = files.split(tensors, 5 * 10**9)
    headers = {name: files.header(shard) for name, shard in shards.items()}
    count, num_bytes = PUBLISHED[model, format]
    assert len({tensor.name for tensor in tensors}) == len(tensors) == count
    assert sum(tensor.nbytes for tensor in tensors) == num_bytes
    assert sum(math.prod(tensor.shape) * 2 for tensor in tensors) == num_bytes
    assert all(len(header) < 100_000 for header in headers.values())
    largest = max(tensor.nbytes for tensor in tensors)
    assert all(sum(t.nbytes for t in shard) <= max(5 * 10**9, largest) for shard in shards.values())


def test_a_list_for_the_largest_model_takes_no_memory():
    cfg = tele.get_model("tele_flm_1t")
    convert.tensors(cfg, "tele_flm")  # what is compiled and remembered
    tracemalloc.start()
    convert.tensors(cfg, "tele_flm", "bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


SHAPES = {
    ("telechat_7b", "telechat"): {
        "word_embeddings.weight": (160_256, 4_096),
        "h.29.self_attention.query.weight": (4_096, 4_096),
        "h.29.self_attention.key_value.weight": (8_192, 4_096),
        "h.0.self_attention.dense.bias": (4_096,),
        "h.0.mlp.gate_proj.weight": (12_288, 4_096),
        "h.0.mlp.down_proj.weight": (4_096, 12_288),
        "h.0.mlp.down_proj.bias": (4_096,),
        "ln_f.weight": (4_096,),
    },
    ("telechat_12b", "telechat"): {
        "transformer.word_embeddings.weight": (120_000, 5_120),
        "transformer.h.37.post_attention_layernorm.weight": (5_120,),
        "transformer.h.37.self_attention.key_value.weight": (10_240, 5_120),
        "transformer.ln_f.weight": (5_120,),
        "lm_head.weight": (120_000, 5_120),
    },
    ("telechat_52b", "telechat_52b"): {
        "transformer.wte.weight": (80_896, 8_192),
        "transformer.h.63.attn.c_attn.weight": (8_192, 24_576),
        "transformer.h.63.attn.c_proj.weight": (8_192, 8_192),
        "transformer.h.63.attn.masked_bias": (),
        "transformer.h.0.mlp.c_fc.weight": (8_192, 43_648),
        "transformer.h.0.mlp.c_proj.weight": (21_824, 8_192),
        "transformer.h.0.ln_1.weight": (8_192,),
        "lm_head.weight": (80_896, 8_192),
    },
    ("tele_flm_1t", "tele_flm"): {
        "model.embed_tokens.weight": (81_920, 20_480),
        "model.layers.139.self_attn.v_proj.weight": (20_480, 20_480),
        "model.layers.139.mlp.up_proj.weight": (98_304, 20_480),
        "model.layers.139.mlp.down_proj.weight": (20_480, 98_304),
        "model.norm.weight": (20_480,),
    },
}


@pytest.mark.parametrize("model, format", SHAPES)
def test_tensors_have_the_published_names_and_shapes(model, format):
    found = {tensor.name: tensor.shape for tensor in convert.tensors(tele.get_model(model), format)}
    assert found.items() >= SHAPES[model, format].items()


# Keys and values of the released config.json files.
SEVEN_B = {
    "model_type": "telechat",
    "hidden_size": 4096,
    "n_layer": 30,
    "n_head": 32,
    "n_inner": None,
    "ffn_hidden_size": 12288,
    "vocab_size": 160256,
    "layer_norm_epsilon": 1e-5,
    "training_seqlen": 8192,
    "seq_length": 8192,
    "embed_layernorm": False,
    "apply_residual_connection_post_layernorm": False,
}
CONFIGS = {
    "telechat_7b": SEVEN_B,
    "telechat_12b": SEVEN_B
    | {"hidden_size": 5120, "n_layer": 38, "vocab_size": 120_000, "tie_word_embeddings": False, "logn": False},
    "tele_flm_52b": {
        "model_type": "TeleFLM",
        "hidden_size": 8192,
        "intermediate_size": 21824,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 80384,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_mup": True,
        "input_mult": 1.0,
        "output_mult": 0.5,
        "mup_scale_factor": 16,
        "attention_bias": False,
        "hidden_act": "silu",
    },
    "telechat_52b": {
        "model_type": "telechat",
        "n_embd": 8192,
        "n_inner": 21824,
        "n_layer": 64,
        "n_head": 64,
        "n_positions": 4096,
        "vocab_size": 80896,
        "layer_norm_epsilon": 1e-5,
        "rotary_theta": 10000,
        "relative_encoding": "rotary",
        "use_RMSNorm": True,
        "add_bias_linear": False,
        "use_mup": True,
        "input_mult": 1.0,
        "output_mult": 1.0,
        "mup_scale_factor": 32.0,
        "mup_base_width": 256,
    },
}
TELE_FLM = CONFIGS["tele_flm_52b"]
CONFIGS["tele_flm_52b_instruct"] = TELE_FLM | {"vocab_size": 80896, "output_mult": 1.0, "mup_scale_factor": 32}
CONFIGS["tele_flm_1t"] = TELE_FLM | {
    **{"hidden_size": 20480, "intermediate_size": 98304, "num_hidden_layers": 140, "vocab_size": 81920},
    **{"num_attention_heads": 160, "num_key_value_heads": 160, "output_mult": 2.0, "mup_scale_factor": 80},
}


@pytest.mark.parametrize("model", CONFIGS)
def test_a_released_config_is_the_named_model(model):
    keys = configs.Keys(CONFIGS[model], "config.json")
    cfg, named = configs.read(keys, configs.detect(keys)), tele.get_model(model)
    assert cfg.vocab_size == named.padded_vocab_size  # without a tokenizer all rows count
    assert cfg.matrix_init_std == pytest.approx(named.matrix_init_std)
    same = {key: getattr(named, key) for key in ("vocab_size", "dtype", "param_dtype", "matrix_init_std")}
    assert cfg.replace(padded_vocab_size=cfg.padded_vocab_size, **same) == named


@pytest.mark.parametrize("model", CONFIGS)
def test_a_named_model_is_exported_with_the_released_keys(model):
    keys = configs.Keys(CONFIGS[model], "config.json")
    format = configs.detect(keys)
    written = exporting.outline(tele.get_model(model), format, dtype="bfloat16").document
    released = {key: value for key, value in CONFIGS[model].items() if value is not None}
    assert {key: written.get(key) for key in released} == released
    assert written["torch_dtype"] == "bfloat16"
    assert configs.detect(configs.Keys(written, "config.json")) == format


def test_52b_turns_faster_beyond_4096_tokens():
    """Its rotary base is 10,000 * alpha, without exponent."""
    cfg = configs.read(configs.Keys(CONFIGS["telechat_52b"], "config.json"), "telechat_52b")
    for length, alpha in ((4096, 1), (4097, 3), (8192, 3), (8193, 7)):
        assert cfg.rope_length_factors(length) == (10_000.0 * alpha, 1.0)


def test_the_seven_b_as_llama_keeps_its_base_up_to_8192_tokens():
    plan = exporting.outline(tele.get_model("telechat_7b"), "llama", dtype="bfloat16")
    assert plan.document["rope_theta"] == pytest.approx(30_527.7, abs=0.05)
    assert plan.document["max_position_embeddings"] == 8192
    assert plan.document["tie_word_embeddings"] is True and plan.document["attention_bias"] is True
    zeros = [tensor for tensor in plan.tensors if tensor.constant == 0.0]
    assert len(zeros) == 30 * 5 and not any(tensor.parts for tensor in zeros)
    assert np.sum([t.nbytes for t in plan.tensors]) - np.sum([t.nbytes for t in zeros]) == 2 * 7_200_018_432
