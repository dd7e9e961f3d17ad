"""Chunks read and written directly: a chunk is its numbers and their CRC-32C, and nothing else; packing.py says where.

TensorStore reads and writes the same files, and saving, loading and single reads use it. But it allocates a chunk three
times on the way, which takes more time than the copying, and memory that cannot be counted beforehand: for what has a
budget and moves terabytes (growth.stream, imports, the verification of what is stored), there are these.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
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

from tele_jax.checkpoint import layout, packing
from tele_jax.errors import DamageError

if TYPE_CHECKING:  # it brings TensorStore
    from tele_jax.checkpoint.lazy import LazyArray

_PAGE_BYTES = 4096  # what O_DIRECT asks of addresses and sizes, at most


class ChunkCache:
    """A cache of the chunks that were read last, each checked once when it is read. Safe for threads.

    cache = ChunkCache(slots=4, nbytes=2**27)
    with cache.chunk(array, (3, 0)) as values: ...
    """

    def __init__(self, slots: int, nbytes: int):
        """Allocates `slots` buffers (at least one a thread) of `nbytes`, the size of the largest chunk."""
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
    """Reads a chunk into the beginning of uint8[n]. Raises DamageError naming the leaf and the file."""
    size = array.leaf.chunk_bytes
    with _open_chunk(array, index) as (stream, start):
        stream.seek(start)
        view, filled = buffer.data[:size], 0
        while count := stream.readinto(view[filled:]):
            filled += count
    stored = int.from_bytes(buffer[size - layout.CRC_BYTES : size].tobytes(), "little")
    if filled < size or crc32c(buffer[: size - layout.CRC_BYTES].data) != stored:
        raise DamageError(f"{array.name}: damaged: {_file(array, index)}: its checksum is not that of its content")


def fingerprint(arrays: Iterable["LazyArray"]) -> str:
    """Computes one SHA-256 from the checksums at the ends of all chunks of the arrays: reads 4 bytes of each.

    Raises:
      DamageError: a chunk is missing or of another size.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.name} {array.leaf} {array.chunks}\n".encode())
        for index in itertools.product(*map(range, array.leaf.grid)):
            with _open_chunk(array, index) as (stream, start):
                stream.seek(start + array.leaf.chunk_bytes - layout.CRC_BYTES)
                digest.update(stream.read(layout.CRC_BYTES))
    return digest.hexdigest()


def _file(array: "LazyArray", index: tuple[int, ...]) -> str:
    return os.fspath(array.path / layout.chunk_key(packing.file_of(array.leaf, index)))


@contextlib.contextmanager
def _open_chunk(array: "LazyArray", index: tuple[int, ...]) -> Iterator[tuple[FileIO, int]]:
    """Opens the file that a chunk lies in; yields it with the position of the chunk."""
    file, leaf = _file(array, index), array.leaf
    try:
        with open(file, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            if leaf.files is None:
                if size != leaf.chunk_bytes:
                    raise DamageError(f"{array.name}: damaged: {file}: {size:,} bytes, expected {leaf.chunk_bytes:,}")
                yield stream, 0
                return
            entries = array.indexes.get(file)
            if entries is None:
                entries = array.indexes[file] = _read_index(array, stream, size, file)
            offset, length = map(int, entries[packing.entry_of(leaf, index)])
            if length != leaf.chunk_bytes or offset + length > size:
                raise DamageError(f"{array.name}: damaged: {file}: its index has no chunk {list(index)}")
            yield stream, offset
    except FileNotFoundError:
        raise DamageError(f"{array.name}: damaged: {file} is missing") from None


def _read_index(array: "LazyArray", stream: FileIO, size: int, file: str) -> np.ndarray:
    length = packing.index_bytes(array.leaf)
    stream.seek(max(0, size - length))
    entries = packing.parse_index(array.leaf, stream.read(length))
    if entries is None:
        raise DamageError(f"{array.name}: damaged: {file}: {size:,} bytes, and no index with its checksum at their end")
    return entries


def allocate(nbytes: int) -> np.ndarray:
    """Allocates uninitialised uint8[n], n >= nbytes, for FileWriter; it begins and ends at a page of memory."""
    memory = mmap.mmap(-1, -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class FileWriter:
    """Writes the chunks of one file, in any order, and the index behind them. Directories are made.

    Large chunks are written past the page cache: filling it takes more time than everything else here, and terabytes
    would drive out of it what others need.
    """

    def __init__(self, file: Path, leaf: layout.Leaf, index: tuple[int, ...]):
        """index: of the file, in leaf.file_grid."""
        self._path, self._leaf, self._index = file, leaf, index
        self._positions = {chunk: at for at, chunk in enumerate(packing.chunks_of(leaf, index))}

    def __enter__(self) -> "FileWriter":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._direct = self._leaf.chunk_bytes >= packing.DIRECT_BYTES and hasattr(os, "O_DIRECT")
        return self

    def write(self, chunk: tuple[int, ...], buffer: np.ndarray) -> None:
        """Writes the first leaf.chunk_bytes of an `allocate`d buffer, the last 4 of them replaced by the checksum."""
        size, start = self._leaf.chunk_bytes, self._positions[chunk] * packing.pitch(self._leaf)
        checksum = crc32c(buffer[: size - layout.CRC_BYTES].data)
        buffer[size - layout.CRC_BYTES : size] = np.frombuffer(checksum.to_bytes(layout.CRC_BYTES, "little"), np.uint8)
        if self._direct:
            self._direct = self._write_directly(buffer[: -(-size // _PAGE_BYTES) * _PAGE_BYTES], start)
        if not self._direct:
            _write_all(self._descriptor, buffer[:size], start)

    def _write_directly(self, pages: np.ndarray, start: int) -> bool:
        """Writes whole pages past the page cache. False where the file system cannot do that."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            _write_all(self._descriptor, pages, start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        finally:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
        return True

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                end = packing.file_bytes(self._leaf, self._index)
                if self._leaf.files is not None:
                    index = np.frombuffer(packing.make_index(self._leaf, self._index), np.uint8)
                    _write_all(self._descriptor, index, end - len(index))
                os.ftruncate(self._descriptor, end)  # of a chunk alone, the rest of its last page
        finally:
            os.close(self._descriptor)


def _write_all(descriptor: int, data: np.ndarray, start: int) -> None:
    view = data.data
    while view:
        count = os.pwrite(descriptor, view, start)
        view, start = view[count:], start + count


def flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
