"""Both tile kernels keep the contract in growth/leaf.py: any rectangle is that rectangle of the leaf in the oracle.

Fresh values have the moments that they promise.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten, unflatten
from tele_jax.growth import axis_map, kernel
from tele_jax.growth.leaf import LeafStep, leaf_key
from tests import reference
from tests.growth import oracle
from tests.growth.checkpoints import random_numbers
from tests.growth.strategies import growths, without_compiling


def _whole(shape):
    return [np.arange(size) for size in shape]


@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 5), (2, 3, 4, 6), (1, 1), (3, 1)])
def test_fresh_values_are_those_of_an_independent_threefry(shape):
    key = leaf_key(3, "layers.attn.q")
    assert key == oracle.key_of(3, "layers.attn.q")
    np.testing.assert_array_equal(kernel.normal(key, _whole(shape), shape, 0.02), oracle.normal(key, shape, 0.02))


def test_the_independent_threefry_gives_the_published_vectors():
    """Known answers of Random123 for threefry2x32 with 20 rounds."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344)
    for counter, key, answer in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        (*pi, (0xC4923A9C, 0x483DF7A0)),
    ]:
        words = oracle.threefry(key, tuple(np.array([c], np.uint32) for c in counter))
        assert tuple(int(word[0]) for word in words) == answer


@st.composite
def tilings(draw):
    """A growth, one of its leaves, and a rectangle: for every dimension any indices, in any order."""
    case = draw(growths())
    with without_compiling():
        plan = growth.plan(case.src, case.dst, **case.kwargs)
        name = draw(st.sampled_from(sorted(plan.leaves)))
        shape = plan.dst_spec[name].shape
    indices = [draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size + 2)) for size in shape]
    return plan, name, [np.array(i) for i in indices]


def test_any_rectangle_of_a_leaf_is_that_rectangle_of_the_whole():
    @settings(max_examples=150)
    @given(tilings())
    def check(tiling):
        plan, name, where = tiling
        with without_compiling():
            params = reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0)
            array = flatten(params)[name]
            asked = []

            def read(indices):
                asked.append(math.prod(len(i) for i in indices))
                return array[np.ix_(*indices)]

            (step,) = plan.leaf_steps(name)
            tile = kernel.tile(step, where, read, array.dtype)
            whole = flatten(oracle.grow(plan, params))[name]
        np.testing.assert_array_equal(tile, whole[np.ix_(*where)])
        assert sum(asked) <= tile.size  # it never reads more than it writes

    check()


def test_the_library_cuts_fresh_values_to_rectangles_without_changing_them():
    shape, key = (3, 5, 8), (1, 2)
    whole = np.asarray(kernel.normal(key, _whole(shape), shape, 1.0))
    rng = np.random.default_rng(0)
    for _ in range(5):
        where = [rng.permutation(size)[:2] for size in shape]
        np.testing.assert_array_equal(kernel.normal(key, where, shape, 1.0), whole[np.ix_(*where)])


def test_tiles_put_together_are_the_leaf():
    src = tele.ModelConfig(num_layers=1, embed_dim=4, num_heads=1, head_dim=4, mlp_dim=6, vocab_size=8)
    plan = growth.plan(src, src.replace(embed_dim=6, mlp_dim=10, num_layers=2))
    name, spec = "layers.mlp.gate", plan.dst_spec["layers.mlp.gate"]
    array = jnp.asarray(np.random.default_rng(0).standard_normal(plan.src_spec[name].shape), jnp.float32)
    (step,) = plan.leaf_steps(name)
    read = lambda indices: array[np.ix_(*indices)]  # noqa: E731
    cut = lambda w: kernel.tile(step, w, read, array.dtype)  # noqa: E731
    rows = [
        np.concatenate([cut([np.arange(2), r, c]) for c in np.split(np.arange(10), 2)], axis=2)
        for r in np.split(np.arange(6), 2)
    ]
    np.testing.assert_array_equal(np.concatenate(rows, axis=1), cut(_whole(spec.shape)))


# ---- What fresh values look like ----

