"""Chunk files read and written directly: a chunk is its numbers and their CRC-32C, and nothing else.

TensorStore reads and writes the same files, and saving, loading and single reads use it. But it allocates a chunk three
times on the way, which takes more time than the copying, and memory that cannot be counted beforehand: for what has a
budget and moves terabytes (growth.stream, imports, the verification of what is stored), there are these.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from tele_jax.checkpoint import layout
from tele_jax.errors import DamageError

if TYPE_CHECKING:  # it brings TensorStore
    from tele_jax.checkpoint.lazy import LazyArray

_PAGE_BYTES = 4096  # what O_DIRECT asks of addresses and sizes, at most
_DIRECT_BYTES = 2**20  # from here on a file is written past the page cache


class ChunkCache:
    """A cache of the chunks that were read last, each checked once when it is read. Safe for threads.

    cache = ChunkCache(slots=4, nbytes=2**27)
    with cache.chunk(array, (3, 0)) as values: ...
    """

    def __init__(self, slots: int, nbytes: int):
        """Allocates `slots` buffers (at least one a thread) of `nbytes`, the size of the largest chunk file."""
        self.bytes_read = 0
        self._buffers = [allocate(nbytes) for _ in range(slots)]  # reused: fresh memory is slow to touch
        self._entries: collections.OrderedDict[Any, _Entry] = collections.OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def chunk(self, array: "LazyArray", index: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yields a whole chunk, padded at the edge of the leaf; callers neither change nor keep it.

        Raises:
          DamageError: the file is missing or damaged; names leaf and file.
        """
        key = (array.name, index)
        with self._lock:
            entry = self._entries.get(key)
            is_new = entry is None
            if is_new:
                entry = self._entries[key] = _Entry(self._take_buffer())
            entry.users += 1
            self._entries.move_to_end(key)
        try:
            if is_new:
                self._read(array, index, entry)
            entry.ready.wait()
            if entry.error is not None:
                raise entry.error
            yield entry.buffer[: array.leaf.chunk_bytes - layout.CRC_BYTES].view(array.dtype).reshape(array.chunks)
        finally:
            with self._lock:
                entry.users -= 1
                if entry.error is not None and not entry.users:
                    self._buffers.append(self._entries.pop(key).buffer)

    def _take_buffer(self) -> np.ndarray:
        if self._buffers:
            return self._buffers.pop()
        oldest = next(key for key, entry in self._entries.items() if not entry.users)
        return self._entries.pop(oldest).buffer

    def _read(self, array: "LazyArray", index: tuple[int, ...], entry: "_Entry") -> None:
        try:
            read_chunk(array, index, entry.buffer)
            with self._lock:
                self.bytes_read += array.leaf.chunk_bytes
        except BaseException as error:
            entry.error = error
        finally:
            entry.ready.set()


@dataclasses.dataclass(eq=False)
class _Entry:
    buffer: np.ndarray
    users: int = 0
    error: BaseException | None = None
    ready: threading.Event = dataclasses.field(default_factory=threading.Event)


def read_chunk(array: "LazyArray", index: tuple[int, ...], buffer: np.ndarray) -> None:
    """Reads a chunk file into the beginning of uint8[n]. Raises DamageError naming the leaf and the file."""
    file, size = array.path / layout.chunk_key(index), array.leaf.chunk_bytes
    with _open_chunk(array, index) as stream:
        view, filled = buffer.data[:size], 0
        while count := stream.readinto(view[filled:]):
            filled += count
    stored = int.from_bytes(buffer[size - layout.CRC_BYTES : size].tobytes(), "little")
    if filled < size or crc32c(buffer[: size - layout.CRC_BYTES].data) != stored:
        raise DamageError(f"{array.name}: damaged: {file}: its checksum is not that of its content")


def fingerprint(arrays: Iterable["LazyArray"]) -> str:
    """Computes one SHA-256 from the checksums at the ends of all chunks of the arrays: reads 4 bytes a file.

    Raises:
      DamageError: a chunk is missing or of another size.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.name} {array.leaf} {array.chunks}\n".encode())
        for index in itertools.product(*map(range, array.leaf.grid)):
            with _open_chunk(array, index) as stream:
                stream.seek(-layout.CRC_BYTES, os.SEEK_END)
                digest.update(stream.read(layout.CRC_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def _open_chunk(array: "LazyArray", index: tuple[int, ...]) -> Iterator[FileIO]:
    file = os.fspath(array.path / layout.chunk_key(index))
    try:
        with open(file, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != array.leaf.chunk_bytes:
                raise DamageError(f"{array.name}: damaged: {file}: {size:,} bytes, expected {array.leaf.chunk_bytes:,}")
            yield stream
    except FileNotFoundError:
        raise DamageError(f"{array.name}: damaged: {file} is missing") from None


def allocate(nbytes: int) -> np.ndarray:
    """Allocates uninitialised uint8[n], n >= nbytes, for write_chunk; it begins and ends at a page of memory."""
    memory = mmap.mmap(-1, -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def write_chunk(file: Path, buffer: np.ndarray, size: int) -> None:
    """Writes the first `size` bytes of an `allocate`d buffer, the last 4 of them replaced by the checksum.

    Directories are made. Large files are written past the page cache: filling it takes more time than everything else
    here, and terabytes would drive out of it what others need.
    """
    checksum = crc32c(buffer[: size - layout.CRC_BYTES].data)
    buffer[size - layout.CRC_BYTES : size] = np.frombuffer(checksum.to_bytes(layout.CRC_BYTES, "little"), np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    if size >= _DIRECT_BYTES and hasattr(os, "O_DIRECT") and _write_directly(file, buffer, size):
        return
    with open(file, "wb", buffering=0) as stream:
        _write_all(stream.fileno(), buffer[:size])


def _write_directly(file: Path, buffer: np.ndarray, size: int) -> bool:
    """Writes whole pages past the page cache, and cuts the file to size. False where the file system cannot do that."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    try:
        _write_all(descriptor, buffer[: -(-size // _PAGE_BYTES) * _PAGE_BYTES])
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def _write_all(descriptor: int, data: np.ndarray) -> None:
    view = data.data
    while view:
        view = view[os.write(descriptor, view) :]


def flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
