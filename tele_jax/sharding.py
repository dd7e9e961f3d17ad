"""Shardings of parameters and batches on a mesh: a short table from axis names to mesh axes, and its checks.

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = param_shardings(spec(cfg), mesh)      # {"layers": {"attn": {"q": NamedSharding(...)}}}

A kernel [embed, mlp] is cut along embed into 4 and along mlp into 2: each device holds an eighth.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from tele_jax.axes import Leaf, Params, ParamSpec, flatten, unflatten
from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.settings import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch is cut over both: fsdp is data parallelism with the parameters cut as well

Rules = Mapping[str, str | None]
Device = Any  # jax.Device, which the type stubs of jaxlib leave out
AnyMesh = Mesh | jax.sharding.AbstractMesh

# Every logical axis has a line; None means: never cut.
RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "rank": None,
    "score": None,
}
LARGE_BYTES = 64 * 2**20  # a leaf above this must not lie whole on every device
BLOCK_BYTES = 64 * 2**20  # part of an array that `fetch` moves at once


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None, *, num_slices: int | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the devices given, or all of them, neighbours close together.

    Where the devices lie on more than one TPU slice, `data` runs over the slices first: a step sends sums of gradients,
    and of a few figures, over the slower network between them, and no parameters.
    num_slices: number of slices that the devices must lie on; None: any number.

    Raises:
      UserError: the product of the axes is not the number of devices, or data not a multiple of the number of slices;
        the devices lie on another number of slices than num_slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config.data, config.fsdp, config.tensor)
    require(
        int(np.prod(shape)) == len(devices),
        f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} = {int(np.prod(shape))} devices, "
        f"but there are {len(devices)}; change config.mesh",
    )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    require(
        num_slices in (None, slices),
        f"num_slices={num_slices}, but the devices lie on {slices}; change config.num_slices, or what is started",
    )
    require(
        config.data % slices == 0,
        f"mesh data={config.data}: there are {slices} slices, and only data may cross them; make data a multiple",
    )
    # An axis of the mesh need not be a whole axis of the torus: tensor=4 on a slice of 8x8x16 takes half of one.
    if slices > 1:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (config.data // slices, *shape[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def partition_spec(name: str, leaf: ParamSpec, mesh: AnyMesh, rules: Rules = RULES) -> P:
    """The PartitionSpec of one parameter.

    Raises:
      UserError: an axis without a rule, two axes of the leaf on one mesh axis, a size that does not divide, a large
        leaf that would lie whole on every device; each names the leaf, the axis and what to change.
    """
    entries: list[str | None] = []
    for axis, size in zip(leaf.axes, leaf.shape, strict=True):
        require(axis in rules, f"{name}: no sharding rule covers its axis {axis!r}; rules: {', '.join(rules)}")
        mesh_axis = rules[axis]
        if mesh_axis is None or mesh.shape[mesh_axis] == 1:
            entries.append(None)
            continue
        require(
            mesh_axis not in entries,
            f"{name}: two of its axes {leaf.axes} are cut over the mesh axis {mesh_axis!r}; change the rules",
        )
        require(
            size % mesh.shape[mesh_axis] == 0,
            f"{name}: {axis}={size} does not divide over mesh {mesh_axis}={mesh.shape[mesh_axis]}; "
            f"choose a mesh or a model in which it does",
        )
        entries.append(mesh_axis)
    num_bytes = leaf.size * np.dtype(leaf.dtype).itemsize
    cuts_parameters = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    if cuts_parameters and not any(entries) and num_bytes > LARGE_BYTES:
        raise UserError(f"{name}: {num_bytes:,} bytes would lie whole on every device; give one of {leaf.axes} a rule")
    return P(*entries)


def require_mesh(mesh: object, where: str) -> None:
    """Raises UserError, naming the argument, for what is not a mesh, or has not the axes of `make_mesh`."""
    fits = isinstance(mesh, AnyMesh) and set(MESH_AXES) <= set(mesh.axis_names)
    found = f"one with the axes {mesh.axis_names}" if isinstance(mesh, AnyMesh) else type(mesh).__name__
    require(fits, f"{where}: expected a mesh with the axes {MESH_AXES}, as sharding.make_mesh makes it, got {found}")


def param_shardings(spec: Params, mesh: AnyMesh, rules: Rules = RULES) -> Params:
    """A NamedSharding for every leaf of a tree of ParamSpec; raises as `partition_spec` and `require_mesh`."""
    require_mesh(mesh, "mesh")
    return unflatten(
        {name: NamedSharding(mesh, partition_spec(name, leaf, mesh, rules)) for name, leaf in flatten(spec).items()}
    )


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def to_host(array: object) -> np.ndarray:
    """The whole array in the memory of every process, wherever it lies; all processes have to call this."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def is_spread(array: Leaf) -> bool:
    """True for an array on more than one device of a mesh, of this process or of others, which `fetch` reads."""
    on_mesh = isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding)
    return on_mesh and len(array.sharding.device_set) > 1


