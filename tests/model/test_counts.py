"""Published models by name: parameter counts against the published numbers, and the axis names of every parameter."""

import contextlib
import math

import jax
import jax.numpy as jnp
import pytest

import tele_jax as tele
from tele_jax.axes import ParamSpec, flatten
from tele_jax.errors import UserError
from tests import reference

NAMES = [
    *("tele_flm_proxy", "tele_flm_52b", "tele_flm_52b_instruct", "tele_flm_102b", "tele_flm_1t"),
    *("telechat_1b", "telechat_3b", "telechat_7b", "telechat_12b", "telechat_52b"),
]

TINY = dict(num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=10, mlp_dim=37, vocab_size=61)


def kernel_specs(spec):
    """Specs of the leaves that are neither the embedding nor the head."""
    return {name: leaf for name, leaf in spec.items() if name not in ("embed.table", "lm_head.kernel")}


@pytest.mark.parametrize(
    "name, rows, billions, digits",
    [
        ("tele_flm_52b", 80_000, 52.818, 3),
        ("tele_flm_102b", 80_000, 102.20, 2),
        ("tele_flm_1t", 80_000, 1083.735, 3),
        ("tele_flm_proxy", 81_920, 0.283, 3),
        ("tele_flm_52b", 81_920, 52.85, 2),
    ],
)
def test_tele_flm_has_the_published_size(name, rows, billions, digits):
    """arXiv 2404.16645 and 2407.02783; by the formula with 80,000 rows, as printed there with 81,920."""
    cfg = tele.get_model(name).replace(vocab_size=80_000, padded_vocab_size=rows)
    assert round(tele.count_params(cfg) / 1e9, digits) == billions


def test_telechat_has_the_published_size():
    """arXiv 2401.03804 and the sizes of the released checkpoints."""
    assert tele.count_params(tele.get_model("telechat_7b")) == 7_200_018_432
    assert tele.count_params(tele.get_model("telechat_12b")) == 12_386_432_000
    # In bytes of bfloat16; the released files hold one constant `attn.masked_bias` a layer beside the parameters.
    telechat_52b = tele.get_model("telechat_52b")
    assert 2 * (tele.count_params(telechat_52b) + telechat_52b.num_layers) == 105_665_020_032
    without_embedding = kernel_specs(flatten(tele.spec(tele.get_model("telechat_3b"))))
    assert round(sum(leaf.size for leaf in without_embedding.values()) / 1e9, 2) == 3.05


