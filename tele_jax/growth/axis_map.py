"""Maps of one axis: from every destination index to the source index that it takes, or to NEW. Pure numpy.

widen("embed", 3, 5)             index [0 1 2 -1 -1], the last two new
repeat("layers", 2, [0, 1, 1])   index [0 1 1], the third a copy that was not there before: fresh
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tele_jax.config import FILLED, check_fields, from_dict, require
from tele_jax.errors import UserError
from tele_jax.files import Table

NEW = -1
_MOST_UNITS = 10**8  # the longest axis that is read from JSON


if TYPE_CHECKING:

    class _Array:
        """Type of a field that takes a list for an array, or None for the default, and reads as an array."""

        def __get__(self, axis_map: object, owner: type | None = None) -> np.ndarray: ...
        def __set__(self, axis_map: object, value: npt.ArrayLike | None) -> None: ...

else:
    _Array = Any


@check_fields
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AxisMap:
    """One logical axis before and after growth. Lists are taken for arrays.

    Attributes:
      axis: the name of the axis.
      src_size: the number of units before.
      index: int64[dst_size], the source index of every destination index, or NEW.
      fresh: bool[dst_size], true where the unit was not in the model before: NEW entries (the default), and copies that
        growth masks or zeroes. A copy that a source unit is split into is not fresh.
      scale: float64[dst_size], a factor for leaves that produce the unit, where their LeafPlan names the axis.
      share: float64[dst_size], a factor for leaves that read the unit; over all copies of a unit, scale * share is 1.
    """

    axis: str
    src_size: int
    index: _Array
    fresh: _Array = FILLED
    scale: _Array = FILLED
    share: _Array = FILLED

    def __post_init__(self):
        size = len(self.index)
        defaults = {"index": (np.int64, None), "fresh": (bool, np.asarray(self.index) == NEW)}
        defaults |= dict.fromkeys(("scale", "share"), (np.float64, np.ones(size)))
        for name, (dtype, default) in defaults.items():
            given = getattr(self, name)
            object.__setattr__(self, name, np.asarray(default if given is None else given, dtype))
        if {self.fresh.shape, self.scale.shape, self.share.shape} != {(size,)}:
            raise UserError(f"{self.axis}: index, fresh, scale and share differ in length")
        if size and (self.index.max() >= self.src_size or self.index.min() < NEW):
            raise UserError(f"{self.axis}: index outside the source axis of size {self.src_size}")
        if not self.fresh[self.index == NEW].all():
            raise UserError(f"{self.axis}: a NEW entry is not marked fresh")

    def __repr__(self) -> str:
        return f"<AxisMap {self.axis}: {self.src_size} -> {self.dst_size}, {self.fresh.sum()} fresh>"

    @property
    def dst_size(self) -> int:
        return len(self.index)

    @property
    def is_identity(self) -> bool:
        """True where nothing moves, is new, or is scaled."""
        same = self.dst_size == self.src_size and np.array_equal(self.index, np.arange(self.src_size))
        return same and not self.fresh.any() and bool((self.scale == 1).all() and (self.share == 1).all())

    def compose(self, later: "AxisMap") -> "AxisMap":
        """The map from this source to the destination of `later`, which follows this map."""
        if later.src_size != self.dst_size:
            raise UserError(f"{self.axis}: cannot compose {self.dst_size} with a map of {later.src_size}")
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
          UserError: a source unit that the destination does not hold any more.
        """
        position = np.full(self.src_size, NEW)
        kept = np.flatnonzero((self.index != NEW) & ~self.fresh)[::-1]
        position[self.index[kept]] = kept  # the first place of a unit counts
        if (position == NEW).any():
            lost = np.flatnonzero(position == NEW).tolist()
            raise UserError(f"{self.axis}: units {lost} of the source are not in the destination")
        fresh = np.zeros(self.src_size, bool)
        return AxisMap(self.axis, self.dst_size, position, fresh, 1 / self.scale[position], 1 / self.share[position])

    def concatenate(self, other: "AxisMap") -> "AxisMap":
        """Both maps side by side over one source: the destination of this map, then that of the other."""
        if other.src_size != self.src_size:
            raise UserError(f"{self.axis}: sources of size {self.src_size} and {other.src_size}")
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("index", "fresh", "scale", "share")]
        return AxisMap(self.axis, self.src_size, *map(np.concatenate, pairs))

    def to_json(self) -> Table:
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
        """The inverse of to_json. Raises UserError, with `where` before the field, for what to_json does not make."""
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
            return AxisMap(fields.axis, fields.src_size, index, fresh, fields.scale, fields.share)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where}: {error}") from None

    def runs(self) -> list[tuple[int, int]]:
        """The index as runs (start, length) of consecutive source indices; start NEW for a run of new entries."""
        before, after = self.index[:-1], self.index[1:]
        goes_on = np.where(before == NEW, after == NEW, after == before + 1)
        starts = np.flatnonzero(np.concatenate([[True], ~goes_on]))[: self.dst_size].tolist()
        return [(int(self.index[a]), b - a) for a, b in itertools.pairwise([*starts, self.dst_size])]


