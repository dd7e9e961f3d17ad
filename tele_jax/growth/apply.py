"""Growth of arrays in memory: parameters, optimizer state, and the way back."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import ParamSpec, flatten, is_empty, map_param_subtrees, unflatten
from tele_jax.errors import UserError
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.kernel import leaf_key, tile
from tele_jax.growth.plan import LeafPlan, Plan

# What power of the gradient a moment of optax averages, by its name.
_MOMENTS = {"mu": 1, "trace": 1, "acc_grads": 1, "nu": 2, "nu_max": 2, "sum_of_squares": 2}


def apply(plan: Plan, params: Mapping[str, Any]) -> dict[str, Any]:
    """The grown parameters; a pure function, so that under jit with out_shardings it grows sharded arrays in place.

    Raises:
      UserError: params are not what plan.src_cfg describes; every leaf that differs is named.
    """
    leaves = flatten(params)
    check_tree(leaves, plan.src_spec)
    return unflatten({name: _grow(plan, name, plan.leaves[name], leaves[name]) for name in leaves})


def shrink(plan: Plan, params: Mapping[str, Any]) -> dict[str, Any]:
    """The left inverse of `apply`: bitwise where nothing was scaled, to one ulp elsewhere.

    Raises:
      UserError: params are not what plan.dst_cfg describes.
    """
    leaves = flatten(params)
    check_tree(leaves, plan.dst_spec)
    inverse = {axis: m.invert() for axis, m in plan.maps.items()}
    small = {}
    for name, spec in plan.src_spec.items():
        leaf = plan.leaves[name]
        # The inverse of what growth multiplied by, rounding included, brings every entry back to one ulp.
        factor = float(np.asarray(leaf.coefficient, jnp.promote_types(spec.dtype, jnp.float32)))
        back = LeafPlan(1 / factor, (), leaf.scaled, leaf.shared)
        small[name] = _evaluate(back, [inverse[a] for a in spec.axes], leaves[name], (0, 0), spec.shape)
    return unflatten(small)


def apply_opt(plan: Plan, opt_state: Any) -> Any:
    """The optimizer state of the grown parameters, for any optax state.

    Every subtree that has the names and shapes of the parameters is grown: theta' = a*theta makes m' = m/a and, for
    second moments (named `nu`), v' = v/a^2; new entries are zero. Where the state keeps `born` beside `count` (see
    train.optimizer), new units are marked as born now. Everything else is passed on as it is.
    """
    return grow_state(plan, opt_state, functools.partial(_grow, plan))


def grow_state(plan: Plan, opt_state: Any, grow: Callable[[str, LeafPlan, Any, int], Any]) -> Any:
    """As `apply_opt`, with grow(name, plan of the moment, moment, power of the factors) in the place of the kernel."""
    spec = unflatten(plan.src_spec)

    def grow_moments(path: tuple[str, ...], tree: Any) -> Any:
        power = _MOMENTS.get(path[-1] if path else "")
        if power is None:
            raise UserError(f"optimizer state {'.'.join(path)}: not one of the known moments {', '.join(_MOMENTS)}")
        moments = flatten(tree)
        return unflatten(
            {
                name: moment
                if is_empty(moment)
                else grow(name, plan.leaves[name].moment(plan.dst_spec[name], plan.maps), moment, power)
                for name, moment in moments.items()
            }
        )

    def keep(path: tuple[str, ...], leaf: Any) -> Any:
        if len(getattr(leaf, "shape", ())) and "born" not in path:
            raise UserError(f"optimizer state {'.'.join(path)}: {leaf.shape} is not of the shape of a parameter")
        return leaf

    grown = map_param_subtrees(grow_moments, opt_state, spec, keep)
    return _mark_born(plan, grown)


def _mark_born(plan: Plan, state: Any) -> Any:
    """Sets `born` of every fresh unit to the current count, wherever a node of the state has both."""
    fields = _fields(state)
    if fields is None:
        return state
    if isinstance(state, (list, tuple)) and not hasattr(state, "_fields"):
        return type(state)(_mark_born(plan, child) for child in state)
    changes = {key: _mark_born(plan, child) for key, child in fields.items()}
    if "born" in fields and "count" in fields:
        changes["born"] = {axis: _born(plan.maps[axis], old, fields["count"]) for axis, old in fields["born"].items()}
    return state._replace(**changes) if hasattr(state, "_fields") else type(state)({**state, **changes})


def _born(axis_map: AxisMap, old: Any, count: Any) -> Any:
    xp = jnp if isinstance(old, jax.Array) else np  # what growth.stream reads from disk needs no compiled program
    inherited = xp.asarray(old)[np.maximum(axis_map.index, 0)]
    return xp.where(axis_map.fresh, xp.asarray(count, inherited.dtype), inherited)


def _fields(state: Any) -> dict[str, Any] | None:
    if hasattr(state, "_fields"):
        return dict(zip(state._fields, state, strict=True))
    if isinstance(state, Mapping):
        return dict(state)
    return {str(i): child for i, child in enumerate(state)} if isinstance(state, (list, tuple)) else None


def check_tree(leaves: Mapping[str, Any], spec: Mapping[str, ParamSpec]) -> None:
    """Raises UserError naming every leaf whose presence, shape or dtype is not as in spec."""
    wrong = [f"{name}: missing" for name in spec if name not in leaves]
    wrong += [f"{name}: not a parameter of this model" for name in leaves if name not in spec]
    for name in spec.keys() & leaves.keys():
        have, want = leaves[name], spec[name]
        if tuple(have.shape) != want.shape or np.dtype(have.dtype) != np.dtype(want.dtype):
            wrong.append(f"{name}: {have.dtype}{list(have.shape)}, expected {np.dtype(want.dtype)}{list(want.shape)}")
    if wrong:
        raise UserError("the parameters do not fit the config: " + "; ".join(sorted(wrong)))


def _grow(plan: Plan, name: str, leaf: LeafPlan, array: Any, power: int = 1) -> jax.Array:
    spec = plan.dst_spec[name]
    return _evaluate(leaf, [plan.maps[a] for a in spec.axes], array, leaf_key(plan.seed, name), spec.shape, power)


def _evaluate(leaf: LeafPlan, maps: list[AxisMap], array: Any, key: tuple[int, int], shape, power=1) -> jax.Array:
    array = jnp.asarray(array)

    def read(indices):
        out = array
        for dimension, index in enumerate(indices):
            if not np.array_equal(index, np.arange(array.shape[dimension])):
                out = jnp.take(out, index, axis=dimension)
        return out

    return tile(leaf, maps, [np.arange(size) for size in shape], read, key, shape, array.dtype, power)
