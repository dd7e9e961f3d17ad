"""The first level of verification: every entry of the grown tree is what the plan says.

Kept entries are the source's, to the bit or, where the plan multiplies them, within their roundings; zeros are zero (of
either sign), constants are the constant, and fresh values are those that the seed, the name of the leaf and the index
give, to the bit unless a later step of a composed plan multiplies them. Leaves are read in tiles, from arrays in memory
or from checkpoints that do not fit there. The optimizer state is looked at in the same way, with the plan of each part
of it (opt_state.part_plan).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tele_jax.checkpoint import chunks, layout
from tele_jax.growth import describe, host_kernel
from tele_jax.growth.kernel import leaf_key
from tele_jax.growth.plan import Growth, Plan
from tele_jax.sharding import tiles

TILE_BYTES = 16 * 2**20


def look(plan: Growth, src: Mapping[str, Any], dst: Mapping[str, Any], unit: int | None) -> dict[str, str]:
    """{leaf: the first entry that is not what it should be} for the leaves of one unit of the grown tree: see `share`.

    src, dst: {dotted name: array, or checkpoint.LazyArray}, with the leaves of that unit at least.
    """
    found = {}
    for name, spec in plan.dst_spec.items():
        if bool(spec.stack) == (unit is not None) and name in dst:
            # Where nothing comes from the source, its leaf may be missing.
            source, made = (_Chunkwise.of(leaf) for leaf in (src.get(plan.sources[name]), dst[name]))
            problem = next(_problems(plan, name, source, made, unit), None)
            if problem is not None:
                found[name] = problem
    return found


def altered(plan: Growth, found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """{leaf: what is wrong with it} for every leaf that is not what the plan makes of the source; found: in units."""
    first: dict[str, str] = {}
    for unit in reversed(found):
        first |= unit
    return {name: first[name] for name in plan.dst_spec if name in first}


class _Chunkwise:
    """A stored leaf of which the last chunk stays in memory: tiles are smaller than chunks, which are read whole."""

    def __init__(self, stored: Any):
        self._stored, self._place, self._chunk = stored, None, None
        self._buffer = np.empty(stored.leaf.chunk_bytes, np.uint8)

    @classmethod
    def of(cls, leaf: Any) -> Any:
        """The leaf itself where it is in memory."""
        return cls(leaf) if hasattr(leaf, "chunks") and leaf.shape else leaf

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        sizes = self._stored.chunks
        place = tuple(part.start // size for part, size in zip(key, sizes, strict=True))
        if any((part.stop - 1) // size > i for part, size, i in zip(key, sizes, place, strict=True)):
            return self._stored[key]  # of several chunks
        if place != self._place:
            self._place, self._chunk = place, self._read(place)
        return self._chunk[
            tuple(slice(p.start - i * n, p.stop - i * n) for p, i, n in zip(key, place, sizes, strict=True))
        ]

    def _read(self, place: tuple[int, ...]) -> np.ndarray:
        stored = self._stored
        if "://" in str(stored.path):
            ends = zip(place, stored.chunks, stored.shape, strict=True)
            return stored[tuple(slice(i * n, min((i + 1) * n, size)) for i, n, size in ends)]
        chunks.read_chunk(stored, place, self._buffer)
        return self._buffer[: -layout.CRC_BYTES].view(stored.dtype).reshape(stored.chunks)


@dataclasses.dataclass(frozen=True, eq=False)
class Unrounded:
    """A leaf of the result, read in float64, with the products of the plan in the place of what they were rounded to.

    What is not such a product to within its rounding is as it is stored. So the function of a model in float32 or
    bfloat16 can be compared to the precision of float64, however much of the rounding a sharp softmax makes.
    """

    plan: Growth
    name: str
    source: Any
    made: Any

    def __getitem__(self, key: Any) -> np.ndarray:
        """By integers and slices of step 1, like a LazyArray."""
        shape = self.plan.dst_spec[self.name].shape
        keys = [k for k in (key if isinstance(key, tuple) else (key,)) if k is not Ellipsis]
        keys += [slice(None)] * (len(shape) - len(keys))
        where = tuple(k if isinstance(k, slice) else slice(int(k), int(k) + 1) for k in keys)
        parts = [describe.along(self.plan, self.name, dimension, part) for dimension, part in enumerate(where)]
        read = np.asarray(self.made[where])
        values = read.astype(np.float64)
        kept = describe.kinds(parts) == describe.KEPT
        if kept.any():
            products = _products(self.plan, self.name, self.source, parts)
            rounded = kept & _is_rounded(self.plan, self.name, values, products, read.dtype)
            values[rounded] = products[rounded]
        return values.reshape([n for n, k in zip(values.shape, keys, strict=True) if isinstance(k, slice)])


def _products(plan: Growth, name: str, source: Any, parts: Sequence[describe.Along]) -> np.ndarray:
    """float64: what the plan makes of the source entries at the origins of a tile, not rounded."""
    coefficient = math.prod(step.leaves[leaf].coefficient for step, leaf in plan.leaf_steps(name))
    return _gather(source, parts) * (coefficient * _outer([part.factors[-1] for part in parts]))


def _is_rounded(plan: Growth, name: str, values: np.ndarray, products: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Where values are the products in the dtype of the leaf: to the bit where nothing is scaled."""
    if plan.moves_exactly(name):
        return (values == products) & (np.signbit(values) == np.signbit(products))
    # What is below the smallest normal number may be flushed to 0.
    slack = sum(_rounding(step, leaf, dtype) for step, leaf in plan.leaf_steps(name))
    return np.abs(values - products) <= slack * np.abs(products) + float(jnp.finfo(dtype).tiny)