def fetch(array: jax.Array, wanted: Mapping[int, int | None]) -> np.ndarray | None:
    """Returns array[wanted[p]], or all of the array (None), in every process p of `wanted`, and None in the others.

    Every process has to call this with equal arguments. Blocks of BLOCK_BYTES travel to all devices: for each block the
    devices send the same rows of their own parts. (For array[index, rows], with rows that are cut over the mesh, the
    compiler would gather all of the array on every device.)

    wanted: {process: index along the first dimension, which must not be cut}; None in all or in none.
    """
    leading = 0 if None in wanted.values() else 1
    shape, parts = array.shape[leading:], array.sharding.shard_shape(array.shape)[leading:]
    ways = [size // part for size, part in zip(shape, parts, strict=True)]
    process = jax.process_index()
    # Two dimensions for each of the array: [part, place in the part, ...].
    apart = lambda lengths: [n for pair in zip(ways, lengths, strict=True) for n in pair]  # noqa: E731
    out = np.empty(apart(parts), array.dtype) if process in wanted else None
    for tile in tiles(parts, array.dtype.itemsize * math.prod(ways), BLOCK_BYTES):
        starts, lengths = [cut.start for cut in tile], [cut.stop - cut.start for cut in tile]
        for reader, index in wanted.items():
            start = (*starts,) if index is None else (index, *starts)
            block = _on_all(array, start, (*[1] * leading, *lengths), array.sharding)
            if reader == process:
                mine = block.addressable_data(0)
                mine.copy_to_host_async()  # while the others have their turn
            block.block_until_ready()  # or many would be on their way at once, and in memory
        if out is not None:
            where = tuple(cut for one in tile for cut in (slice(None), one))
            out[where] = np.asarray(mine).reshape(apart(lengths))
    return None if out is None else out.reshape(shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _on_all(array: jax.Array, start: tuple[Any, ...], lengths: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Gathers one rectangle of every device's part of an array, side by side, whole on every device."""

    def gather(part: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
        part = jax.lax.dynamic_slice(part, start, lengths)
        for dimension, mesh_axes in enumerate(sharding.spec):
            if mesh_axes is not None:
                part = jax.lax.all_gather(part, mesh_axes, axis=dimension, tiled=True)
        return part

    return jax.shard_map(gather, mesh=sharding.mesh, in_specs=(sharding.spec, P()), out_specs=P(), check_vma=False)(
        array, start
    )


def tiles(shape: Sequence[int], itemsize: int, nbytes: int) -> Iterator[tuple[slice, ...]]:
    """Yields rectangles of about nbytes that cover a shape, cut along the first axis where that is enough."""
    lengths = list(shape)
    for dimension in range(len(shape)):
        below = math.prod(shape[dimension + 1 :]) * itemsize
        lengths[dimension] = max(1, min(shape[dimension], nbytes // max(1, below)))
        if lengths[dimension] > 1:
            break
    starts = [range(0, size, length) for size, length in zip(shape, lengths, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(s, min(s + n, size)) for s, n, size in zip(corner, lengths, shape, strict=True))


def batch_sharding(mesh: AnyMesh, batch_size: int, name: str = "batch_size") -> NamedSharding:
    """The sharding of rows over data and fsdp; raises UserError where batch_size, called `name`, does not divide."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        batch_size % ways == 0,
        f"{name}={batch_size} (per microbatch) does not divide over mesh data x fsdp = {ways}; change one of them",
    )
    return NamedSharding(mesh, P(BATCH))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a batch that lie on this process's devices, int64, ascending. With one process: all."""
    slices = batch_sharding(mesh, batch_size).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def put_batch(batch: Mapping[str, Any], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """A host batch on the mesh, rows over data and fsdp. It holds all rows, or local_rows of them.

    In a batch of all rows an array may have another number of rows than batch_size, such as one for each pair.
    """
    sharding = batch_sharding(mesh, batch_size)
    whole = any(len(rows) == batch_size for rows in batch.values())

    def put(rows: np.ndarray) -> jax.Array:
        if whole:
            if sharding.is_fully_addressable:
                return jax.device_put(rows, sharding)
            # device_put would first compare all rows between the processes, over the network.
            return jax.make_array_from_callback(rows.shape, sharding, lambda part: rows[part])
        return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

    return {name: put(rows) for name, rows in batch.items()}


def platform() -> str:
    """The platform of the program that is being traced: that of the mesh that is set, or JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def mesh_of_step() -> jax.sharding.AbstractMesh | None:
    """The mesh that is set (jax.set_mesh), where it has the axes MESH_AXES and more than one device; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and set(MESH_AXES) <= set(mesh.axis_names) and mesh.size > 1 else None


def constrain(x: jax.Array) -> jax.Array:
    """Keeps the residual stream [B, S, D] cut over the batch, and over embed by `tensor`, between blocks.

    Without the second cut every device of a tensor group would hold, and save for the backward pass, the same copy. The
    cut could as well run along the sequence (arXiv 2205.05198), and norms would then need no sum over devices, one
    number a token. But TPU programs pad a sum that they scatter along a dimension that is not the last, and put the
    parts together again: in a step of the 1T model 59 GB of collectives (benchmarks/aot_vs_maxtext.py, jax 0.12).
    Nothing happens where no mesh is set, or the shape does not divide.
    """
    mesh = mesh_of_step()
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x  # a batch smaller than the mesh, as in generation: leave it to the compiler
    tensor = mesh.shape["tensor"]
    cut = x.shape[1] > 1 and x.shape[2] % tensor == 0  # single tokens, in generation, are summed and not scattered
    return jax.lax.with_sharding_constraint(x, P(BATCH, None, "tensor" if cut else None))


def whole_rows(x: jax.Array, tensor: int | None = None) -> jax.Array:
    """Keeps an array inside a block [B, S, ...] cut over the batch, and its dimension `tensor`, if given, over tensor.

    Left to itself, the compiler may keep embed cut, gather whole weights on every device and exchange
    activations, above all in the backward pass, which these constraints hold for as well.
    """
    mesh = mesh_of_step()
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    entries: list[Any] = [BATCH] + [None] * (x.ndim - 1)
    if tensor is not None and x.shape[tensor] % mesh.shape["tensor"] == 0:
        entries[tensor] = "tensor"
    return jax.lax.with_sharding_constraint(x, P(*entries))


def on_host(tree: Any) -> Any:
    """The values of arrays as numpy arrays, inside a mesh also of those that lie on devices of other processes."""
    return jax.device_get(tree if jax.process_count() == 1 else _replicated(tree))


@jax.jit
def _replicated(tree):
    return jax.lax.with_sharding_constraint(tree, P())


def lookup(table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Looks up tokens [B, S] in an embedding table [V, D] that is cut by RULES: [B, S, D] in dtype, cut over the batch,
    and by tensor over the sequence.

    Token ids travel, not the table: each device looks up all tokens of its fsdp group in its own part of the table,
    and the parts are exchanged. Gradients are summed over the tokens in the dtype of the table, where it lies.
    """
    mesh = mesh_of_step()
    sizes = {} if mesh is None else dict(mesh.shape)
    cuts = [(tokens.shape[0], ("data", "fsdp")), (tokens.shape[1], ("tensor",))]
    cuts += [(table.shape[0], ("tensor",)), (table.shape[1], ("fsdp",))]
    if not sizes or any(size % math.prod(sizes[axis] for axis in axes) for size, axes in cuts):
        return jnp.take(table, tokens, axis=0).astype(dtype)

    def local(table, tokens):
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        rows = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        here = (rows >= 0) & (rows < table.shape[0])
        found = jnp.take(table, jnp.where(here, rows, 0), axis=0).astype(dtype)
        x = jnp.where(here[..., None], found, 0)
        x = jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    table_spec = P(RULES["vocab"], RULES["embed"])
    return jax.shard_map(local, in_specs=(table_spec, P(BATCH)), out_specs=P(BATCH, "tensor"))(table, tokens)
