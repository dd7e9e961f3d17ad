"""Any model of ours as a plain Llama: run by transformers, with nothing of ours."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import convert
from tele_jax.axes import flatten, unflatten
from tele_jax.errors import UserError
from tele_jax.model import decoder, heads
from tests import reference

SMALL = dict(
    num_layers=2, embed_dim=24, num_heads=4, head_dim=6, mlp_dim=40, vocab_size=50, max_seq_len=64, dtype="float32"
)
NTK = tele.Ntk(original_length=16, trained_length=32)
CASES = {
    "plain": {},
    "mup": dict(input_mult=2.0, output_mult=0.5, mup_base_width=8),
    "factors_that_round": dict(input_mult=1.7, output_mult=0.9, mup_base_width=5),
    "tied_mup": dict(tie_embeddings=True, input_mult=3.0, output_mult=0.7, mup_base_width=8),
    "tied_equal_multipliers": dict(tie_embeddings=True, input_mult=2.0, output_mult=2.0),
    "padded": dict(padded_vocab_size=64, output_mult=0.25),
    "biases": dict(output_biases=True),
    "grouped_wide_heads": dict(num_kv_heads=2, head_dim=10, rope=tele.Rope(theta=700.0), rms_eps=1e-3),
    "ntk_up_to_its_trained_length": dict(output_biases=True, rope=tele.Rope(ntk=NTK), max_seq_len=32),
}


def random_params(cfg):
    values = flatten(reference.random_params(cfg, np.random.default_rng(5), 1.0))
    return unflatten({name: jnp.asarray(value, cfg.param_dtype) for name, value in values.items()})


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it_without_missing_or_unexpected_keys_and_gives_the_same_logits(name, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tele_jax[hf]'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'tele_jax[hf]'")
    torch.set_num_threads(1)
    cfg = tele.ModelConfig(**{**SMALL, **CASES[name]})
    params = random_params(cfg)
    convert.save_hf(tmp_path / "out", cfg, params, format="llama")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(cfg.rope_length_factors(1)[0])
    tokens = np.random.default_rng(6).integers(0, 50, (2, 31), np.int32)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens).long()).logits.numpy()
    expected = reference.forward(cfg, params, tokens)
    assert found.shape == expected.shape == (2, 31, 50)
    assert np.abs(expected).max() > 0.05
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["plain", "factors_that_round", "tied_mup"])
def test_transformers_reads_a_reward_model_as_a_classifier_and_gives_the_same_scores(name, tmp_path):
    """Its pad id is the last token of the text: transformers reads the score at the last token that is no padding."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tele_jax[hf]'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'tele_jax[hf]'")
    cfg = tele.ModelConfig(**{**SMALL, **CASES[name]}, scalar_head=True)
    params = random_params(cfg)
    convert.save_hf(tmp_path / "out", cfg, params, format="llama")
    model, info = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, pad_token_id=0
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tokens = np.random.default_rng(6).integers(1, 50, (2, 11), np.int32)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens).long()).logits.numpy()[:, 0]
    scores = np.asarray(heads.scalar_of(cfg, params, decoder.hidden(cfg, params, tokens)))[:, -1]
    assert np.abs(scores).max() > 0.05 and np.abs(found - scores).max() < 1e-5
    again, read = convert.load_hf(tmp_path / "out")
    assert again.scalar_head
    same = np.asarray(heads.scalar_of(again, read, decoder.hidden(again, read, tokens)))[:, -1]
    assert np.abs(same - scores).max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_read_again_it_is_the_same_function(name, tmp_path):
    cfg = tele.ModelConfig(**{**SMALL, **CASES[name]})
    params = random_params(cfg)
    convert.save_hf(tmp_path / "out", cfg, params, format="llama")
    again, read = convert.load_hf(tmp_path / "out")
    assert (again.input_mult, again.logit_mult, again.padded_vocab_size) == (1.0, 1.0, 50)
    tokens = np.random.default_rng(7).integers(0, 50, (1, 9), np.int32)
    found, expected = reference.forward(again, read, tokens), reference.forward(cfg, params, tokens)
    assert np.abs(found - expected).max() < 1e-5


def test_only_the_table_and_the_last_norm_change(tmp_path):
    cfg = tele.ModelConfig(**SMALL, **CASES["mup"])
    params = random_params(cfg)
    done = convert.save_hf(tmp_path / "out", cfg, params, format="llama")
    assert done.notes == [
        "folded: embed.table is multiplied by 2",
        f"folded: final_norm.scale is multiplied by {0.5 * 8 / 24:g}",
    ]
    _, read = convert.load_hf(tmp_path / "out")
    before, after = flatten(params), flatten(read)
    changed = {name for name in before if np.asarray(before[name]).tobytes() != np.asarray(after[name]).tobytes()}
    assert changed == {"embed.table", "final_norm.scale"}


