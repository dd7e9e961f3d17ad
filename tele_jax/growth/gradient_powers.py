"""Measures on an optimizer which power of the gradient each part of its state is.

Small parameters and gradients go through the optimizer for a few steps, in float64. Then they grow as a plan lets them
grow (every leaf scaled by a number of its own, its gradient divided by another; new entries with gradients of zero) and
go through it again. A part of the state that a power of the gradient brings from the one run to the other, and that is
zero where the parameters are new, can be grown; any other cannot, and the reason is which change it did not follow.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer
from optax import contrib

from tele_jax.axes import Leaf, Params, ParamSpec, PyTree, flatten, is_empty, map_param_subtrees, unflatten
from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.growth.plan import Plan
from tele_jax.sharding import tiles

# The kind of a part of a state with the shapes of the parameters: a power of the gradient (0 where scaling the gradient
# changes nothing), or "parameters", which grow as the model's own. Other arrays are "carried": passed on unchanged.
Kind = int | Literal["parameters", "carried"]
Path = tuple[str, ...]
_BLOCK_BYTES = 16 * 2**20  # bytes of an array on disk that are read at once

_BEFORE, _AFTER = 2, 3  # sizes of every axis
# A part that is still zero after so many steps, such as what waits for accumulated gradients, is run on.
_STEPS, _MOST_STEPS = 3, 64
_GRADIENT = 1e-4  # below usual thresholds of clipping; an epsilon that is added to its square shows
_FACTORS = (2.0, 0.25, 0.5, 4.0, 0.125)  # powers of 2: exact in every dtype

# Second copies of the parameters, which the optimizer moves: they grow as parameters, not with the gradients.
_ITERATES = {contrib.ScheduleFreeState: ("z",)}

# The errors of an optimizer that wants other arguments, or parameters of other sizes.
_ERRORS = (TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError)


class Parts(NamedTuple):
    """The parts of a state. trees: {path: {leaf: array}} with the shapes of parameters; others: {path: leaf}."""

    trees: dict[Path, Table]
    others: dict[Path, Leaf]

    @property
    def shapes(self) -> dict[Path, tuple[int, ...]]:
        return {path: np.shape(leaf) for path, leaf in self.others.items()}


def take_apart(state: PyTree, like: PyTree) -> Parts:
    """Takes a state apart; like: a nested dict of anything with the shapes of the parameters."""
    parts = Parts({}, {})

    def keep(path: Path, tree: PyTree) -> PyTree:
        parts.trees[path] = flatten(tree)
        return tree

    map_param_subtrees(keep, state, like, parts.others.setdefault)
    return parts


def nodes(node: PyTree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every container of a state with its path, outer ones first."""
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


def is_zero(tree: Params) -> bool:
    """True where all entries are known to be zero; an array under jit, or of other processes, is not known.

    Of arrays on disk (checkpoint.LazyArray) the first blocks are read, up to an entry that is not zero.
    """
    return all(map(_is_zero_leaf, jax.tree.leaves(tree)))


def _is_zero_leaf(leaf: Leaf) -> bool:
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, Tracer) and leaf.is_fully_addressable and not np.any(np.asarray(leaf))
    if isinstance(leaf, np.ndarray):
        return not leaf.any()
    if not hasattr(leaf, "nbytes") or not hasattr(leaf, "__getitem__"):
        return False
    return not any(np.any(leaf[tile]) for tile in tiles(leaf.shape, leaf.dtype.itemsize, _BLOCK_BYTES))


def type_at(opt_state: PyTree, path: Path) -> str:
    """The name of the innermost type of optax (or another named tuple) around a path."""
    names = [type(node).__name__ for p, node in nodes(opt_state) if hasattr(node, "_fields") and p == path[: len(p)]]
    return names[-1] if names else type(opt_state).__name__


def shown(path: Path) -> str:
    return ".".join(path) or "as a whole"


# ---- measuring


class _Change(NamedTuple):
    """The differences of the second run: leaves are scaled, gradients are divided, there are new entries."""

    parameters: bool = False
    gradients: bool = False
    entries: bool = False


