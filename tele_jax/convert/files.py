"""Safetensors files: eight bytes with the length of a JSON header, the header, then the numbers of every tensor.

Headers are read and written here, and not by the package `safetensors`: an export writes pieces of tensors that are
never whole in memory, an import reads such pieces into memory that it has already (the package maps the file or copies
whole tensors), and the headers of a model of 2 TB have to be made without its weights.
"""

import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tele_jax.convert.families import Tensor
from tele_jax.errors import UserError
from tele_jax.files import Table, read_table, require_no_pointer, require_regular

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": jnp.dtype("float64"),
    "F32": jnp.dtype("float32"),
    "F16": jnp.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
}
# Of dtypes that no weight of ours has, but buffers beside them may: masks, positions.
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_BUFFERS = 512  # in one call; systems allow 1,024
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file. offset: of its first byte in the file. dtype: its name in the format, such as BF16."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def read(self, files: "Files", places: np.ndarray, rows: np.ndarray) -> None:
        """Fills rows, unsigned integers [n, m] of the dtype's size, with the numbers from places int64[n] on."""
        files.read(self.file, self.offset + places * rows.itemsize, rows.view(np.uint8))

    def __str__(self) -> str:
        return f"{self.file.name}: {self.name}"


def read_directory(path: Path) -> dict[str, Stored]:
    """All tensors of a released checkpoint, by name; reads headers only.

    As transformers does it: model.safetensors is the checkpoint where it is there, else the files that the index names;
    other files beside them (of an adapter, of another program) are left alone. Without either, all files together.

    Raises:
      UserError: no safetensors, pickle files instead, a shard that is missing, or not what the index says; a file is
        cut short or its header is damaged.
    """
    if os.path.lexists(path / SINGLE):
        return read_header(path / SINGLE)
    indexes = list(path.glob(f"*{INDEX.removeprefix('model')}"))
    if path / INDEX in indexes or len(indexes) == 1:
        return _read_indexed(path / INDEX if path / INDEX in indexes else indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file for pattern in _PICKLES for file in path.glob(pattern))
        if pickles:
            raise UserError(
                f"{pickles[0]}: a PyTorch pickle file, which can run any program when it is read; convert it to "
                "safetensors where you trust it (transformers: model.save_pretrained(DIR)) and import that"
            )
        raise UserError(f"{path}: no *.safetensors file")
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in tensors:
                raise UserError(f"{file}: {name} is in {tensors[name].file.name} as well, and there is no {INDEX}")
            tensors[name] = stored
    return tensors


def _read_indexed(index: Path) -> dict[str, Stored]:
    try:
        places = dict(read_table(index)["weight_map"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: damaged, not an index of safetensors ({error!r})") from None
    for tensor, place in places.items():
        if not isinstance(place, str) or not place:
            raise UserError(f"{index}: damaged, {tensor} is placed in {place!r}, which is no name of a file")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        file = index.with_name(Path(name).name or "-")
        listed = sorted(tensor for tensor, place in places.items() if place == name)
        if Path(name).name != name:
            raise UserError(f"{index}: {listed[0]} is placed in {name!r}, which is no file beside it")
        missing = f"missing; {index.name} has {len(listed)} tensors in it, such as {listed[0]}"
        header = read_header(file, missing=missing)
        if absent := [tensor for tensor in listed if tensor not in header]:
            raise UserError(f"{file}: has no {absent[0]}, though {index.name} says so ({len(absent)} such tensors)")
        if extra := sorted(header.keys() - set(listed)):
            raise UserError(
                f"{file}: has {extra[0]}, which {index.name} does not place there ({len(extra)} such tensors)"
            )
        tensors |= header
    return tensors


def read_header(file: Path, missing: str = "") -> dict[str, Stored]:
    """The tensors of one file. Raises UserError naming the file, and the tensor where one is at fault.

    missing: what to say where there is none.
    """
    size = require_regular(file, missing=missing)
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
            require_no_pointer(start, str(file))
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise UserError(
                    f"{file}: damaged or cut short: {size:,} bytes cannot hold the header that it announces"
                )
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_no_doubles)
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, file, 8 + length, entry) for name, entry in header.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged: its header is not that of a safetensors file ({error})") from None
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if stored.offset != end:
            raise UserError(f"{stored}: damaged: its numbers do not begin where those of the tensor before end")
        end += stored.nbytes
        if end > size:
            raise UserError(
                f"{file}: cut short: {stored.name} ends at byte {end:,}, but the file has {size:,}; fetch it again"
            )
    if end != size:
        raise UserError(f"{file}: damaged: {size - end:,} bytes behind the last tensor")
    return tensors


