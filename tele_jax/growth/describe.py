"""What becomes of every entry of a grown leaf: kept, zero, or filled by one of the steps; counted, and printed.

An entry is looked at from the end: the last step says that it is zero, or fills it, or takes it from the tree before;
there the step before says the same, down to the source. Each step decides by conditions along the axes, so that counts
are products and nothing of the size of a leaf is made.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tele_jax.config import ModelConfig
from tele_jax.growth.axis_map import NEW

if TYPE_CHECKING:
    from tele_jax.growth.plan import Growth

KINDS = ("copied", "scaled", "zero", "fresh")
KEPT, ZERO, FILLED = 0, 1, 2  # FILLED + i: by the i-th step of the leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Along:
    """What the steps of a leaf say of some destination indices along one dimension, the last step first.

    zero, new: bool[steps, n], what each makes zero or fills here. place: int64[steps, n], the index in what each step
    makes. origin: int64[n], source indices (0 where there is none). factors: float64[steps + 1, n], what the values
    that come out of each step are multiplied by later on; the last row is for what comes from the source.
    """

    zero: np.ndarray
    new: np.ndarray
    place: np.ndarray
    origin: np.ndarray
    factors: np.ndarray


def along(growth: "Growth", name: str, dimension: int, where: np.ndarray | slice = slice(None)) -> Along:
    """The fate of destination indices `where` (all by default) along one dimension of a leaf."""
    axis = growth.dst_spec[name].axes[dimension]
    index = np.arange(growth.maps[axis].dst_size)[where]
    known = np.ones(len(index), bool)
    factors = [np.ones(len(index))]
    zero, new, place = [], [], []
    for step, leaf_name in reversed(growth.leaf_steps(name)):
        axis_map, leaf = step.maps[axis], step.leaves[leaf_name]
        place.append(index)
        zero.append(known & axis_map.fresh[index] if axis in leaf.zero else np.zeros_like(known))
        new.append(known & (axis_map.index[index] == NEW))
        along_axis = leaf.factors(axis_map)
        factors.append(factors[-1] if along_axis is None else factors[-1] * along_axis[index])
        known = known & ~new[-1]
        index = np.where(known, axis_map.index[index], 0)
    return Along(np.array(zero), np.array(new), np.array(place), index, np.array(factors))


def kinds(parts: Sequence[Along]) -> np.ndarray:
    """int8[n, m, ...], KEPT, ZERO or FILLED + step, for the rectangle that some indices along every dimension make."""
    shape = tuple(part.origin.size for part in parts)
    if not parts:
        return np.zeros((), np.int8)
    outer = lambda rows: functools.reduce(np.logical_or.outer, rows)  # noqa: E731
    out = np.full(shape, KEPT, np.int8)
    steps = len(parts[0].zero)
    for k in reversed(range(steps)):  # what a later step says stands above what an earlier one says
        out[outer([part.new[k] for part in parts])] = FILLED + steps - 1 - k
        out[outer([part.zero[k] for part in parts])] = ZERO
    return out


def tally(growth: "Growth", name: str) -> dict[str, int]:
    """How many entries of a leaf are copied, scaled, zero and fresh; they add up to its size."""
    moved = "copied" if growth.moves_exactly(name) else "scaled"
    steps = growth.leaf_steps(name)
    classes = []  # along every dimension: one index of each sort, and how many there are
    for dimension in range(len(growth.dst_spec[name].axes)):
        part = along(growth, name, dimension)
        columns, first, counts = np.unique(
            np.concatenate([part.zero, part.new]), axis=1, return_index=True, return_counts=True
        )
        del columns
        picked = Along(*(rows[..., first] for rows in dataclasses.astuple(part)))
        classes.append((picked, counts.tolist()))
    counts = dict.fromkeys(KINDS, 0)
    found = kinds([picked for picked, _ in classes])
    for place in itertools.product(*(range(size) for size in found.shape)):
        kind = int(found[place])
        number = math.prod(count[i] for (_, count), i in zip(classes, place, strict=True))
        if kind >= FILLED:
            step, leaf_name = steps[kind - FILLED]
            leaf = step.leaves[leaf_name]
            counts["zero" if leaf.fill == "constant" and leaf.value == 0 else "fresh"] += number
        else:
            counts[moved if kind == KEPT else "zero"] += number
    return counts


def table(growth: "Growth") -> str:
    """The plan for people: what grows, what becomes of every leaf, totals in parameters and bytes, notes."""
    rows = [("leaf", "from", "to", *KINDS)]
    total, nbytes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for name, spec in growth.dst_spec.items():
        counts = growth.tally(name)
        source = growth.leaf_steps(name)[0]
        before = growth.src_spec[source[0].sources[source[1]]]
        for kind in KINDS:
            total[kind] += counts[kind]
            nbytes[kind] += counts[kind] * np.dtype(spec.dtype).itemsize
        shapes = ("x".join(map(str, s.shape)) for s in (before, spec))
        rows.append((name, *shapes, *(f"{counts[kind]:,}" for kind in KINDS)))
    source_size = sum(s.size for s in growth.src_spec.values())
    source_bytes = sum(s.size * np.dtype(s.dtype).itemsize for s in growth.src_spec.values())
    rows.append(("total", f"{source_size:,}", f"{sum(total.values()):,}", *(f"{n:,}" for n in total.values())))
    rows.append(("bytes", _size(source_bytes), _size(sum(nbytes.values())), *map(_size, nbytes.values())))
    return "\n".join([*_head(growth), *_columns(rows), *(f"note: {note}" for note in growth.notes)])


def _head(growth: "Growth") -> list[str]:
    # In the order of the config, which is the same for a plan that comes from JSON.
    maps = [growth.maps[axis] for axis in growth.src_cfg.axis_sizes if axis in growth.maps]
    axes = ", ".join(f"{m.axis} {m.src_size} -> {m.dst_size}" for m in maps if not m.is_identity)
    if not growth.preserving:
        promise = "does not preserve the function"
    else:
        promise = "preserves the function" + (", behind masks at 0" if growth.masked else "")
    changed = [
        f"config: {field.name} {getattr(growth.src_cfg, field.name)} -> {getattr(growth.dst_cfg, field.name)}"
        for field in dataclasses.fields(ModelConfig)
        if field.name in ("rms_eps", "input_mult", "output_mult", "vocab_size")
        and getattr(growth.src_cfg, field.name) != getattr(growth.dst_cfg, field.name)
    ]
    return [f"policy {growth.policy}: {promise}", f"axes: {axes or 'none grow'}", *changed]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _size(nbytes: int) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    raise AssertionError
