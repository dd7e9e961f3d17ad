"""The first level of verification: every entry of the grown tree is what the plan says, to the bit.

Kept entries equal the source's, zeros are zero, constants are the constant, fresh values have the moments that they
should. Leaves are read in tiles, from arrays in memory or from checkpoints that do not fit there.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tele_jax.growth import fate
from tele_jax.growth.plan import Growth, Plan
from tele_jax.sharding import tiles

TILE_BYTES = 16 * 2**20
_SIGMAS = 7  # how far a moment of fresh values may be from what is expected
_KURTOSIS = 2.7  # of kernel.normal
_LARGEST = 3.6  # kernel.normal ends at 3.464 standard deviations; bfloat16 rounds a little beyond that


@dataclasses.dataclass
class Moments:
    """Of the fresh values of one step in one leaf, divided by the standard deviation that they should have."""

    number: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, values: np.ndarray) -> None:
        self.number += values.size
        self.total += float(values.sum())
        self.squares += float((values**2).sum())
        self.largest = max(self.largest, float(np.abs(values).max(initial=0.0)))

    def __add__(self, other: "Moments") -> "Moments":
        sums = (self.number + other.number, self.total + other.total, self.squares + other.squares)
        return Moments(*sums, max(self.largest, other.largest))

    def problem(self, repeats: int) -> str | None:
        """repeats: how often a later step copied each value at most; copies say nothing new of the moments."""
        mean, variance = self.total / self.number, self.squares / self.number
        independent = self.number / repeats
        if abs(mean) > _SIGMAS / math.sqrt(independent):
            return f"fresh values have the mean {mean:.3g} std over {self.number:,} entries, expected 0"
        # The second term (Bernstein's) is for a few values only, whose squares are far from normal.
        if abs(variance - 1) > _SIGMAS * math.sqrt((_KURTOSIS - 1) / independent) + _LARGEST**2 / independent:
            return f"fresh values have the variance {variance:.4g} of what is planned, over {self.number:,} entries"
        return None if self.largest <= _LARGEST else f"a fresh value is {self.largest:.3g} std large"


@dataclasses.dataclass
class Look:
    """What was seen of one layer of a leaf, or of one that has none.

    problem: an entry that is not what it should be; the rest was then not looked at. moments: by step of the leaf.
    """

    problem: str | None
    moments: list[Moments]

    def to_json(self) -> list[Any]:
        return [self.problem, [dataclasses.astuple(moments) for moments in self.moments]]

    @classmethod
    def from_json(cls, data: list[Any]) -> "Look":
        return cls(data[0], [Moments(*moments) for moments in data[1]])


def look(plan: Growth, src: Mapping[str, Any], dst: Mapping[str, Any], unit: int | None) -> dict[str, Look]:
    """{leaf: what is seen of it} for the leaves of one unit of the grown tree: see `share`.

    src, dst: {dotted name: array, or checkpoint.LazyArray}, with the leaves of that unit at least.
    """
    looks = {}
    for name, spec in plan.dst_spec.items():
        if bool(spec.stack) == (unit is not None):
            moments = [Moments() for _ in plan.leaf_steps(name)]
            # Where nothing comes from the source, its leaf may be missing.
            found = _problems(plan, name, src.get(plan.sources[name]), dst[name], unit, moments)
            looks[name] = Look(next(found, None), moments)
    return looks


def altered(plan: Growth, looks: Sequence[Mapping[str, Look]]) -> dict[str, str]:
    """{leaf: what is wrong with it} for every leaf of the grown tree that is not what the plan makes of the source.

    looks: of all units, in order.
    """
    wrong = {}
    for name in plan.dst_spec:
        seen = [units[name] for units in looks if name in units]
        problem = next((one.problem for one in seen if one.problem is not None), None) or _judged(plan, name, seen)
        if problem is not None:
            wrong[name] = problem
    return wrong


def _judged(plan: Growth, name: str, seen: Sequence[Look]) -> str | None:
    steps = [step for step, _ in plan.leaf_steps(name)]
    for k in range(len(steps)):
        moments = sum((one.moments[k] for one in seen), Moments())
        problem = moments.problem(_repeats(steps[k + 1 :], plan.dst_spec[name].axes)) if moments.number else None
        if problem is not None:
            return problem
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Unrounded:
    """A leaf of the result, read in float64, with the products of the plan in the place of what they were rounded to.

    What is not such a product to within its rounding is as it is stored. So the function of a model in float32 or
    bfloat16 can be compared to the precision of float64, however much of the rounding a sharp softmax makes.
    """

    plan: Growth
    name: str
    source: Any
    made: Any

    def __getitem__(self, key: Any) -> np.ndarray:
        """By integers and slices of step 1, like a LazyArray."""
        shape = self.plan.dst_spec[self.name].shape
        keys = [k for k in (key if isinstance(key, tuple) else (key,)) if k is not Ellipsis]
        keys += [slice(None)] * (len(shape) - len(keys))
        where = tuple(k if isinstance(k, slice) else slice(int(k), int(k) + 1) for k in keys)
        parts = [fate.along(self.plan, self.name, dimension, part) for dimension, part in enumerate(where)]
        values = np.asarray(self.made[where]).astype(np.float64)
        kept = fate.kinds(parts) == fate.KEPT
        if kept.any():
            products = _products(self.plan, self.name, self.source, parts)
            rounded = kept & _is_rounded(self.plan, self.name, values, products)
            values[rounded] = products[rounded]
        return values.reshape([n for n, k in zip(values.shape, keys, strict=True) if isinstance(k, slice)])


def _products(plan: Growth, name: str, source: Any, parts: Sequence[fate.Along]) -> np.ndarray:
    """float64: what the plan makes of the source entries at the origins of a tile, not rounded."""
    coefficient = math.prod(step.leaves[leaf].coefficient for step, leaf in plan.leaf_steps(name))
    return _gather(source, parts) * (coefficient * _outer([part.factors[-1] for part in parts]))


def _is_rounded(plan: Growth, name: str, values: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Where values are the products in the dtype of the leaf: to the bit where nothing is scaled."""
    if plan.moves_exactly(name):
        return (values == products) & (np.signbit(values) == np.signbit(products))
    # Rounded once a step, the factors too; what is below the smallest normal number may be flushed to 0.
    info = jnp.finfo(plan.dst_spec[name].dtype)
    slack = 2 * len(plan.leaf_steps(name)) * float(info.eps)
    return np.abs(values - products) <= slack * np.abs(products) + float(info.tiny)


