"""The two tile kernels compute any rectangle of a grown leaf to the same bits, by the contract that leaf.py states.

`tile` is JAX, for arrays in memory and on a mesh. `fill_tile` works in host memory at copying speed, for growth from
checkpoint to checkpoint: what is moved, zero or constant is written by numpy, straight from a chunk of the source into
a chunk of the destination. Products and fresh values are computed by XLA, which flushes subnormal numbers where numpy
does not, in blocks of one size, so that each of the two programs is compiled once per dtype.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.typing import DTypeLike

from tele_jax.growth.leaf import Along, LeafStep

# Sum of four uniform 16-bit integers: mean and standard deviation.
_MEAN = 4 * (2**16 - 1) / 2
SUM_STD = math.sqrt(4 * (2**32 - 1) / 12)

Read = Callable[[Sequence[np.ndarray]], jax.Array]


def tile(step: LeafStep, where: Sequence[np.ndarray], read: Read, dtype: DTypeLike) -> jax.Array:
    """Computes the entries of a grown leaf at the destination indices `where`, one int array per dimension.

    Args:
      read: read(source indices, one int array per dimension) gives that rectangle of the source leaf; what it gives
        at NEW is not used.
    """
    along = [step.along(dimension, index) for dimension, index in enumerate(where)]
    value = _scaled(step, along, read([part.origin for part in along]))
    if any(part.new.any() for part in along):
        value = jnp.where(_any([part.new for part in along]), _filled(step, where, dtype), value)
    if any(part.zero.any() for part in along):
        value = jnp.where(_any([part.zero for part in along]), jnp.zeros((), dtype), value)
    return value.astype(dtype)


def _scaled(step: LeafStep, along: Sequence[Along], source: jax.Array) -> jax.Array:
    if step.moves_exactly:
        return source
    precise = jnp.promote_types(source.dtype, jnp.float32)
    factor = jnp.asarray(step.coefficient, precise)
    for dimension, part in enumerate(along):
        if part.factors is not None:
            factor = factor * _on_dimension(jnp.asarray(part.factors, precise), dimension, len(along))
    return (source.astype(precise) * factor).astype(source.dtype)


def _filled(step: LeafStep, where: Sequence[np.ndarray], dtype: DTypeLike) -> jax.Array:
    if step.leaf.fill == "constant":
        return jnp.asarray(step.leaf.value, dtype)
    return normal(step.key, where, step.shape, step.leaf.value).astype(dtype)


def normal(key: tuple[int, int], where: Sequence[np.ndarray], shape: Sequence[int], std: float) -> jax.Array:
    """Bell-shaped float32 values of mean 0 and the given std, each a function of key and absolute index alone.

    Threefry (Salmon et al. 2011) of (row, column) gives 64 bits; their four 16-bit parts are added up. The sum of four
    uniform values is near normal (kurtosis 2.7, cut off at 3.46 std, like a truncated normal) and, unlike a logarithm
    or an inverse error function, needs only integers and one product that is rounded once: the same bits under every
    tiling, and on every platform that rounds as IEEE 754 says (compared on CPUs).
    """
    require_countable(shape)
    # jnp, not numpy: under jit only the vectors become constants of the program, not every row of the leaf.
    rows = jnp.zeros((1,) * (len(shape) - 1), jnp.uint32)
    for dimension, (size, w) in enumerate(zip(shape[:-1], where[:-1], strict=True)):
        rows = rows * jnp.uint32(size) + _on_dimension(jnp.asarray(w.astype(np.uint32)), dimension, len(shape) - 1)
    counters = jnp.broadcast_arrays(rows[..., None], jnp.asarray(where[-1].astype(np.uint32)))
    words = threefry2x32_p.bind(jnp.uint32(key[0]), jnp.uint32(key[1]), *counters)
    return bell(words, jnp.float32(std / SUM_STD))


def bell(words: Sequence[jax.Array], scale: jax.Array) -> jax.Array:
    """float32 values from two random words uint32[...] each; scale: float32, std / SUM_STD."""
    first, second = ((word & 0xFFFF) + (word >> 16) for word in words)
    total = (first + second).astype(jnp.int32)
    # total - mean is a multiple of 1/2 below 2^18: exact in float32, so that the product is rounded once.
    return (total.astype(jnp.float32) - jnp.float32(_MEAN)) * scale


def require_countable(shape: Sequence[int]) -> None:
    """Raises ValueError for a leaf with more rows or columns than 32-bit counters can tell apart."""
    if math.prod(shape[:-1]) > 2**32 or shape[-1] > 2**32:
        raise ValueError(f"a leaf of shape {tuple(shape)} has more than 2^32 rows or columns")


def _on_dimension(vector: Any, dimension: int, ndim: int) -> Any:
    return vector.reshape([-1 if i == dimension else 1 for i in range(ndim)])


def _any(vectors: Sequence[np.ndarray]) -> jax.Array:
    """True where the vector of any dimension is, broadcastable over the leaf; vectors without True are left out."""
    mask = jnp.asarray(False)
    for dimension, vector in enumerate(vectors):
        if vector.any():
            mask = mask | _on_dimension(jnp.asarray(vector), dimension, len(vectors))
    return mask


# ---- in host memory --------------------------------------------------------------------------------------------------

BLOCK = 2**17  # entries that XLA computes at once: small enough for the cache, large enough to be worth the call
SCRATCH_BYTES = 24 * 2**20  # memory beside the tile and a chunk of the source, both of 128 MiB
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry-2x32
_MAX_RUNS = 1024  # with more runs, entries are gathered one by one

Chunk = Callable[[tuple[int, ...]], contextlib.AbstractContextManager[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A stored leaf: the shape of its chunks, and chunk(index) -> the chunk, for as long as the context is open."""

    chunks: tuple[int, ...]
    chunk: Chunk


