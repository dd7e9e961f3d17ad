"""The comparison of what a growth made with its plan, entry by entry: parameters, and the optimizer state.

Kept entries are the source's, to the bit or, where the plan multiplies them, within their roundings; zeros are zero (of
either sign), constants are the constant, and fresh values are those that the seed, the name of the leaf and the index
give, to the bit unless a later step of the plan multiplies them. Leaves are read in tiles, from arrays in memory or
from checkpoints that do not fit there.

Parts of an optimizer state with the shapes of the parameters are compared like parameters, by the power of the gradient
that each part is. In the trainer's state new units are born at the current count. All else is unchanged, to the bit.

`each` splits verification into independent units, and divides them among processes that hold the models together. A
unit is a layer of the grown model with its source layer; one more unit, None, is all that is not stacked: embedding,
head and final norm. Of 32 layers on 8 processes each process examines four or five units, and holds one at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tele_jax.axes import Leaf, Leaves, ParamSpec, PyTree, is_empty, unflatten
from tele_jax.growth import kernel
from tele_jax.growth.axis_map import NEW
from tele_jax.growth.gradient_powers import Path, nodes, shown, take_apart
from tele_jax.growth.leaf import FILLED, KEPT, ZERO, LeafStep, Traced, kinds, trace
from tele_jax.growth.opt_state import is_adam, power_of
from tele_jax.growth.opt_state import kinds as state_kinds
from tele_jax.growth.plan import Plan
from tele_jax.processes import from_all
from tele_jax.sharding import fetch, is_spread, tiles, to_host

if TYPE_CHECKING:
    from tele_jax.checkpoint import LazyArray

TILE_BYTES = 16 * 2**20


def differing(plan: Plan, src: Leaves, dst: Leaves, unit: int | None, power: int | None = None) -> dict[str, str]:
    """{leaf: its first entry that is not as planned} for the leaves of one unit of the grown tree: see `each`.

    src, dst: {dotted name: array, or checkpoint.LazyArray}, with the leaves of that unit at least.
    power: for an optimizer moment, its power of the gradient.
    """
    found = {}
    for name, spec in plan.dst_spec.items():
        if bool(spec.stack) == (unit is not None) and name in dst:
            # Where nothing comes from the source, its leaf may be missing.
            source, made = (_Chunkwise.of(leaf) for leaf in (src.get(plan.sources[name]), dst[name]))
            problem = next(_problems(plan.leaf_steps(name, power), source, made, unit, np.dtype(spec.dtype)), None)
            if problem is not None:
                found[name] = problem
    return found


def first_problems(plan: Plan, found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """{leaf: problem} of the first unit that has one, in the order of the leaves; found: what `differing` gave."""
    first: dict[str, str] = {}
    for unit in reversed(found):
        first |= unit
    return {name: first[name] for name in plan.dst_spec if name in first}


class _Chunkwise:
    """A stored leaf whose last chunk stays in memory, since tiles are smaller than chunks, which are read whole."""

    def __init__(self, stored: "LazyArray"):
        self._stored, self._place, self._chunk = stored, (), np.empty(0)

    @classmethod
    def of(cls, leaf: Leaf) -> Leaf:
        """Wraps a stored leaf; a leaf in memory is returned as it is."""
        return cls(leaf) if hasattr(leaf, "chunks") and leaf.shape else leaf

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        stored = self._stored
        place = tuple(part.start // size for part, size in zip(key, stored.chunks, strict=True))
        starts = [i * size for i, size in zip(place, stored.chunks, strict=True)]
        if any(part.stop > start + size for part, start, size in zip(key, starts, stored.chunks, strict=True)):
            return stored[key]  # in several chunks
        if place != self._place:
            ends = [min(start + n, size) for start, n, size in zip(starts, stored.chunks, stored.shape, strict=True)]
            self._chunk = np.empty(0)  # or two chunks would be held
            self._place, self._chunk = place, stored[tuple(map(slice, starts, ends))]
        return self._chunk[tuple(slice(k.start - start, k.stop - start) for k, start in zip(key, starts, strict=True))]


@dataclasses.dataclass(frozen=True, eq=False)
class Unrounded:
    """A leaf of the result in float64, with unrounded products in the place of the rounded ones that are stored.

    An entry that is not such a product to within its rounding is as it is stored. So the function of a model in float32
    or bfloat16 is compared to the precision of float64, however much of the rounding a sharp softmax makes.
    """

    steps: Sequence[LeafStep]
    source: Leaf
    made: Leaf

    def __getitem__(self, key: Any) -> np.ndarray:
        """Takes integers and slices of step 1, like a LazyArray."""
        keys = [k for k in (key if isinstance(key, tuple) else (key,)) if k is not Ellipsis]
        keys += [slice(None)] * (len(self.steps[-1].shape) - len(keys))
        where = tuple(k if isinstance(k, slice) else slice(int(k), int(k) + 1) for k in keys)
        traced = [trace(self.steps, dimension, part) for dimension, part in enumerate(where)]
        read = np.asarray(self.made[where])
        values = read.astype(np.float64)
        kept = kinds(traced) == KEPT
        if kept.any():
            products = _products(self.steps, self.source, traced)
            rounded = kept & _is_rounded(self.steps, values, products, read.dtype)
            values[rounded] = products[rounded]
        return values.reshape([n for n, k in zip(values.shape, keys, strict=True) if isinstance(k, slice)])


def _products(steps: Sequence[LeafStep], source: object, traced: Sequence[Traced]) -> np.ndarray:
    """The source entries at the origins of a tile times all factors, in float64 and not rounded."""
    coefficient = math.prod(step.coefficient for step in steps)
    return _gather(source, traced) * (coefficient * _outer([part.factors[-1] for part in traced]))


def _is_rounded(steps: Sequence[LeafStep], values: np.ndarray, products: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """True where values are the products in the dtype of the leaf: to the bit where nothing is scaled."""
    if all(step.moves_exactly for step in steps):
        return (values == products) & (np.signbit(values) == np.signbit(products))
    # Values below the smallest normal number may be flushed to 0.
    return np.abs(values - products) <= _slack(steps, dtype) * np.abs(products) + float(jnp.finfo(dtype).tiny)


def _slack(steps: Sequence[LeafStep], dtype: np.dtype) -> float:
    """The largest relative error of the products that steps make of an entry.

    In each step the coefficient and the factor of every axis are rounded, and multiplied, in float32 or better; their
    product with the entry is rounded to the dtype of the leaf.
    """
    precise = jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps
    return sum(0.505 * float(jnp.finfo(dtype).eps + (1 + 2 * step.number_of_factors) * precise) for step in steps)


def _problems(steps: Sequence[LeafStep], source: Leaf, made: Leaf, unit: int | None, dtype: np.dtype) -> Iterator[str]:
    """Says what is wrong in one unit of a leaf, tile by tile."""
    stack = () if unit is None else (slice(unit, unit + 1),)
    for tile in tiles(steps[-1].shape[len(stack) :], dtype.itemsize, TILE_BYTES):
        where = (*stack, *tile)
        traced = [trace(steps, dimension, part) for dimension, part in enumerate(where)]
        kind = kinds(traced)
        read = np.asarray(made[where])
        values = read.astype(np.float64)
        at = lambda place, where=where: f"at {[int(p + w.start) for p, w in zip(place, where, strict=True)]}"  # noqa: E731
        if not np.isfinite(values).all():
            yield f"{values[~np.isfinite(values)][0]} {at(np.argwhere(~np.isfinite(values))[0])}"
        wrong = (kind == ZERO) & (values != 0)
        if wrong.any():
            yield f"{values[wrong][0]:.6g} {at(np.argwhere(wrong)[0])}, planned 0"
        kept = kind == KEPT
        if kept.any():
            expected = _products(steps, source, traced)
            wrong = kept & ~_is_rounded(steps, values, expected, read.dtype)
            if wrong.any():
                yield f"{values[wrong][0]:.9g} {at(np.argwhere(wrong)[0])}, from the source {expected[wrong][0]:.9g}"
        for place, value, expected in _wrongly_filled(steps, traced, kind, values, read.dtype):
            yield f"a new entry is {value:.9g} {at(place)}, planned {expected:.9g}"


def _wrongly_filled(
    steps: Sequence[LeafStep], traced: Sequence[Traced], kind: np.ndarray, values: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[Sequence[int], float, float]]:
    """Yields (place in the tile, value, planned value) of the first wrong entry that each step filled."""
    width = kind.shape[-1] if kind.ndim else 1
    for k, step in enumerate(steps):
        if not (kind == FILLED + k).any():
            continue
        later = steps[k + 1 :]
        factors = math.prod(after.coefficient for after in later)
        factors = np.broadcast_to(factors * _outer([part.factors[len(later)] for part in traced]), kind.shape)
        exact = all(after.moves_exactly for after in later)
        slack = 0.0 if exact else _slack(later, dtype)
        places = [part.place[len(later)] for part in traced] or [np.zeros(1, np.int64)]
        rows, columns = kernel.row_numbers(step.shape, places), places[-1].astype(np.uint32)
        # In blocks, since counters and values of a whole tile would take many times its memory.
        count = max(1, kernel.BLOCK // width)
        for first in range(0, kind.size // width, count):
            row, column = np.nonzero(kind.reshape(-1, width)[first : first + count] == FILLED + k)
            row += first
            made, factor = (array.reshape(-1, width)[row, column] for array in (values, factors))
            planned = _new(step, rows[row], columns[column], dtype) * factor
            wrong = ~(np.abs(made - planned) <= slack * np.abs(planned))
            if wrong.any():
                i = int(np.argmax(wrong))
                yield np.unravel_index(row[i] * width + column[i], kind.shape), made[i], planned[i]
                break


def _new(step: LeafStep, rows: np.ndarray, columns: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values float64[n] that a step fills in at rows and columns of a leaf, rounded to the dtype of the leaf."""
    if step.leaf.fill == "constant":
        return np.full(len(rows), step.leaf.value, dtype).astype(np.float64)
    return kernel.normal_at(step.key, rows, columns, step.leaf.value, dtype).astype(np.float64)


