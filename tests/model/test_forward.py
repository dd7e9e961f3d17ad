"""The decoder and its loss against the float64 numpy reference, and the properties that any decoder must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax.axes import flatten, unflatten
from tele_jax.config import Ntk, Rope
from tele_jax.model.loss import next_token_loss
from tests import reference

TOLERANCE = {"float64": 1e-10, "float32": 2e-4}  # largest absolute difference of logits, which are of order 1 to 10

# Sizes that nothing divides; every case below changes some of them.
BASE = dict(
    num_layers=3,
    embed_dim=24,
    num_heads=4,
    head_dim=8,
    mlp_dim=37,
    vocab_size=61,
    padded_vocab_size=64,
    max_seq_len=512,
)


def _ntk(**fields):
    return Rope(ntk=Ntk(**(dict(original_length=4, trained_length=8) | fields)))


# What an input can have beside tokens: "segments", "positions", and the mask axes. The rest are fields of the config.
CASES = {
    "plain": {},
    "one_token": {"length": 1},
    "long": {"length": 33},
    "one_layer": {"num_layers": 1},
    "no_padding": {"padded_vocab_size": None},
    "biases": {"output_biases": True},
    "one_kv_head": {"num_kv_heads": 1},
    "grouped_queries": {"num_kv_heads": 2},
    "grouped_queries_of_three": {"num_heads": 6, "num_kv_heads": 2, "output_biases": True},
    "one_head": {"num_heads": 1},
    "multipliers": {"input_mult": 3.7, "output_mult": 0.5},
    "residual_mult": {"residual_mult": 0.3},
    "mup": {"input_mult": 0.3, "output_mult": 1.7, "mup_base_width": 16},
    "large_epsilon": {"rms_eps": 0.3, "input_mult": 0.2},
    "other_theta": {"rope": Rope(theta=500.0), "length": 33},
    "ntk_within": {"rope": _ntk(), "length": 7},
    "ntk_at_trained_length": {"rope": _ntk(), "length": 8},
    "ntk_one_beyond": {"rope": _ntk(), "length": 9},
    "ntk_far_beyond": {"rope": _ntk(), "length": 33},
    "ntk_linear": {"rope": _ntk(base="linear", attention_slope=0.3), "length": 33},
    "ntk_original_above_trained": {"rope": _ntk(original_length=16, trained_length=5), "length": 7},
    "ntk_odd_lengths": {"rope": _ntk(original_length=5, trained_length=9), "length": 31, "segments": True},
    "tied": {"tie_embeddings": True},
    "tied_mup": {"tie_embeddings": True, "mup_base_width": 8, "input_mult": 2.0},
    "embed_norm": {"embed_norm": True, "input_mult": 0.01},
    "head_dim_2": {"head_dim": 2},
    "head_dim_10": {"head_dim": 10, "num_heads": 3},
    "segments": {"segments": True, "length": 33},
    "positions": {"positions": True},
    "segments_and_positions": {"segments": True, "positions": True, "length": 33, "num_kv_heads": 2},
    "mask_embed": {"masks": ("embed",)},
    "mask_mlp": {"masks": ("mlp",)},
    "mask_heads": {"masks": ("heads",), "num_kv_heads": 2},
    "mask_layers": {"masks": ("layers",)},
    "mask_layers_one_layer": {"masks": ("layers",), "num_layers": 1, "output_biases": True},
    "mask_embed_norm": {"masks": ("embed",), "embed_norm": True, "rms_eps": 0.1},
    "mask_all": {"masks": ("embed", "mlp", "heads", "layers"), "output_biases": True},
    "everything": {
        **dict(masks=("embed", "mlp", "heads", "layers"), segments=True, positions=True, length=33),
        **dict(output_biases=True, embed_norm=True, tie_embeddings=True, num_kv_heads=2, mup_base_width=16),
        **dict(input_mult=2.0, output_mult=3.0, rope=_ntk(), rms_eps=1e-3),
    },
}


def make(dtype, *, seed=0, batch=2, length=7, segments=False, positions=False, masks=(), **overrides):
    """(config, params, inputs) of one case, as float64 numpy holding values that `dtype` can represent."""
    cfg = tele.ModelConfig(**(BASE | dict(dtype=dtype, param_dtype=dtype) | overrides))
    rng = np.random.default_rng(seed)
    params = reference.random_params(cfg, rng, 1.0)
    inputs = {"tokens": rng.integers(0, cfg.vocab_size, (batch, length), dtype=np.int32)}
    if segments:
        inputs["segment_ids"] = random_segments(rng, batch, length)
    if positions:
        inputs["positions"] = rng.integers(0, 50, (batch, length), dtype=np.int32)
    if masks:
        inputs["masks"] = {axis: random_mask(rng, cfg.axis_sizes[axis]) for axis in masks}
    rounded = np.float64 if dtype == "float64" else np.float32
    round_trip = lambda x: x if x.dtype == np.int32 else x.astype(rounded).astype(np.float64)  # noqa: E731
    return cfg, jax.tree.map(round_trip, params), jax.tree.map(round_trip, inputs)


def random_segments(rng, batch, length):
    """Packed rows: runs of segments 1, 2, ..., then padding of segment 0."""
    cuts = np.sort(rng.integers(0, length + 1, (batch, 4)), axis=1)
    number = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(axis=-1)
    return np.where(number == 5, 0, number).astype(np.int32)


def random_mask(rng, size):
    """Entries 0, 0.3 and 1 in random places, at least one of them not 0."""
    mask = rng.choice([0.0, 0.3, 1.0], size)
    mask[rng.integers(size)] = rng.choice([0.3, 1.0])
    return mask


def on_device(cfg, tree):
    floats = jnp.dtype(cfg.param_dtype)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else floats), tree)


def compiled(function, cfg):
    """`function(cfg, ...)` under jit; in float64 the formulas are at stake: the compiler takes its short way."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, static_argnums=0, compiler_options=quick if cfg.dtype == "float64" else None)


