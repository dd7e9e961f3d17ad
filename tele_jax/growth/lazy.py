"""Grown leaves that are computed where they are read: to look at, or verify, what does not fit into memory.

big = growth.lazy(plan, checkpoint.open_lazy(path).params)
big["layers"]["mlp"]["up"][3, :64]        the same bits as growth.apply(plan, params)["layers"]["mlp"]["up"][3, :64]
growth.verify_stored(plan, params, big)   a comparison before a byte is written
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tele_jax.axes import flatten, unflatten
from tele_jax.growth import host_kernel
from tele_jax.growth.apply import check_tree
from tele_jax.growth.kernel import leaf_key
from tele_jax.growth.plan import Growth

BLOCK_BYTES = 32 * 2**20  # of the source, read at once


@dataclasses.dataclass(frozen=True, eq=False)
class GrownArray:
    """A leaf of the grown tree; indexing it with integers and slices computes that part of it."""

    plan: Growth
    name: str
    source: Any  # array, or checkpoint.LazyArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.dst_spec[self.name].shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.plan.dst_spec[self.name].dtype)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.plan.dst_spec[self.name].axes

    def __getitem__(self, key: Any) -> np.ndarray:
        from tele_jax.checkpoint.lazy import basic_index

        index = basic_index(key, self.shape)
        bounds = [part if isinstance(part, slice) else slice(part, part + 1) for part in index]
        if any(part.step not in (None, 1) for part in bounds):
            raise IndexError("a grown leaf takes slices without a step")
        out = np.empty([part.stop - part.start for part in bounds], self.dtype)
        if out.size:
            *before, (step, name) = self.plan.leaf_steps(self.name)
            source = _source(self.source)
            for earlier, leaf in before:
                spec = earlier.dst_spec[leaf]
                chunks = _chunks(spec.shape, np.dtype(spec.dtype).itemsize)
                maps = [earlier.maps[axis] for axis in spec.axes]
                key = leaf_key(earlier.seed, leaf)
                source = host_kernel.grown(source, earlier.leaves[leaf], maps, chunks, key, self.dtype)
            maps = [step.maps[axis] for axis in self.axes]
            start = [part.start for part in bounds]
            host_kernel.fill_tile(out, step.leaves[name], maps, start, source, leaf_key(step.seed, name))
        return out[tuple(slice(None) if isinstance(part, slice) else 0 for part in index)]


def lazy(plan: Growth, params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that growth.apply would make, as GrownArray leaves. params: arrays, or checkpoint.LazyArray.

    Raises:
      UserError: params are not what plan.src_cfg describes.
    """
    leaves = flatten(params)
    check_tree(leaves, plan.src_spec)
    return unflatten({name: GrownArray(plan, name, leaves[plan.sources[name]]) for name in plan.dst_spec})


def _source(array: Any) -> host_kernel.Source:
    """An array that can be sliced, as a source of chunks; those at the edge are filled up with zeros."""
    chunks = _chunks(array.shape, np.dtype(array.dtype).itemsize)

    @contextlib.contextmanager
    def chunk(index: tuple[int, ...]) -> Iterator[np.ndarray]:
        start = [i * n for i, n in zip(index, chunks, strict=True)]
        box = tuple(slice(s, min(s + n, size)) for s, n, size in zip(start, chunks, array.shape, strict=True))
        part = np.asarray(array[box])
        if part.shape != chunks:
            whole = np.zeros(chunks, part.dtype)
            whole[tuple(slice(n) for n in part.shape)] = part
            part = whole
        yield part

    return host_kernel.Source(chunks, chunk)


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """One index of leading dimensions as long as a block is too large, then a piece of the next one."""
    chunks = list(shape)
    for dimension, size in enumerate(shape):
        below = math.prod(shape[dimension + 1 :]) * itemsize
        chunks[dimension] = max(1, min(size, BLOCK_BYTES // max(1, below)))
        if chunks[dimension] > 1:
            break
    return tuple(chunks)