def _outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    out = np.ones((1,) * len(vectors))
    for dimension, vector in enumerate(vectors):
        if not (vector == 1).all():
            out = out * vector.reshape([-1 if d == dimension else 1 for d in range(len(vectors))])
    return out


def _gather(array: Leaf, traced: Sequence[Traced]) -> np.ndarray:
    """The source entries at the origins of a tile, in float64; only the part of the source around them is read."""
    if not traced:
        return np.asarray(array).astype(np.float64)
    box = tuple(slice(int(part.origin.min()), int(part.origin.max()) + 1) for part in traced)
    read = np.asarray(array[box]).astype(np.float64)
    for dimension, (part, bounds) in enumerate(zip(traced, box, strict=True)):
        index = part.origin - bounds.start
        if not np.array_equal(index, np.arange(read.shape[dimension])):
            read = np.take(read, index, axis=dimension)
    return read


# ---- optimizer states


def differing_state(
    plan: Plan, before: object, after: object, optimizer: optax.GradientTransformation | None = None
) -> dict[str, str]:
    """{part of the state: problem} for all parts that are not what growth makes of `before`.

    Args:
      before, after: trees of arrays or of checkpoint.LazyArray; where several processes hold them together, all have to
        call this.
      optimizer: the optimizer that made the state, as for apply_opt.

    Raises:
      UserError: a part of `before` cannot be grown.
      DamageError: a stored leaf is damaged.
    """
    known = state_kinds(plan, before, optimizer)
    old, new = take_apart(before, unflatten(plan.src_spec)), take_apart(after, unflatten(plan.dst_spec))
    wrong: dict[str, str] = {}
    for path in sorted({*old.trees, *new.trees}):
        if path not in old.trees or path not in new.trees:
            which = "source" if path in old.trees else "grown state"
            wrong[shown(path)] = f"only the {which} has it with the shapes of the parameters"
            continue
        for leaf, problem in _tree_problems(plan, power_of(known[path]), old.trees[path], new.trees[path]):
            wrong[shown((*path, leaf))] = problem
    born = _births(plan, before, old.others)
    for path in sorted({*old.others, *new.others}):
        if path not in old.others or path not in new.others:
            wrong[shown(path)] = "only the {} has it".format("source" if path in old.others else "grown state")
        elif problem := _value_problem(born.get(path, old.others[path]), new.others[path]):
            wrong[shown(path)] = problem
    return wrong


