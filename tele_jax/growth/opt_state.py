"""Growth of optimizer states, by the power of the gradient that every part of a state is.

Names of fields do not tell the power: `nu` is of power 2 in Adam and of power 1 in AdaMax. The type of a state does
where every optimizer with that type means the same: the trainer's AdamState, and some types of optax where nothing
comes before them in a chain. Where the type does not (Adam, AdaMax and ADOPT all keep a ScaleByAdamState), the
optimizer has to be given, and its state is measured (gradient_powers.py).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from tele_jax.axes import Leaf, PyTree, flatten, is_empty, map_param_subtrees, unflatten
from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.growth.apply import grow_leaf
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.gradient_powers import Kind, Path, is_zero, measure, nodes, shown, take_apart, type_at
from tele_jax.growth.leaf import LeafStep
from tele_jax.growth.plan import Plan, Step, require_plan

Kinds = Mapping[Path, Kind]
Grow = Callable[[LeafStep, Any], Any]


class AdamState(NamedTuple):
    """State of the trainer's Adam (train.optimizer), which growth knows wherever it stands in a state.

    count: int32 steps done. mu, nu: moments, trees like the parameters. born: int32[size] per axis name.
    A unit behind a closed mask is born when the mask begins to rise, in a later step: see `delay_births`.
    """

    count: Any
    mu: PyTree
    nu: PyTree
    born: Table


def apply_opt(plan: Plan, opt_state: PyTree, optimizer: optax.GradientTransformation | None = None) -> PyTree:
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

    >>> import tele_jax as tele
    >>> cfg = tele.ModelConfig(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=3, vocab_size=10)
    >>> plan, tx = tele.growth.widen_mlp(cfg, 5), optax.adamw(1e-3)
    >>> state = tx.init(tele.init(cfg, jax.random.key(0)))
    >>> apply_opt(plan, state, tx)[0].mu["layers"]["mlp"]["up"].shape
    (2, 8, 5)
    """
    return grow_state(plan, opt_state, grow_leaf, kinds(plan, opt_state, optimizer))


def kinds(plan: Plan, opt_state: PyTree, optimizer: optax.GradientTransformation | None = None) -> dict[Path, Kind]:
    """The kind of every part of a state, by its path (names, keys and positions). Raises UserError as apply_opt."""
    require_plan(plan, "apply_opt: plan")
    require(opt_state is not None, "apply_opt: opt_state: expected the state of an optimizer, got None")
    own = any(is_adam(node) for _, node in nodes(opt_state))
    only_counts = not any(_is_number(leaf) for leaf in jax.tree.leaves(opt_state))
    if optimizer is not None and not own and not only_counts:
        return measure(plan, opt_state, optimizer)
    found: dict[Path, Kind] = {}
    for path, node in nodes(opt_state):
        if is_adam(node):
            found |= {(*path, "mu"): 1, (*path, "nu"): 2}
            born = node["born"] if isinstance(node, Mapping) else node.born
            found |= {(*path, "born", axis): "carried" for axis in born}
    for path, node in _foremost(opt_state):
        found |= {(*path, field): power for field, power in _POWERS.get(type(node), {}).items()}

    trees, others = take_apart(opt_state, unflatten(plan.src_spec))
    for path, tree in trees.items():
        # A state of zeros, before the first step, grows into zeros, whatever it is.
        if path not in found:
            require(is_zero(tree), _needs_optimizer(opt_state, path))
            found[path] = 1
    for path, leaf in others.items():
        if len(getattr(leaf, "shape", ())) and path not in found:
            require(_is_constant(opt_state, path), _needs_optimizer(opt_state, path))
            found[path] = "carried"
    return found


def power_of(kind: Kind) -> int | None:
    """The `power` of Plan.leaf_steps for a part of a state: None for what grows as parameters do."""
    return kind if isinstance(kind, int) else None


def is_adam(node: PyTree) -> bool:
    """True where a node is the trainer's state, or the nested dict that a checkpoint gives back of it.

    Files name fields, not types; these four, of which one is the births of the units of every axis, are its own.
    """
    if isinstance(node, Mapping):
        return node.keys() == set(AdamState._fields) and isinstance(node["born"], Mapping)
    return isinstance(node, AdamState)


