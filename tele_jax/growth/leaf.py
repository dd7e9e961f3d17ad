"""One leaf under growth, entry by entry: the contract that both kernels, counting and verification read.

An entry of a grown leaf has one index per dimension, and every dimension an axis with its AxisMap. In one plan step:

    ZERO      the leaf plan names an axis in `zero`, and the entry's index along that axis is fresh
    FILLED    else, some index is NEW: the entry is `value`, or normal with standard deviation `value`
    KEPT      else: the source entry at the mapped indices, times the factors (`coefficient`, and one along each axis in
              `scaled` or `shared`); it counts as "copied" where all factors are 1, and as "scaled" otherwise

`LeafStep.along` decides this along one dimension. After several steps the last one decides first; what it keeps is
decided by the step before, down to the source (`trace` and `kinds`).

Factors are rounded, and multiplied with each other and with the entry, in float32 or in the dtype of the leaf where
that is more precise; the product is rounded once to the dtype of the leaf. Normal values are a function of `key` and of
the entry's absolute indices alone. Hence the bits of an entry do not depend on the rectangle that is computed.
kernel.py does this in JAX and in host memory; tests/growth/test_kernels.py compares both with numpy.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tele_jax.axes import ParamSpec
from tele_jax.config import check_names
from tele_jax.growth.axis_map import NEW, AxisMap

KEPT, ZERO, FILLED = 0, 1, 2  # in arrays of kinds; FILLED + i: filled by the i-th step
KINDS = ("copied", "scaled", "zero", "fresh")  # as counted and printed


@check_names
@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """The rule by which one plan step makes the entries of one leaf; see the top of this module.

    Attributes:
      coefficient: factor on every entry that is kept.
      zero: axes at whose fresh indices the leaf is 0.
      scaled: axes along which kept entries are multiplied by AxisMap.scale.
      shared: axes along which kept entries are multiplied by AxisMap.share.
      fill: "normal" or "constant", for new entries that are not zero.
      value: the standard deviation, or the constant.
    """

    coefficient: float = 1.0
    zero: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    fill: Literal["normal", "constant"] = "constant"
    value: float = 0.0

    @property
    def moves_exactly(self) -> bool:
        """True where entries of the source arrive unchanged."""
        return self.coefficient == 1 and not self.scaled and not self.shared

    @property
    def fills_zero(self) -> bool:
        return self.fill == "constant" and self.value == 0

    def moment(self, spec: ParamSpec, maps: Mapping[str, AxisMap]) -> "LeafPlan":
        """The plan for an optimizer moment of this leaf, which grows like the gradient; new entries are 0.

        Where the parameter becomes a*theta, its gradient becomes g/a. Where a unit is split into copies, the leaf that
        produces the unit gets the gradient times `share` (the fraction that is read of each copy), and the leaf that
        reads the unit gets it times `scale` (the size of each copy).
        """
        copied = [axis for axis in spec.axes if (maps[axis].scale != 1).any() or (maps[axis].share != 1).any()]
        scaled = tuple(axis for axis in copied if axis in spec.inputs)
        shared = tuple(axis for axis in copied if axis in spec.outputs or spec.role == "scale")
        return LeafPlan(1 / self.coefficient, spec.axes, scaled, shared)


class Along(NamedTuple):
    """The decisions of one step along one dimension, for n destination indices.

    zero, new: bool[n]. origin: int64[n], source indices, or NEW. factors: float64[n], or None where all are 1.
    """

    zero: np.ndarray
    new: np.ndarray
    origin: np.ndarray
    factors: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class LeafStep:
    """All that one plan step says about one leaf.

    Attributes:
      leaf: the rule.
      maps: the AxisMap of every dimension.
      key: two 32-bit words for fresh values, see `leaf_key`.
      power: exponent of all factors: 1, or the power of the gradient that an optimizer moment is.
    """

    leaf: LeafPlan
    maps: tuple[AxisMap, ...]
    key: tuple[int, int] = (0, 0)
    power: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf after the step."""
        return tuple(axis_map.dst_size for axis_map in self.maps)

    @property
    def coefficient(self) -> float:
        return float(self.leaf.coefficient) ** self.power

    @property
    def moves_exactly(self) -> bool:
        """True where entries of the source arrive unchanged."""
        return self.power == 0 or self.leaf.moves_exactly

    @property
    def number_of_factors(self) -> int:
        """The number of dimensions with factors, each of which adds a rounding."""
        return sum(axis_map.axis in (*self.leaf.scaled, *self.leaf.shared) for axis_map in self.maps)

    def along(self, dimension: int, index: np.ndarray) -> Along:
        """Decides for the destination indices int64[n] along one dimension."""
        axis_map, leaf = self.maps[dimension], self.leaf
        origin = axis_map.index[index]
        zero = axis_map.fresh[index] if axis_map.axis in leaf.zero else np.zeros(len(index), bool)
        factors = [axis_map.scale[index]] if axis_map.axis in leaf.scaled else []
        factors += [axis_map.share[index]] if axis_map.axis in leaf.shared else []
        factor = math.prod(factors) ** self.power if factors else None
        return Along(zero, origin == NEW, origin, factor)


