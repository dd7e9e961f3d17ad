"""Growth of parameters in memory, and the way back. Optimizer states: see opt_state.py."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import ParamSpec, flatten, unflatten
from tele_jax.errors import UserError
from tele_jax.growth.kernel import leaf_key, tile
from tele_jax.growth.plan import Growth, LeafPlan, Plan


def apply(plan: Growth, params: Mapping[str, Any]) -> dict[str, Any]:
    """The grown parameters; a pure function. For arrays that lie on a mesh, see `sharded`.

    Raises:
      UserError: params are not what plan.src_cfg describes, every leaf that differs is named; float64 without
        jax_enable_x64.
    """
    return grow_params(plan, params, grow_leaf)


def grow_params(plan: Growth, params: Mapping[str, Any], grow: Callable[[Plan, str, LeafPlan, Any], Any]) -> Any:
    """As `apply`, with grow(step, leaf name, plan of the leaf, leaf) for the kernel."""
    leaves = flatten(params)
    check_tree(leaves, plan.src_spec)
    for step in plan.steps:
        leaves = {name: grow(step, name, step.leaves[name], leaves[source]) for name, source in step.sources.items()}
    return unflatten(leaves)


def shrink(plan: Growth, params: Mapping[str, Any]) -> dict[str, Any]:
    """The left inverse of `apply`: to the bit where nothing was scaled, to rounding elsewhere.

    Of each step that is one unit in the last place where a leaf has a coefficient alone, and a few (five, with random
    factors) where its units were split into copies, by policy copy, which multiplies by several.

    Raises:
      UserError: params are not what plan.dst_cfg describes; the plan drops something, which nothing brings back.
    """
    leaves = flatten(params)
    check_tree(leaves, plan.dst_spec)
    for step in reversed(plan.steps):
        leaves = _shrink_leaves(step, leaves)
    return unflatten(leaves)


def _shrink_leaves(step: Plan, leaves: Mapping[str, Any]) -> dict[str, Any]:
    try:
        inverse = {axis: m.invert() for axis, m in step.maps.items()}
    except ValueError as error:
        raise UserError(f"shrink: policy {step.policy} has no inverse: {error}") from None
    kept = {source: name for name, source in step.sources.items()}
    if lost := step.src_spec.keys() - kept.keys():
        raise UserError(f"shrink: policy {step.policy} has no inverse: it drops {', '.join(sorted(lost))}")
    small = {}
    for name, spec in step.src_spec.items():
        leaf = step.leaves[kept[name]]
        # The inverse of what growth multiplied by, with its rounding: entries come back to one unit in the last place.
        factor = float(np.asarray(leaf.coefficient, jnp.promote_types(spec.dtype, jnp.float32)))
        back = LeafPlan(1 / factor, (), leaf.scaled, leaf.shared)
        small[name] = _evaluate(back, [inverse[a] for a in spec.axes], leaves[kept[name]], (0, 0), spec.shape)
    return small


def check_tree(leaves: Mapping[str, Any], spec: Mapping[str, ParamSpec]) -> None:
    """Raises UserError naming every leaf whose presence, shape or dtype is not as in spec."""
    wrong = [f"{name}: missing" for name in spec if name not in leaves]
    wrong += [f"{name}: not a parameter of this model" for name in leaves if name not in spec]
    for name in spec.keys() & leaves.keys():
        have, want = leaves[name], spec[name]
        if not (hasattr(have, "shape") and hasattr(have, "dtype")):
            wrong.append(f"{name}: {type(have).__name__}, not an array")
        elif tuple(have.shape) != want.shape or np.dtype(have.dtype) != np.dtype(want.dtype):
            wrong.append(f"{name}: {have.dtype}{list(have.shape)}, expected {np.dtype(want.dtype)}{list(want.shape)}")
    if wrong:
        raise UserError("the parameters do not fit the config: " + "; ".join(sorted(wrong)))


Take = Callable[[jax.Array, Sequence[np.ndarray]], jax.Array]


def take(array: jax.Array, indices: Sequence[np.ndarray]) -> jax.Array:
    """The entries of an array at indices, one int array per dimension; anything at NEW."""
    for dimension, index in enumerate(indices):
        if not np.array_equal(index, np.arange(array.shape[dimension])):
            array = jnp.take(array, np.maximum(index, 0), axis=dimension, mode="clip")
    return array


def grow_leaf(step: Plan, name: str, leaf: LeafPlan, array: Any, power: int = 1, take: Take = take) -> jax.Array:
    """One leaf by one step; name: of the leaf after it; power: of the factors, 2 for second moments."""
    spec = step.dst_spec[name]
    maps = [step.maps[axis] for axis in spec.axes]
    return _evaluate(leaf, maps, array, leaf_key(step.seed, name), spec.shape, power, take)


def _evaluate(leaf: LeafPlan, maps, array: Any, key: tuple[int, int], shape, power=1, take: Take = take) -> jax.Array:
    dtype = array.dtype
    array = jnp.asarray(array)
    if array.dtype != dtype:
        raise UserError(
            f"a leaf of {dtype} would be cut to {array.dtype}: jax.config.update('jax_enable_x64', True) keeps it; "
            "growth.stream and growth.lazy work without"
        )
    where = [np.arange(size) for size in shape]
    return tile(leaf, maps, where, functools.partial(take, array), key, shape, array.dtype, power)