def grow_state(plan: Plan, opt_state: PyTree, grow: Grow, known: Kinds) -> PyTree:
    """Grows an optimizer state as `apply_opt` does, with grow(step of the leaf, array) as the kernel."""
    for step in plan.steps:
        opt_state = _grow_state(step, opt_state, grow, known)
    return opt_state


def _grow_state(step: Step, opt_state: PyTree, grow: Grow, known: Kinds) -> PyTree:
    def grow_tree(path: Path, tree: PyTree) -> PyTree:
        kind = known.get(path)
        if kind is None or kind == "carried":
            raise UserError(f"optimizer state {shown(path)}: the optimizer that was given keeps no such part")
        leaves = flatten(tree)
        renames = any(name != source for name, source in step.sources.items()) or len(step.sources) < len(leaves)
        if renames and any(map(is_empty, leaves.values())):
            raise UserError(
                f"optimizer state {shown(path)}: holds some leaves only, and {step.policy} renames or drops them"
            )
        return unflatten(
            {
                name: leaves[source]
                if is_empty(leaves[source])
                else grow(step.leaf_step(name, power_of(kind)), leaves[source])
                for name, source in step.sources.items()
            }
        )

    def keep(path: Path, leaf: Leaf) -> PyTree:
        if len(getattr(leaf, "shape", ())) and known.get(path) != "carried":
            raise UserError(f"optimizer state {shown(path)}: {leaf.shape} is not of the shape of a parameter")
        return leaf

    grown = map_param_subtrees(grow_tree, opt_state, unflatten(step.src_spec), keep)
    return jax.tree.map(lambda node: _mark_born(step, node) if is_adam(node) else node, grown, is_leaf=is_adam)


def _mark_born(step: Step, state: PyTree) -> PyTree:
    """Sets `born` of every fresh unit to the current count."""
    if isinstance(state, Mapping):
        return _mark_born(step, AdamState(**state))._asdict()
    born = {axis: _born(step.maps[axis], old, state.count) for axis, old in state.born.items()}
    return state._replace(born=born)


def _born(axis_map: AxisMap, old: object, count: object) -> PyTree:
    xp = jnp if isinstance(old, jax.Array) else np  # arrays from disk need no compiled program
    inherited = xp.asarray(old)[np.maximum(axis_map.index, 0)]
    return xp.where(axis_map.fresh, xp.asarray(count, inherited.dtype), inherited)


# {type: {field: power}} for types that mean the same in every optimizer, if their input is the gradient.
_POWERS: dict[type, dict[str, int]] = {
    optax.TraceState: {"trace": 1},
    optax.EmaState: {"ema": 1},
    optax.ScaleByLionState: {"mu": 1},
    optax.ScaleByAmsgradState: {"mu": 1, "nu": 2, "nu_max": 2},
    optax.MultiStepsState: {"acc_grads": 1},
    contrib.MuonState: {"mu": 1},
}

# Arrays of a state that no gradient moves.
_CONSTANTS = {contrib.MuonState: ("ns_coeffs",), optax.AddNoiseState: ("rng_key",)}

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


def _foremost(node: PyTree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields the states that see the gradient itself: those that come first in every chain around them."""
    yield path, node
    if type(node) in (tuple, list) and node:
        yield from _foremost(node[0], (*path, "0"))
    elif field := _WRAPPERS.get(type(node)):
        inner = getattr(node, field)
        several = inner.items() if isinstance(node, optax.PartitionState) else [(None, inner)]
        for label, state in several:
            yield from _foremost(state, (*path, field) if label is None else (*path, field, str(label)))


def _is_number(leaf: object) -> bool:
    """True where a leaf can depend on gradients; counts, marks and random keys do not."""
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float) if dtype is None else jax.numpy.issubdtype(dtype, np.inexact)


def _is_constant(opt_state: PyTree, path: Path) -> bool:
    """True where the type that holds an array says that it is a constant of the optimizer."""
    return any(
        path[: len(above) + 1] == (*above, field)
        for above, node in nodes(opt_state)
        for field in _CONSTANTS.get(type(node), ())
    )


def _needs_optimizer(opt_state: PyTree, path: Path) -> str:
    return (
        f"optimizer state {shown(path)}: a {type_at(opt_state, path)} alone does not tell by which rule to grow it. "
        "Pass the optax optimizer that made the state: apply_opt(plan, opt_state, optimizer). From a checkpoint, only "
        "the state of tele_jax's own optimizer can be grown"
    )
