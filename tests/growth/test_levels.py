"""The two levels of verification that need no more memory than a block: structure, and function part by part.

What is right passes, in every dtype; each thing that can be wrong is found and named; the formulas in layerwise.py are
those of tests/reference.py and of the decoder.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint, growth, surgery
from tele_jax.axes import flatten, unflatten
from tele_jax.growth.layers import distances
from tele_jax.growth.verify import entries
from tele_jax.growth.verify import parts as layerwise
from tele_jax.model import decoder
from tests import reference
from tests.growth import strategies
from tests.growth.strategies import growths, without_compiling
from tests.growth.test_apply import params_of
from tests.growth.test_compose import pairs
from tests.growth.test_verify import both_sides_random_in_embed, configs, heads_appended_across_groups, with_leaves

POLICIES = ("exact", "msg", "copy", "stack", "random")


# ---- the formulas ------------------------------------------------------------------------------------------------


def random_masks(cfg, rng):
    sizes = dict(embed=cfg.embed_dim, mlp=cfg.mlp_dim, heads=cfg.num_heads, layers=cfg.num_layers)
    return {axis: rng.uniform(0.1, 1, size) for axis, size in sizes.items() if rng.random() < 0.5}


def side_of(cfg, params, masks=None):
    return layerwise.Side(cfg, strategies.flat_spec(cfg), flatten(params), masks or {})


@settings(max_examples=40)
@given(
    strategies.sources(), st.sampled_from([None, tele.Ntk(8, 16, "ntk"), tele.Ntk(3, 4, "linear")]), st.integers(0, 99)
)
def test_states_and_logits_are_those_of_the_reference(src, ntk, seed):
    rng = np.random.default_rng(seed)
    cfg = src.replace(rope=tele.Rope(theta=100.0, ntk=ntk), head_dim=max(src.head_dim, 4))
    params, masks = reference.random_params(cfg, rng, 1.0), random_masks(cfg, rng)
    tokens = rng.integers(0, cfg.vocab_size, (2, 6))
    side = side_of(cfg, params, masks)
    *_, last = layerwise.states(side, tokens)
    expected = reference.forward(cfg, params, tokens, masks=masks)
    np.testing.assert_allclose(layerwise.logits(side, last), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


EVERYTHING = tele.ModelConfig(
    **dict(num_layers=3, embed_dim=6, num_heads=6, num_kv_heads=2, head_dim=4, mlp_dim=5, vocab_size=12),
    **dict(padded_vocab_size=14, output_biases=True, embed_norm=True, input_mult=1.5, mup_base_width=3, rms_eps=1e-3),
    **dict(rope=tele.Rope(theta=50.0, ntk=tele.Ntk(4, 6)), dtype="float64", param_dtype="float64", remat="none"),
)


@pytest.mark.parametrize("tied", [False, True])
def test_states_and_logits_are_those_of_the_decoder(x64, tied):
    cfg, rng = EVERYTHING.replace(tie_embeddings=tied), np.random.default_rng(0)
    params, tokens = reference.random_params(cfg, rng, 1.0), rng.integers(0, 12, (2, 7))
    side = side_of(cfg, params)
    states = np.stack(list(layerwise.states(side, tokens)))
    np.testing.assert_allclose(states, jax.jit(decoder.layer_states, static_argnums=0)(cfg, params, tokens), atol=1e-10)
    logits = jax.jit(tele.forward, static_argnums=0)(cfg, params, tokens)
    np.testing.assert_allclose(layerwise.logits(side, states[-1]), logits, atol=1e-10)


def test_distances_of_a_stored_model_are_those_of_one_in_memory(tmp_path):
    cfg = EVERYTHING.replace(dtype="float32", param_dtype="float32")
    params = jax.tree.map(np.float32, reference.random_params(cfg, np.random.default_rng(0), 1.0))
    checkpoint.save(tmp_path / "a", cfg, params)
    tokens = np.random.default_rng(1).integers(0, 12, (2, 9))
    for metric in ("cosine", "relative_l2", "angular"):
        stored = distances(cfg, checkpoint.open_lazy(tmp_path / "a").params, tokens, metric)
        assert stored == pytest.approx(distances(cfg, params, tokens, metric), rel=1e-12)
    assert stored == pytest.approx(distances(cfg, jax.tree.map(jnp.asarray, params), tokens, "angular"), rel=1e-4)


# ---- what is right passes ----------------------------------------------------------------------------------------


def passes(plan, params, big):
    report = growth.verify_stored(plan, params, big)
    assert not report.altered, report.problems
    assert list(report.parts) == ["embed", *(f"layers[{i}]" for i in range(plan.dst_cfg.num_layers)), "head"]
    if plan.preserving:
        assert max(report.parts.values()) <= report.parts_tolerance == 1e-11, report.parts
    assert report.ok and report.max_abs is None and report.dead is None
    return report


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_growth_passes_however_its_parameters_are_rounded(policy, dtype):
    """Also where large scores make of a rounded norm scale a difference of many times its rounding."""

    @settings(max_examples=12)
    @given(growths(policy=policy, dtype=dtype), st.sampled_from([0.1, 1.0, 10.0]))
    def check(case, scale):
        layers = {"layers": "uniform"} if policy in ("stack", "random") else {}
        plan = growth.plan(case.src, case.dst, **case.kwargs | layers)
        params = reference.random_params(case.src, np.random.default_rng(case.params_seed), scale)
        params["embed"]["table"] *= case.embedding_scale
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
        passes(plan, params, growth.apply(plan, params))

    with without_compiling():
        check()


@pytest.mark.parametrize("policies", [("exact", "exact"), ("msg", "msg"), ("copy", "exact")])
def test_composed_growths_pass(policies):
    @settings(max_examples=10)
    @given(pairs(policies))
    def check(pair):
        case, first, then = pair
        plan, params = growth.compose(first, then), params_of(case)
        passes(plan, params, growth.apply(plan, params))

    with without_compiling():
        check()


def test_three_composed_growths_in_bfloat16_pass():
    """A new norm scale of the first is rounded by both of the others."""
    with without_compiling():
        plan = growth.widen_embed(configs("bfloat16")[0], 11)
        for width in (13, 29):
            plan = growth.compose(plan, growth.widen_embed(plan.dst_cfg, width))
        params = reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        passes(plan, params, growth.apply(plan, params))


def test_numbers_so_small_that_their_product_is_flushed_to_zero_are_no_alteration():
    with without_compiling():
        plan = growth.plan(*configs("float32"))
        params = jax.tree.map(np.float32, reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0))
        params["final_norm"]["scale"][1] = 1.2e-38  # times sqrt(6/11): subnormal
        big = growth.apply(plan, params)
        big["final_norm"]["scale"][1] = 0.0
        passes(plan, params, big)


def test_only_some_layers_may_be_looked_at():
    with without_compiling():
        plan, params, big = grown()
        report = growth.verify_stored(plan, params, big, layers=[2, 0])
    assert list(report.parts) == ["embed", "layers[0]", "layers[2]", "head"] and report.ok


# ---- what is wrong is found --------------------------------------------------------------------------------------


def grown(dtype="float64", **how):
    """(plan, params, grown params as writable numpy) of a model that grows in all axes."""
    src, dst = configs(dtype)
    plan = growth.plan(src, dst.replace(mlp_dim=40, embed_dim=30), **how)
    params = reference.random_params(src, np.random.default_rng(0), 1.0)
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    return plan, params, jax.tree.map(np.array, growth.apply(plan, params))


def flip_a_bit(leaf):
    view = leaf.view({2: np.int16, 4: np.int32, 8: np.int64}[leaf.dtype.itemsize])
    view[(0,) * leaf.ndim] ^= 1


def one_ulp_of_a_scaled_norm_too_many(leaf):
    leaf[0, 0] += leaf[0, 0] * 5 * float(jnp.finfo(leaf.dtype).eps)


def put(value, *place):
    def change(leaf):
        leaf[place] = value

    return change


def times(factor, *place):
    def change(leaf):
        leaf[place] = (leaf[place].astype(np.float64) * factor).astype(leaf.dtype)

    return change


def flip_the_last_bit(leaf):
    view = leaf.view({2: np.int16, 4: np.int32, 8: np.int64}[leaf.dtype.itemsize])
    view[(-1,) * leaf.ndim] ^= 1


def two_units_alike(leaf):
    leaf[..., 17] = leaf[..., 16]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("layers.attn.q", flip_a_bit, r".* at \[0, 0, 0, 0\], from the source"),
        ("layers.mlp.down_bias", times(-1, 1, 2), r".* at \[1, 2\], from the source"),
        ("layers.attn_norm.scale", one_ulp_of_a_scaled_norm_too_many, r".* at \[0, 0\], from the source"),
        ("final_norm.scale", times((30 / 6) ** 0.5), r".* at \[0\], from the source"),
        ("final_norm.scale", put(0.0, 29), r"a new entry is 0 at \[29\], planned 1"),
        ("embed.table", put(2.0**-30, 3, 7), r"9\.31323e-10 at \[3, 7\], planned 0"),
        ("layers.mlp.down", put(-2.0, 1, 39, 0), r"-2 at \[1, 39, 0\], planned 0"),
        ("layers.mlp.up", put(np.nan, 2, 7, 9), r"nan at \[2, 7, 9\]"),
        ("layers.attn.o", put(np.inf, 0, 1, 1, 1), r"inf at \[0, 1, 1, 1\]"),
        ("layers.mlp.gate", times(1.3, ..., slice(5, None)), r"a new entry is .* at \[0, 0, 5\], planned"),
        ("layers.mlp.gate", times(0.0, ..., slice(5, None)), r"a new entry is -?0 at \[0, 0, 5\], planned"),
        ("layers.mlp.gate", times(-1, 1, 2, 30), r"a new entry is .* at \[1, 2, 30\], planned"),
        ("layers.mlp.gate", flip_the_last_bit, r"a new entry is .* at \[2, 29, 39\], planned"),
        ("layers.mlp.up", two_units_alike, r"a new entry is .* at \[0, 0, 17\], planned"),
        ("embed.table", flip_a_bit, r".* at \[0, 0\], from the source"),
    ],
)
def test_an_altered_leaf_is_found_and_said_where(name, change, problem, dtype):
    with without_compiling():
        plan, params, big = grown(dtype)
        change(flatten(big)[name])
        report = growth.verify_stored(plan, params, big)
    assert report.altered == (name,) and not report.ok
    (said,) = report.problems
    assert re.fullmatch(rf"{re.escape(name)}: {problem}.*", said), said


def test_the_sign_of_a_zero_is_a_bit_as_well():
    with without_compiling():
        plan, params, big = grown()
        params["layers"]["attn"]["q"][1, 2, 3, 1] = 0.0
        big = jax.tree.map(np.array, growth.apply(plan, params))
        assert growth.verify_stored(plan, params, big).ok
        place = np.flatnonzero(plan.maps["heads"].index == 3)[0]
        big["layers"]["attn"]["q"][np.flatnonzero(plan.maps["layers"].index == 1)[0], 2, place, 1] *= -1
        assert growth.verify_stored(plan, params, big).altered == ("layers.attn.q",)


def test_another_source_is_found():
    with without_compiling():
        plan, _, big = grown()
        other = reference.random_params(plan.src_cfg, np.random.default_rng(1), 1.0)
        assert set(growth.verify_stored(plan, other, big).altered) == set(plan.leaves)


def differing_parts(plan):
    """Parts of what a plan makes that differ from the source's; the structural level finds nothing wrong with it."""
    params = reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0)
    params["embed"]["table"] *= 0.1
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(plan.src_cfg.param_dtype)), params)
    report = growth.verify_stored(plan, params, growth.apply(plan, params))
    assert not report.altered and not report.ok
    name, difference = report.worst_part
    assert f"largest relative difference {difference:.3g} in {name}" in str(report)
    return {part for part, value in report.parts.items() if value > report.parts_tolerance}