def _problems(
    plan: Growth, name: str, source: Any, made: Any, unit: int | None, moments: list[Moments]
) -> Iterator[str]:
    """What is wrong in one unit of a leaf; adds to the moments on the way."""
    spec, steps = plan.dst_spec[name], plan.leaf_steps(name)
    coefficients = np.cumprod([1.0, *(step.leaves[leaf].coefficient for step, leaf in reversed(steps))])
    eps = float(jnp.finfo(spec.dtype).eps)
    stack = () if unit is None else (slice(unit, unit + 1),)
    for tile in tiles(spec.shape[len(stack) :], np.dtype(spec.dtype).itemsize, TILE_BYTES):
        where = (*stack, *tile)
        parts = [fate.along(plan, name, dimension, part) for dimension, part in enumerate(where)]
        kinds = fate.kinds(parts)
        values = np.asarray(made[where]).astype(np.float64)
        at = lambda place, where=where: f"at {[int(p + w.start) for p, w in zip(place, where, strict=True)]}"  # noqa: E731
        if not np.isfinite(values).all():
            yield f"{values[~np.isfinite(values)][0]} {at(np.argwhere(~np.isfinite(values))[0])}"
        wrong = (kinds == fate.ZERO) & (values != 0)
        if wrong.any():
            yield f"{values[wrong][0]:.6g} {at(np.argwhere(wrong)[0])}, planned 0"
        kept = kinds == fate.KEPT
        if kept.any():
            expected = _products(plan, name, source, parts)
            wrong = kept & ~_is_rounded(plan, name, values, expected)
            if wrong.any():
                yield f"{values[wrong][0]:.9g} {at(np.argwhere(wrong)[0])}, from the source {expected[wrong][0]:.9g}"
        for k, (step, leaf_name) in enumerate(steps):
            filled = kinds == fate.FILLED + k
            if not filled.any():
                continue
            later = len(steps) - 1 - k
            leaf = step.leaves[leaf_name]
            scale = (coefficients[later] * _outer([part.factors[later] for part in parts])) * leaf.value
            scale = np.broadcast_to(scale, values.shape)
            if leaf.fill == "normal":
                moments[k].add(values[filled] / scale[filled])
                continue
            wrong = filled & (np.abs(values - scale) > 2 * max(1, later) * eps * np.abs(scale))
            if wrong.any():
                place = at(np.argwhere(wrong)[0])
                yield f"a new entry is {values[wrong][0]:.6g} {place}, planned {scale[wrong][0]:.6g}"


def _repeats(steps: Sequence[Plan], axes: Sequence[str]) -> int:
    """How often some steps copy an entry of a leaf at most."""
    counts = [np.bincount(step.maps[axis].index[step.maps[axis].index >= 0]) for step in steps for axis in axes]
    return math.prod(int(count.max(initial=1)) for count in counts)


def _outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    out = np.ones((1,) * len(vectors))
    for dimension, vector in enumerate(vectors):
        if not (vector == 1).all():
            out = out * vector.reshape([-1 if d == dimension else 1 for d in range(len(vectors))])
    return out


def _gather(array: Any, parts: Sequence[fate.Along]) -> np.ndarray:
    """float64: the source entries at the origins of a tile; only the part of the source around them is read."""
    if not parts:
        return np.asarray(array).astype(np.float64)
    box = tuple(slice(int(part.origin.min()), int(part.origin.max()) + 1) for part in parts)
    read = np.asarray(array[box]).astype(np.float64)
    for dimension, (part, bounds) in enumerate(zip(parts, box, strict=True)):
        index = part.origin - bounds.start
        if not np.array_equal(index, np.arange(read.shape[dimension])):
            read = np.take(read, index, axis=dimension)
    return read