def run(cfg, params, tokens, **inputs):
    """tele.forward as numpy, with 64 bits switched on where the config computes in them."""
    with jax.enable_x64(cfg.dtype == "float64"):
        forward = compiled(tele.forward, cfg)
        logits = forward(cfg, on_device(cfg, params), on_device(cfg, tokens), **on_device(cfg, inputs))
        assert logits.dtype == (jnp.float64 if cfg.dtype == "float64" else jnp.float32)
        return np.asarray(logits)


def assert_agrees(cfg, params, inputs):
    expected = reference.forward(cfg, params, **inputs)
    logits = run(cfg, params, **inputs)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE[cfg.dtype])


# ---- against the reference ------------------------------------------------------------------------------------------


# Rows long enough for attention="xla" to work in blocks (short ones take the reference), on both sides of their edges.
LONG_CASES = {
    "plain_129": {"length": 129},
    "grouped_queries_256": {"length": 256, "num_kv_heads": 2},
    "one_kv_head_257": {"length": 257, "num_kv_heads": 1, "head_dim": 2},
    "ntk_131": {"length": 131, "rope": _ntk(), "head_dim": 10, "num_heads": 3},
    "segments_and_positions_300": {"length": 300, "segments": True, "positions": True, "num_kv_heads": 2},
    "mask_heads_200": {"length": 200, "masks": ("heads",), "num_kv_heads": 2},
    "everything_389": CASES["everything"] | {"length": 389},
}
ATTENTION_LENGTHS = [("reference", 11), ("xla", 11), ("xla", 300)]


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_in_float64(case):
    assert_agrees(*make("float64", **CASES[case]))


# The formulas are held in float64; here it is the rounding of what the compiler makes of them.
@pytest.mark.parametrize(
    "case",
    ["plain", "grouped_queries_of_three", "large_epsilon", "ntk_far_beyond", "tied_mup", "embed_norm", "everything"],
)
def test_logits_agree_in_float32(case):
    assert_agrees(*make("float32", **CASES[case]))