SHAPE = (64, 4096)
STD = 0.02


@pytest.fixture(scope="module")
def sample():
    return np.asarray(kernel.normal(leaf_key(0, "layers.mlp.up"), _whole(SHAPE), SHAPE, STD), np.float64)


def test_fresh_values_have_the_mean_and_standard_deviation_asked_for(sample):
    n = sample.size
    assert abs(sample.mean()) < 5 * STD / math.sqrt(n)
    # The variance of a sample variance is (kurtosis - 1)/n sigma^4; kurtosis of a sum of four uniforms is 3 - 1.2/4.
    assert abs(sample.var() / STD**2 - 1) < 5 * math.sqrt(1.7 / n)
    kurtosis = np.mean(sample**4) / sample.var() ** 2
    assert abs(kurtosis - 2.7) < 0.05
    assert abs(np.mean(sample**3)) / STD**3 < 0.03


def test_fresh_values_stay_within_3_47_standard_deviations(sample):
    assert 3.0 < np.abs(sample).max() / STD < 3.47


def test_fresh_values_are_not_correlated(sample):
    bound = 5 * STD**2 / math.sqrt(sample.size)
    assert abs(np.mean(sample[:-1] * sample[1:])) < bound
    assert abs(np.mean(sample[:, :-1] * sample[:, 1:])) < bound
    assert abs(np.mean(sample[:-1, 1:] * sample[1:, :-1])) < bound
    correlation = np.corrcoef(sample) - np.eye(SHAPE[0])
    assert np.abs(correlation).max() < 5.5 / math.sqrt(SHAPE[1])


def test_no_row_and_no_column_comes_twice(sample):
    assert len(np.unique(sample, axis=0)) == SHAPE[0]
    assert len(np.unique(sample.T, axis=0)) == SHAPE[1]


def test_layers_and_leaves_and_seeds_have_values_of_their_own():
    shape = (2, 16, 16)
    values = [
        np.asarray(kernel.normal(leaf_key(seed, name), _whole(shape), shape, 1.0))
        for seed in (0, 1, 2**31)
        for name in ("layers.mlp.gate", "layers.mlp.up")
    ]
    layers = [layer.ravel() for value in values for layer in value]
    correlation = np.corrcoef(layers) - np.eye(len(layers))
    assert np.abs(correlation).max() < 5 / math.sqrt(16 * 16)


def test_a_large_leaf_has_values_at_its_far_end():
    """Rows of the 1T model's queries, 140 x 20480 x 160 of them, are numbered without overflow."""
    shape = (140, 20_480, 160, 128)
    where = [np.array([0, 139]), np.array([0, 20_479]), np.array([0, 159]), np.array([0, 1, 127])]
    values = np.asarray(kernel.normal((3, 4), where, shape, 1.0))
    rows = np.ravel_multi_index(np.meshgrid(*where[:3], indexing="ij"), shape[:3])
    words = oracle.threefry((3, 4), np.broadcast_arrays(rows[..., None], where[3]))
    total = sum((w & np.uint32(0xFFFF)).astype(np.int64) + (w >> np.uint32(16)) for w in words)
    np.testing.assert_allclose(values, (total - 131070) / math.sqrt((2**32 - 1) / 3), rtol=1e-6)
    assert len(np.unique(values.reshape(-1, 3), axis=0)) == 8


def test_a_leaf_with_more_rows_than_counters_is_refused():
    where = [np.arange(1)] * 3
    with pytest.raises(ValueError, match=r"a leaf of shape \(65536, 65537, 2\) has more than 2\^32 rows or columns"):
        kernel.normal((0, 0), where, (65536, 65537, 2), 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_scaled_in_float32_and_rounded_once(dtype):
    values = jnp.asarray(np.random.default_rng(0).standard_normal(500), dtype)
    m = axis_map.identity("embed", 500)
    leaf = growth.LeafPlan(coefficient=math.sqrt(8 / 13))
    tile = kernel.tile(LeafStep(leaf, (m,)), [np.arange(500)], lambda i: values, values.dtype)
    exact = np.asarray(values, np.float64) * math.sqrt(8 / 13)
    assert tile.dtype == values.dtype
    # Half a unit in the last place, and what float32 adds to it.
    half = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(np.asarray(tile, np.float64) - exact) <= half * (1 + 1e-3)).all()


