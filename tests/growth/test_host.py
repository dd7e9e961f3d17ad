"""Tiles in host memory: the bits of any growth, for any tile and any chunks of the source."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tele_jax import growth
from tele_jax.axes import flatten, unflatten
from tele_jax.growth import host_kernel, kernel
from tests.growth import oracle
from tests.growth.checkpoints import random_numbers
from tests.growth.strategies import growths, without_compiling


def in_memory(array, chunks):
    """A source for host_kernel.fill_tile, cut into chunks of a shape."""

    @contextlib.contextmanager
    def chunk(index):
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))]
        whole = np.full(chunks, np.nan, array.dtype)  # what is beyond the edge must not be read
        whole[tuple(slice(n) for n in part.shape)] = part
        yield whole

    return host_kernel.Source(chunks, chunk)


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
    maps = [plan.maps[axis] for axis in specs[name].axes]
    host_kernel.fill_tile(
        out, plan.leaves[name], maps, start, in_memory(array, chunks), kernel.leaf_key(plan.seed, name)
    )
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
    maps = [scattered(axis, n, n + 20, generator) for axis, n in (("a", 30), ("b", 50), ("c", 60))]
    leaf = growth.LeafPlan(0.3, zero=("b",), scaled=("a", "c"), shared=("b",), **fill)
    array = random_numbers(generator, (30, 50, 60))
    out = np.full((50, 70, 80), np.nan, np.float32)
    assert out.size > 2 * host_kernel.BLOCK
    host_kernel.fill_tile(out, leaf, maps, (0, 0, 0), in_memory(array, (30, 17, 25)), (1, 2), power=-1)
    where = [np.arange(size) for size in out.shape]
    expected = kernel.tile(
        leaf, maps, where, lambda i: jnp.asarray(array[np.ix_(*i)]), (1, 2), out.shape, np.float32, -1
    )
    assert out.tobytes() == np.asarray(expected).tobytes()
