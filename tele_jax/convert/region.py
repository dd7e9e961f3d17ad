"""Copies rectangles of leaves from and to the tensors of a released file, whose axes come in another order.

Most of the work is transposing. It is done in blocks that fit the processor's cache, through a scratch matrix with
padded rows: rows whose addresses differ by a power of two share a few cache lines (numpy transposes 8,192 columns of
bfloat16 at 0.4 GB/s then, at 2 GB/s with padding; 2026-11-25).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from tele_jax.convert.families import Part
from tele_jax.convert.files import DTYPES, Files, Stored
from tele_jax.errors import DamageError, UserError

# In a block that is transposed: bytes that are contiguous on the strided side, and bytes of a row.
_SEGMENT_BYTES, _ROW_BYTES = 256, 32 * 1024
_BLOCK_BYTES = 2**20  # of a block that is not transposed
_PAD_BYTES = 64  # a cache line
SCRATCH_BYTES = 4 * (_SEGMENT_BYTES // 2) * (_ROW_BYTES + _PAD_BYTES)  # of one thread at most


@dataclasses.dataclass(frozen=True)
class _Block:
    """A part of a leaf that is a matrix in the tensor.

    Attributes:
      ranges: {axis of the leaf: (begin, end)}, in the order of the tensor.
      offsets: int64[n], index of the first number of each row in the tensor.
      width: numbers in a row.
    """

    ranges: dict[str, tuple[int, int]]
    offsets: np.ndarray
    width: int


def cut_order(part: Part, axes: Sequence[str]) -> list[int]:
    """Returns the dimensions of a leaf (its axes without `layers`) in the order in which the tensor has them."""
    return [axes.index(axis) for axis in part.axes if axis != "*"]


def read(files: Files, stored: Stored, part: Part, axes: Sequence[str], start: Sequence[int], out: np.ndarray) -> None:
    """Fills `out` with the rectangle of a leaf that begins at `start`, from the tensor that holds it.

    axes: those of the leaf without `layers`; `out` has one dimension for each, and any float dtype.

    Raises:
      UserError: the file is cut short; a number is NaN or infinite, in the file or after the conversion. The message
        names file and tensor.
    """
    dtype = DTYPES[stored.dtype]
    for block in _blocks(part, axes, start, out.shape, dtype.itemsize):
        view = _view(_bits(out), block, axes, start)
        inside = _as_rows(view, block) if out.dtype == dtype else None
        rows = _scratch(len(block.offsets), block.width, dtype) if inside is None else inside
        stored.read(files, block.offsets, rows)
        _require_finite(rows, dtype, f"{stored.file}: {stored.name}", UserError)
        if out.dtype != dtype:
            rows = _convert(rows, dtype, out.dtype, f"{stored.file}: {stored.name}")
        if inside is None:
            np.copyto(view, rows.reshape(view.shape))


def write(
    files: Files,
    stored: Stored,
    part: Part,
    axes: Sequence[str],
    start: Sequence[int],
    values: np.ndarray,
    factor: float = 1.0,
    origin: str = "",
) -> None:
    """Writes a rectangle of a leaf, times a factor, to its place in a tensor: the inverse of `read`.

    origin: names the leaf in messages.

    Raises:
      DamageError: a number of the leaf is NaN or infinite.
      UserError: a number is infinite after the conversion.
    """
    dtype = DTYPES[stored.dtype]
    for block in _blocks(part, axes, start, values.shape, values.dtype.itemsize):
        view = _view(_bits(values), block, axes, start)
        rows = _as_rows(view, block)
        if rows is None:
            # In two steps: contiguous pieces go to a matrix with padded rows, which is then transposed.
            gathered = _gather(view, block, axes)
            rows = _scratch(len(block.offsets), block.width, values.dtype)
            np.copyto(rows.reshape(view.shape), gathered)
        _require_finite(rows, values.dtype, origin, DamageError)
        if values.dtype != dtype or factor != 1.0:
            rows = _convert(rows, values.dtype, dtype, origin, factor)
        files.write(stored.file, stored.offset + block.offsets * dtype.itemsize, rows.view(np.uint8))


def _convert(rows: np.ndarray, dtype: np.dtype, to: np.dtype, where: str, factor: float = 1.0) -> np.ndarray:
    """Converts numbers, held as unsigned integers, to another dtype, rounded to nearest.

    factor: multiplies them before that, in float32 or in float64.
    """
    numbers = rows.view(dtype)
    if factor != 1.0:
        precise = np.float64 if dtype == np.float64 else np.float32
        numbers = numbers.astype(precise) * precise(factor)
    converted = _scratch(len(rows), rows.shape[1], to)
    with np.errstate(over="ignore"):
        np.copyto(converted.view(to), numbers, casting="unsafe")
    _require_finite(converted, to, f"{where}, as {to.name}", UserError)
    return converted


def _blocks(
    part: Part, axes: Sequence[str], start: Sequence[int], shape: Sequence[int], itemsize: int
) -> Iterator[_Block]:
    """Cuts a rectangle into matrices whose rows are contiguous in the tensor."""
    range_of = {axis: (s, s + n) for axis, s, n in zip(axes, start, shape, strict=True)}
    ranges = [(part.turn, part.turn + 1) if axis == "*" else range_of[axis] for axis in part.axes]
    # A row has the trailing axes that are complete and adjacent in the leaf too, and one more that may be cut.
    first = len(ranges) - 1
    while first and ranges[first] == (0, part.sizes[first]) and _are_neighbours(part, axes, first):
        first -= 1
    strides = [math.prod(part.sizes[i + 1 :]) for i in range(len(ranges))]
    order = cut_order(part, axes)
    most = _ROW_BYTES if order != sorted(order) else _BLOCK_BYTES
    across = max(1, min(most // (strides[first] * itemsize), ranges[first][1] - ranges[first][0]))
    row_bytes = across * strides[first] * itemsize
    down = _SEGMENT_BYTES // itemsize if order != sorted(order) else max(1, _BLOCK_BYTES // row_bytes)
    for outer in _pieces(ranges[:first], down):
        offsets = np.zeros(1, np.int64)
        for i, (begin, end) in enumerate(outer):
            offsets = np.add.outer(offsets, _places(part, i, begin, end) * strides[i]).ravel()
        for begin in range(*ranges[first], across):
            end = min(begin + across, ranges[first][1])
            kept = [*outer, (begin, end), *ranges[first + 1 :]]
            named = {axis: r for axis, r in zip(part.axes, kept, strict=True) if axis != "*"}
            yield _Block(named, offsets + begin * strides[first], (end - begin) * strides[first])


def _places(part: Part, i: int, begin: int, end: int) -> np.ndarray:
    """Returns where the entries begin to end of the leaf's axis i lie along it in the tensor: int64[end - begin]."""
    places = np.arange(begin, end, dtype=np.int64)
    if part.pairs and part.axes[i] == "head_dim":
        half = part.sizes[i] // 2
        places = places % half * 2 + places // half
    return places


