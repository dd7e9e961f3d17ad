"""Growth of arrays that lie on a mesh, compiled: each device makes its own part of every grown leaf."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax.axes import map_param_subtrees, unflatten
from tele_jax.errors import UserError
from tele_jax.growth import exchange
from tele_jax.growth.apply import grow_leaf, grow_params
from tele_jax.growth.opt_state import grow_state, kinds
from tele_jax.growth.plan import Growth, LeafPlan, Plan
from tele_jax.sharding import RULES, param_shardings, replicated


def state_shardings(plan: Growth, mesh: Mesh, opt_state: Any, optimizer: Any = None) -> Any:
    """The shardings of the grown optimizer state, from the state before (arrays or shapes): moments as parameters.

    optimizer: as for apply_opt.
    """
    known = kinds(plan, opt_state, optimizer)
    shapes = jax.eval_shape(lambda state: grow_state(plan, state, grow_leaf, known), opt_state)
    spec = unflatten(plan.dst_spec)
    params = param_shardings(spec, mesh)
    return map_param_subtrees(lambda path, tree: params, shapes, spec, lambda *_: replicated(mesh))


def sharded(plan: Growth, mesh: Mesh, opt_state: Any, optimizer: Any = None) -> Callable[[Any, Any], tuple[Any, Any]]:
    """(parameters, optimizer state) -> the grown ones, jitted for a mesh; opt_state, arrays or shapes, may be None.

    optimizer: as for apply_opt.
    """
    params = param_shardings(unflatten(plan.dst_spec), mesh)

    def grow(step: Plan, name: str, leaf: LeafPlan, array: Any, power: int = 1) -> jax.Array:
        axes = step.dst_spec[name].axes

        def take(array: jax.Array, indices: Sequence[np.ndarray]) -> jax.Array:
            pairs = zip(axes, array.shape, indices, strict=True)
            return exchange.take(array, indices, [_cut(mesh, a, size, len(index)) for a, size, index in pairs], mesh)

        return grow_leaf(step, name, leaf, array, power, take)

    if opt_state is None:
        return jax.jit(lambda p, _: (grow_params(plan, p, grow), None), out_shardings=(params, None))
    for leaf in jax.tree.leaves(opt_state):  # jit would cut it without a word
        wide = hasattr(leaf, "dtype") and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
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
