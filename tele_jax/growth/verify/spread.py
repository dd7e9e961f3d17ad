"""Splits verification into independent units, and divides them among processes that hold the models together.

A unit is a layer of the grown model with its source layer; one more unit, None, is all that is not stacked: embedding,
head and final norm. Of 32 layers on 8 processes each process examines four or five units, and holds one at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tele_jax.axes import Leaves, ParamSpec
from tele_jax.growth.axis_map import NEW
from tele_jax.growth.plan import Plan
from tele_jax.processes import from_all
from tele_jax.sharding import fetch, is_spread


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
