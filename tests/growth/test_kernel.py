"""The tile kernel: any rectangle is that rectangle of the whole, and fresh values have the moments they promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten
from tele_jax.growth import axis_map, kernel
from tests import reference
from tests.growth import oracle
from tests.growth.strategies import growths, without_compiling


def _whole(shape):
    return [np.arange(size) for size in shape]


@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 5), (2, 3, 4, 6), (1, 1), (3, 1)])
def test_fresh_values_are_those_of_an_independent_threefry(shape):
    key = kernel.leaf_key(3, "layers.attn.q")
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
            spec = plan.dst_spec[name]
            params = reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0)
            array = flatten(params)[name]
            asked = []

            def read(indices):
                asked.append(math.prod(len(i) for i in indices))
                return array[np.ix_(*indices)]

            maps = [plan.maps[axis] for axis in spec.axes]
            key = kernel.leaf_key(plan.seed, name)
            tile = kernel.tile(plan.leaves[name], maps, where, read, key, spec.shape, array.dtype)
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
    maps, key = [plan.maps[a] for a in spec.axes], kernel.leaf_key(plan.seed, name)
    read = lambda indices: array[np.ix_(*indices)]  # noqa: E731
    cut = lambda w: kernel.tile(plan.leaves[name], maps, w, read, key, spec.shape, array.dtype)  # noqa: E731
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
    return np.asarray(kernel.normal(kernel.leaf_key(0, "layers.mlp.up"), _whole(SHAPE), SHAPE, STD), np.float64)


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
        np.asarray(kernel.normal(kernel.leaf_key(seed, name), _whole(shape), shape, 1.0))
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
    tile = kernel.tile(leaf, [m], [np.arange(500)], lambda i: values, (0, 0), (500,), values.dtype)
    exact = np.asarray(values, np.float64) * math.sqrt(8 / 13)
    assert tile.dtype == values.dtype
    # Half a unit in the last place, and what float32 adds to it.
    half = np.abs(exact) * float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(np.asarray(tile, np.float64) - exact) <= half * (1 + 1e-3)).all()


def test_compiled_values_are_those_computed_eagerly():
    shape = (4, 33)
    compiled = jax.jit(lambda: kernel.normal((5, 6), _whole(shape), shape, 0.3))()
    np.testing.assert_array_equal(compiled, kernel.normal((5, 6), _whole(shape), shape, 0.3))