def test_powers_of_two_fold_exactly_in_bfloat16_and_others_are_refused_until_a_dtype_is_named(tmp_path):
    cfg = tele.ModelConfig(**{**SMALL, "param_dtype": "bfloat16", "output_mult": 1 / 32})
    params = random_params(cfg)
    convert.save_hf(tmp_path / "exact", cfg, params, format="llama")
    _, read = convert.load_hf(tmp_path / "exact")
    scale = lambda tree: np.asarray(tree["final_norm"]["scale"]).astype(np.float64)  # noqa: E731
    assert (scale(read) == scale(params) / 32).all()

    cfg = cfg.replace(output_mult=1 / 40)
    with pytest.raises(
        UserError, match=r"multiplying final_norm.scale by 0.025 would round in bfloat16; --dtype float32"
    ):
        convert.save_hf(tmp_path / "no", cfg, params, format="llama")
    assert not (tmp_path / "no").exists()
    convert.save_hf(tmp_path / "rounded", cfg, params, format="llama", dtype="bfloat16")
    _, read = convert.load_hf(tmp_path / "rounded")
    assert np.abs(scale(read) / scale(params) * 40 - 1).max() < 2**-8
    convert.save_hf(tmp_path / "wide", cfg, params, format="llama", dtype="float32")
    _, read = convert.load_hf(tmp_path / "wide")
    assert np.abs(scale(read) / scale(params) * 40 - 1).max() < 1e-6


LONG = r"cannot express TeleChat's NTK scaling.*from 32 tokens on.*max_seq_len is 64; with --max-seq-len 32"


@pytest.mark.parametrize(
    "format, changes, message",
    [
        ("llama", dict(embed_norm=True), "has no norm after the embedding"),
        ("llama", dict(residual_mult=0.5), "has no factor on the residual branches"),
        ("llama", dict(rope=tele.Rope(ntk=NTK)), LONG),
        ("llama", dict(rope=tele.Rope(tables="float16")), "rotary tables rounded to float16"),
        ("tele_flm", dict(output_biases=True), "has no biases, as this model does .*; llama can hold it"),
        ("tele_flm", dict(head_dim=10), "4 heads of 10 are not embed_dim=24; llama can hold it"),
        ("tele_flm", dict(rope=tele.Rope(ntk=NTK)), LONG),
        ("telechat", {}, "has biases on dense and down_proj, this model has none"),
        ("telechat", dict(output_biases=True), "theta 10,000 and NTK scaling with an attention slope of 0.1"),
        ("telechat_52b", dict(num_kv_heads=2), "has no grouped queries"),
        ("telechat_52b", dict(tie_embeddings=True), "has no tied embedding"),
        ("telechat_52b", dict(rope=tele.Rope(ntk=NTK)), "beyond 4,096 tokens its rotary base is multiplied by alpha"),
        ("gpt2", {}, "'gpt2': not one of tele_flm, telechat, telechat_52b, llama"),
    ],
)
def test_what_a_format_cannot_express_is_refused_with_the_reason(format, changes, message, tmp_path):
    cfg = tele.ModelConfig(**{**SMALL, **changes})
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tele.spec(cfg))
    with pytest.raises(UserError, match=message):
        convert.save_hf(tmp_path / "out", cfg, params, format=format)
    assert not list(tmp_path.iterdir())


def test_with_a_shorter_context_ntk_scaling_is_a_constant_base(tmp_path):
    cfg = tele.ModelConfig(**{**SMALL, "output_biases": True, "rope": tele.Rope(ntk=NTK)})
    params = random_params(cfg)
    done = convert.save_hf(tmp_path / "out", cfg, params, format="llama", max_seq_len=32)
    base = 10_000 * 3 ** (6 / 4)  # alpha of 32 tokens, twice the 16
    assert done.notes == [
        f"rotary base {base:,.1f}, exact up to 32 tokens; beyond 32 this model changes it, which llama cannot"
    ]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert math.isclose(written["rope_theta"], base) and written["max_position_embeddings"] == 32


def test_params_of_another_model_are_refused_leaf_by_leaf(tmp_path):
    cfg = tele.ModelConfig(**SMALL)
    params = random_params(cfg.replace(mlp_dim=41))
    with pytest.raises(UserError, match=r"layers.mlp.down: given float32\[2,41,24\], expected float32\[2,40,24\]"):
        convert.save_hf(tmp_path / "out", cfg, params, format="llama")