def test_compiled_values_are_those_computed_eagerly():
    shape = (4, 33)
    compiled = jax.jit(lambda: kernel.normal((5, 6), _whole(shape), shape, 0.3))()
    np.testing.assert_array_equal(compiled, kernel.normal((5, 6), _whole(shape), shape, 0.3))


# ---- The kernel in host memory ----


def in_memory(array, chunks):
    """A source for kernel.fill_tile, cut into chunks of a shape."""

    @contextlib.contextmanager
    def chunk(index):
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))]
        whole = np.full(chunks, np.nan, array.dtype)  # what is beyond the edge must not be read
        whole[tuple(slice(n) for n in part.shape)] = part
        yield whole

    return kernel.Source(chunks, chunk)


@given(growths(dtype="float32") | growths(dtype="float32", policy="copy"), st.data())
@settings(max_examples=250)
def test_any_tile_has_the_bits_of_any_growth(case, data):
    with without_compiling(), np.errstate(over="ignore"):
        plan = growth.plan(case.src, case.dst, **case.kwargs)
        generator = np.random.default_rng(case.params_seed)
        params = unflatten({n: random_numbers(generator, s.shape) for n, s in plan.src_spec.items()})
        expected = flatten(oracle.grow(plan, params))
        specs = plan.dst_spec
    name = data.draw(st.sampled_from(sorted(specs)))
    shape, array = specs[name].shape, flatten(params)[name]
    start = [data.draw(st.integers(0, size - 1)) for size in shape]
    size = [data.draw(st.integers(1, size)) for size in shape]
    chunks = tuple(data.draw(st.integers(1, size + 2)) for size in array.shape)
    out = random_numbers(generator, size)
    kernel.fill_tile(out, *plan.leaf_steps(name), start, in_memory(array, chunks))
    inside = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    padded = np.zeros(size, np.float32)
    padded[tuple(slice(n) for n in expected[name][inside].shape)] = expected[name][inside]
    if not plan.leaves[name].moves_exactly:  # numpy keeps subnormal numbers, XLA does not
        padded, out = (np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x) for x in (padded, out))
    np.testing.assert_array_equal(out, padded)


def scattered(axis, src_size, dst_size, generator):
    """An AxisMap in which nothing lies beside what it lay beside before."""
    index = generator.permutation(np.concatenate([np.arange(src_size), np.full(dst_size - src_size, -1)]))
    fresh = (index == -1) | (generator.random(dst_size) < 0.1)
    return growth.AxisMap(axis, src_size, index, fresh, *generator.uniform(0.5, 2, (2, dst_size)))


@pytest.mark.parametrize("fill", [{"fill": "normal", "value": 0.02}, {"fill": "constant", "value": 0.7}])
def test_scattered_indices_in_blocks_of_every_kind(fill):
    """As tree surgery may have them: more runs than are copied one by one, more entries than a block holds."""
    generator = np.random.default_rng(0)
    maps = tuple(scattered(axis, n, n + 20, generator) for axis, n in (("a", 30), ("b", 50), ("c", 60)))
    leaf = growth.LeafPlan(0.3, zero=("b",), scaled=("a", "c"), shared=("b",), **fill)
    array = random_numbers(generator, (30, 50, 60))
    out = np.full((50, 70, 80), np.nan, np.float32)
    assert out.size > 2 * kernel.BLOCK
    step = LeafStep(leaf, maps, key=(1, 2), power=-1)
    kernel.fill_tile(out, step, (0, 0, 0), in_memory(array, (30, 17, 25)))
    where = [np.arange(size) for size in out.shape]
    expected = kernel.tile(step, where, lambda i: jnp.asarray(array[np.ix_(*i)]), np.float32)
    assert out.tobytes() == np.asarray(expected).tobytes()