def fill_tile(out: np.ndarray, step: LeafStep, start: Sequence[int], source: Source) -> None:
    """Fills a rectangle of a grown leaf, whatever it held; beyond the edge of the leaf with zeros.

    Args:
      out: contiguous, of the dtype of the leaf.
      start: the first destination index of the rectangle along every dimension.

    Raises:
      ValueError: a leaf with fresh values has more than 2^32 rows or columns.
    """
    along, live, kept = [], [], []  # per dimension; live: inside the leaf and not zero; kept: from the source
    for dimension, (first, size, total) in enumerate(zip(start, out.shape, step.shape, strict=True)):
        part = step.along(dimension, np.arange(first, min(first + size, total)))
        outside = (0, size - len(part.zero))
        along.append(part)
        live.append(np.pad(~part.zero, outside))
        kept.append(np.pad(~part.zero & ~part.new, outside))
    # In two dimensions from here on: all leading ones are rows.
    matrix = out.reshape(-1, out.shape[-1] if out.ndim else 1)
    rows_live, columns_live = _rows_and_columns(live)
    rows_kept, columns_kept = _rows_and_columns(kept)
    if not (rows_live.any() and columns_live.any()):
        out.fill(0)
        return
    matrix[_at(~rows_live, np.ones_like(columns_live))] = 0
    matrix[_at(rows_live, ~columns_live)] = 0
    if rows_kept.any() and columns_kept.any():
        positions = [np.flatnonzero(mask) for mask in kept]
        _move(out, positions, [part.origin[to] for part, to in zip(along, positions, strict=True)], source)
        if not step.moves_exactly:
            _scale(matrix, rows_kept, columns_kept, *_factors(step, along, positions, out.dtype))
        regions = [(rows_kept, columns_live & ~columns_kept), (rows_live & ~rows_kept, columns_live)]
    else:
        regions = [(rows_live, columns_live)]
    for rows, columns in regions:
        if step.leaf.fill == "constant":
            matrix[_at(rows, columns)] = step.leaf.value
        elif rows.any() and columns.any():
            _fill_normal(matrix, rows, columns, step, start, out.shape)


def fill_after(
    out: np.ndarray, steps: Sequence[tuple[LeafStep, tuple[int, ...]]], start: Sequence[int], source: Source
) -> None:
    """Fills a rectangle of a leaf after several steps, as `fill_tile` does after one.

    Chunks between the steps are computed when they are asked for, and held for as long as they are used.

    Args:
      steps: each with the shape of the chunks that are computed of what it makes; that of the last is not used.
    """
    *before, (last, _) = steps
    for step, shape in before:
        source = _grown(source, step, shape, out.dtype)
    fill_tile(out, last, start, source)


