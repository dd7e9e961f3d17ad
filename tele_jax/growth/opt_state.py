"""Growth of optimizer states: which power of the gradient every part of a state is, and the state that results.

The names of fields do not say it: `nu` is of power 2 in Adam and of power 1 in AdaMax. The type does where all that
make it mean the same: the trainer's state (AdamState), and some of optax where nothing comes before them in a chain.
Where it does not (Adam, AdaMax and ADOPT all keep a ScaleByAdamState), the optimizer has to be given, and its state is
measured (tele_jax.growth.gradient_powers).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tele_jax.axes import flatten, is_empty, map_param_subtrees, unflatten
from tele_jax.errors import UserError
from tele_jax.growth.apply import grow_leaf
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.compose import combined
from tele_jax.growth.plan import Growth, LeafPlan, Plan
from tele_jax.sharding import tiles

_BLOCK_BYTES = 16 * 2**20  # of an array on disk, read at once

# What a tree of the shapes of the parameters is: a power of the gradient (0: scaling the gradient does not change it),
# or parameters, which grow as the model's own. Of another array: "carried", passed on as it is.
Kind = int | Literal["parameters", "carried"]
Path = tuple[str, ...]
Kinds = Mapping[Path, Kind]
Grow = Callable[[Plan, str, LeafPlan, Any, int], Any]


class Parts(NamedTuple):
    """A state taken apart. trees: {path: {leaf: array}} of the shapes of parameters; others: {path: leaf}."""

    trees: dict[Path, dict[str, Any]]
    others: dict[Path, Any]

    @property
    def shapes(self) -> dict[Path, tuple[int, ...]]:
        return {path: np.shape(leaf) for path, leaf in self.others.items()}


def take_apart(state: Any, like: Any) -> Parts:
    """The parts of a state; like: a nested dict of what has the shapes of the parameters."""
    parts = Parts({}, {})

    def keep_tree(path: Path, tree: Any) -> Any:
        parts.trees[path] = flatten(tree)
        return tree

    def keep_other(path: Path, leaf: Any) -> Any:
        parts.others[path] = leaf
        return leaf

    map_param_subtrees(keep_tree, state, like, keep_other)
    return parts


class AdamState(NamedTuple):
    """State of the trainer's Adam (train.optimizer), which growth knows wherever it stands in a state.

    count: int32 steps done. mu, nu: moments, trees like the parameters. born: int32[size] per axis name.
    A unit behind a closed mask is born when the mask begins to rise, in a later step: see `delay_births`.
    """

    count: Any
    mu: Any
    nu: Any
    born: dict[str, Any]


def apply_opt(plan: Growth, opt_state: Any, optimizer: optax.GradientTransformation | None = None) -> Any:
    """The optimizer state of the grown parameters.

    Where growth makes theta' = a*theta, the gradient is g/a, so that a part of the state that is of power p in the
    gradient is divided by a^p; what it holds of parameters grows as they do, counts stay, and new entries are zero. In
    the trainer's state (AdamState) new units are marked as born now.

    Args:
      optimizer: what made the state. The trainer's state does without, and so do states of zeros and a few types of
        optax where they stand first in a chain. Small parameters are run through the optimizer, with and without
        growth, and a part of its state that does not come out as above is refused. These are a few steps with small
        gradients: a rule that changes later, or a clip that acts, is not seen.

    Raises:
      UserError: names the part of the state that cannot be grown, and why; the optimizer is needed and not given.

    >>> tx = optax.adamw(1e-3)
    >>> apply_opt(plan, tx.init(params), tx)
    """
    return grow_state(plan, opt_state, grow_leaf, kinds(plan, opt_state, optimizer))


def kinds(plan: Growth, opt_state: Any, optimizer: optax.GradientTransformation | None = None) -> dict[Path, Kind]:
    """The kind of every part of a state, by its path (names, keys and positions). Raises UserError as apply_opt."""
    own = any(is_adam(node) for _, node in nodes(opt_state))
    only_counts = not any(_is_number(leaf) for leaf in jax.tree.leaves(opt_state))
    if optimizer is not None and not own and not only_counts:
        from tele_jax.growth.gradient_powers import measure

        return measure(plan, opt_state, optimizer)
    found: dict[Path, Kind] = {}
    for path, node in nodes(opt_state):
        if is_adam(node):
            found |= {(*path, "mu"): 1, (*path, "nu"): 2}
            born = node["born"] if isinstance(node, Mapping) else node.born
            found |= {(*path, "born", axis): "carried" for axis in born}
    for path, node in _foremost(opt_state):
        found |= {(*path, field): power for field, power in _powers().get(type(node), {}).items()}

    def known(path: Path) -> bool:
        return path in found

    def moments(path: Path, tree: Any) -> Any:
        # A state of zeros, before the first step, grows into zeros, whatever it is.
        if not known(path):
            if not is_zero(tree):
                raise UserError(_needs_optimizer(opt_state, path))
            found[path] = 1
        return tree

    def other(path: Path, leaf: Any) -> Any:
        if len(getattr(leaf, "shape", ())) and not known(path):
            if not _is_constant(opt_state, path):
                raise UserError(_needs_optimizer(opt_state, path))
            found[path] = "carried"
        return leaf

    map_param_subtrees(moments, opt_state, unflatten(plan.src_spec), other)
    return found


def is_adam(node: Any) -> bool:
    """Tells whether a node is the trainer's state, or the nested dict that a checkpoint gives back of it.

    Files name fields, not types; these four, of which one is the births of the units of every axis, are its own.
    """
    if isinstance(node, Mapping):
        return node.keys() == set(AdamState._fields) and isinstance(node["born"], Mapping)
    return isinstance(node, AdamState)


def grow_state(plan: Growth, opt_state: Any, grow: Grow, known: Kinds) -> Any:
    """Does what `apply_opt` does, by grow(step, leaf name, plan of the leaf, array, power of the factors)."""
    for step in plan.steps:
        opt_state = _grow_state(step, opt_state, grow, known)
    return opt_state


def part_plan(plan: Growth, kind: Kind) -> Growth:
    """The plan by which a part of a state grows, where `plan` is that of the parameters; see `apply_opt`."""
    if kind == "parameters":
        return plan
    return combined([_part_step(step, kind) for step in plan.steps])


def _part_step(step: Plan, power: int) -> Plan:
    moments = {name: leaf.moment(step.dst_spec[name], step.maps) for name, leaf in step.leaves.items()}
    return dataclasses.replace(
        step,
        leaves={n: dataclasses.replace(m, coefficient=float(m.coefficient) ** power) for n, m in moments.items()},
        maps={
            axis: dataclasses.replace(m, scale=m.scale**power, share=m.share**power) for axis, m in step.maps.items()
        },
    )


def _grow_state(step: Plan, opt_state: Any, grow: Grow, known: Kinds) -> Any:
    def grow_tree(path: Path, tree: Any) -> Any:
        kind = known.get(path)
        if kind is None or kind == "carried":
            raise UserError(f"optimizer state {shown(path)}: the optimizer that was given keeps no such part")
        leaves = flatten(tree)
        renames = any(name != source for name, source in step.sources.items()) or len(step.sources) < len(leaves)
        if renames and any(map(is_empty, leaves.values())):
            raise UserError(
                f"optimizer state {shown(path)}: holds some leaves only, and {step.policy} renames or drops them"
            )

        def grown(name: str, source: str) -> Any:
            if is_empty(leaves[source]):
                return leaves[source]
            if kind == "parameters":
                return grow(step, name, step.leaves[name], leaves[source], 1)
            moment = step.leaves[name].moment(step.dst_spec[name], step.maps)
            return grow(step, name, moment, leaves[source], kind)

        return unflatten({name: grown(name, source) for name, source in step.sources.items()})

    def keep(path: Path, leaf: Any) -> Any:
        if len(getattr(leaf, "shape", ())) and known.get(path) != "carried":
            raise UserError(f"optimizer state {shown(path)}: {leaf.shape} is not of the shape of a parameter")
        return leaf

    grown = map_param_subtrees(grow_tree, opt_state, unflatten(step.src_spec), keep)
    return jax.tree.map(lambda node: _mark_born(step, node) if is_adam(node) else node, grown, is_leaf=is_adam)


def _mark_born(plan: Plan, state: Any) -> Any:
    """Sets `born` of every fresh unit to the current count."""
    if isinstance(state, Mapping):
        return _mark_born(plan, AdamState(**state))._asdict()
    born = {axis: _born(plan.maps[axis], old, state.count) for axis, old in state.born.items()}
    return state._replace(born=born)


def _born(axis_map: AxisMap, old: Any, count: Any) -> Any:
    xp = jnp if isinstance(old, jax.Array) else np  # what growth.stream reads from disk needs no compiled program
    inherited = xp.asarray(old)[np.maximum(axis_map.index, 0)]
    return xp.where(axis_map.fresh, xp.asarray(count, inherited.dtype), inherited)


def nodes(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every container of a state with its path, outer ones first."""
    if isinstance(node, Mapping):
        children = dict(node)
    elif hasattr(node, "_fields"):
        children = dict(zip(node._fields, node, strict=True))
    elif isinstance(node, (list, tuple)):
        children = {str(i): child for i, child in enumerate(node)}
    else:
        return
    yield path, node
    for key, child in children.items():
        yield from nodes(child, (*path, str(key)))


