"""Where parameters and batches live on a mesh: a short table from axis names to mesh axes, and its checks.

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = param_shardings(spec(cfg), mesh)      # {"layers": {"attn": {"q": NamedSharding(...)}}}

A kernel [embed, mlp] is cut along embed into 4 and along mlp into 2: each device holds an eighth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tele_jax.axes import ParamSpec, flatten, unflatten
from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.run import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch is cut over both: fsdp is data parallelism with the parameters cut as well

Rules = Mapping[str, str | None]

# Every logical axis has a line; None means: never cut.
RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}
LARGE_BYTES = 64 * 2**20  # a leaf above this must not lie whole on every device


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the devices given, or all of them.

    Raises:
      UserError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config.data, config.fsdp, config.tensor)
    require(
        int(np.prod(shape)) == len(devices),
        f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} = {int(np.prod(shape))} devices, "
        f"but there are {len(devices)}; change config.mesh",
    )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def partition_spec(name: str, leaf: ParamSpec, mesh: Mesh, rules: Rules = RULES) -> P:
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


def param_shardings(spec: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> dict[str, Any]:
    """NamedSharding for every leaf of a tree of ParamSpec; raises as `partition_spec`."""
    return unflatten(
        {name: NamedSharding(mesh, partition_spec(name, leaf, mesh, rules)) for name, leaf in flatten(spec).items()}
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Rows over data and fsdp; raises UserError where batch_size does not divide."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        batch_size % ways == 0,
        f"batch_size={batch_size} (per microbatch) does not divide over mesh data x fsdp = {ways}; change one of them",
    )
    return NamedSharding(mesh, P(BATCH))


def constrain(x: jax.Array) -> jax.Array:
    """Keeps activations [B, ...] cut along the batch only, where a mesh is set (jax.set_mesh); a no-op elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH) <= set(mesh.axis_names):
        return x
    if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x  # a batch smaller than the mesh, as in generation: leave it to the compiler
    return jax.lax.with_sharding_constraint(x, P(BATCH))