def _grown(source: Source, step: LeafStep, shape: tuple[int, ...], dtype: DTypeLike) -> Source:
    @contextlib.contextmanager
    def chunk(index: tuple[int, ...]) -> Iterator[np.ndarray]:
        out = np.empty(shape, dtype)
        fill_tile(out, step, [i * n for i, n in zip(index, shape, strict=True)], source)
        yield out

    return Source(shape, chunk)


def _rows_and_columns(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The masks of the leading dimensions as one over rows, and that of the last."""
    *leading, columns = masks if masks else [np.ones(1, bool)]
    return functools.reduce(np.logical_and.outer, leading, np.ones(1, bool)).ravel(), columns


def _select(positions: np.ndarray) -> slice | np.ndarray:
    """Positions in ascending order, as a slice where they have no gap."""
    if len(positions) and positions[-1] - positions[0] + 1 != len(positions):
        return positions
    return slice(positions[0], positions[-1] + 1) if len(positions) else slice(0, 0)


def _at(rows: np.ndarray, columns: np.ndarray) -> tuple[slice | np.ndarray, ...]:
    """The index of a rectangle that two masks, or two lists of positions, cut out of a matrix."""
    down, across = (_select(np.flatnonzero(x) if x.dtype == bool else x) for x in (rows, columns))
    return (down, across) if isinstance(down, slice) or isinstance(across, slice) else np.ix_(down, across)


def _move(out: np.ndarray, positions: list[np.ndarray], origins: list[np.ndarray], source: Source) -> None:
    """Copies from every chunk of the source what the tile takes from it."""
    parts = []
    for to, origin, size in zip(positions, origins, source.chunks, strict=True):
        chunk, within = np.divmod(origin, size)
        parts.append([(int(c), to[chunk == c], within[chunk == c]) for c in np.unique(chunk)])
    for combination in itertools.product(*parts):
        with source.chunk(tuple(c for c, _, _ in combination)) as values:
            _copy(out, values, [(to, origin) for _, to, origin in combination])


def _copy(out: np.ndarray, values: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    runs = [list(_runs(to, origin)) for to, origin in pairs]
    if math.prod(map(len, runs)) <= _MAX_RUNS:
        for combination in itertools.product(*runs):
            out[tuple(to for to, _ in combination)] = values[tuple(origin for _, origin in combination)]
    elif math.prod(len(to) for to, _ in pairs) <= BLOCK:
        out[np.ix_(*(to for to, _ in pairs))] = values[np.ix_(*(origin for _, origin in pairs))]
    else:  # in halves, since gathered entries are held twice
        longest = max(range(len(pairs)), key=lambda d: len(pairs[d][0]))
        middle = len(pairs[longest][0]) // 2
        for half in (slice(None, middle), slice(middle, None)):
            _copy(out, values, [(t[half], o[half]) if d == longest else (t, o) for d, (t, o) in enumerate(pairs)])


def _runs(to: np.ndarray, origin: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Yields pairs of slices along which both go up by one."""
    breaks = np.flatnonzero((np.diff(to) != 1) | (np.diff(origin) != 1)) + 1
    for first, end in itertools.pairwise([0, *breaks.tolist(), len(to)]):
        size = end - first
        yield slice(to[first], to[first] + size), slice(origin[first], origin[first] + size)


def _factors(
    step: LeafStep, along: Sequence[Along], positions: Sequence[np.ndarray], dtype: DTypeLike
) -> tuple[np.ndarray, np.ndarray | None]:
    """Factors of the kept rows and columns, multiplied in the order in which `tile` does it."""
    precise = np.promote_types(dtype, np.float32)
    taken = [
        None if part.factors is None else part.factors[to].astype(precise)
        for part, to in zip(along, positions, strict=True)
    ]
    leading = len(along) - 1
    rows = np.asarray(step.coefficient, precise).reshape((1,) * max(0, leading))
    for dimension, factors in enumerate(taken[:-1]):
        if factors is not None:
            rows = rows * factors.reshape([-1 if d == dimension else 1 for d in range(leading)])
    rows = np.broadcast_to(rows, [len(to) for to in positions[:-1]]).ravel()
    return rows, taken[-1] if taken else None


def _blocks(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Cuts positions of rows and columns so that at most BLOCK entries are in each part."""
    width = min(len(columns), BLOCK)
    height = BLOCK // width
    for row in range(0, len(rows), height):
        for column in range(0, len(columns), width):
            yield slice(row, min(row + height, len(rows))), slice(column, min(column + width, len(columns)))


def _scale(matrix: np.ndarray, rows, columns, of_rows: np.ndarray, of_columns: np.ndarray | None) -> None:
    rows, columns = np.flatnonzero(rows), np.flatnonzero(columns)
    values, factors = np.zeros(BLOCK, matrix.dtype), np.zeros(BLOCK, of_rows.dtype)
    for r, c in _blocks(rows, columns):
        shape = (r.stop - r.start, c.stop - c.start)
        size = math.prod(shape)
        place = _at(rows[r], columns[c])
        values[:size].reshape(shape)[...] = matrix[place]
        factor = factors[:size].reshape(shape)
        factor[...] = of_rows[r, None]
        if of_columns is not None:
            factor *= of_columns[c]
        with _on_host():
            matrix[place] = np.asarray(_product(values, factors))[:size].reshape(shape)


def _fill_normal(matrix: np.ndarray, rows, columns, step: LeafStep, start, shape) -> None:
    require_countable(step.shape)
    rows, columns = np.flatnonzero(rows), np.flatnonzero(columns)
    places = [np.arange(first, first + length) for first, length in zip(start, shape, strict=True)]
    of_rows, of_columns = row_numbers(step.shape, places)[rows], (columns + start[-1]).astype(np.uint32)
    counters = np.zeros((2, BLOCK), np.uint32)  # allocated once, since fresh memory is slow to touch
    for r, c in _blocks(rows, columns):
        shape = (r.stop - r.start, c.stop - c.start)
        row, column = (counter[: math.prod(shape)].reshape(shape) for counter in counters)
        row[...], column[...] = of_rows[r, None], of_columns[c]
        drawn = _drawn(step.key, counters, step.leaf.value, matrix.dtype)
        matrix[_at(rows[r], columns[c])] = drawn[: math.prod(shape)].reshape(shape)


def row_numbers(shape: Sequence[int], places: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers uint32 of the rows, of all leading dimensions together, at the places along every dimension of a leaf."""
    numbers = np.zeros(1, np.uint32)
    for size, place in zip(shape[:-1], places[:-1], strict=True):
        numbers = np.add.outer(numbers * np.uint32(size), place.astype(np.uint32)).ravel()
    return numbers


def normal_at(key: tuple[int, int], rows: np.ndarray, columns: np.ndarray, std: float, dtype: DTypeLike) -> np.ndarray:
    """Fresh values dtype[n] at (row, column) of a leaf, two uint32[n]; its leading dimensions count as one of rows."""
    out = np.empty(len(rows), dtype)
    counters = np.zeros((2, BLOCK), np.uint32)
    for first in range(0, len(rows), BLOCK):
        part = out[first : first + BLOCK]
        counters[:, : len(part)] = rows[first : first + BLOCK], columns[first : first + BLOCK]
        part[...] = _drawn(key, counters, std, out.dtype)[: len(part)]
    return out


def _drawn(key: tuple[int, int], counters: np.ndarray, std: float, dtype: DTypeLike) -> np.ndarray:
    with _on_host():
        return np.asarray(_normal(*np.array(key, np.uint32), *counters, np.float32(std / SUM_STD), dtype=dtype))


@contextlib.contextmanager
def _on_host() -> Iterator[None]:
    """Computes on the CPU whatever other devices there are, and in float64 where the leaf has it."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(True):
        yield


@jax.jit
def _product(values: jax.Array, factors: jax.Array) -> jax.Array:
    return (values.astype(factors.dtype) * factors).astype(values.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _normal(key0, key1, rows: jax.Array, columns: jax.Array, scale, *, dtype) -> jax.Array:
    """Threefry-2x32 as in `kernel.normal`; its rounds are written out, for XLA to make one loop of them."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    a, b = rows + keys[0], columns + keys[1]
    for i in range(5):
        for bits in _ROTATIONS[i % 2]:
            a = a + b
            b = ((b << jnp.uint32(bits)) | (b >> jnp.uint32(32 - bits))) ^ a
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return bell((a, b), scale).astype(dtype)