def _rounding(step: Plan, name: str, dtype: np.dtype) -> float:
    """The largest relative error of a product that a step makes of an entry of a leaf.

    The coefficient and the factor of every axis are rounded, and multiplied, in float32 or better; their product with
    the entry is rounded to the dtype of the leaf.
    """
    leaf = step.leaves[name]
    number = sum(leaf.factors(step.maps[axis]) is not None for axis in step.dst_spec[name].axes)
    precise = jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps
    return 0.505 * float(jnp.finfo(dtype).eps + (1 + 2 * number) * precise)


def _problems(plan: Growth, name: str, source: Any, made: Any, unit: int | None) -> Iterator[str]:
    """Names what is wrong in one unit of a leaf, tile by tile."""
    spec = plan.dst_spec[name]
    stack = () if unit is None else (slice(unit, unit + 1),)
    for tile in tiles(spec.shape[len(stack) :], np.dtype(spec.dtype).itemsize, TILE_BYTES):
        where = (*stack, *tile)
        parts = [describe.along(plan, name, dimension, part) for dimension, part in enumerate(where)]
        kinds = describe.kinds(parts)
        read = np.asarray(made[where])
        values = read.astype(np.float64)
        at = lambda place, where=where: f"at {[int(p + w.start) for p, w in zip(place, where, strict=True)]}"  # noqa: E731
        if not np.isfinite(values).all():
            yield f"{values[~np.isfinite(values)][0]} {at(np.argwhere(~np.isfinite(values))[0])}"
        wrong = (kinds == describe.ZERO) & (values != 0)
        if wrong.any():
            yield f"{values[wrong][0]:.6g} {at(np.argwhere(wrong)[0])}, planned 0"
        kept = kinds == describe.KEPT
        if kept.any():
            expected = _products(plan, name, source, parts)
            wrong = kept & ~_is_rounded(plan, name, values, expected, read.dtype)
            if wrong.any():
                yield f"{values[wrong][0]:.9g} {at(np.argwhere(wrong)[0])}, from the source {expected[wrong][0]:.9g}"
        for place, value, expected in _wrongly_filled(plan, name, parts, kinds, values, read.dtype):
            yield f"a new entry is {value:.9g} {at(place)}, planned {expected:.9g}"


def _wrongly_filled(
    plan: Growth, name: str, parts: Sequence[describe.Along], kinds: np.ndarray, values: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[Sequence[int], float, float]]:
    """(place in the tile, value, planned value) of the first new entry of every step that is not as planned."""
    steps = plan.leaf_steps(name)
    width = kinds.shape[-1] if kinds.ndim else 1
    for k, (step, leaf_name) in enumerate(steps):
        if not (kinds == describe.FILLED + k).any():
            continue
        later = steps[k + 1 :]
        factors = math.prod(after.leaves[leaf].coefficient for after, leaf in later)
        factors = np.broadcast_to(factors * _outer([part.factors[len(later)] for part in parts]), kinds.shape)
        exact = all(after.leaves[leaf].moves_exactly for after, leaf in later)
        slack = 0.0 if exact else sum(_rounding(after, leaf, dtype) for after, leaf in later)
        row_numbers, columns = _numbered([part.place[len(later)] for part in parts], step.dst_spec[leaf_name].shape)
        # By blocks: counters and values of a whole tile would take many times its memory.
        count = max(1, host_kernel.BLOCK // width)
        for first in range(0, kinds.size // width, count):
            row, column = np.nonzero(kinds.reshape(-1, width)[first : first + count] == describe.FILLED + k)
            row += first
            made, factor = (array.reshape(-1, width)[row, column] for array in (values, factors))
            planned = _new(step, leaf_name, row_numbers[row], columns[column], dtype) * factor
            wrong = ~(np.abs(made - planned) <= slack * np.abs(planned))
            if wrong.any():
                i = int(np.argmax(wrong))
                yield np.unravel_index(row[i] * width + column[i], kinds.shape), made[i], planned[i]
                break


def _numbered(places: Sequence[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """uint32: the numbers of the rows (of all leading dimensions together) and columns of a rectangle in a leaf."""
    *leading, columns = places or [np.zeros(1, np.int64)]
    rows = np.zeros(1, np.int64)
    for size, place in zip(shape[:-1], leading, strict=True):
        rows = np.add.outer(rows * size, place).ravel()
    return rows.astype(np.uint32), columns.astype(np.uint32)


def _new(step: Plan, name: str, rows: np.ndarray, columns: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64[n]: what a step fills in at rows and columns of a leaf, rounded to the dtype of the leaf."""
    leaf = step.leaves[name]
    if leaf.fill == "constant":
        return np.full(len(rows), leaf.value, dtype).astype(np.float64)
    return host_kernel.normal(leaf_key(step.seed, name), rows, columns, leaf.value, dtype).astype(np.float64)


def _outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    out = np.ones((1,) * len(vectors))
    for dimension, vector in enumerate(vectors):
        if not (vector == 1).all():
            out = out * vector.reshape([-1 if d == dimension else 1 for d in range(len(vectors))])
    return out


def _gather(array: Any, parts: Sequence[describe.Along]) -> np.ndarray:
    """float64: the source entries at the origins of a tile; only the part of the source around them is read."""
    if not parts:
        return np.asarray(array).astype(np.float64)
    box = tuple(slice(int(part.origin.min()), int(part.origin.max()) + 1) for part in parts)
    read = np.asarray(array[box]).astype(np.float64)
    for dimension, (part, bounds) in enumerate(zip(parts, box, strict=True)):
        index = part.origin - bounds.start
        if not np.array_equal(index, np.arange(read.shape[dimension])):
            read = np.take(read, index, axis=dimension)
    return read
