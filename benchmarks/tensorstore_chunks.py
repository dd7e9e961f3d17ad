"""Chunk files read and written by TensorStore, in the place of checkpoint/chunk_files.py, to compare the two.

    JAX_PLATFORMS=cpu python benchmarks/grow_stream.py --io tensorstore

`install` replaces the two functions that touch chunk files; all else of the writer (memory, threads, journal, flushes)
stays. The figures of both are in docs/grow_stream.md.
"""

import functools
from pathlib import Path

import numpy as np
import tensorstore as ts

from tele_jax.checkpoint import chunk_files, chunked, layout
from tele_jax.errors import DamageError


def install() -> None:
    """From here on TensorStore reads and writes every chunk."""
    chunked.write_chunk = write_chunk
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


def write_chunk(file: Path, buffer: np.ndarray, size: int) -> None:
    """Writes a chunk as chunk_files.write_chunk does: file is <array>/c/<i>/<j>, buffer holds its numbers first."""
    parts = file.parts
    at = len(parts) - 1 - parts[::-1].index("c")
    store = _open(str(Path(*parts[:at])))
    chunk = store.chunk_layout.read_chunk.shape or ()
    values = buffer[: size - layout.CRC_BYTES].view(store.dtype.numpy_dtype).reshape(chunk)
    part = _part(store, tuple(map(int, parts[at + 1 :])))
    inside = values[tuple(slice(s.stop - s.start) for s in part)]
    store[part].write(inside, can_reference_source_data_indefinitely=True).result()


def read_chunk(array, index: tuple[int, ...], buffer: np.ndarray) -> None:
    """Reads a chunk as chunk_files.read_chunk does, into the beginning of buffer."""
    try:
        values = array.tensorstore[_part(array.tensorstore, index)].read().result()
    except ValueError as error:
        raise DamageError(f"{array.name}: damaged: {error}") from None
    whole = buffer[: array.leaf.chunk_bytes - layout.CRC_BYTES].view(array.dtype).reshape(array.chunks)
    whole[tuple(slice(n) for n in values.shape)] = values