def _are_neighbours(part: Part, axes: Sequence[str], i: int) -> bool:
    """Tells whether the axes i - 1 and i of the tensor are adjacent in the leaf too, in this order."""
    before, this = part.axes[i - 1], part.axes[i]
    return "*" not in (before, this) and axes.index(before) + 1 == axes.index(this)


def _pieces(ranges: Sequence[tuple[int, int]], count: int) -> Iterator[list[tuple[int, int]]]:
    """Cuts a rectangle into parts of at most `count` entries, along its leading axes first."""
    sizes = [end - begin for begin, end in ranges]
    steps, left = [], count
    for size in reversed(sizes):
        step = max(1, min(size, left))
        steps.append(step)
        left = max(1, left // max(1, size)) if step == size else 1
    steps.reverse()
    grids = [range(begin, end, step) for (begin, end), step in zip(ranges, steps, strict=True)]
    for corner in itertools.product(*grids):
        yield [(c, min(c + step, end)) for c, step, (_, end) in zip(corner, steps, ranges, strict=True)]


def _view(values: np.ndarray, block: _Block, axes: Sequence[str], start: Sequence[int]) -> np.ndarray:
    """Returns a view of the part of a rectangle that a block covers, with its axes in the order of the tensor."""
    inside = [(s, block.ranges[axis]) for axis, s in zip(axes, start, strict=True)]
    part = values[tuple(slice(begin - s, end - s) for s, (begin, end) in inside)]
    return part.transpose([axes.index(axis) for axis in block.ranges])


def _as_rows(view: np.ndarray, block: _Block) -> np.ndarray | None:
    """Returns the rows of a block without a copy where they are contiguous in the leaf too; otherwise None."""
    try:
        rows = view.reshape((len(block.offsets), block.width), copy=False)
    except ValueError:
        return None
    return rows if rows.strides[1] == rows.itemsize else None


def _gather(view: np.ndarray, block: _Block, axes: Sequence[str]) -> np.ndarray:
    """Copies a view to memory in the order of the leaf, with padded rows; the axes keep their order."""
    order = np.argsort([axes.index(axis) for axis in block.ranges])
    natural = view.transpose(order)
    copy = _scratch(math.prod(natural.shape[:-1]), natural.shape[-1], natural.dtype).reshape(natural.shape)
    np.copyto(copy, natural)
    return copy.transpose(np.argsort(order))


def _scratch(rows: int, width: int, dtype: np.dtype) -> np.ndarray:
    """Allocates a matrix of unsigned integers whose rows begin an odd number of cache lines apart."""
    kind = _kind(dtype)
    lines = -(-width * kind.itemsize // _PAD_BYTES)
    stride = (lines + 1 - lines % 2) * _PAD_BYTES if rows > 1 else width * kind.itemsize
    return np.empty((rows, stride // kind.itemsize), kind)[:, :width]


def _kind(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(_kind(values.dtype))


# Bits of the exponent: a number in which all of them are set is infinite or NaN.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}


def _require_finite(bits: np.ndarray, dtype: np.dtype, where: str, error: type[Exception]) -> None:
    mask = _kind(dtype).type(_EXPONENTS[np.dtype(dtype).name])
    if bits.size and np.bitwise_and(bits, mask).max() == mask:
        raise error(f"{where}: has numbers that are not finite (NaN or infinity)")
