"""Leaves of a checkpoint on their way from the devices to files: how they are cut, copied to the host, and written.

TensorStore writes the arrays, by a type handler of ours for Orbax, because Orbax's own fixes the codecs of its zarr3
arrays, and those carry no checksum of the data.
"""

import asyncio
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import future

from tele_jax.axes import Leaf, Leaves, ParamSpec
from tele_jax.checkpoint import layout, packing
from tele_jax.checkpoint.lazy import kvstore
from tele_jax.errors import UserError

_CONTEXT = ts.Context({"file_io_concurrency": {"limit": 32}})
_ENCODED_BYTES = 2 * 2**30  # of files that are being written, beside the copies of the leaves
_AT_ONCE = 32  # files


@dataclasses.dataclass(frozen=True, eq=False)
class HostLeaf:
    """A copy of a leaf on the host. pieces: the parts that this process writes, as (index, values): whole files."""

    leaf: layout.Leaf
    pieces: tuple[tuple[tuple[slice, ...], np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the pieces; Orbax reads this for its log."""
        return sum(values.nbytes for _, values in self.pieces)


def describe_leaves(leaves: Leaves, params: Mapping[str, ParamSpec], item: str) -> dict[str, layout.Leaf]:
    """Decides how each leaf of an item is stored.

    leaves: jax or numpy arrays, Python numbers, or jax.ShapeDtypeStruct with shardings, for a count without arrays.
    params: the parameters by name; a leaf that belongs to one (a moment of Adam) has its axes and is cut like it.

    Raises:
      UserError: a leaf that is not numeric, or a typed PRNG key.
    """
    return {name: _describe_leaf(f"{item}: {name}", name, value, params) for name, value in leaves.items()}


def _describe_leaf(where: str, name: str, value: Leaf, params: Mapping[str, ParamSpec]) -> layout.Leaf:
    scalar = _is_number(value)
    array = np.asarray(value) if scalar else value
    dtype = getattr(array, "dtype", None)
    if dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        raise UserError(f"{where}: a typed PRNG key cannot be stored; keep jax.random.key_data of it in the state")
    if dtype is None or np.dtype(dtype).kind in "OSUMm":
        raise UserError(f"{where}: {type(value).__name__} cannot be stored; leaves must be arrays or numbers")
    owner = params.get(layout.matching_param(name, array.shape, params) or "")
    spec = ParamSpec(
        tuple(array.shape),
        np.dtype(dtype),
        *((owner.stack, owner.inputs, owner.outputs) if owner else ()),
    )
    part = tuple(array.shape) if _is_local(value) else _part(value)
    size = spec.dtype.itemsize
    chunks = layout.chunk_shape(spec.shape, size, stacked=len(spec.stack), shard=part)
    files = packing.file_shape(spec.shape, chunks, size, limit=packing.FILE_BYTES, part=part)
    return layout.Leaf(spec, chunks, scalar, files)


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and not isinstance(value, np.generic)


def _is_local(array: object) -> bool:
    sharding = getattr(array, "sharding", None)
    return sharding is None or sharding.is_fully_addressable


def _part(array: Any) -> tuple[int, ...]:
    """Shape of the parts of an array over several processes that one process writes: what some of its devices hold."""
    shard = array.sharding.shard_shape(array.shape)
    owners = np.full([n // max(1, size) for n, size in zip(array.shape, shard, strict=True)], -1)
    # In this order JAX numbers the replicas of a piece; `_owned_shards` takes the first.
    for device, index in array.sharding.devices_indices_map(tuple(array.shape)).items():
        at = tuple((part.start or 0) // max(1, size) for part, size in zip(index, shard, strict=True))
        if owners[at] < 0:
            owners[at] = device.process_index
    return tuple(n * size for n, size in zip(packing.single_owner_part(owners), shard, strict=True))


def copy_to_host(leaves: Leaves, described: Mapping[str, layout.Leaf]) -> dict[str, HostLeaf]:
    """Copies what this process has to write. On return the arrays may be changed or donated."""
    for value in leaves.values():
        for _, data in _owned_shards(value):
            data.copy_to_host_async()
    return {name: HostLeaf(described[name], _pieces(value)) for name, value in leaves.items()}


def _owned_shards(value: object) -> list[tuple[tuple[slice, ...], jax.Array]]:
    """Lists (index, data) of what this process writes: one replica of every part of an array, in one process."""
    shards = value.addressable_shards if isinstance(value, jax.Array) else []
    return [(s.index, s.data) for s in shards if s.replica_id == 0 and s.data is not None]


def _pieces(value: object) -> tuple[tuple[tuple[slice, ...], np.ndarray], ...]:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return _gathered(value)
    if jax.process_index() != 0:
        return ()  # the same on every process
    if not isinstance(value, jax.Array):
        return (((), np.array(value)),)
    # One process has it all: one piece, so that shards that share a file do not rewrite it.
    whole = np.empty(value.shape, value.dtype)
    for index, data in _owned_shards(value):
        whole[index] = np.asarray(data)
    return (((), whole),)


def _gathered(value: jax.Array) -> tuple[tuple[tuple[slice, ...], np.ndarray], ...]:
    """The parts of `_part` that this process writes, each in one array."""
    part = _part(value)
    parts: dict[tuple[int, ...], np.ndarray] = {}
    for index, data in _owned_shards(value):
        start = tuple(i.indices(n)[0] for i, n in zip(index, value.shape, strict=True))
        origin = tuple(s // max(1, n) * n for s, n in zip(start, part, strict=True))
        whole = parts.setdefault(origin, np.empty(part, value.dtype))
        whole[tuple(slice(s - o, s - o + n) for s, o, n in zip(start, origin, data.shape, strict=True))] = data
    return tuple(
        (tuple(slice(o, o + n) for o, n in zip(origin, part, strict=True)), whole) for origin, whole in parts.items()
    )


class HostLeafHandler(ocp.type_handlers.TypeHandler):
    """Writes HostLeaf by TensorStore; Orbax notes them as numpy arrays, which it restores without further arguments."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Sequence[object]) -> Sequence[object]:
        raise NotImplementedError("tele_jax reads arrays in lazy.py")

    async def deserialize(self, infos: Sequence[object], args: Sequence[object] | None = None) -> Sequence[object]:
        raise NotImplementedError("tele_jax reads arrays in lazy.py")

    async def serialize(
        self, values: Sequence[HostLeaf], infos: Sequence[object], args: object = None
    ) -> Sequence[Any]:
        leaves = [value.leaf for value in values]
        largest = max((math.prod(x.files or x.chunks) * x.spec.dtype.itemsize for x in leaves), default=1)

        async def write_all() -> None:
            room = asyncio.Semaphore(min(_AT_ONCE, max(2, _ENCODED_BYTES // max(1, largest))))
            await asyncio.gather(*(_write(value, info, room) for value, info in zip(values, infos, strict=True)))

        return [future.CommitFutureAwaitingContractedSignals(write_all(), name="tele_jax_arrays")]


async def _write(value: HostLeaf, info: Any, room: asyncio.Semaphore) -> None:
    await info.await_path_creation()
    first = jax.process_index() == 0
    if not first and not value.pieces:
        return
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(info.parent_dir / info.name),
        "metadata": layout.zarr_metadata(value.leaf),
        # A chunk of zeros is written like any other, so that a chunk that is not there is always damage.
        "store_data_equal_to_fill_value": True,
    }
    # One process writes zarr.json; the others cannot know when it is there, nor need to.
    store = await ts.open(spec, context=_CONTEXT, create=first, open=not first, assume_metadata=not first)

    async def write_file(index: tuple[slice, ...], values: np.ndarray) -> None:
        async with room:  # a file is put together in memory
            await store[index].write(values, can_reference_source_data_indefinitely=True)

    files = [file for index, values in value.pieces for file in _by_file(value.leaf, index, values)]
    await asyncio.gather(*(write_file(*file) for file in files))


def _by_file(leaf: layout.Leaf, index: tuple[slice, ...], values: np.ndarray) -> list[tuple[tuple[slice, ...], Any]]:
    """Cuts a piece into what lies in one file each. index: of the piece in the leaf; () where it is all of it."""
    starts = [part.start for part in index] if index else [0] * values.ndim
    cuts = []
    for start, size, step in zip(starts, values.shape, leaf.files or leaf.chunks, strict=True):
        cuts.append([slice(at, min(at + step, start + size)) for at in range(start, start + size, step)])
    return [
        (box, values[tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, starts, strict=True))])
        for box in itertools.product(*cuts)
    ]
