"""Chunk files read and written by TensorStore, in the place of checkpoint/chunk_files.py, to compare the two.

    JAX_PLATFORMS=cpu python benchmarks/grow_stream.py --io tensorstore

`install` replaces the function that reads a chunk and the class that writes a file; all else of the writer (memory,
threads, journal, flushes) stays, but TensorStore needs a whole file in memory. The figures of both are in
docs/grow_stream.md.
"""

import functools
from pathlib import Path

import numpy as np
import tensorstore as ts

from tele_jax.checkpoint import chunk_files, layout
from tele_jax.errors import DamageError


def install() -> None:
    """From here on TensorStore reads and writes every chunk."""
    chunk_files.FileWriter = FileWriter
    chunk_files.read_chunk = read_chunk


@functools.cache
def _open(directory: str) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, open=True, read=True, write=True).result()


def _part(store: ts.TensorStore, index: tuple[int, ...]) -> tuple[slice, ...]:
    chunks = store.chunk_layout.read_chunk.shape or ()  # of a scalar TensorStore says None
    return tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunks, store.shape, strict=True))


class FileWriter:
    """Writes a file as chunk_files.FileWriter does, in one request when all its chunks are there."""

    def __init__(self, file: Path, leaf: layout.Leaf, index: tuple[int, ...]):
        """file: <array>/c/<i>/<j>."""
        self._store = _open(str(file.parents[len(index)] if index else file.parent))
        box = zip(index, leaf.files or leaf.chunks, leaf.spec.shape, strict=True)
        self._part = tuple(slice(i * n, min((i + 1) * n, whole)) for i, n, whole in box)
        self._leaf = leaf
        self._values = np.empty([part.stop - part.start for part in self._part], leaf.spec.dtype)

    def __enter__(self) -> "FileWriter":
        return self

    def write(self, chunk: tuple[int, ...], buffer: np.ndarray) -> None:
        leaf = self._leaf
        values = buffer[: leaf.chunk_bytes - layout.CRC_BYTES].view(leaf.spec.dtype).reshape(leaf.chunks)
        starts = [c * n - part.start for c, n, part in zip(chunk, leaf.chunks, self._part, strict=True)]
        there = self._values[tuple(slice(s, s + n) for s, n in zip(starts, leaf.chunks, strict=True))]
        there[...] = values[tuple(slice(n) for n in there.shape)]

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._store[self._part].write(self._values, can_reference_source_data_indefinitely=True).result()


def read_chunk(array, index: tuple[int, ...], buffer: np.ndarray) -> None:
    """Reads a chunk as chunk_files.read_chunk does, into the beginning of buffer."""
    try:
        values = array.tensorstore[_part(array.tensorstore, index)].read().result()
    except ValueError as error:
        raise DamageError(f"{array.name}: damaged: {error}") from None
    whole = buffer[: array.leaf.chunk_bytes - layout.CRC_BYTES].view(array.dtype).reshape(array.chunks)
    whole[tuple(slice(n) for n in values.shape)] = values
