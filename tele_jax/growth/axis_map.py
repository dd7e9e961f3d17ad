"""AxisMap: where every index of a grown axis comes from. Pure numpy.

widen("embed", 3, 5)          index [0 1 2 -1 -1], the last two new
repeat("layers", [0, 1, 1])   index [0 1 1], the third a copy that was not there before: also new
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tele_jax.config import from_dict, require
from tele_jax.errors import UserError

NEW = -1
_MOST_UNITS = 10**8  # of an axis that is read from JSON


@dataclasses.dataclass(frozen=True, eq=False)
class AxisMap:
    """One logical axis before and after growth.

    Attributes:
      axis: its name.
      src_size: its size before.
      index: int64[dst_size], the source index of every destination index, or NEW.
      fresh: bool[dst_size], true where the unit was not in the model before: NEW entries, and copies that growth
        masks or zeroes. An entry that a source unit is split into is a copy, but not fresh.
      scale: float64[dst_size], the factor on what produces the unit, for leaves whose plan asks for it.
      share: float64[dst_size], the factor on what reads the unit; with copies, scale * share adds up to 1 over them.
    """

    axis: str
    src_size: int
    index: np.ndarray
    fresh: np.ndarray
    scale: np.ndarray
    share: np.ndarray

    def __post_init__(self):
        size = len(self.index)
        if {self.fresh.shape, self.scale.shape, self.share.shape} != {(size,)}:
            raise ValueError(f"{self.axis}: index, fresh, scale and share differ in length")
        if size and (self.index.max() >= self.src_size or self.index.min() < NEW):
            raise ValueError(f"{self.axis}: index outside the source axis of size {self.src_size}")
        if not self.fresh[self.index == NEW].all():
            raise ValueError(f"{self.axis}: a NEW entry is not marked fresh")

    @property
    def dst_size(self) -> int:
        return len(self.index)

    @property
    def is_identity(self) -> bool:
        """Nothing moves, nothing is new, nothing is scaled."""
        same = self.dst_size == self.src_size and np.array_equal(self.index, np.arange(self.src_size))
        return same and not self.fresh.any() and bool((self.scale == 1).all() and (self.share == 1).all())

    def compose(self, later: "AxisMap") -> "AxisMap":
        """This map, then `later`: as one map from this source to the later destination."""
        if later.src_size != self.dst_size:
            raise ValueError(f"{self.axis}: cannot compose {self.dst_size} with a map of {later.src_size}")
        known = later.index != NEW
        through = np.where(known, later.index, 0)
        return AxisMap(
            self.axis,
            self.src_size,
            np.where(known, self.index[through], NEW),
            later.fresh | (known & self.fresh[through]),
            np.where(known, self.scale[through], 1.0) * later.scale,
            np.where(known, self.share[through], 1.0) * later.share,
        )

    def invert(self) -> "AxisMap":
        """The left inverse: every source index from where growth kept it, the scale undone.

        Raises:
          ValueError: a source unit that the destination does not hold any more.
        """
        position = np.full(self.src_size, NEW)
        for dst in range(self.dst_size - 1, -1, -1):
            if self.index[dst] != NEW and not self.fresh[dst]:
                position[self.index[dst]] = dst
        if (position == NEW).any():
            lost = np.flatnonzero(position == NEW).tolist()
            raise ValueError(f"{self.axis}: units {lost} of the source are not in the destination")
        fresh = np.zeros(self.src_size, bool)
        return AxisMap(self.axis, self.dst_size, position, fresh, 1 / self.scale[position], 1 / self.share[position])

    def concatenate(self, other: "AxisMap") -> "AxisMap":
        """Both maps side by side over the same source: the destination of this one, then that of the other."""
        if other.src_size != self.src_size:
            raise ValueError(f"{self.axis}: sources of size {self.src_size} and {other.src_size}")
        pair = [(getattr(self, name), getattr(other, name)) for name in ("index", "fresh", "scale", "share")]
        return AxisMap(self.axis, self.src_size, *(np.concatenate(both) for both in pair))

    def to_json(self) -> dict[str, Any]:
        """Plain lists, runs of consecutive indices folded: [[start, length], ...], start -1 for a run of NEW."""
        return {
            "axis": self.axis,
            "src_size": self.src_size,
            "runs": [list(run) for run in self.runs()],
            "fresh": np.flatnonzero(self.fresh & (self.index != NEW)).tolist(),
            "scale": None if (self.scale == 1).all() else self.scale.tolist(),
            "share": None if (self.share == 1).all() else self.share.tolist(),
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "map") -> "AxisMap":
        """The inverse of to_json. Raises UserError for what to_json does not make; where: put before its fields."""
        fields = from_dict(_Fields, data, where)
        size = sum(run[1] for run in fields.runs if len(run) == 2)
        good = max(size, fields.src_size) <= _MOST_UNITS and all(
            len(run) == 2 and run[1] > 0 and (run[0] == NEW or 0 <= run[0] <= fields.src_size - run[1])
            for run in fields.runs
        )
        require(good, f"{where}.runs: must be (start, length) inside the source, of {_MOST_UNITS:,} units at most")
        parts = [np.arange(start, start + n) if start != NEW else np.full(n, NEW) for start, n in fields.runs]
        index = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
        fresh = index == NEW
        require(all(0 <= unit < size for unit in fields.fresh), f"{where}.fresh: a unit is not one of {size}")
        fresh[list(fields.fresh)] = True
        factors = [*(fields.scale or ()), *(fields.share or ())]
        require(all(math.isfinite(f) and f != 0 for f in factors), f"{where}: scale and share must be finite, not 0")
        try:
            return make(fields.axis, fields.src_size, index, fresh, fields.scale, fields.share)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where}: {error}") from None

    def runs(self) -> list[tuple[int, int]]:
        """The index as runs (start, length) of consecutive source indices; start NEW for a run of new entries."""
        runs: list[tuple[int, int]] = []
        for i in self.index.tolist():
            start, length = runs[-1] if runs else (None, 0)
            if runs and ((i == NEW and start == NEW) or (i != NEW and start != NEW and i == start + length)):
                runs[-1] = (start, length + 1)
            else:
                runs.append((i, 1))
        return runs


@dataclasses.dataclass(frozen=True)
class _Fields:
    """An AxisMap as JSON."""

    axis: str
    src_size: int
    runs: tuple[tuple[int, ...], ...]
    fresh: tuple[int, ...]
    scale: tuple[float, ...] | None
    share: tuple[float, ...] | None


def make(
    axis: str,
    src_size: int,
    index: Sequence[int],
    fresh: Sequence[bool] | None = None,
    scale: Sequence[float] | None = None,
    share: Sequence[float] | None = None,
) -> AxisMap:
    """An AxisMap from lists; fresh defaults to the NEW entries, scale and share to ones."""
    index = np.asarray(index, np.int64)
    fresh = index == NEW if fresh is None else np.asarray(fresh, bool)
    factors = [np.ones(len(index)) if f is None else np.asarray(f, np.float64) for f in (scale, share)]
    return AxisMap(axis, src_size, index, fresh, *factors)


def identity(axis: str, size: int) -> AxisMap:
    return make(axis, size, np.arange(size))


def widen(axis: str, src_size: int, dst_size: int) -> AxisMap:
    """New entries appended at the end."""
    return make(axis, src_size, np.concatenate([np.arange(src_size), np.full(dst_size - src_size, NEW)]))


def repeat(axis: str, src_size: int, index: Sequence[int]) -> AxisMap:
    """Source units in the order given; the first occurrence of each is the unit itself, later ones are fresh copies."""
    seen: set[int] = set()
    fresh = [i in seen or seen.add(i) for i in index]  # set.add returns None: false on the first occurrence
    return make(axis, src_size, index, [bool(f) for f in fresh])


def copies(axis: str, src_size: int, index: Sequence[int], *, keep_norm: bool = False) -> AxisMap:
    """Units split into copies that together do what the unit did: nothing is fresh.

    Readers take 1/n of each of n copies. With keep_norm, where a norm's mean of squares runs over the axis, copies are
    scaled by t = sqrt(dst/(src n)) and readers take 1/(n t), so that the mean is unchanged for any numbers of copies.
    """
    index = np.asarray(index, np.int64)
    n = np.bincount(index, minlength=src_size)[index]
    scale = np.sqrt(len(index) / (src_size * n)) if keep_norm else np.ones(len(index))
    return make(axis, src_size, index, np.zeros(len(index), bool), scale, 1 / (n * scale))


def grouped_heads(src_heads: int, src_groups: int, dst_heads: int, dst_groups: int) -> tuple[AxisMap, AxisMap]:
    """Maps for heads and kv_heads that keep every query head with the keys and values it had.

    A group grows inside itself, new groups come at the end, and where the groups get smaller each is split into
    several that hold copies of its keys and values (grouped-query attention becoming multi-head attention).

    Raises:
      ValueError: too few destination groups to hold the heads that there are.
    """
    src_group, dst_group = src_heads // src_groups, dst_heads // dst_groups
    parts = -(-src_group // dst_group)  # destination groups per source group
    if src_groups * parts > dst_groups:
        raise ValueError(
            f"{src_heads} heads in {src_groups} groups do not fit into {dst_heads} heads in {dst_groups} groups: "
            f"groups of {dst_group} need at least {src_groups * parts} of them"
        )
    heads = np.full((dst_groups, dst_group), NEW)
    kv_heads = np.full(dst_groups, NEW)
    for head in range(src_heads):
        group, within = divmod(head, src_group)
        part, place = divmod(within, dst_group)
        heads[group * parts + part, place] = head
        kv_heads[group * parts + part] = group
    return make("heads", src_heads, heads.ravel()), make("kv_heads", src_groups, kv_heads)


def copied_heads(src_heads: int, src_groups: int, dst_heads: int, dst_groups: int) -> tuple[AxisMap, AxisMap]:
    """The same with copies of heads and groups in the place of new ones: each of n copies of a head is read by 1/n.

    The share of a copied group is that of its heads, on average: that is how much of the gradient of its keys and
    values it has, exactly where all of its heads are shared alike.

    Raises:
      ValueError: as grouped_heads.
    """
    grown, groups = grouped_heads(src_heads, src_groups, dst_heads, dst_groups)
    heads, kv_heads = grown.index.reshape(dst_groups, -1).copy(), groups.index.copy()
    known = np.flatnonzero(kv_heads != NEW)
    for group in known:
        own = heads[group][heads[group] != NEW]
        heads[group] = np.where(heads[group] == NEW, np.resize(own, heads.shape[1]), heads[group])
    new = np.flatnonzero(kv_heads == NEW)
    heads[new], kv_heads[new] = heads[np.resize(known, len(new))], kv_heads[np.resize(known, len(new))]
    split = copies("heads", src_heads, heads.ravel())
    share = split.share.reshape(dst_groups, -1).sum(axis=1) / (src_heads // src_groups)
    return split, make("kv_heads", src_groups, kv_heads, share=share)
