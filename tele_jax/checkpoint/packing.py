"""The places of chunks in files: pure functions of shapes, which saving, growth and counting share.

A file holds a rectangle of chunks and, at its end, their index: zarr3's codec sharding_indexed. Every chunk has its own
checksum and is read alone. Millions of small files are what object stores and shared file systems are slowest at: on
its published mesh the 1T model with its optimizer state had 6,249,216 files when a chunk was a file.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from crc32c import crc32c

from tele_jax.checkpoint import layout

FILE_BYTES = 2**30  # largest file of a save: an object store takes it in one request
TILES_PER_CHUNK_LIMIT = 8  # small chunks are written together, an eighth of the largest chunk at a time
_FILES = 20_000  # about as many have the largest checkpoints that growth, imports and merges write
_MISSING = 2**64 - 1  # in an index: the chunk lies outside the array
_PAGE_BYTES = 4096  # what O_DIRECT asks of positions and sizes, at most
DIRECT_BYTES = 2**20  # chunks from here on begin at a page, so that they can be written past the page cache

Key = TypeVar("Key")


def file_shape(
    shape: Sequence[int], chunks: Sequence[int], itemsize: int, *, limit: int, part: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Shape of the part of an array that one file holds: as many whole chunks as `limit` bytes have room for.

    part: the piece of the array that one process writes, where several do; files never straddle two pieces.

    Returns None where a chunk is a file.

    >>> file_shape((140, 20480, 98304), (1, 80, 49152), 4, limit=2**30, part=(140, 80, 49152))
    (47, 80, 49152)
    """
    part = shape if part is None else part
    room = max(1, limit // max(1, math.prod(chunks) * itemsize))
    taken = [1] * len(shape)
    for axis in reversed(range(len(shape))):  # the last first: a layer lies in as few files as can be
        count = max(1, -(-part[axis] // chunks[axis]))
        most = min(count, room)
        if tuple(part)[axis] == shape[axis]:
            taken[axis] = -(-count // -(-count // most))  # about the same for every file
        else:
            taken[axis] = next(n for n in range(most, 0, -1) if count % n == 0)
        room //= taken[axis]
    if max(taken, default=1) == 1:
        return None
    return tuple(n * chunk for n, chunk in zip(taken, chunks, strict=True))


def single_owner_part(owners: np.ndarray) -> tuple[int, ...]:
    """The largest rectangle of pieces that one process owns, such that rectangles of that shape cover the whole array.

    owners: int[...], the process that writes each piece of an array, one dimension for each of the array.

    >>> single_owner_part(np.array([[0, 0, 1, 1], [2, 2, 3, 3]]))
    (1, 2)
    """
    part = [1] * owners.ndim
    for axis in reversed(range(owners.ndim)):
        lines = np.moveaxis(owners, axis, -1)
        length = lines.shape[-1]
        for count in range(length, 0, -1):
            cut = lines.reshape(*lines.shape[:-1], length // count, count) if length % count == 0 else None
            if cut is not None and (cut == cut[..., :1]).all():
                part[axis] = count
                owners = np.moveaxis(cut[..., 0], -1, axis)
                break
    return tuple(part)


def packed(leaves: Mapping[Key, layout.Leaf], chunk_bytes: int) -> dict[Key, layout.Leaf]:
    """Gives leaves that are written chunk by chunk, by growth or an import, their files.

    Files are of an eighth of chunk_bytes, so that many threads and processes share the work and a kill loses little;
    larger where that would be very many files, and one chunk at least.
    """
    limit = max(chunk_bytes // TILES_PER_CHUNK_LIMIT, sum(leaf.nbytes for leaf in leaves.values()) // _FILES)
    return {
        key: dataclasses.replace(
            leaf, files=file_shape(leaf.spec.shape, leaf.chunks, leaf.spec.dtype.itemsize, limit=limit)
        )
        for key, leaf in leaves.items()
    }


def file_of(leaf: layout.Leaf, chunk: Sequence[int]) -> tuple[int, ...]:
    """The index, in leaf.file_grid, of the file that a chunk lies in."""
    return tuple(c // n for c, n in zip(chunk, leaf.per_file, strict=True))


def chunks_of(leaf: layout.Leaf, file: Sequence[int]) -> list[tuple[int, ...]]:
    """The chunks of a file that lie inside the leaf, the last axis fastest."""
    counts = zip(file, leaf.per_file, leaf.grid, strict=True)
    return list(itertools.product(*(range(f * n, min((f + 1) * n, whole)) for f, n, whole in counts)))


def entry_of(leaf: layout.Leaf, chunk: Sequence[int]) -> int:
    """The place of a chunk in the index of its file."""
    entry = 0
    for c, n in zip(chunk, leaf.per_file, strict=True):
        entry = entry * n + c % n
    return entry


def index_bytes(leaf: layout.Leaf) -> int:
    """Size of the index at the end of a file, with its checksum; 0 where a chunk is a file."""
    return 0 if leaf.files is None else 16 * math.prod(leaf.per_file) + layout.CRC_BYTES


def pitch(leaf: layout.Leaf) -> int:
    """Bytes from one chunk to the next in a file that growth or an import writes; large chunks begin at a page."""
    size = leaf.chunk_bytes
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES if size >= DIRECT_BYTES else size


def file_bytes(leaf: layout.Leaf, file: Sequence[int]) -> int:
    """Size of a file that growth or an import writes."""
    if leaf.files is None:
        return leaf.chunk_bytes
    return len(chunks_of(leaf, file)) * pitch(leaf) + index_bytes(leaf)


def make_index(leaf: layout.Leaf, file: Sequence[int]) -> bytes:
    """The index of a file whose chunks lie at multiples of `pitch`, in the order of `chunks_of`."""
    entries = np.full((math.prod(leaf.per_file), 2), _MISSING, "<u8")
    for position, chunk in enumerate(chunks_of(leaf, file)):
        entries[entry_of(leaf, chunk)] = position * pitch(leaf), leaf.chunk_bytes
    data = entries.tobytes()
    return data + crc32c(data).to_bytes(layout.CRC_BYTES, "little")


def parse_index(leaf: layout.Leaf, data: bytes) -> np.ndarray | None:
    """The uint64[n, 2] offsets and sizes in an index; None where it is damaged."""
    content, checksum = data[: -layout.CRC_BYTES], data[-layout.CRC_BYTES :]
    if len(data) != index_bytes(leaf) or crc32c(content) != int.from_bytes(checksum, "little"):
        return None
    return np.frombuffer(content, "<u8").reshape(-1, 2)


def array_files(items: Mapping[str, Mapping[str, layout.Leaf]]) -> Iterator[str]:
    """The paths of all files of the arrays of a checkpoint, inside its step directory; Orbax's documents come beside.

    items: as Meta.items has them.
    """
    for item, leaves in items.items():
        for name, leaf in leaves.items():
            yield f"{item}/{name}/zarr.json"
            for file in itertools.product(*map(range, leaf.file_grid)):
                yield f"{item}/{name}/{layout.chunk_key(file)}"