def _tree_problems(plan: Plan, power: int | None, src: Leaves, dst: Leaves) -> Iterator[tuple[str, str]]:
    """Yields (leaf, problem) for one part of a state; power: of the gradient, None for parameters."""
    alike = {}
    for name, source in plan.sources.items():
        before, after = src[source], dst[name]
        if is_empty(before) or is_empty(after):
            if not (is_empty(before) and is_empty(after)):
                yield name, "is there in one of the two states only"
        elif np.dtype(before.dtype) != np.dtype(after.dtype):
            yield name, f"is {after.dtype}, and {before.dtype} in the source"
        else:
            alike[name] = after
    sources = {plan.sources[name]: src[plan.sources[name]] for name in alike}
    found = each(plan, sources, alike, lambda unit, old, new: differing(plan, old, new, unit, power))
    yield from first_problems(plan, found).items()


def _births(plan: Plan, state: PyTree, others: Mapping[Path, object]) -> dict[Path, np.ndarray]:
    """{path: expected births} of the units of every axis, in all states of the trainer's Adam."""
    expected = {}
    for path, node in nodes(state):
        if is_adam(node):
            count = _values(others[*path, "count"])
            for axis, axis_map in plan.maps.items():
                if (place := (*path, "born", axis)) in others:
                    old = _values(others[place])
                    expected[place] = np.where(axis_map.fresh, count, old[np.maximum(axis_map.index, 0)])
    return expected


