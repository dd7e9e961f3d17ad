"""Changes to parameter trees by the names of their axes: take, drop, reorder, cut, pad, rescale, rename, select.

    plan = surgery.drop(cfg, "layers", [3, 7])
    plan = surgery.cut(plan, "mlp", 1024)             functions take a config, or a plan to go on from
    print(plan)
    small = growth.apply(plan, params)                or apply_opt, stream, verify: they are plans of growth

    one = surgery.merge(cfg, [a, b], "slerp", t=0.5)  several models into one: merging.py

A plan says whether the function is preserved, and if not, why (plan.notes). Growth that keeps the function and lets
what is new learn is `growth.plan`.
"""

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from tele_jax.axes import Leaf, ParamSpec, flatten, require_arrays
from tele_jax.checkpoint.layout import name_problem
from tele_jax.config import ModelConfig, finite, require, require_config, whole
from tele_jax.errors import UserError, abridged
from tele_jax.files import Table
from tele_jax.growth import axis_map
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.leaf import LeafPlan
from tele_jax.growth.means import add_tokens, pool_kv_heads
from tele_jax.growth.merging import merge
from tele_jax.growth.plan import Plan, Step, compose
from tele_jax.growth.policies import expand_blocks
from tele_jax.model.spec import flat_spec

Model = ModelConfig | Plan

__all__ = ["add_tokens", "expand_blocks", "pool_kv_heads"]
__all__ += ["Diff", "Difference", "cut", "diff", "drop", "duplicate", "find", "merge", "pad", "rename", "rescale"]
__all__ += ["select", "submodel", "take"]

# {axis that surgery can change: the config's field for its size}
FIELDS = {"layers": "num_layers", "embed": "embed_dim", "heads": "num_heads", "kv_heads": "num_kv_heads"}
FIELDS |= {"mlp": "mlp_dim", "vocab": "padded_vocab_size"}


# ---- by axis -----------------------------------------------------------------------------------------------------


def take(model: Model, axis: str, ids: Sequence[int]) -> Plan:
    """Keeps the units `ids` of an axis, in that order, and drops all others.

    layers may be repeated: the copies take part. heads keep the keys and values that they have, so that with grouped
    queries they have to come in groups of one size; kv_heads takes whole groups. vocab takes tokens: the id of a token
    becomes its place in `ids`, and padding is dropped. To repeat units of another axis so that they do what one did,
    use growth's policy copy.

    Raises:
      UserError: an axis that is none of those, an id that is not there, a repeated one, heads that break up groups.
    """
    cfg = config_of(model)
    ids = _ids(cfg, axis, ids, "take")
    size = _units(cfg, axis)
    require(len(ids) > 0, f"take: no ids; {axis} has to keep at least one")
    repeats = len(set(ids)) < len(ids)
    require(axis == "layers" or not repeats, f"take: {axis} ids repeat; see growth.plan(policy='copy')")
    if axis in ("heads", "kv_heads"):
        maps = _take_heads(cfg, ids) if axis == "heads" else _take_groups(cfg, ids)
    else:
        maps = {axis: axis_map.repeat(axis, cfg.axis_sizes[axis], ids)}
    same_units = sorted(ids) == list(range(size))
    keeps = same_units and (axis not in ("layers", "vocab") or ids == sorted(ids))
    note = () if keeps else (_what_changes(axis, size, ids, same_units),)
    return _extend(model, "surgery", maps, vocab_size=len(ids) if axis == "vocab" else None, keeps=keeps, notes=note)


def drop(model: Model, axis: str, ids: Collection[int]) -> Plan:
    """Drops the units `ids` of an axis. Raises UserError as `take`."""
    cfg = config_of(model)
    gone = set(_ids(cfg, axis, ids, "drop"))
    return take(model, axis, [i for i in range(_units(cfg, axis)) if i not in gone])


def duplicate(model: Model, ids: Collection[int]) -> Plan:
    """Puts a copy of each of these layers right after it; it takes part at once (those of growth.plan do not)."""
    cfg = config_of(model)
    ids = _ids(cfg, "layers", ids, "duplicate")
    require(len(set(ids)) == len(ids), "duplicate: layers are named twice; use take for several copies of one")
    return take(model, "layers", [i for i in range(cfg.num_layers) for _ in range(1 + (i in ids))])