def _no_doubles(pairs: Sequence[tuple[str, Any]]) -> Table:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _stored(name: str, file: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name}: {entry}")
    if entry["dtype"] not in _ITEM_BYTES:
        raise UserError(f"{file}: {name} is of dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
    stored = Stored(name, file, start + begin, shape, entry["dtype"])
    if end - begin != stored.nbytes:
        raise ValueError(f"{name}: {end - begin:,} bytes for {entry['dtype']}{list(shape)}")
    return stored


# ---- writing -----------------------------------------------------------------------------------------------------


def split(tensors: Sequence[Tensor], shard_bytes: int) -> dict[str, list[Tensor]]:
    """The files of a checkpoint: each of at most shard_bytes of numbers, unless a tensor alone has more."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def header(tensors: Iterable[Tensor]) -> bytes:
    """The first bytes of a file: everything before the numbers."""
    table: Table = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        dtype = _NAMES[jnp.dtype(tensor.dtype)]
        table[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def create(path: Path, shards: Mapping[str, Sequence[Tensor]]) -> dict[str, Stored]:
    """Makes the files of a checkpoint, of their full size and with their headers, but without numbers."""
    stored: dict[str, Stored] = {}
    for name, tensors in shards.items():
        first = header(tensors)
        offset = len(first)
        for tensor in tensors:
            dtype = _NAMES[jnp.dtype(tensor.dtype)]
            stored[tensor.name] = Stored(tensor.name, path / name, offset, tensor.shape, dtype)
            offset += tensor.nbytes
        with (path / name).open("wb") as stream:
            stream.write(first)
            stream.truncate(offset)
    if len(shards) > 1:
        places = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (path / INDEX).write_text(json.dumps(document, indent=2) + "\n")
    return stored


# ---- pieces ------------------------------------------------------------------------------------------------------


class Files:
    """Open files, for threads to read or write rows of bytes in."""

    def __init__(self, flags: int = os.O_RDONLY):
        self._flags, self._open, self._lock = flags | os.O_CLOEXEC, {}, threading.Lock()

    def read(self, file: Path, offsets: np.ndarray, rows: np.ndarray) -> None:
        """Fills the rows of uint8[n, m] from bytes that begin at offsets int64[n]. Raises UserError."""
        self._transfer(os.preadv, file, offsets, rows)

    def write(self, file: Path, offsets: np.ndarray, rows: np.ndarray) -> None:
        """Writes the rows of uint8[n, m] to bytes that begin at offsets int64[n]."""
        self._transfer(os.pwritev, file, offsets, rows)

    def _transfer(self, call, file: Path, offsets: np.ndarray, rows: np.ndarray) -> None:
        count, width = rows.shape
        descriptor = self._descriptor(file)
        breaks = np.flatnonzero(np.diff(offsets) != width) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), count], strict=True):
            whole = rows.strides[0] == width or end - begin == 1
            buffers = [rows[begin:end].reshape(-1)] if whole else list(rows[begin:end])
            position = int(offsets[begin])
            while buffers:
                try:
                    moved = call(descriptor, buffers[:_MAX_BUFFERS], position)
                except OSError as error:
                    if call is os.preadv:
                        raise UserError(f"{file}: could not be read at byte {position:,} ({error.strerror})") from None
                    raise
                if moved == 0:
                    raise UserError(f"{file}: cut short at byte {position:,} while it was read")
                position += moved
                while buffers and moved >= len(buffers[0]):
                    moved -= len(buffers.pop(0))
                if moved:
                    buffers[0] = buffers[0][moved:]

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, self._flags)
                except OSError as error:
                    raise UserError(f"{file}: {error.strerror}") from None
            return self._open[file]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