# layers, embed, heads, head_dim, mlp; as published (docs/facts.md).
PUBLISHED_SIZES = {
    "tele_flm_proxy": (64, 512, 4, 128, 1_344),
    "tele_flm_52b": (64, 8_192, 64, 128, 21_824),
    "tele_flm_102b": (80, 10_240, 80, 128, 27_264),
    "tele_flm_1t": (140, 20_480, 160, 128, 98_304),
    "telechat_1b": (16, 2_048, 32, 64, 5_460),
    "telechat_3b": (14, 4_096, 16, 256, 12_288),
    "telechat_7b": (30, 4_096, 32, 128, 12_288),
    "telechat_12b": (38, 5_120, 32, 160, 12_288),
    "telechat_52b": (64, 8_192, 64, 128, 21_824),
    "tele_flm_52b_instruct": (64, 8_192, 64, 128, 21_824),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_named_model_has_the_published_shape(name):
    cfg = tele.get_model(name)
    assert (cfg.num_layers, cfg.embed_dim, cfg.num_heads, cfg.head_dim, cfg.mlp_dim) == PUBLISHED_SIZES[name]
    assert cfg.num_kv_heads == cfg.num_heads
    assert cfg.rms_eps == 1e-5 and cfg.rope.theta == 10_000.0
    is_telechat = name in ("telechat_1b", "telechat_3b", "telechat_7b", "telechat_12b")
    assert cfg.output_biases == is_telechat
    assert not cfg.embed_norm
    assert tele.count_params(cfg) == reference.init_count(cfg)


@pytest.mark.parametrize(
    "name, multiplier", [("tele_flm_52b", 1 / 32), ("telechat_52b", 1 / 32), ("tele_flm_1t", 1 / 40)]
)
def test_logits_have_the_released_multiplier(name, multiplier):
    assert tele.get_model(name).logit_mult == pytest.approx(multiplier, rel=1e-12)


@pytest.mark.parametrize(
    "name, length, base, factor",
    [
        ("telechat_7b", 1, 30_527.7, 1.0),
        ("telechat_7b", 8_192, 30_527.7, 1.0),
        ("telechat_12b", 8_192, 10_000.0, 1.0),
        ("telechat_12b", 16_384, 10_000.0 * 3 ** (160 / 158), 1 + 0.1 * math.log(2)),
        ("telechat_52b", 4_096, 10_000.0, 1.0),
        ("tele_flm_52b", 4_096, 10_000.0, 1.0),
    ],
)
def test_the_rotary_base_is_the_released_one(name, length, base, factor):
    cfg = tele.get_model(name)
    assert cfg.rope_length_factors(length) == pytest.approx((base, factor), rel=1e-5)
    assert reference.rope_base_and_factor(cfg, length) == pytest.approx((base, factor), rel=1e-5)


def test_a_spec_allocates_nothing():
    before = len(jax.live_arrays())
    spec = flatten(tele.spec(tele.get_model("tele_flm_1t")))  # 4 TB in float32: with arrays this would not return
    assert all(isinstance(leaf, ParamSpec) for leaf in spec.values())
    assert sum(leaf.size for leaf in spec.values()) > 1e12
    assert len(jax.live_arrays()) <= before


# Name: (stack, inputs, outputs) of every parameter, as section 1 of the design has them.
PER_LAYER = ("layers",)
AXES = {
    "embed.table": ((), ("vocab",), ("embed",)),
    "layers.attn_norm.scale": (PER_LAYER, ("embed",), ()),
    "layers.attn.q": (PER_LAYER, ("embed",), ("heads", "head_dim")),
    "layers.attn.k": (PER_LAYER, ("embed",), ("kv_heads", "head_dim")),
    "layers.attn.v": (PER_LAYER, ("embed",), ("kv_heads", "head_dim")),
    "layers.attn.o": (PER_LAYER, ("heads", "head_dim"), ("embed",)),
    "layers.attn.o_bias": (PER_LAYER, (), ("embed",)),
    "layers.mlp_norm.scale": (PER_LAYER, ("embed",), ()),
    "layers.mlp.gate": (PER_LAYER, ("embed",), ("mlp",)),
    "layers.mlp.up": (PER_LAYER, ("embed",), ("mlp",)),
    "layers.mlp.down": (PER_LAYER, ("mlp",), ("embed",)),
    "layers.mlp.down_bias": (PER_LAYER, (), ("embed",)),
    "final_norm.scale": ((), ("embed",), ()),
    "lm_head.kernel": ((), ("embed",), ("vocab",)),
    "embed_norm.scale": ((), ("embed",), ("embed",)),
}
OPTIONAL = {"layers.attn.o_bias", "layers.mlp.down_bias", "embed_norm.scale"}


def test_every_parameter_has_the_axes_of_the_design():
    spec = flatten(tele.spec(tele.ModelConfig(**TINY, output_biases=True, embed_norm=True)))
    assert {name: (leaf.stack, leaf.inputs, leaf.outputs) for name, leaf in spec.items()} == AXES


@pytest.mark.parametrize(
    "options, absent",
    [
        ({}, OPTIONAL),
        ({"tie_embeddings": True}, OPTIONAL | {"lm_head.kernel"}),
        ({"output_biases": True}, {"embed_norm.scale"}),
        ({"embed_norm": True, "padded_vocab_size": 64}, {"layers.attn.o_bias", "layers.mlp.down_bias"}),
    ],
)
def test_parameters_exist_as_the_config_says(options, absent):
    cfg = tele.ModelConfig(**TINY, **options)
    spec = flatten(tele.spec(cfg))
    assert spec.keys() == AXES.keys() - absent
    assert {name: leaf.shape for name, leaf in spec.items()} == reference.shapes(cfg)
    assert tele.count_params(cfg) == reference.init_count(cfg)


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32", "float64"])
def test_a_spec_has_the_dtype_of_the_config_whatever_was_asked_before(param_dtype):
    cfg = tele.ModelConfig(**TINY, param_dtype=param_dtype)
    with contextlib.suppress(UserError):  # 64 bits are off: float64 may be refused, but nothing wrong may stay behind
        tele.spec(cfg)
    with jax.enable_x64(True):
        spec = flatten(tele.spec(cfg))
    assert {str(jnp.dtype(leaf.dtype)) for leaf in spec.values()} == {param_dtype}


def test_initial_values_are_as_the_roles_say():
    """Scales are 1, biases 0, the others truncated normal, matrix-like ones with their variance divided by r = 4."""
    cfg = tele.ModelConfig(**TINY, output_biases=True, embed_norm=True, mup_base_width=6, init_std=0.02)
    params, spec = flatten(tele.init(cfg, jax.random.key(0))), flatten(tele.spec(cfg))
    assert {n: (p.shape, p.dtype) for n, p in params.items()} == {n: (s.shape, s.dtype) for n, s in spec.items()}
    for name, leaf in params.items():
        if name.endswith("scale"):
            assert (leaf == 1.0).all(), name
        elif name.endswith("bias"):
            assert (leaf == 0.0).all(), name
        else:
            std = 0.02 if name in ("embed.table", "lm_head.kernel") else 0.02 / 2
            assert float(jnp.std(leaf)) == pytest.approx(std, rel=0.1), name
            assert float(jnp.abs(leaf).max()) < 2.3 * std, name
    assert (params["layers.attn.q"][0] != params["layers.attn.q"][1]).any()