def leaf_key(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit words that the fresh values of a leaf are drawn with."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


class Traced(NamedTuple):
    """The decisions of a chain of steps along one dimension, for n indices after the last step; last step first.

    zero, new: bool[steps, n], decided by that step and no later one. place: int64[steps, n], the index after that step.
    origin: int64[n], source indices (0 where there is none). factors: float64[steps + 1, n]: by what later steps
    multiply a value that a step made; the last row is for values of the source.
    """

    zero: np.ndarray
    new: np.ndarray
    place: np.ndarray
    origin: np.ndarray
    factors: np.ndarray


def trace(steps: Sequence[LeafStep], dimension: int, where: slice = slice(None)) -> Traced:
    """Follows destination indices (all by default) along one dimension back through the steps of a leaf."""
    index = np.arange(steps[-1].shape[dimension])[where]
    known = np.ones(len(index), bool)
    factors = [np.ones(len(index))]
    zero, new, place = [], [], []
    for step in reversed(steps):
        found = step.along(dimension, index)
        place.append(index)
        zero.append(known & found.zero)
        new.append(known & found.new)
        factors.append(factors[-1] if found.factors is None else factors[-1] * found.factors)
        known = known & ~found.new
        index = np.where(known, found.origin, 0)
    return Traced(np.array(zero), np.array(new), np.array(place), index, np.array(factors))


def kinds(traced: Sequence[Traced]) -> np.ndarray:
    """int8[n, m, ...] of KEPT, ZERO or FILLED + step, for the rectangle that one Traced per dimension spans."""
    if not traced:
        return np.zeros((), np.int8)
    outer = functools.partial(functools.reduce, np.logical_or.outer)
    out = np.full([part.origin.size for part in traced], KEPT, np.int8)
    steps = len(traced[0].zero)
    for k in reversed(range(steps)):  # a later step overrides an earlier one
        out[outer([part.new[k] for part in traced])] = FILLED + steps - 1 - k
        out[outer([part.zero[k] for part in traced])] = ZERO
    return out


def count(steps: Sequence[LeafStep]) -> dict[str, int]:
    """Counts the entries of a leaf that are copied, scaled, zero and fresh, without an array of its size."""
    classes: list[tuple[Traced, list[int]]] = []  # per dimension: one index of each sort, and how many there are
    for dimension in range(len(steps[-1].maps)):
        part = trace(steps, dimension)
        decisions = np.concatenate([part.zero, part.new])
        _, first, numbers = np.unique(decisions, axis=1, return_index=True, return_counts=True)
        classes.append((Traced(*(rows[..., first] for rows in part)), numbers.tolist()))
    kept = "copied" if all(step.moves_exactly for step in steps) else "scaled"
    filled = ["zero" if step.leaf.fills_zero else "fresh" for step in steps]
    names = {KEPT: kept, ZERO: "zero"} | {FILLED + i: name for i, name in enumerate(filled)}
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    found = kinds([picked for picked, _ in classes])
    for place in itertools.product(*map(range, found.shape)):
        counts[names[int(found[place])]] += math.prod(n[i] for (_, n), i in zip(classes, place, strict=True))
    return counts
