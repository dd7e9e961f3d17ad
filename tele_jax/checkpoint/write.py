"""From arrays on devices to files: copies to the host at once, then writes in the background, under Orbax.

Orbax makes a save atomic (it writes into a temporary directory and renames it), asynchronous, and the same on one
process and on many. The arrays themselves are written here, by a type handler of ours, because Orbax's own fixes the
codecs of its zarr3 arrays, and those carry no checksum of the data.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from tele_jax.axes import ParamSpec, unflatten
from tele_jax.checkpoint import layout
from tele_jax.checkpoint.store import kvstore
from tele_jax.errors import DamageError, UserError

_CONTEXT = ts.Context({"file_io_concurrency": {"limit": 32}})


@dataclasses.dataclass(frozen=True, eq=False)
class HostLeaf:
    """A leaf as it was when it was copied. pieces: what this process writes, as (index, values)."""

    leaf: layout.Leaf
    pieces: tuple[tuple[tuple[slice, ...], np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        """Read by Orbax, for its log."""
        return sum(values.nbytes for _, values in self.pieces)


def describe_leaves(leaves: Mapping[str, Any], params: Mapping[str, ParamSpec], item: str) -> dict[str, layout.Leaf]:
    """How each leaf (jax or numpy array, or Python scalar) of an item will be stored.

    params: the parameters by name; a leaf that belongs to one (a moment of Adam) has its axes and is cut like it.

    Raises:
      UserError: a leaf that is not numeric, or a typed PRNG key.
    """
    return {name: _describe_leaf(f"{item}: {name}", name, value, params) for name, value in leaves.items()}


def _describe_leaf(where: str, name: str, value: Any, params: Mapping[str, ParamSpec]) -> layout.Leaf:
    scalar = isinstance(value, (bool, int, float)) and not isinstance(value, np.generic)
    array = np.asarray(value) if scalar else value
    dtype = getattr(array, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise UserError(f"{where}: a typed PRNG key cannot be stored; keep jax.random.key_data of it in the state")
    if dtype is None or np.dtype(dtype).kind in "OSUMm":
        raise UserError(f"{where}: {type(value).__name__} cannot be stored; leaves must be arrays or numbers")
    owner = params.get(layout.matching_param(name, array.shape, params))
    spec = ParamSpec(
        tuple(array.shape),
        np.dtype(dtype),
        *((owner.stack, owner.inputs, owner.outputs) if owner else ()),
    )
    shard = array.shape if _is_local(array) else array.sharding.shard_shape(array.shape)
    chunks = layout.chunk_shape(spec.shape, spec.dtype.itemsize, stacked=len(spec.stack), shard=shard)
    return layout.Leaf(spec, chunks, scalar)


def _is_local(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def copy_to_host(leaves: Mapping[str, Any], described: Mapping[str, layout.Leaf]) -> dict[str, HostLeaf]:
    """Copies what this process has to write. On return the arrays may be changed or donated."""
    for value in leaves.values():
        for shard in _owned_shards(value):
            shard.data.copy_to_host_async()
    return {name: HostLeaf(described[name], _pieces(value)) for name, value in leaves.items()}


def _owned_shards(value: Any) -> list[jax.Shard]:
    """Of every part of an array, one replica in one process."""
    return [s for s in value.addressable_shards if s.replica_id == 0] if isinstance(value, jax.Array) else []


def _pieces(value: Any) -> tuple[tuple[tuple[slice, ...], np.ndarray], ...]:
    if not _is_local(value):
        return tuple((shard.index, np.array(shard.data)) for shard in _owned_shards(value))
    if jax.process_index() != 0:
        return ()  # the same on every process
    if not isinstance(value, jax.Array):
        return (((), np.array(value)),)
    # One process has it all: one piece, so that shards that share a chunk do not rewrite each other's file.
    whole = np.empty(value.shape, value.dtype)
    for shard in _owned_shards(value):
        whole[shard.index] = np.asarray(shard.data)
    return (((), whole),)


class _HostLeafHandler(ocp.type_handlers.TypeHandler):
    """Writes HostLeaf by TensorStore; Orbax notes them as numpy arrays, which it restores without further arguments."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("tele_jax reads arrays in store.py")

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("tele_jax reads arrays in store.py")

    async def serialize(self, values: Sequence[HostLeaf], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        async def write_all() -> None:
            await asyncio.gather(*(_write(value, info) for value, info in zip(values, infos, strict=True)))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write_all(), name="tele_jax_arrays")]


async def _write(value: HostLeaf, info: Any) -> None:
    await info.await_path_creation()
    first = jax.process_index() == 0
    if not first and not value.pieces:
        return
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(info.parent_dir / info.name),
        "metadata": layout.zarr_metadata(value.leaf),
        # A chunk of zeros is a file like any other, so that a chunk that is not there is always damage.
        "store_data_equal_to_fill_value": True,
    }
    # One process writes zarr.json; the others cannot know when it is there, nor need to.
    mode = {"create": True} if first else {"open": True, "assume_metadata": True}
    store = await ts.open(spec, context=_CONTEXT, **mode)
    for index, values in value.pieces:
        await store[index].write(values, can_reference_source_data_indefinitely=True)


def make_checkpointer(items: Sequence[str]) -> ocp.AsyncCheckpointer:
    """Orbax's checkpointer for our items: `meta` is JSON, the others trees of HostLeaf."""
    _quiet_orbax()
    registry = ocp.type_handlers.create_type_handler_registry((HostLeaf, _HostLeafHandler()))
    handlers = {
        item: ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
        for item in items
    }
    meta = ocp.JsonCheckpointHandler(filename=layout.META_FILE)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(meta=meta, **handlers))


@contextlib.contextmanager
def in_one_line(path: Any) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise where they cannot write, as on a full disk, into DamageError."""
    try:
        yield
    except Exception as error:
        reason = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
        raise DamageError(f"{path}: the checkpoint could not be written: {reason}") from error


def save_args(meta: layout.Meta, host: Mapping[str, Mapping[str, HostLeaf]]) -> ocp.args.Composite:
    """What the checkpointer takes; an item without leaves is in `meta` only, since Orbax refuses to save it."""
    items = {item: ocp.args.PyTreeSave(unflatten(leaves)) for item, leaves in host.items() if leaves}
    return ocp.args.Composite(meta=ocp.args.JsonSave(layout.meta_to_json(meta)), **items)


class _OrbaxWarnings(logging.Filter):
    """Lets Orbax warn only where absl was asked to be verbose: it warns about defaults that it chose itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        is_chatter = record.levelno < logging.ERROR and "orbax" in record.pathname
        return not is_chatter or absl.logging.get_verbosity() > absl.logging.WARNING


def _quiet_orbax() -> None:
    logger = absl.logging.get_absl_logger()
    if not any(isinstance(f, _OrbaxWarnings) for f in logger.filters):
        logger.addFilter(_OrbaxWarnings())