@dataclasses.dataclass(frozen=True)
class _Fields:
    """An AxisMap as JSON."""

    axis: str
    src_size: int
    runs: tuple[tuple[int, ...], ...]
    fresh: tuple[int, ...]
    scale: tuple[float, ...] | None
    share: tuple[float, ...] | None


def identity(axis: str, size: int) -> AxisMap:
    return AxisMap(axis, size, np.arange(size))


def widen(axis: str, src_size: int, dst_size: int) -> AxisMap:
    """New entries appended at the end."""
    return AxisMap(axis, src_size, np.concatenate([np.arange(src_size), np.full(dst_size - src_size, NEW)]))


def repeat(axis: str, src_size: int, index: Sequence[int]) -> AxisMap:
    """Source units in the order given; the first occurrence of each is the unit itself, later ones are fresh copies."""
    seen: set[int] = set()
    fresh = [i in seen or seen.add(i) for i in index]  # set.add returns None: false on the first occurrence
    return AxisMap(axis, src_size, index, [bool(f) for f in fresh])


def copies(axis: str, src_size: int, index: npt.ArrayLike, *, keep_norm: bool = False) -> AxisMap:
    """Units split into copies that together do what the unit did: nothing is fresh.

    Leaves that read the axis take 1/n of each of n copies. keep_norm, for an axis over which a norm takes the mean of
    squares, scales copies by t = sqrt(dst/(src n)) and reads 1/(n t) of each, which keeps the mean for any n.
    """
    index = np.asarray(index, np.int64)
    n = np.bincount(index, minlength=src_size)[index]
    scale = np.sqrt(len(index) / (src_size * n)) if keep_norm else np.ones(len(index))
    return AxisMap(axis, src_size, index, np.zeros(len(index), bool), scale, 1 / (n * scale))


def grouped_heads(src_heads: int, src_groups: int, dst_heads: int, dst_groups: int) -> tuple[AxisMap, AxisMap]:
    """Maps for heads and kv_heads that keep every query head with the keys and values it had.

    A group grows inside itself, new groups come at the end, and where the groups get smaller each is split into
    several that hold copies of its keys and values (grouped-query attention becoming multi-head attention).

    Raises:
      UserError: too few destination groups to hold the heads that there are.
    """
    src_group, dst_group = src_heads // src_groups, dst_heads // dst_groups
    parts = -(-src_group // dst_group)  # destination groups per source group
    if src_groups * parts > dst_groups:
        raise UserError(
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
    return AxisMap("heads", src_heads, heads.ravel()), AxisMap("kv_heads", src_groups, kv_heads)


def copied_heads(src_heads: int, src_groups: int, dst_heads: int, dst_groups: int) -> tuple[AxisMap, AxisMap]:
    """Maps as grouped_heads makes them, with copies in the place of new heads; each of n copies is read by 1/n.

    The share of a copied group is the mean share of its heads: the fraction of the gradient of its keys and values that
    it gets, exactly where all of its heads have one share.

    Raises:
      UserError: as grouped_heads.
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
    return split, AxisMap("kv_heads", src_groups, kv_heads, share=share)
