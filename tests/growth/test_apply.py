"""Growth keeps the function: hundreds of random growths in float64, some compiled and sharded ones; and the way back.

The functions before and after are computed by tests/reference.py, which knows nothing of growth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten, unflatten
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference
from tests.growth import oracle
from tests.growth.strategies import Growth, growths, without_compiling

SMALL = dict(num_layers=2, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=10, vocab_size=16)


def params_of(case: Growth, dtype=np.float64):
    params = reference.random_params(case.src, np.random.default_rng(case.params_seed), 1.0)
    params["embed"]["table"] *= case.embedding_scale
    return jax.tree.map(lambda x: x.astype(dtype), params)


def tokens_of(cfg, length=5):
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (2, length))


def closed_masks(plan):
    return {axis: np.where(m.fresh, 0.0, 1.0) for axis, m in plan.maps.items()} if plan.masked else None


def relative_difference(a, b):
    return np.abs(a - b).max() / np.abs(a).max()


def same_bits(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        left, right = np.asarray(a[name]), np.asarray(b[name])
        assert left.dtype == right.dtype, name
        assert left.tobytes() == right.tobytes(), name


def grows_without_change(case: Growth):
    """One growth: made as the plan says, to the bit, and the same logits to 1e-12 of the largest."""
    params, tokens = params_of(case), tokens_of(case.src)
    plan = growth.plan(case.src, case.dst, **case.kwargs)
    big = growth.apply(plan, params)
    same_bits(big, oracle.grow(plan, params))
    before = reference.forward(case.src, params, tokens)
    after = reference.forward(plan.dst_cfg, big, tokens, masks=closed_masks(plan))
    assert relative_difference(before, after[..., : case.src.vocab_size]) <= 1e-12


@pytest.mark.parametrize("policy", ["exact", "msg", "copy"])
def test_any_growth_keeps_the_function(policy):
    @settings(max_examples=250)
    @given(growths(policy=policy))
    def check(case):
        grows_without_change(case)

    with without_compiling():
        check()


RATIOS = {
    "embed_alone": dict(embed_dim=13),
    "mlp_alone": dict(mlp_dim=17),
    "heads_alone_inside_groups": dict(num_heads=6),
    "heads_alone_new_groups": dict(num_heads=6, num_kv_heads=3),
    "heads_alone_split_to_multi_head": dict(num_heads=4, num_kv_heads=4),
    "heads_alone_split_and_grown": dict(num_heads=7, num_kv_heads=7),
    "layers_alone": dict(num_layers=5),
    "multiplier_alone": dict(output_mult=3.0, input_mult=0.3),
    "mup_width_alone": dict(mup_base_width=4),
    "vocabulary_alone": dict(vocab_size=21, padded_vocab_size=24),
    "padding_alone": dict(padded_vocab_size=24),
    "all": dict(
        vocab_size=19,
        embed_dim=13,
        mlp_dim=17,
        num_heads=9,
        num_kv_heads=3,
        num_layers=5,
        output_mult=3.0,
        mup_base_width=4,
    ),
}


@pytest.mark.parametrize("policy", ["exact", "msg", "copy"])
@pytest.mark.parametrize("axes", RATIOS)
def test_each_axis_alone_by_an_awkward_ratio(policy, axes):
    src = tele.ModelConfig(**SMALL, dtype="float64", param_dtype="float64", output_biases=True, rms_eps=1e-3)
    with without_compiling():
        grows_without_change(Growth(src, src.replace(**RATIOS[axes]), {"policy": policy}, 1e-2, 0))


@pytest.mark.parametrize("epsilon", ["scale", "keep"])
@pytest.mark.parametrize("embedding_scale", [1e-1, 1e-3, 1e-5])
def test_small_activations_keep_the_function_where_epsilon_matters(epsilon, embedding_scale):
    src = tele.ModelConfig(**SMALL, dtype="float64", param_dtype="float64")
    case = Growth(src, src.replace(embed_dim=21), {"epsilon": epsilon}, embedding_scale, 0)
    with without_compiling():
        grows_without_change(case)
        plan = growth.plan(src, case.dst, **case.kwargs)
        assert plan.dst_cfg.rms_eps == (src.rms_eps if epsilon == "keep" else pytest.approx(1e-5 * 8 / 21, rel=1e-15))
        # The check can fail: the epsilon of the other way is seen.
        wrong = plan.dst_cfg.replace(rms_eps=1e-5 * 8 / 21 if epsilon == "keep" else src.rms_eps)
        params = params_of(case)
        before = reference.forward(src, params, tokens_of(src))
        after = reference.forward(wrong, growth.apply(plan, params), tokens_of(src))
    assert relative_difference(before, after) > 1e-7


COMPILED = {
    "exact_all": (dict(num_layers=3, embed_dim=11, num_heads=6, mlp_dim=13), dict(output_biases=True), {}),
    "exact_keep": (dict(embed_dim=13, num_layers=3, mlp_dim=11), dict(embed_norm=True), dict(epsilon="keep")),
    "exact_tied_small_embedding": (dict(embed_dim=11), dict(tie_embeddings=True, mup_base_width=4), {}),
    "exact_split_to_multi_head": (dict(num_heads=5, num_kv_heads=5), {}, {}),
    "exact_multipliers": (dict(embed_dim=11, output_mult=0.3, input_mult=5.0), dict(mup_base_width=4), {}),
    "exact_residual_mult": (dict(embed_dim=11, num_layers=3), dict(residual_mult=0.3), {}),
    "msg_all": (dict(num_layers=3, embed_dim=11, num_heads=6, mlp_dim=13), dict(output_biases=True), {}),
    "msg_tied": (dict(embed_dim=13, num_layers=3), dict(tie_embeddings=True, embed_norm=True), {}),
    "msg_new_groups": (dict(num_heads=9, num_kv_heads=3, output_mult=2.0), {}, {}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_the_decoder_in_float32_keeps_its_logits(name):
    changes, options, kwargs = COMPILED[name]
    src = tele.ModelConfig(**SMALL, **options, dtype="float32", remat="none")
    scale = 1e-3 if "small" in name else 1.0
    case = Growth(src, src.replace(**changes), dict(policy=name.split("_")[0], **kwargs), scale, 0)
    params, tokens = params_of(case, np.float32), jnp.asarray(tokens_of(src))
    with without_compiling():
        plan = growth.plan(src, case.dst, **case.kwargs)
        big = growth.apply(plan, params)
    masks = growth.MaskSchedule(plan)(0)
    assert (masks is not None) == plan.masked
    forward = jax.jit(tele.forward, static_argnums=0)
    before = np.asarray(forward(src, params, tokens), np.float64)
    after = np.asarray(forward(plan.dst_cfg, big, tokens, masks=masks), np.float64)
    assert relative_difference(before, after) <= 2e-5


def test_msg_behind_open_masks_is_another_function():
    """So that the tests above are not passed by a growth that adds nothing."""
    src = tele.ModelConfig(**SMALL, dtype="float64", param_dtype="float64")
    case = Growth(src, src.replace(num_layers=3, embed_dim=11, num_heads=6, mlp_dim=13), {"policy": "msg"}, 1.0, 0)
    with without_compiling():
        plan = growth.plan(src, case.dst, **case.kwargs)
        big = growth.apply(plan, params_of(case))
    tokens = tokens_of(src)
    before, after = reference.forward(src, params_of(case), tokens), reference.forward(plan.dst_cfg, big, tokens)
    assert relative_difference(before, after) > 1e-3


# ---- The library as it runs: eager and compiled, on one device and on eight ----


def _random_tree(cfg):
    params = reference.random_params(cfg, np.random.default_rng(1), 1.0)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32).astype(cfg.param_dtype), params)


def test_compiled_float64_growth_is_what_the_plan_says_to_the_bit(x64):
    src = tele.ModelConfig(**SMALL, dtype="float64", param_dtype="float64", output_biases=True)
    plan = growth.plan(src, src.replace(embed_dim=11, num_heads=9, num_kv_heads=3, num_layers=3, output_mult=3.0))
    params = reference.random_params(src, np.random.default_rng(1), 1.0)
    same_bits(jax.jit(lambda p: growth.apply(plan, p))(params), oracle.grow(plan, params))


@pytest.mark.parametrize(
    ("dtype", "policy", "src_mesh", "dst_mesh"),
    [
        ("float32", "exact", MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)),
        ("bfloat16", "msg", MeshConfig(data=4, tensor=2), MeshConfig(fsdp=4, tensor=2)),
    ],
)
def test_growth_on_eight_devices_gives_the_bits_of_one(dtype, policy, src_mesh, dst_mesh):
    src = tele.ModelConfig(**SMALL, param_dtype=dtype)
    dst = src.replace(embed_dim=12, num_heads=6, mlp_dim=14, num_layers=3, output_mult=3.0)
    plan = growth.plan(src, dst, policy=policy, seed=5)
    params = _random_tree(src)
    sharded = jax.device_put(params, param_shardings(tele.spec(src), make_mesh(src_mesh)))
    out = param_shardings(tele.spec(plan.dst_cfg), make_mesh(dst_mesh))
    big = jax.jit(lambda p: growth.apply(plan, p), out_shardings=out)(sharded)
    for name, leaf in flatten(big).items():
        assert leaf.sharding == flatten(out)[name]
    assert len({shard.device for shard in flatten(big)["layers.mlp.gate"].addressable_shards}) == 8
    same_bits(big, oracle.grow(plan, params))
    if dtype == "float32":
        same_bits(big, growth.apply(plan, params))  # eagerly, on one device


def test_growth_is_compiled_without_large_constants():
    """Fresh values come from counters made on the devices: what a program holds must not grow with the model."""
    src = tele.ModelConfig(**SMALL | dict(embed_dim=256, num_heads=8, num_kv_heads=8, head_dim=16))
    plan = growth.plan(src, src.replace(embed_dim=320, num_heads=10, num_kv_heads=10))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), tele.spec(src))
    program = jax.jit(lambda p: growth.apply(plan, p)).lower(shapes).as_text()
    assert max(len(line) for line in program.splitlines()) < 20_000


# ---- The way back ----


def ulps(a, b):
    """How many floats apart two arrays of one dtype are."""
    a, b = np.asarray(a), np.asarray(b)
    kind = {2: np.int16, 4: np.int32, 8: np.int64}[a.dtype.itemsize]
    a, b = a.view(kind).astype(object), b.view(kind).astype(object)
    low = -(2 ** (8 * np.dtype(kind).itemsize - 1))
    ordered = [np.where(x < 0, low - x, x) for x in (a, b)]
    return int(np.max(np.abs(ordered[0] - ordered[1])))


def _undoes(dtype, allowed):
    @settings(phases=[Phase.generate], derandomize=True)
    @given(growths(dtype=dtype))
    def check(case):
        params = params_of(case, dtype)
        plan = growth.plan(case.src, case.dst, **case.kwargs)
        back = flatten(growth.shrink(plan, growth.apply(plan, params)))
        for name, value in flatten(params).items():
            assert back[name].dtype == value.dtype
            assert ulps(value, back[name]) <= (0 if plan.leaves[name].coefficient == 1 else allowed), name

    with without_compiling():
        check()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shrinking_undoes_growth_to_two_ulps_and_exactly_where_nothing_was_scaled(dtype):
    _undoes(dtype, allowed=2)


def test_shrinking_undoes_growth_to_one_ulp():
    _undoes("float32", allowed=1)


def test_shrinking_ignores_what_became_of_the_new_parts():
    src = tele.ModelConfig(**SMALL, dtype="float64", param_dtype="float64", output_biases=True)
    with without_compiling():
        plan = growth.plan(src, src.replace(embed_dim=11, num_heads=6, mlp_dim=13, num_layers=3), layers=[0, 0, 1])
        params = reference.random_params(src, np.random.default_rng(1), 1.0)
        big = flatten(growth.apply(plan, params))
        noisy = {name: np.where(old, big[name], np.nan) for name, old in oracle.old(plan).items()}
        back = flatten(growth.shrink(plan, unflatten(noisy)))
    for name, value in flatten(params).items():
        np.testing.assert_allclose(back[name], value, rtol=1e-15)


@pytest.mark.parametrize(
    ("policy", "layers", "ids"),
    [("stack", "uniform", [0, 1, 2, 0, 1]), ("interleave", [0, 0, 1, 1, 2], [0, 0, 1, 1, 2])],
)
def test_copies_that_take_part_at_once_are_copies_of_every_leaf(policy, layers, ids):
    src = tele.ModelConfig(**SMALL).replace(num_layers=3, param_dtype="float64")
    params = reference.random_params(src, np.random.default_rng(0), 1.0)
    with without_compiling():
        plan = growth.plan(src, src.replace(num_layers=5), policy=policy, layers=layers)
        grown = growth.apply(plan, params)
    assert not plan.preserving
    taken = {name: np.asarray(x)[ids] if name.startswith("layers.") else x for name, x in flatten(params).items()}
    same_bits(grown, unflatten(taken))


# ---- Bad input ----


def _wrong(leaves, name, value):
    return unflatten({**leaves, name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaves: leaves.pop("lm_head.kernel"), r"lm_head\.kernel: missing"),
        (
            lambda leaves: leaves.update({"layers.attn.o_bias": np.zeros((2, 8), np.float32)}),
            r"layers\.attn\.o_bias: not a parameter of this model",
        ),
        (
            lambda leaves: leaves.update({"layers.attn.q": np.zeros((2, 8, 3, 4), np.float32)}),
            r"layers\.attn\.q: float32\[2, 8, 3, 4\], expected float32\[2, 8, 4, 4\]",
        ),
        (
            lambda leaves: leaves.update({"final_norm.scale": np.zeros(8, np.float16)}),
            r"final_norm\.scale: float16\[8\], expected float32\[8\]",
        ),
        (
            lambda leaves: [leaves.pop("embed.table"), leaves.update({"layers.mlp.up": np.zeros((2, 8), np.float32)})],
            r"embed\.table: missing; layers\.mlp\.up: float32\[2, 8\], expected float32\[2, 8, 10\]",
        ),
    ],
)
@pytest.mark.parametrize("function", ["apply", "shrink"])
def test_a_tree_that_does_not_fit_is_refused_and_every_wrong_leaf_named(function, change, message):
    src = tele.ModelConfig(**SMALL)
    plan = growth.plan(src, src)
    leaves = flatten(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tele.spec(src)))
    change(leaves)
    with pytest.raises(tele.UserError, match=message):
        getattr(growth, function)(plan, unflatten(leaves))


def test_growing_what_is_already_grown_is_refused():
    src = tele.ModelConfig(**SMALL)
    plan = growth.plan(src, src.replace(mlp_dim=13))
    big = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tele.spec(plan.dst_cfg))
    with pytest.raises(
        tele.UserError, match=r"layers\.mlp\.down: .*\[2, 13, 8\], expected .*\[2, 10, 8\].*mlp\.gate.*mlp\.up"
    ):
        growth.apply(plan, big)


def test_nothing_grown_is_the_identity():
    @settings(max_examples=50)
    @given(growths(), st.sampled_from(["exact", "msg", "copy"]))
    def check(case, policy):
        src = case.src
        params = reference.random_params(src, np.random.default_rng(0), 1.0)
        same_bits(growth.apply(growth.plan(src, src, policy=policy), params), params)

    with without_compiling():
        check()