def cut(model: Model, axis: str, size: int) -> Plan:
    """Keeps the first `size` units of an axis; of vocab that many rows, where cutting mere padding changes nothing."""
    cfg = config_of(model)
    have, size = _size(cfg, axis), whole(size, "cut: the size")
    require(0 < size <= have, f"cut: {axis} has {have} units, and cannot be cut to {size}")
    if axis != "vocab" or size < cfg.vocab_size:
        return take(model, axis, range(size))
    return _extend(model, "surgery", {axis: AxisMap(axis, have, np.arange(size))})


def pad(model: Model, axis: str, size: int) -> Plan:
    """Pads layers, heads, mlp or vocab (rows) with zeros up to `size` units, for sizes that have to divide over a mesh.

    The function stays, and what is new never learns. heads are padded by whole groups.

    Raises:
      UserError: another axis, fewer units than there are, heads that do not make whole groups.
    """
    cfg = config_of(model)
    have, size = _size(cfg, axis), whole(size, "pad: the size")
    require(axis in ("layers", "heads", "mlp", "vocab"), f"pad: {axis} cannot be padded; widen it with growth.plan")
    require(size >= have, f"pad: {axis} has {have} units already, more than {size}; see surgery.cut")
    maps = {axis: axis_map.widen(axis, have, size)}
    if axis == "heads":
        group = cfg.num_heads // cfg.num_kv_heads
        require(size % group == 0, f"pad: {size} heads do not make whole groups of {group}")
        maps["kv_heads"] = axis_map.widen("kv_heads", cfg.num_kv_heads, size // group)
    return _extend(model, "surgery", maps, lively=size == have or axis == "vocab")


def submodel(model: Model, **ids: Sequence[int]) -> Plan:
    """Takes a part of a model that is a model itself: for each axis named, the units that it keeps.

    >>> cfg = ModelConfig(num_layers=4, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=10)
    >>> submodel(cfg, layers=range(0, 4, 2), mlp=range(6)).dst_cfg.num_layers
    2
    """
    require(bool(ids), f"submodel: name what to keep, of {', '.join(FIELDS)}")
    first, *others = ids.items()
    return functools.reduce(lambda plan, kept: take(plan, *kept), others, take(model, *first))


# ---- by leaf -----------------------------------------------------------------------------------------------------


def find(
    model: Model,
    path: str = "*",
    *,
    axis: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    role: str | None = None,
) -> tuple[str, ...]:
    """Finds the leaves that fit all that is given, and returns their names.

    Args:
      path: a pattern with * and ?, e.g. "layers.mlp.*".
      axis: an axis of the leaf.
      reads, writes: one of the inputs, or outputs, of the leaf.
      role: "kernel", "table", "bias" or "scale".

    >>> cfg = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=10)
    >>> find(cfg, writes="embed", role="kernel")
    ('layers.attn.o', 'layers.mlp.down')

    Raises:
      UserError: nothing fits.
    """

    def fits(name: str, leaf: ParamSpec) -> bool:
        pairs = ((axis, leaf.axes), (reads, leaf.inputs), (writes, leaf.outputs), (role, (leaf.role,)))
        return fnmatch.fnmatchcase(name, path) and all(given is None or given in have for given, have in pairs)

    spec = spec_of(model)
    found = tuple(name for name in spec if fits(name, spec[name]))
    asked = {"path": path, "axis": axis, "reads": reads, "writes": writes, "role": role}
    asked = ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)
    require(bool(found), f"no leaf fits {asked}; leaves: {abridged(spec)}")
    return found


def select(model: Model, leaves: str | Collection[str]) -> Plan:
    """Selects leaves by names, or by a pattern as `find` takes it. The result is a part of a tree, not a model."""
    names = find(model, leaves) if isinstance(leaves, str) else tuple(leaves)
    _require_leaves(model, names, "select")
    require(len(set(names)) == len(names), "select: a leaf is named twice")
    whole = len(names) == len(spec_of(model))
    notes = () if whole else (f"keeps {len(names)} of {len(spec_of(model))} leaves: not a model",)
    return _extend(model, "select", tree={n: n for n in names}, keeps=whole, notes=notes)


def rename(model: Model, names: Mapping[str, str]) -> Plan:
    """Renames leaves, {old: new}, for something that expects other names.

    Raises:
      UserError: an old name that is not there; two leaves under one name, or one inside another.
    """
    _require_leaves(model, names, "rename")
    tree = {names.get(old, old): old for old in spec_of(model)}
    require(len(tree) == len(spec_of(model)), "rename: two leaves would have one name")
    for name in tree:
        parts = name.split(".")
        problem = name_problem(name)
        require(problem is None, f"rename: {name!r} cannot be stored: {problem}")
        above = next((up for i in range(1, len(parts)) if (up := ".".join(parts[:i])) in tree), None)
        require(above is None, f"rename: {name} would lie inside {above}, which is a leaf")
    origin = model.sources if isinstance(model, Plan) else {name: name for name in tree.values()}
    moved = sorted(n for n in tree.keys() & flat_spec(config_of(model)).keys() if origin[tree[n]] != n)
    notes = [f"{origin[tree[name]]} takes the place of {name}: the function changes" for name in moved]
    if tree.keys() != flat_spec(config_of(model)).keys():
        notes.append("the leaves have other names than those of a model")
    return _extend(model, "rename", tree=tree, keeps=not moved, notes=tuple(notes))