def _powers() -> dict[type, dict[str, int]]:
    """Types of which every optimizer that makes them means the same, if what comes in is the gradient."""
    from optax import contrib

    return {
        optax.TraceState: {"trace": 1},
        optax.EmaState: {"ema": 1},
        optax.ScaleByLionState: {"mu": 1},
        optax.ScaleByAmsgradState: {"mu": 1, "nu": 2, "nu_max": 2},
        optax.MultiStepsState: {"acc_grads": 1},
        contrib.MuonState: {"mu": 1},
    }


# Types that hand the gradient on to what they wrap, and the field that holds its state.
_WRAPPERS = {
    optax.MaskedState: "inner_state",
    optax.PartitionState: "inner_states",
    optax.InjectHyperparamsState: "inner_state",
    optax.InjectStatefulHyperparamsState: "inner_state",
    optax.ApplyIfFiniteState: "inner_state",
    optax.MultiStepsState: "inner_opt_state",
    optax.ConditionallyMaskState: "inner_state",
    optax.ConditionallyTransformState: "inner_state",
    optax.LookaheadState: "fast_state",
}


def _foremost(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The states that see the gradient itself: first in every chain around them."""
    yield path, node
    if type(node) in (tuple, list) and node:
        yield from _foremost(node[0], (*path, "0"))
    elif field := _WRAPPERS.get(type(node)):
        inner = getattr(node, field)
        several = inner.items() if isinstance(node, optax.PartitionState) else [(None, inner)]
        for label, state in several:
            yield from _foremost(state, (*path, field) if label is None else (*path, field, str(label)))


def _is_number(leaf: Any) -> bool:
    """Tells whether a leaf can depend on gradients; counts, marks and random keys do not."""
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else jax.dtypes.issubdtype(dtype, np.inexact)


def is_zero(tree: Mapping[str, Any]) -> bool:
    """Tells whether all entries are known to be zero; an array under jit, or of other processes, is not known.

    Of arrays on disk (checkpoint.LazyArray) the first blocks are read, up to an entry that is not zero.
    """
    return all(map(_is_zero_leaf, jax.tree.leaves(tree)))


def _is_zero_leaf(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable and not np.any(np.asarray(leaf))
    if isinstance(leaf, np.ndarray):
        return not leaf.any()
    if not hasattr(leaf, "nbytes") or not hasattr(leaf, "__getitem__"):
        return False
    return not any(np.any(leaf[tile]) for tile in tiles(leaf.shape, leaf.dtype.itemsize, _BLOCK_BYTES))


def _is_constant(opt_state: Any, path: Path) -> bool:
    """Tells, by the type that holds it, whether an array is a constant of the optimizer, which no gradient moves."""
    from optax import contrib

    constants = {contrib.MuonState: ("ns_coeffs",), optax.AddNoiseState: ("rng_key",)}
    return any(
        path[: len(above) + 1] == (*above, field)
        for above, node in nodes(opt_state)
        for field in constants.get(type(node), ())
    )


def type_at(opt_state: Any, path: Path) -> str:
    """The name of the innermost type of optax (or another named tuple) around a path."""
    names = [type(node).__name__ for p, node in nodes(opt_state) if hasattr(node, "_fields") and p == path[: len(p)]]
    return names[-1] if names else type(opt_state).__name__


def _needs_optimizer(opt_state: Any, path: Path) -> str:
    return (
        f"optimizer state {shown(path)}: its type, {type_at(opt_state, path)}, does not say how it grows (Adam, AdaMax "
        "and ADOPT share one). Give the optimizer that made it, apply_opt(plan, opt_state, optimizer); of a "
        "checkpoint, only a state that tele_jax trained with can be grown"
    )


def shown(path: Path) -> str:
    return ".".join(path) or "(all of it)"
