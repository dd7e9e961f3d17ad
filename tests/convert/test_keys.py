"""Keys of config.json: what would make another model is refused by name, what changes nothing is not."""

import json

import pytest

import tele_jax as tele
from tele_jax import checkpoint, convert
from tele_jax.convert import configs, release
from tele_jax.convert.release import open_release
from tele_jax.errors import UserError
from tests.convert import releases
from tests.convert.test_published import CONFIGS
from tests.data.test_released_prompts import RELEASED


def read(format, **change):
    config, _ = releases.MAKERS[format]()
    return configs.read(configs.Keys(config | change, "config.json"), format)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("llama", {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
         "rope_scaling: rotary scaling 'yarn'"),
        ("llama", {"rope_parameters": YARN, "rope_scaling": {"type": "default"}}, "rope_parameters: rotary scaling"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
         "rope_theta is 500, rope_theta in rope_parameters is 9: two rotary bases"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "factor": 2.0}},
         "rope_parameters: factor is 2.0, which tele_jax does not know there"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor is 0.5"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
         "layer_types holds 'sliding_attention', but tele_jax has only full_attention"),
        ("llama", {"layer_types": ["full_attention"] * 2}, "layer_types describes 2 layers, but num_hidden"),
        ("llama", {"no_rope_layers": [1, 0, 1]}, r"no_rope_layers is \[1, 0, 1\], which tele_jax does not know"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is 8, which tele_jax does not know in format llama"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True, but tele_jax has only False"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True, but tele_jax has only False"),
        ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': .*, but tele_jax has only {}"),
        ("tele_flm", {"mup_attention_scale": 2.0}, "mup_attention_scale is 2.0, .* in format tele_flm"),
        ("telechat", {"n_inner": 96}, "n_inner is 96, which tele_jax does not know in format telechat"),
        ("telechat", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling is"),
        ("telechat_52b", {"rotary_use_xpos": True}, "rotary_use_xpos is True, but tele_jax has only False"),
        ("telechat_52b", {"scale_attn_weights": False}, "scale_attn_weights is False, but tele_jax has only True"),
        ("telechat_52b", {"activation_function": "gelu"}, "activation_function is 'gelu', but tele_jax has"),
        ("telechat_52b", {"offset_alibi": 100}, "offset_alibi is 100, .* in format telechat_52b"),
    ],
)  # fmt: skip
def test_a_key_that_may_mean_another_model_is_refused_by_name(format, change, message):
    with pytest.raises(UserError, match=f"config.json: {message}"):
        read(format, **change)


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("llama", {"attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False, "_name_or_path": "x"}),
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}}),  # SmolLM2
        ("llama", {"no_rope_layers": None, "is_encoder_decoder": False, "pruned_heads": {}, "do_sample": True}),
        ("llama", {"layer_types": ["full_attention"] * releases.L, "rope_scaling": None}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": {}}),
        ("llama", {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {"type": "default"}}),
        ("telechat", {"offset_alibi": 100, "skip_bias_add": True, "semi_causal": False}),
        ("telechat_52b", {"summary_type": "cls_index", "rotary_xpos_scale_base": 512, "rotary_use_xpos": False}),
    ],
)  # fmt: skip
def test_a_key_that_changes_nothing_does_not(format, change):
    assert read(format, **change) == read(format)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_configs_are_read(name):
    keys = configs.Keys(CONFIGS[name], "config.json")
    assert configs.read(keys, configs.detect(keys)).num_layers > 0


def test_what_describes_every_layer_follows_a_growth(tmp_path):
    config, tensors = releases.llama()
    config["layer_types"] = ["full_attention"] * releases.L
    src = releases.save(tmp_path / "release", config, tensors)
    convert.import_checkpoint(src, tmp_path / "ck")
    cfg = checkpoint.open_lazy(tmp_path / "ck").cfg
    plan = tele.growth.plan(cfg, cfg.replace(num_layers=5), policy="exact")
    tele.growth.stream(plan, tmp_path / "ck", tmp_path / "grown")
    convert.export_checkpoint(tmp_path / "grown", tmp_path / "out", format="llama")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_hidden_layers"], written["layer_types"]) == (5, ["full_attention"] * 5)
    assert open_release(tmp_path / "out").cfg.num_layers == 5


@pytest.mark.parametrize("name", ["telechat_7b", "telechat_12b", "telechat_52b", "telechat2"])
def test_the_released_files_are_read(name):
    """The files themselves: every key is known, and generation follows them."""
    if not (folder := RELEASED / name).is_dir():
        pytest.skip(f"the released files are not here: {name} in the folder of released files")
    keys = configs.read_json(folder)
    cfg = configs.read(keys, configs.detect(keys))
    found, notes = release.read_conventions(folder, keys)
    stated = json.loads((folder / "generation_config.json").read_text())
    assert cfg.vocab_size == keys.values["vocab_size"] and notes == []
    assert found == {
        "eos_token_ids": [stated["eos_token_id"]],
        "do_sample": False,
        "sampling": {name: stated[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")},
        "document_start": None,
    }
