"""Growth of arrays that lie on a mesh, compiled: each device makes its own part of every grown leaf."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax.axes import map_param_subtrees, unflatten
from tele_jax.growth import exchange
from tele_jax.growth.apply import apply_opt, grow_leaf, grow_params, grow_state
from tele_jax.growth.plan import Growth, LeafPlan, Plan
from tele_jax.sharding import RULES, param_shardings, replicated


def state_shardings(plan: Growth, mesh: Mesh, opt_state: Any) -> Any:
    """Where the grown optimizer state lies, for the state before (arrays or shapes): moments as their parameters."""
    shapes = jax.eval_shape(lambda state: apply_opt(plan, state), opt_state)
    spec = unflatten(plan.dst_spec)
    params = param_shardings(spec, mesh)
    return map_param_subtrees(lambda path, tree: params, shapes, spec, lambda *_: replicated(mesh))


def sharded(plan: Growth, mesh: Mesh, opt_state: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """(parameters, optimizer state) -> the grown ones, jitted for a mesh; opt_state, arrays or shapes, may be None."""
    params = param_shardings(unflatten(plan.dst_spec), mesh)

    def grow(step: Plan, name: str, leaf: LeafPlan, array: Any, power: int = 1) -> jax.Array:
        axes = step.dst_spec[name].axes

        def take(array: jax.Array, indices: Sequence[np.ndarray]) -> jax.Array:
            pairs = zip(axes, array.shape, indices, strict=True)
            return exchange.take(array, indices, [_cut(mesh, a, size, len(index)) for a, size, index in pairs], mesh)

        return grow_leaf(step, name, leaf, array, power, take)

    if opt_state is None:
        return jax.jit(lambda p, _: (grow_params(plan, p, grow), None), out_shardings=(params, None))
    out = (params, state_shardings(plan, mesh, opt_state))
    return jax.jit(lambda p, state: (grow_params(plan, p, grow), grow_state(plan, state, grow)), out_shardings=out)


def _cut(mesh: Mesh, axis: str, *sizes: int) -> str | None:
    """The mesh axis that an axis is cut over; None where it lies whole, or where one of the sizes does not divide."""
    mesh_axis = RULES[axis]
    if mesh_axis is None or mesh.shape[mesh_axis] == 1:
        return None
    return None if any(size % mesh.shape[mesh_axis] for size in sizes) else mesh_axis