def _value_problem(expected: object, found: object) -> str | None:
    expected, found = _values(expected), _values(found)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"is {found.dtype}{list(found.shape)}, expected {expected.dtype}{list(expected.shape)}"
    if expected.tobytes() == found.tobytes():
        return None
    place = tuple(int(i) for i in np.argwhere(expected != found)[0]) if (expected != found).any() else (0,) * found.ndim
    return f"{found[place]} at {list(place)}, expected {expected[place]}"


def _values(leaf: Leaf) -> np.ndarray:
    if hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return to_host(leaf)


# ---- division among processes ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a stacked leaf, in memory; indexed like the leaf: leaf[layer, 8:16] or leaf[layer : layer + 1]."""

    layer: int
    values: np.ndarray

    def __getitem__(self, key: object) -> np.ndarray:
        first, *others = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice):
            inside = (first.start, first.stop) == (self.layer, self.layer + 1)
            first = slice(None)
        else:
            inside, first = first == self.layer, 0
        if not inside:
            raise IndexError(f"{key}: only layer {self.layer} is held here")
        return self.values[None][(first, *others)]


def each(plan: Plan, src: Leaves, dst: Leaves, examine: Callable[[int | None, Leaves, Leaves], Any]) -> list[Any]:
    """Calls examine(unit, src, dst) for every unit, and returns the results: first that of None, then of the layers.

    Args:
      src, dst: {dotted name: leaf}. Where some lie on several devices, each process fetches and examines some of the
        units, one at a time, and all processes have to call this alike. Other leaves are handed on, and not held.
      examine: returns JSON.
    """
    units = [None, *range(plan.dst_cfg.num_layers)]
    if not any(map(is_spread, [*src.values(), *dst.values()])):
        return [examine(unit, src, dst) for unit in units]
    process, count = jax.process_index(), jax.process_count()
    mine = []
    for start in range(0, len(units), count):
        turn = dict(enumerate(units[start : start + count]))
        sources = {p: None if unit is None else int(plan.maps["layers"].index[unit]) for p, unit in turn.items()}
        before = _fetched(src, plan.src_spec, {p: source for p, source in sources.items() if source != NEW})
        after = _fetched(dst, plan.dst_spec, turn)
        if process in turn:
            mine.append(examine(turn[process], before, after))
        del before, after  # or the next round would be held beside them
    shares = from_all(mine)
    return [shares[number % count][number // count] for number in range(len(units))]


def _fetched(leaves: Leaves, spec: Mapping[str, ParamSpec], wanted: Mapping[int, int | None]) -> Leaves:
    """Fetches what every process wants, {process: layer}: one layer of stacked leaves, or (None) the other leaves."""
    process, found = jax.process_index(), {}
    for name, leaf in leaves.items():
        stacked = bool(spec[name].stack)
        readers = {p: layer for p, layer in wanted.items() if (layer is not None) == stacked}
        if is_spread(leaf) and readers:
            values, layer = fetch(leaf, readers), readers.get(process)
            leaf = values if values is None or layer is None else Layer(layer, values)
        if process in readers:
            found[name] = leaf
    return found