@pytest.mark.parametrize("case", LONG_CASES)
def test_logits_of_long_rows_agree_in_float64(case):
    assert_agrees(*make("float64", attention="xla", **LONG_CASES[case]))


@pytest.mark.parametrize("case", ["segments_and_positions_300", "everything_389"])
def test_logits_of_long_rows_agree_in_float32(case):
    assert_agrees(*make("float32", attention="xla", **LONG_CASES[case]))


def test_reference_attention_agrees_on_long_rows():
    assert_agrees(*make("float64", attention="reference", **LONG_CASES["everything_389"]))


def test_long_rows_take_another_implementation_than_short_ones():
    """Without this the tests above might compare the reference attention with itself."""
    programs = set()
    for attention in ("reference", "xla"):
        cfg, params, inputs = make("float32", length=129, attention=attention)
        program = compiled(tele.forward, cfg).lower(cfg, on_device(cfg, params), on_device(cfg, inputs["tokens"]))
        programs.add(program.as_text())
    assert len(programs) == 2


def test_logits_agree_without_remat():
    assert_agrees(*make("float64", remat="none", **CASES["everything"]))


def test_bfloat16_returns_float32_logits_near_the_reference():
    cfg, params, inputs = make("float32", **CASES["everything"])
    inputs["positions"] = inputs["positions"] + 3000  # which bfloat16 itself cannot tell apart
    expected = reference.forward(cfg, params, **inputs)
    logits = run(cfg.replace(dtype="bfloat16"), params, **inputs)
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.03 * np.sqrt(np.mean(expected**2))


@st.composite
def cases(draw):
    """Any small decoder with any input, as arguments of `make`."""
    kv_heads, vocab = draw(st.integers(1, 3)), draw(st.integers(2, 30))
    head_dim = draw(st.sampled_from([2, 4, 6, 8, 10]))
    ntk = st.builds(
        Ntk,
        original_length=st.integers(1, 9),
        trained_length=st.integers(1, 16),
        base=st.sampled_from(["linear", "ntk"] if head_dim > 2 else ["linear"]),
        attention_slope=st.floats(0, 0.3),
    )
    return dict(
        seed=draw(st.integers(0, 2**32 - 1)),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 19) | st.sampled_from([129, 200])),
        segments=draw(st.booleans()),
        positions=draw(st.booleans()),
        masks=draw(st.sets(st.sampled_from(["embed", "mlp", "heads", "layers"]))),
        num_layers=draw(st.integers(1, 3)),
        embed_dim=draw(st.integers(1, 17)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=draw(st.integers(1, 19)),
        vocab_size=vocab,
        padded_vocab_size=vocab + draw(st.integers(0, 5)),
        rms_eps=draw(st.sampled_from([1e-5, 1e-2])),
        rope=Rope(theta=draw(st.sampled_from([100.0, 10_000.0])), ntk=draw(st.none() | ntk)),
        input_mult=draw(st.floats(0.1, 10)),
        output_mult=draw(st.floats(0.1, 3)),
        mup_base_width=draw(st.none() | st.integers(1, 17)),
        tie_embeddings=draw(st.booleans()),
        output_biases=draw(st.booleans()),
        embed_norm=draw(st.booleans()),
        remat=draw(st.sampled_from(["none", "full"])),
        attention=draw(st.sampled_from(["auto", "reference", "xla"])),
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(cases())
def test_logits_of_any_config_agree_in_float64(case):
    assert_agrees(*make("float64", **(case | {"masks": tuple(sorted(case["masks"]))})))


# ---- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention, length", ATTENTION_LENGTHS)
def test_a_later_token_changes_no_earlier_logits(attention, length):
    cfg, params, inputs = make("float64", attention=attention, length=length)
    before, changed, at = run(cfg, params, **inputs), inputs["tokens"].copy(), length // 2
    changed[:, at] = (changed[:, at] + 1) % cfg.vocab_size
    after = run(cfg, params, changed)
    np.testing.assert_allclose(after[:, :at], before[:, :at], rtol=0, atol=1e-12)
    assert (np.abs(after[:, at:] - before[:, at:]).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("attention, length", ATTENTION_LENGTHS)
def test_a_packed_segment_has_the_logits_it_has_alone(attention, length):
    """Segments in any order of ids; in long rows one spans blocks and one is far from the row's start."""
    cfg, params, inputs = make("float64", attention=attention, length=length, num_kv_heads=2)
    lengths = [4, 5, 2] if length == 11 else [10, 180, 40, 70]
    segment_ids = np.tile(np.repeat([7, 1, 3, 0][-len(lengths) :], lengths).astype(np.int32), (2, 1))
    positions = np.tile(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]), (2, 1))
    packed = run(cfg, params, inputs["tokens"], segment_ids=segment_ids, positions=positions)
    for start, size in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        part = slice(start, start + size)  # the last one is padding: segment 0 is a segment like the others
        np.testing.assert_allclose(packed[:, part], run(cfg, params, inputs["tokens"][:, part]), rtol=0, atol=1e-12)