# Reasons why a part does not grow, by the first change that it does not follow.
_REASONS = {
    _Change(entries=True): "where parameters are added it is not zero, or it changes elsewhere (it begins at a value "
    "other than zero, or depends on whole leaves)",
    _Change(gradients=True): "it is no power of the gradient (an epsilon, a start value or a norm is in it)",
    _Change(parameters=True): "it depends on the values of the parameters (weight decay, norms, distances)",
}


def measure(plan: Plan, opt_state: PyTree, optimizer: optax.GradientTransformation) -> dict[Path, Kind]:
    """Measures the kind of every part of the states that an optimizer makes, one of which is opt_state: {path: kind}.

    Where the plan scales no leaf, nothing but new entries is tried.

    Raises:
      UserError: names the part of the state that does not grow; the optimizer cannot be run on gradients alone.
    """
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise UserError(f"optimizer: {name} is no optax.GradientTransformation, as optax.adam(1e-3) is one")
    leaves = [leaf for step in plan.steps for leaf in step.leaves.values()]
    scales = not all(leaf.moves_exactly for leaf in leaves)
    sign = -1.0 if any(leaf.coefficient < 0 for leaf in leaves) else 1.0
    paired = any(isinstance(node, optax.LookaheadState) for _, node in nodes(opt_state))
    iterates: set[Path] = {
        (*path, field) for path, node in nodes(opt_state) for field in _ITERATES.get(type(node), ()) if node is not None
    }

    cannot = lambda path: f"optimizer state {shown(path)} ({type_at(opt_state, path)}) cannot be grown: "  # noqa: E731

    def compare(change: _Change) -> tuple[dict[Path, set[Kind]], set[Path], dict[Path, tuple[int, ...]]]:
        fits, moved, shapes = _compare(plan.src_spec, optimizer, change, sign, paired)
        copies: dict[Path, set[Kind]] = {path: {"parameters"} for path in iterates}
        return fits | copies, moved - iterates, shapes

    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        fits, moved, shapes = compare(_Change(scales, scales, True))
        failed = sorted({path for path, found in fits.items() if not found} | moved)
        for path in failed[:1]:
            for change, why in _REASONS.items():
                again, others, _ = compare(change)
                if path in others or not again.get(path, ()):
                    raise UserError(cannot(path) + why)
            raise UserError(cannot(path) + "it does not follow a change of parameters, gradients and sizes together")
    kinds: dict[Path, Kind] = {path: next(iter(found)) for path, found in fits.items() if len(found) == 1}
    trees, others = take_apart(opt_state, unflatten(plan.src_spec))
    for path in [*trees, *others]:
        if path not in (fits if path in trees else shapes):
            raise UserError(
                f"optimizer state {shown(path)} ({type_at(opt_state, path)}): the optimizer that was given keeps no "
                "such part of the model that the plan grows; both have to belong to that model"
            )
    for path, tree in trees.items():
        if path not in kinds:
            why = f"it was still zero after {_MOST_STEPS} steps of a trial, so that what it is was not seen"
            require(is_zero(tree), cannot(path) + why)
            kinds[path] = 1
    for path, leaf in others.items():
        why = (
            f"its shape {list(np.shape(leaf))} is not that of a parameter, and changes with the sizes of the parameters"
        )
        require(np.shape(leaf) == shapes[path], cannot(path) + why)
    return kinds