def rescale(model: Model, factors: Mapping[str, float]) -> Plan:
    """Multiplies leaves by a factor each, {name or pattern: factor}; where several patterns fit, the last counts."""
    coefficients: dict[str, float] = {}
    for pattern, factor in factors.items():
        what = f"rescale: the factor of {pattern}"
        require(finite(factor, what) != 0, f"{what} must not be 0")
        coefficients |= dict.fromkeys(find(model, pattern), float(factor))
    changed = {name: factor for name, factor in coefficients.items() if factor != 1}
    notes = tuple(f"{name} is multiplied by {factor:g}" for name, factor in changed.items())
    return _extend(model, "rescale", coefficients=changed, keeps=not changed, notes=notes)


# ---- two trees ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """The comparison of one leaf in two trees.

    what: "only in a", "only in b", "shape", "dtype", "values" or "equal". max_abs: largest difference of an entry
    (NaN differs from all but NaN). different: how many entries differ.
    """

    name: str
    what: str
    a: str = ""
    b: str = ""
    max_abs: float = 0.0
    different: int = 0


@dataclasses.dataclass(frozen=True)
class Diff:
    """The result of `diff`, one Difference per leaf of either tree."""

    leaves: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """True where both trees are the same to the bit (0.0 counts as -0.0, NaN as NaN)."""
        return all(leaf.what == "equal" for leaf in self.leaves)

    def to_json(self) -> Table:
        return {"equal": self.equal, "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves]}

    def __str__(self) -> str:
        lines = []
        for leaf in self.leaves:
            shapes = leaf.a if leaf.a == leaf.b else " | ".join(filter(None, (leaf.a, leaf.b)))
            more = f"  {leaf.different:,} entries, by {leaf.max_abs:.3g} at most" if leaf.what == "values" else ""
            lines.append(f"{leaf.name}  {shapes}  {leaf.what}{more}")
        return "\n".join(lines)


def diff(a: Mapping[str, object], b: Mapping[str, object]) -> Diff:
    """Compares two trees of arrays, in memory or checkpoint.open_lazy(path).params, one slice of a leaf at a time.

    >>> print(diff({"a": np.zeros(3), "b": np.ones(2)}, {"a": np.zeros(3), "b": np.array([1, 1.5])}))
    a  float64[3]  equal
    b  float64[2]  values  1 entries, by 0.5 at most
    """
    a, b = flatten(a), flatten(b)
    require_arrays(a | b, "diff")
    return Diff(tuple(_difference(name, a.get(name), b.get(name)) for name in sorted({*a, *b})))


def _difference(name: str, a: Leaf, b: Leaf) -> Difference:
    left, right = ("" if x is None else f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]" for x in (a, b))
    if a is None or b is None:
        return Difference(name, "only in a" if b is None else "only in b", left, right)
    if left != right:
        return Difference(name, "shape" if tuple(a.shape) != tuple(b.shape) else "dtype", left, right)
    largest, different = 0.0, 0
    for part in range(a.shape[0]) if a.shape else (...,):
        x, y = np.asarray(a[part]), np.asarray(b[part])
        unequal = ~((x == y) | ((x != x) & (y != y)))
        if unequal.any():
            different += int(unequal.sum())
            gap = np.abs(x[unequal].astype(np.float64) - y[unequal].astype(np.float64))
            largest = max(largest, float(gap.max()) if not np.isnan(gap).any() else float("inf"))
    return Difference(name, "values" if different else "equal", left, right, largest, different)


# ---- a change as a plan ------------------------------------------------------------------------------------------


def config_of(model: Model) -> ModelConfig:
    """The config that a plan leads to, or the config itself. Raises UserError for anything else."""
    found = model.dst_cfg if isinstance(model, Plan) else model
    require_config(found, "surgery: the model is a plan or a config")
    return found


def spec_of(model: Model) -> dict[str, ParamSpec]:
    """{leaf: ParamSpec} of the tree that a plan leads to, or of a config's."""
    return model.dst_spec if isinstance(model, Plan) else flat_spec(config_of(model))


