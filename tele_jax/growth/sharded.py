"""Growth of arrays that lie on a mesh, compiled: each device makes its own part of every grown leaf."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from tele_jax.axes import map_param_subtrees
from tele_jax.growth.apply import apply, apply_opt
from tele_jax.growth.plan import Growth
from tele_jax.model.spec import spec
from tele_jax.sharding import param_shardings, replicated


def state_shardings(plan: Growth, mesh: Mesh, opt_state: Any) -> Any:
    """Where the grown optimizer state lies, for the state before (arrays or shapes): moments as their parameters."""
    shapes = jax.eval_shape(lambda state: apply_opt(plan, state), opt_state)
    params = param_shardings(spec(plan.dst_cfg), mesh)
    return map_param_subtrees(lambda path, tree: params, shapes, spec(plan.dst_cfg), lambda *_: replicated(mesh))


def sharded(plan: Growth, mesh: Mesh, opt_state: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """(parameters, optimizer state) -> the grown ones, jitted for a mesh; opt_state, arrays or shapes, may be None."""
    params = param_shardings(spec(plan.dst_cfg), mesh)
    if opt_state is None:
        return jax.jit(lambda p, _: (apply(plan, p), None), out_shardings=(params, None))
    out = (params, state_shardings(plan, mesh, opt_state))
    return jax.jit(lambda p, state: (apply(plan, p), apply_opt(plan, state)), out_shardings=out)
