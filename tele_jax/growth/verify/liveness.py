"""The test that all that is new can learn: after two optimizer steps, which units have no gradient or are still equal.

Leaves stay where they lie, on one device or on a mesh: read from it is a bit, or a fingerprint, of every unit.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tele_jax.axes import Params, PyTree, flatten, map_param_subtrees, unflatten
from tele_jax.growth.masks import vectors
from tele_jax.growth.plan import Plan
from tele_jax.model import decoder, heads
from tele_jax.model.loss import next_token_loss
from tele_jax.sharding import replicated, to_host

Array = jax.Array | np.ndarray


def liveness(plan: Plan, big: Params, tokens: np.ndarray) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds the (dead, locked) units of a report, after two Adam steps of the grown parameters on tokens int32[B, S].

    Masks, where the plan has them, stand half way up. Needs two gradients and Adam's moments beside the parameters,
    all of them cut over devices as the parameters are.
    """
    masks = vectors(plan, 0.5) if plan.masked else None
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones(tokens[:, 1:].shape, np.float32),
    }
    optimizer = optax.adam(1e-3)
    # With explicit shardings: moments, which begin as zeros, would else lie whole on every device.
    big = jax.tree.map(jnp.asarray, big)
    lies = jax.tree.map(lambda leaf: leaf.sharding, big)
    big = jax.device_put(big, lies)
    state_lies = _state_lies(plan, jax.eval_shape(optimizer.init, big), lies)

    def mean_loss(params):
        total, weight = next_token_loss(plan.dst_cfg, params, batch, masks)
        if plan.dst_cfg.scalar_head:
            x = decoder.hidden(plan.dst_cfg, params, batch["tokens"], masks=masks)
            total += jnp.sum((heads.scalar_of(plan.dst_cfg, params, x) - 1) ** 2)
        return total / weight

    def update(params, gradients, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    gradient = jax.jit(jax.grad(mean_loss), out_shardings=lies)
    update = jax.jit(update, out_shardings=(lies, state_lies), donate_argnums=(1, 2))
    state = jax.jit(optimizer.init, out_shardings=state_lies)(big)
    for _ in range(2):
        big, state = update(big, gradient(big), state)
    return dead(plan, gradient(big)), locked(plan, big)


def _state_lies(plan: Plan, state: PyTree, lies: Params) -> PyTree:
    """Shardings of an optimizer state: moments as their parameters, the rest whole."""
    some = jax.tree.leaves(lies)[0]
    whole = replicated(some.mesh) if isinstance(some, jax.sharding.NamedSharding) else some
    return map_param_subtrees(lambda path, tree: lies, state, unflatten(plan.dst_spec), lambda *_: whole)


def dead(plan: Plan, gradients: Params) -> tuple[str, ...]:
    """Finds new units without a gradient in a leaf, as "axis[unit] in leaf"."""
    fresh = {axis: np.flatnonzero(axis_map.fresh) for axis, axis_map in plan.maps.items()}

    def lives(leaves: Mapping[str, Array]) -> dict[str, dict[int, Array]]:
        """{leaf: {dimension: bool[units]}} where units are new: true where anything of a unit is not 0 in float32."""
        return {
            name: {
                dimension: (leaves[name].astype(np.float32) != 0).any(axis=_others(leaves[name], dimension))
                for dimension, axis in enumerate(spec.axes)
                if fresh[axis].size
            }
            for name, spec in plan.dst_spec.items()
        }

    found, living = [], _of_leaves(lives, gradients)
    for name, spec in plan.dst_spec.items():
        for dimension, alive in living[name].items():
            axis = spec.axes[dimension]
            new = fresh[axis]
            if axis == "vocab":
                # Padding is never seen, and a row of the table only where its token is among the inputs.
                new = new[new < plan.dst_cfg.vocab_size] if dimension else new[:0]
            found += [f"{axis}[{unit}] in {name}" for unit in new[~alive[new]]]
    return tuple(found)


def locked(plan: Plan, params: Params) -> tuple[str, ...]:
    """Finds new units that equal another in all leaves, as "axis[unit] = axis[unit]"."""
    new = {axis: units for axis in (*decoder.MASKED_AXES, "kv_heads") if (units := _new(plan, axis)).any()}

    def words(leaves: Mapping[str, Array]) -> dict[str, list[Array]]:
        return {
            axis: [fingerprints(leaves[n], s.axes.index(axis)) for n, s in plan.dst_spec.items() if axis in s.axes]
            for axis in new
        }

    found, digests = [], _of_leaves(words, params)
    for axis in new:
        first: dict[bytes, int] = {}
        for unit, digest in enumerate(np.concatenate(digests[axis], axis=1)):
            twin = first.setdefault(digest.tobytes(), unit)
            if twin != unit and (new[axis][unit] or new[axis][twin]):
                found.append(f"{axis}[{unit}] = {axis}[{twin}]")
    return tuple(found)


def _new(plan: Plan, axis: str) -> np.ndarray:
    """True for fresh units, and for all but the first of the copies that a unit was split into: bool[units]."""
    axis_map = plan.maps[axis]
    first_seen = np.unique(axis_map.index, return_index=True)[1]
    return axis_map.fresh | ~np.isin(np.arange(axis_map.dst_size), first_seen)


def _of_leaves(function: Callable[[Mapping[str, Array]], Any], tree: Params) -> PyTree:
    """Calls a function of {leaf: array} and returns its small results in numpy; compiled where leaves lie on a mesh."""
    leaves = flatten(tree)
    if all(len(leaf.sharding.device_set) == 1 for leaf in leaves.values()):
        return function({name: np.asarray(leaf) for name, leaf in leaves.items()})  # nothing to compile
    return jax.tree.map(to_host, jax.jit(function)(leaves))


def fingerprints(array: Array, dimension: int) -> Array:
    """Fingerprints uint32[units, 2] of the units of a leaf in float32; unequal units collide with about 1 in 2^64.

    Two sums over a unit, of its entries mixed with their places in it. Sums of integers do not depend on their order,
    hence not on how a leaf is cut over devices.
    """
    xp = jnp if isinstance(array, jax.Array) else np
    others = _others(array, dimension)
    place = xp.zeros((1,) * array.ndim, np.uint32)
    for other in others:
        along = xp.arange(array.shape[other], dtype=np.uint32)
        along = along.reshape([-1 if d == other else 1 for d in range(array.ndim)])
        place = place * np.uint32(array.shape[other]) + along
    first = _mixed(array.astype(np.float32).view(np.uint32) + _mixed(place))
    words = first, _mixed(first + place)
    return xp.stack([word.sum(axis=others, dtype=np.uint32) for word in words], axis=-1)


def _mixed(x: Array) -> Array:
    """The finalizer of MurmurHash3 (Appleby 2011), a permutation of uint32 in which every bit depends on every bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _others(array: Array, dimension: int) -> tuple[int, ...]:
    return tuple(d for d in range(array.ndim) if d != dimension)