def _compare(
    spec: Mapping[str, ParamSpec], optimizer: optax.GradientTransformation, change: _Change, sign: float, paired: bool
) -> tuple[dict[Path, set[Kind]], set[Path], dict[Path, tuple[int, ...]]]:
    """Compares two runs: ({path: kinds that fit}, paths of other leaves that moved, shapes of other leaves)."""
    of_params, of_gradients = (
        {n: sign * _FACTORS[(i + shift) % len(_FACTORS)] if asked else 1.0 for i, n in enumerate(spec)}
        for shift, asked in ((1, change.parameters), (0, change.gradients))
    )
    size = _AFTER if change.entries else _BEFORE
    rng = np.random.default_rng(0)
    shapes = {n: (_BEFORE,) * len(spec[n].shape) for n in spec}
    large = {n: rng.normal(size=(size,) * len(shape)) for n, shape in shapes.items()}
    candidates: tuple[Kind, ...] = (0, 1, 2, "parameters") if change.gradients else (1, "parameters")
    fits: dict[Path, set[Kind]] = {}
    moved: set[Path] = set()
    before = Parts({}, {})

    def grow(params: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> tuple[PyTree, PyTree]:
        params = {n: _place(x * of_params[n], large[n]) for n, x in params.items()}
        return params, {n: _place(g / of_gradients[n], np.zeros_like(large[n])) for n, g in gradients.items()}

    grown = itertools.starmap(grow, _steps(shapes))
    states = zip(_run(optimizer, _steps(shapes), paired), _run(optimizer, grown, paired), strict=True)
    for step, (before, after) in enumerate(states, 1):
        moved |= before.trees.keys() ^ after.trees.keys()
        moved |= {p for p, x in before.others.items() if p not in after.others or not _same(x, after.others[p])}
        for path in before.trees.keys() & after.trees.keys():
            pairs = [(n, x, after.trees[path][n]) for n, x in before.trees[path].items() if not is_empty(x)]
            found: set[Kind] = {
                kind
                for kind in candidates
                if all(_fits(kind, x, y, of_gradients[n], of_params[n], large[n]) for n, x, y in pairs)
            }
            fits[path] = fits.get(path, found) & found
        if step >= _STEPS and all(len(found) < 2 for found in fits.values()):
            break
    carried: dict[Path, set[Kind]] = {path: {"carried"} for path in before.others}
    return carried | fits, moved, before.shapes


def _steps(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Yields (parameters, gradients) of every step. Parameters are drawn anew, not moved by the optimizer."""
    rng = np.random.default_rng(1)
    for _ in range(_MOST_STEPS):
        params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        # Not near zero, where a bound from below (ADOPT's epsilon) would act.
        sizes = {name: rng.uniform(0.5, 1.5, shape) * _GRADIENT for name, shape in shapes.items()}
        yield params, {name: size * rng.choice((-1.0, 1.0), size.shape) for name, size in sizes.items()}


def _place(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """A copy of `outer` with `inner` in its first corner."""
    placed = outer.copy()
    placed[tuple(map(slice, inner.shape))] = inner
    return placed


def _run(
    optimizer: optax.GradientTransformation, steps: Iterator[tuple[PyTree, PyTree]], paired: bool
) -> Iterator[Parts]:
    """Yields the parts of the state after every step of (parameters, gradients)."""
    with_arguments = optax.with_extra_args_support(optimizer).update
    # One program: operations one by one would each be compiled for every shape.
    update = jax.jit(lambda g, state, p: with_arguments(g, state, p, value=1.0, grad=g)[1])
    state = None
    for step in steps:
        tree, gradient = (jax.tree.map(jax.numpy.asarray, unflatten(leaves)) for leaves in step)
        params = optax.LookaheadParams.init_synced(tree) if paired else tree
        try:
            state = optimizer.init(params) if state is None else state
            state = update(gradient, state, params)
        except _ERRORS as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"the optimizer cannot be tried on gradients alone, which growing needs: {what}") from None
        yield take_apart(state, tree)


def _fits(kind: Kind, before: object, after: object, of_gradient: float, of_params: float, params: np.ndarray) -> bool:
    """True where a leaf of the second run is what growth makes of that leaf of the first."""
    before, after = (np.asarray(x).astype(np.float64) for x in (before, after))
    factor, new = (of_gradient**-kind, np.zeros_like(after)) if isinstance(kind, int) else (of_params, params)
    expected = _place(before * factor, new)
    return np.allclose(after, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max(initial=0.0))


def _same(a: object, b: object) -> bool:
    is_key = lambda x: jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    a, b = (np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in map(jax.numpy.asarray, (a, b)))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=0, equal_nan=True)