def test_attention_sees_only_differences_of_positions():
    cfg, params, inputs = make("float64")
    shifted = np.tile(np.arange(100, 107, dtype=np.int32), (2, 1))
    moved = run(cfg, params, inputs["tokens"], positions=shifted)
    np.testing.assert_allclose(moved, run(cfg, params, inputs["tokens"]), rtol=0, atol=1e-11)


def test_masks_of_one_are_no_masks():
    cfg, params, inputs = make("float64", embed_norm=True, output_biases=True, num_kv_heads=2)
    ones = {axis: np.ones(cfg.axis_sizes[axis]) for axis in ("embed", "mlp", "heads", "layers")}
    np.testing.assert_allclose(run(cfg, params, **inputs, masks=ones), run(cfg, params, **inputs), rtol=0, atol=1e-12)


# For every mask axis: the logical axes that shrink with it, and the entries that stay. With two query heads in a
# group, one of each group goes and the kv heads stay.
CUTS = {
    "embed": ({"embed": [*range(0, 9), *range(11, 23)]}, {}),
    "mlp": ({"mlp": [*range(1, 30), 35, 36]}, {}),
    "heads": ({"heads": [0, 1, 3], "kv_heads": [0, 1, 3]}, {}),
    "grouped_heads": ({"heads": [0, 3]}, {"num_kv_heads": 2}),
    "layers": ({"layers": [0, 2]}, {}),
}
SIZE_FIELDS = {
    "embed": "embed_dim",
    "mlp": "mlp_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "layers": "num_layers",
}


@pytest.mark.parametrize("cut", CUTS)
def test_entries_masked_by_zero_might_as_well_not_be_there(cut):
    kept, overrides = CUTS[cut]
    cfg, params, inputs = make("float64", embed_norm=True, output_biases=True, **overrides)
    axis = next(iter(kept))
    mask = np.zeros(cfg.axis_sizes[axis])
    mask[kept[axis]] = 1.0
    masked = run(cfg, params, **inputs, masks={axis: mask})
    assert np.abs(masked - run(cfg, params, **inputs)).max() > 1e-3

    with jax.enable_x64(True):
        spec, small = flatten(tele.spec(cfg)), {}
    for name, leaf in flatten(params).items():
        for dimension, axis_name in enumerate(spec[name].axes):
            if axis_name in kept:
                leaf = np.take(leaf, kept[axis_name], axis=dimension)
        small[name] = leaf
    small_cfg = cfg.replace(**{SIZE_FIELDS[name]: len(ids) for name, ids in kept.items()})
    np.testing.assert_allclose(masked, run(small_cfg, unflatten(small), **inputs), rtol=0, atol=1e-12)


# ---- the loss -------------------------------------------------------------------------------------------------------