LAYERS = {"layers[0]", "layers[2]"}  # layers[1] is a copy, and writes nothing


@pytest.mark.parametrize(
    ("mutate", "parts"),
    [
        (lambda plan: with_leaves(plan, **{"layers.mlp_norm.scale": dict(coefficient=1.0)}), LAYERS),
        (lambda plan: with_leaves(plan, **{"final_norm.scale": dict(coefficient=1.0)}), {"head"}),
        (lambda plan: with_leaves(plan, **{"lm_head.kernel": dict(coefficient=1.0)}), {"head"}),
        (lambda plan: plan.replace(dst_cfg=plan.dst_cfg.replace(rms_eps=1e-3)), {*LAYERS, "head"}),
        (heads_appended_across_groups, LAYERS),
        (both_sides_random_in_embed, {"embed"}),
        (lambda plan: with_leaves(plan, **{"layers.mlp.down": dict(zero=("layers", "mlp"))}), LAYERS),
        (lambda plan: with_leaves(plan, **{"layers.mlp.down": dict(zero=("layers", "embed"))}), LAYERS),
        (lambda plan: with_leaves(plan, **{"layers.attn.o": dict(zero=("embed", "heads"))}), {"layers[1]"}),
        (lambda plan: with_leaves(plan, **{"layers.mlp.down_bias": dict(zero=("embed",))}), {"layers[1]"}),
        (lambda plan: with_leaves(plan, **{"embed.table": dict(coefficient=1.001)}), {"embed"}),
    ],
    ids=[
        "mlp_norm",
        "final_norm",
        "multiplier",
        "epsilon",
        "groups",
        "random_in_embed",
        "channels",
        "mlp_units",
        "copied_layer",
        "copied_bias",
        "input_mult",
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_part_that_does_something_else_is_named(mutate, parts, dtype):
    with without_compiling():
        assert differing_parts(mutate(growth.plan(*configs(dtype), layers=[0, 0, 1]))) == parts


def test_what_is_stored_and_not_planned_shows_in_its_part_too():
    with without_compiling():
        plan, params, big = grown()
        big["layers"]["mlp_norm"]["scale"][1] *= (30 / 6) ** 0.5
        report = growth.verify_stored(plan, params, big)
    assert report.altered == ("layers.mlp_norm.scale",) and report.worst_part[0] == "layers[1]"
    assert report.worst_part[1] > 1e-2 > 1e-11 > max(v for k, v in report.parts.items() if k != "layers[1]")


def test_a_part_of_a_model_cannot_be_verified():
    cfg = configs()[0]
    with without_compiling(), pytest.raises(tele.UserError, match=r"the plan \(select\) leads to a part of a model"):
        growth.verify_stored(surgery.select(cfg, "embed.*"), {}, {})


def test_trees_that_do_not_fit_are_refused():
    with without_compiling():
        plan, params, big = grown()
        del big["lm_head"]
        with pytest.raises(tele.UserError, match=r"do not fit the config: lm_head\.kernel: missing"):
            growth.verify_stored(plan, params, big)
        with pytest.raises(tele.UserError, match=r"embed\.table: float32\[12, 6\], expected float64"):
            growth.verify_stored(plan, jax.tree.map(np.float32, params), big)


# ---- in blocks, and from disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [40, 1000])
@pytest.mark.parametrize("policy", ["exact", "msg", "copy"])
def test_the_report_does_not_depend_on_the_blocks(nbytes, policy, monkeypatch):
    src, dst = configs()
    with without_compiling():
        plan = growth.plan(src.replace(num_kv_heads=4), dst.replace(num_kv_heads=6), policy=policy)
        params = reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0)
        big = jax.tree.map(np.array, growth.apply(plan, params))
        big["layers"]["attn"]["v"][1, 4, 2, 3] = 7.0
        whole = growth.verify_stored(plan, params, big)
        monkeypatch.setattr(entries, "TILE_BYTES", nbytes)
        monkeypatch.setattr(layerwise, "BLOCK_BYTES", nbytes)
        parts = growth.verify_stored(plan, params, big)
    assert whole.altered == parts.altered == ("layers.attn.v",) and whole.problems == parts.problems
    assert parts.parts == pytest.approx(whole.parts, abs=1e-13)
    assert whole.worst_part[1] > 1e-3


@pytest.mark.parametrize(("policy", "how"), [("exact", dict(epsilon="keep")), ("msg", {}), ("copy", {})])
def test_checkpoints_are_verified_as_arrays_are(policy, how, tmp_path, monkeypatch):
    src, dst = configs("float32")
    plan = growth.plan(src.replace(num_kv_heads=4), dst.replace(num_kv_heads=6, output_mult=3.0), policy=policy, **how)
    params = jax.tree.map(np.float32, reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0))
    checkpoint.save(tmp_path / "src", plan.src_cfg, params)
    growth.stream(plan, tmp_path / "src", tmp_path / "dst", chunk_bytes=200, memory_gb=0.2)
    monkeypatch.setattr(entries, "TILE_BYTES", 150)
    old, new = (checkpoint.open_lazy(tmp_path / name) for name in ("src", "dst"))
    stored = growth.verify_stored(plan, old.params, new.params)
    monkeypatch.undo()
    big = checkpoint.load(tmp_path / "dst").params
    assert stored.ok and stored == growth.verify_stored(plan, params, jax.tree.map(np.asarray, big))
    wrong = flatten(jax.tree.map(np.array, big))
    wrong["layers.mlp.up"][0, 1, 2] *= 2
    checkpoint.save(tmp_path / "wrong", plan.dst_cfg, unflatten(wrong))
    stored = growth.verify_stored(plan, old.params, checkpoint.open_lazy(tmp_path / "wrong").params)
    assert stored == growth.verify_stored(plan, params, unflatten(wrong)) and stored.altered == ("layers.mlp.up",)


def test_only_the_rows_of_a_table_that_are_asked_for_are_read():
    """A table of the 1T model has 81,920 rows in chunks of 128 MiB: reading one a token would read it many times."""

    class Counted:
        def __init__(self, values):
            self.values, self.dtype, self.shape, self.reads = values, values.dtype, values.shape, 0

        def __getitem__(self, key):
            self.reads += self.values[key].size
            return self.values[key]

    cfg = EVERYTHING
    params = flatten(reference.random_params(cfg, np.random.default_rng(0), 1.0))
    table = params["embed.table"] = Counted(params["embed.table"])
    tokens = np.random.default_rng(1).integers(0, 12, 500)
    x = layerwise.embed(layerwise.Side(cfg, strategies.flat_spec(cfg), params), tokens)
    assert x.shape == (500, 6) and table.reads <= table.values.size