def _extend(
    model: Model,
    name: str,
    maps: Mapping[str, AxisMap] | None = None,
    *,
    vocab_size: int | None = None,
    coefficients: Mapping[str, float] | None = None,
    tree: dict[str, str] | None = None,
    keeps: bool = True,
    lively: bool = True,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan of one change, after the plan that `model` is, if it is one."""
    cfg, spec = config_of(model), spec_of(model)
    if maps and not any(axis in leaf.axes for leaf in spec.values() for axis in maps):
        raise UserError(f"no leaf of the tree has the axis {next(iter(maps))}")
    sizes = {FIELDS[axis]: m.dst_size for axis, m in (maps or {}).items()}
    step = Step(
        src_cfg=cfg,
        dst_cfg=dataclasses.replace(cfg, **sizes, **({} if vocab_size is None else {"vocab_size": vocab_size})),
        policy=name,
        maps={axis: axis_map.identity(axis, size) for axis, size in cfg.axis_sizes.items()} | dict(maps or {}),
        leaves={leaf: LeafPlan((coefficients or {}).get(leaf, 1.0)) for leaf in (tree or spec)},
        preserving=keeps,
        lively=lively,
        notes=notes,
        tree=tree,
        src_tree=spec if isinstance(model, Plan) and not model.is_model else None,
    )
    plan = Plan((step,))
    return compose(model, plan) if isinstance(model, Plan) else plan


def _size(cfg: ModelConfig, axis: str) -> int:
    require(axis in FIELDS, f"axis {axis!r} is not one of {', '.join(FIELDS)}")
    return cfg.axis_sizes[axis]


def _units(cfg: ModelConfig, axis: str) -> int:
    """The number of units that can be named: padding rows of the vocabulary are no tokens."""
    return cfg.vocab_size if axis == "vocab" else _size(cfg, axis)


def _ids(cfg: ModelConfig, axis: str, ids: Collection[int], what: str) -> list[int]:
    size = _units(cfg, axis)
    listed = isinstance(ids, Iterable) and not isinstance(ids, str)
    require(listed, f"{what}: {axis} ids have to be a list of whole numbers, got {ids!r}")
    ids = [whole(i, f"{what}: {axis} ids[{n}]") for n, i in enumerate(ids)]
    wrong = sorted({i for i in ids if not 0 <= i < size})
    require(not wrong, f"{what}: {axis} has {size} units, 0 to {size - 1}; not {abridged(wrong)}")
    return ids


def _require_leaves(model: Model, names: Collection[str], what: str) -> None:
    spec = spec_of(model)
    wrong = [name for name in names if name not in spec]
    require(not wrong, f"{what}: no leaf {abridged(wrong)}; leaves: {abridged(spec)}")
    require(len(names) > 0, f"{what}: no leaf named")


def _take_heads(cfg: ModelConfig, ids: list[int]) -> dict[str, AxisMap]:
    group = cfg.num_heads // cfg.num_kv_heads
    # (group, the number of its heads that follow each other)
    runs = [(kv, len([*heads])) for kv, heads in itertools.groupby(ids, lambda head: head // group)]
    sizes = " and ".join(map(str, sorted({size for _, size in runs})))
    require(" " not in sizes, f"take: heads {ids} leave groups of {sizes}; a model has groups of one size")
    kv_heads = AxisMap("kv_heads", cfg.num_kv_heads, [kv for kv, _ in runs])
    return {"heads": AxisMap("heads", cfg.num_heads, ids), "kv_heads": kv_heads}


def _take_groups(cfg: ModelConfig, ids: list[int]) -> dict[str, AxisMap]:
    group = cfg.num_heads // cfg.num_kv_heads
    heads = [kv * group + i for kv in ids for i in range(group)]
    kv_heads = AxisMap("kv_heads", cfg.num_kv_heads, ids)
    return {"heads": AxisMap("heads", cfg.num_heads, heads), "kv_heads": kv_heads}


def _what_changes(axis: str, size: int, ids: list[int], same_units: bool) -> str:
    if same_units:
        return {"layers": "layers are in another order", "vocab": "tokens have other ids"}[axis]
    missing = size - len(set(ids))
    parts = [f"{missing} of {size} {axis} are dropped"] if missing else []
    if repeated := len(ids) - len(set(ids)):
        parts.append(f"{repeated} layers are repeated")
    return " and ".join(parts) + ": the function changes"


def __dir__() -> list[str]:
    return sorted(__all__)