# Vocabularies on both sides of any sensible chunk, none of them a multiple of one.
LOSS_CASES = {
    "tied_and_packed": {"tie_embeddings": True, "mup_base_width": 16, "segments": True, "length": 33},
    "no_remat": {"remat": "none", "num_kv_heads": 2, "vocab_size": 4099, "padded_vocab_size": 4160},
    "long": {"attention": "xla", "length": 300, "num_kv_heads": 2, "segments": True, "rope": _ntk()},
    "masked": {"masks": ("embed", "mlp", "heads", "layers"), "output_biases": True, "embed_norm": True},
}
LARGE_VOCAB = {"vocab_size": 20_011, "padded_vocab_size": 20_032, "embed_dim": 5, "length": 9}


def make_loss(dtype, **case):
    """(config, params, batch, masks); about a third of the loss weights are 0, the others are not whole."""
    cfg, params, inputs = make(dtype, **case)
    rng = np.random.default_rng(1)
    shape = inputs["tokens"].shape
    weights = np.where(rng.random(shape) < 0.3, 0.0, rng.integers(1, 9, shape) / 4)
    batch = {
        "tokens": inputs["tokens"],
        "targets": rng.integers(0, cfg.vocab_size, shape, dtype=np.int32),
        "loss_weights": weights,
        "segment_ids": inputs.get("segment_ids", np.ones(shape, np.int32)),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    }
    return cfg, params, batch, inputs.get("masks")


def reference_loss(cfg, params, batch, masks):
    logits = reference.forward(cfg, params, batch["tokens"], batch["positions"], batch["segment_ids"], masks)
    return reference.loss(logits, batch["targets"], batch["loss_weights"])


def mean_loss(cfg, params, batch, masks):
    total, weight = next_token_loss(cfg, params, batch, masks=masks)
    return total / weight


@pytest.mark.parametrize("case", LOSS_CASES)
def test_loss_and_gradient_agree_in_float64(case):
    """The gradient against differences of the reference along one random direction for every parameter."""
    cfg, params, batch, masks = make_loss("float64", **LOSS_CASES[case])
    with jax.enable_x64(True):
        value_and_grad = compiled(jax.value_and_grad(mean_loss, argnums=1), cfg)
        arrays = [on_device(cfg, tree) for tree in (params, batch, masks)]
        value, gradient = jax.tree.map(np.asarray, value_and_grad(cfg, *arrays))
    assert abs(value - reference_loss(cfg, params, batch, masks)) < 1e-10

    rng, leaves, gradient, step = np.random.default_rng(2), flatten(params), flatten(gradient), 2.5e-4
    assert gradient.keys() == leaves.keys()
    for name, leaf in leaves.items():
        direction = rng.standard_normal(leaf.shape) * np.sqrt(np.mean(leaf**2))
        moved = [unflatten(leaves | {name: leaf + i * step * direction}) for i in (-2, -1, 1, 2)]
        far_below, below, above, far_above = (reference_loss(cfg, tree, batch, masks) for tree in moved)
        numeric = (8 * (above - below) - (far_above - far_below)) / (12 * step)
        exact = np.sum(gradient[name] * direction)
        assert abs(exact - numeric) < 1e-9, f"{name}: {exact} against {numeric}"


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_loss_agrees_over_a_large_vocabulary(dtype, tolerance):
    cfg, params, batch, masks = make_loss(dtype, **LARGE_VOCAB)
    with jax.enable_x64(dtype == "float64"):
        arrays = [on_device(cfg, tree) for tree in (params, batch, masks)]
        total, weight = map(np.asarray, compiled(next_token_loss, cfg)(cfg, *arrays))
    assert abs(weight - batch["loss_weights"].sum()) < tolerance
    assert abs(total / weight - reference_loss(cfg, params, batch, masks)) < tolerance


def test_loss_of_no_counted_token_is_zero_and_so_is_its_gradient():
    cfg, params, batch, _ = make_loss("float64", num_layers=1)
    batch["loss_weights"] = np.zeros_like(batch["loss_weights"])
    with jax.enable_x64(True):
        total = compiled(jax.value_and_grad(lambda *args: next_token_loss(*args)[0], argnums=1), cfg)
        value, gradient = jax.tree.map(np.asarray, total(cfg, on_device(cfg, params), on_device(cfg, batch)))
    assert value == 0.0
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(gradient))
