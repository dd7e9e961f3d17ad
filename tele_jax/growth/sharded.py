"""Growth of arrays that lie on a mesh, compiled: each device makes its own part of every grown leaf.

jnp.take along an axis that is cut over devices makes the compiler gather all of it on every device. Here each device
sends the others what they take from its own part: widening 8,192 channels on 256 devices to 10,240, each device needs
the parts of two or three others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tele_jax.axes import PyTree, map_param_subtrees, unflatten
from tele_jax.errors import UserError
from tele_jax.growth.apply import grow_leaf, grow_params
from tele_jax.growth.axis_map import NEW
from tele_jax.growth.leaf import LeafStep
from tele_jax.growth.opt_state import grow_state, kinds
from tele_jax.growth.plan import Plan, require_plan
from tele_jax.sharding import RULES, param_shardings, replicated, require_mesh


def state_shardings(
    plan: Plan, mesh: Mesh, opt_state: PyTree, optimizer: optax.GradientTransformation | None = None
) -> PyTree:
    """The shardings of the grown optimizer state, from the state before (arrays or shapes): moments as parameters.

    optimizer: the optimizer that made the state, as for apply_opt.
    """
    require_plan(plan, "state_shardings: plan")
    require_mesh(mesh, "state_shardings: mesh")
    known = kinds(plan, opt_state, optimizer)
    shapes = jax.eval_shape(lambda state: grow_state(plan, state, grow_leaf, known), opt_state)
    spec = unflatten(plan.dst_spec)
    params = param_shardings(spec, mesh)
    return map_param_subtrees(lambda path, tree: params, shapes, spec, lambda *_: replicated(mesh))


def sharded(
    plan: Plan, mesh: Mesh, opt_state: PyTree, optimizer: optax.GradientTransformation | None = None
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Returns a function, jitted for a mesh, from (parameters, optimizer state) to the grown ones.

    Args:
      opt_state: the state to grow, as arrays or shapes; None to grow parameters alone.
      optimizer: the optimizer that made the state, as for apply_opt.
    """
    require_plan(plan, "sharded: plan")
    require_mesh(mesh, "sharded: mesh")
    params = param_shardings(unflatten(plan.dst_spec), mesh)

    def grow(step: LeafStep, array: object) -> jax.Array:
        def take_on_mesh(array: jax.Array, indices: Sequence[np.ndarray]) -> jax.Array:
            cuts = [_cut(mesh, m.axis, n, len(i)) for m, n, i in zip(step.maps, array.shape, indices, strict=True)]
            return take(array, indices, cuts, mesh)

        return grow_leaf(step, array, take_on_mesh)

    if opt_state is None:
        return jax.jit(lambda p, _: (grow_params(plan, p, grow), None), out_shardings=(params, None))
    for leaf in jax.tree.leaves(opt_state):  # jit would cut it silently
        wide = hasattr(leaf, "dtype") and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended)
        if wide and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise UserError(f"optimizer state: {leaf.dtype} needs jax.config.update('jax_enable_x64', True)")
    known = kinds(plan, opt_state, optimizer)
    out = (params, state_shardings(plan, mesh, opt_state, optimizer))
    return jax.jit(
        lambda p, state: (grow_params(plan, p, grow), grow_state(plan, state, grow, known)), out_shardings=out
    )


def _cut(mesh: Mesh, axis: str, *sizes: int) -> str | None:
    """The mesh axis that an axis is cut over; None where it lies whole, or where one of the sizes does not divide."""
    mesh_axis = RULES[axis]
    if mesh_axis is None or mesh.shape[mesh_axis] == 1:
        return None
    return None if any(size % mesh.shape[mesh_axis] for size in sizes) else mesh_axis


class Round(NamedTuple):
    """A round of an exchange, in which each device sends to one other at most, and receives from one.

    pairs: (sender, receiver). send: int32[ways, n], the entries of its own part that each device sends.
    """

    pairs: tuple[tuple[int, int], ...]
    send: np.ndarray


class Exchange(NamedTuple):
    """The rounds, then `take`, int32[ways, n]: the places in its own part, and all received, that each device keeps."""

    rounds: tuple[Round, ...]
    take: np.ndarray


def exchange(index: np.ndarray, src_size: int, ways: int) -> Exchange:
    """Plans how the entries `index`, int[dst_size], of an axis of src_size come to their devices; NEW may be anything.

    Both sizes are cut into `ways` equal parts. Where no part is needed in more than d places, nor a place needs more
    than d, there are fewer than 2d rounds.
    """
    size = src_size // ways
    wanted = index.reshape(ways, -1)
    take = np.zeros(wanted.shape, np.int32)
    senders = np.where(wanted == NEW, NEW, wanted // size)
    pairs: list[dict[int, int]] = []  # one per round: {sender: receiver}
    for receiver, needed in enumerate(senders):
        own = needed == receiver
        take[receiver, own] = wanted[receiver, own] - receiver * size
        for sender in np.setdiff1d(needed, (NEW, receiver)).tolist():
            free = next((r for r in pairs if sender not in r and receiver not in r.values()), None)
            if free is None:
                pairs.append(free := {})
            free[sender] = receiver
    rounds, before = [], size
    for found in pairs:
        parts = {}
        for sender, receiver in found.items():
            here = senders[receiver] == sender
            parts[sender], place = np.unique(wanted[receiver, here] - sender * size, return_inverse=True)
            take[receiver, here] = before + place
        send = np.zeros((ways, max(map(len, parts.values()))), np.int32)
        for sender, part in parts.items():
            send[sender, : len(part)] = part
        rounds.append(Round(tuple(found.items()), send))
        before += send.shape[1]
    return Exchange(tuple(rounds), take)


def take(array: jax.Array, indices: Sequence[np.ndarray], cuts: Sequence[str | None], mesh: Mesh) -> jax.Array:
    """Takes the entries of an array at `indices`, one int array per dimension; those at NEW may be anything.

    cuts: the mesh axis that each dimension is cut over, before and after; None where it is whole.
    """
    changes = [
        (dimension, index)
        for dimension, index in enumerate(indices)
        if not np.array_equal(index, np.arange(array.shape[dimension]))
    ]
    # Little should travel: axes that are cut come before whole ones, and those that grow most come last.
    changes.sort(key=lambda change: (cuts[change[0]] is None, len(change[1]) / array.shape[change[0]]))
    sizes = array.shape

    def local(block: jax.Array) -> jax.Array:
        for dimension, index in changes:
            cut = cuts[dimension]
            if cut is None:
                block = _at(block, np.maximum(index, 0), dimension)
            else:
                block = _exchanged(block, exchange(index, sizes[dimension], mesh.shape[cut]), dimension, cut)
        return block

    return jax.shard_map(local, mesh=mesh, in_specs=P(*cuts), out_specs=P(*cuts))(array)


def _exchanged(block: jax.Array, plan: Exchange, dimension: int, cut: str) -> jax.Array:
    here = jax.lax.axis_index(cut)
    received = [jax.lax.ppermute(_at(block, jnp.asarray(r.send)[here], dimension), cut, r.pairs) for r in plan.rounds]
    return _at(jnp.concatenate([block, *received], dimension), jnp.asarray(plan.take)[here], dimension)


def _at(block: jax.Array, index: jax.Array | np.ndarray, dimension: int) -> jax.Array:
    return jnp.take(block, index, axis=dimension, mode="clip")
