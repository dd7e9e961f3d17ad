"""Comparison of a grown optimizer state with the one that it grew from: every moment, count and birth.

The parts of a state that have the shapes of the parameters are looked at entry by entry like parameters (structure.py),
by the plan of each part: kept entries are the source's times a power of the factors, new entries are zero. In the
trainer's state new units are born at the current count. All else is what it was, to the bit.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from tele_jax.axes import is_empty, unflatten
from tele_jax.growth.opt_state import is_adam, kinds, nodes, part_plan, shown, take_apart
from tele_jax.growth.plan import Growth
from tele_jax.growth.verify import entries as structure
from tele_jax.growth.verify import spread
from tele_jax.sharding import to_host


def altered(
    plan: Growth, before: Any, after: Any, optimizer: optax.GradientTransformation | None = None
) -> dict[str, str]:
    """{part of the state: what is wrong with it}; {} where all of it is what growth makes of `before`.

    before, after: trees of arrays or of checkpoint.LazyArray; where several processes hold them together, all have to
      call this. optimizer: as for apply_opt.

    Raises:
      UserError: a part of `before` cannot be grown.
      DamageError: a stored leaf is damaged.
    """
    known = kinds(plan, before, optimizer)
    old, new = take_apart(before, unflatten(plan.src_spec)), take_apart(after, unflatten(plan.dst_spec))
    wrong: dict[str, str] = {}
    for path in sorted({*old.trees, *new.trees}):
        if path not in old.trees or path not in new.trees:
            which = "source" if path in old.trees else "grown state"
            wrong[shown(path)] = f"only the {which} has it with the shapes of the parameters"
            continue
        for leaf, problem in _tree_problems(part_plan(plan, known[path]), old.trees[path], new.trees[path]):
            wrong[shown((*path, leaf))] = problem
    born = _births(plan, before, old.others)
    for path in sorted({*old.others, *new.others}):
        if path not in old.others or path not in new.others:
            wrong[shown(path)] = "only the {} has it".format("source" if path in old.others else "grown state")
        elif problem := _value_problem(born.get(path, old.others[path]), new.others[path]):
            wrong[shown(path)] = problem
    return wrong


def _tree_problems(plan: Growth, src: Mapping[str, Any], dst: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(leaf, what is wrong with it) of one part; plan: of that part."""
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
    found = spread.each(plan, sources, alike, lambda unit, old, new: structure.look(plan, old, new, unit))
    yield from structure.altered(plan, found).items()


def _births(plan: Growth, state: Any, others: Mapping[Any, Any]) -> dict[Any, np.ndarray]:
    """{path: the expected births} of the units of every axis, in all states of the trainer's Adam."""
    expected = {}
    for path, node in nodes(state):
        if is_adam(node):
            count = _values(others[*path, "count"])
            for axis, axis_map in plan.maps.items():
                if (place := (*path, "born", axis)) in others:
                    old = _values(others[place])
                    expected[place] = np.where(axis_map.fresh, count, old[np.maximum(axis_map.index, 0)])
    return expected


def _value_problem(expected: Any, found: Any) -> str | None:
    expected, found = _values(expected), _values(found)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"is {found.dtype}{list(found.shape)}, expected {expected.dtype}{list(expected.shape)}"
    if expected.tobytes() == found.tobytes():
        return None
    place = tuple(int(i) for i in np.argwhere(expected != found)[0]) if (expected != found).any() else (0,) * found.ndim
    return f"{found[place]} at {list(place)}, expected {expected[place]}"


def _values(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return to_host(leaf)
