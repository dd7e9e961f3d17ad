"""Plans: growth as data. A plan is a tuple of steps; composing two plans concatenates their steps.

A step has one AxisMap per axis, one LeafPlan per leaf, and the configs before and after, as resolved by its policy.
"""

import dataclasses
import functools
import hashlib
import html
import json
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tele_jax import tables
from tele_jax.axes import ParamSpec
from tele_jax.config import (
    ModelConfig,
    check_names,
    check_seed,
    convert,
    from_dict,
    require,
    require_config,
    require_known,
    to_dict,
)
from tele_jax.errors import abridged
from tele_jax.files import Table
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.leaf import KINDS, LeafPlan, LeafStep, count, leaf_key
from tele_jax.model.decoder import MASKED_AXES
from tele_jax.model.spec import flat_spec

Spec = dict[str, ParamSpec]


@check_names
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Step:
    """One plan step.

    Attributes:
      src_cfg, dst_cfg: the configs before and after.
      policy: the name of the rule that made the step.
      maps: {axis: AxisMap}.
      leaves: {destination leaf: LeafPlan}.
      seed: seed of the fresh values.
      masked: new units have to start behind masks at 0.
      preserving: the function is unchanged (behind masks at 0, where masked).
      lively: everything new can learn, each unit in its own way.
      notes: what is not preserved and why, and what else a reader should know.
      tree: {destination leaf: source leaf} where the result is not the tree of dst_cfg, for example a part of it.
      src_tree: {leaf: ParamSpec} where the source is not the tree of src_cfg, for example the result of such a step.
    """

    src_cfg: ModelConfig
    dst_cfg: ModelConfig
    policy: str
    maps: dict[str, AxisMap]
    leaves: dict[str, LeafPlan]
    seed: int = 0
    masked: bool = False
    preserving: bool = True
    lively: bool = True
    notes: tuple[str, ...] = ()
    tree: dict[str, str] | None = None
    src_tree: dict[str, ParamSpec] | None = None

    def __post_init__(self):
        require_config(self.src_cfg, "plan.src_cfg")
        require_config(self.dst_cfg, "plan.dst_cfg")
        object.__setattr__(self, "seed", check_seed(self.seed, "plan.seed"))
        for name, hint in typing.get_type_hints(Step).items():
            object.__setattr__(self, name, convert(hint, getattr(self, name), f"plan.{name}"))
        for name, leaf in self.leaves.items():
            where = f"plan.leaves.{name}"
            from_dict(LeafPlan, vars(leaf), where)
            numbers = math.isfinite(leaf.coefficient) and leaf.coefficient != 0 and math.isfinite(leaf.value)
            require(numbers, f"{where}: {leaf.coefficient} and {leaf.value} must be finite, the first not 0")

    @functools.cached_property
    def src_spec(self) -> Spec:
        return flat_spec(self.src_cfg) if self.src_tree is None else dict(sorted(self.src_tree.items()))

    @functools.cached_property
    def dst_spec(self) -> Spec:
        if self.tree is None and self.src_tree is None:
            return flat_spec(self.dst_cfg)
        grown = {name: self.src_spec[source] for name, source in sorted(self.sources.items())}
        size = lambda axis: self.maps[axis].dst_size  # noqa: E731
        return {name: dataclasses.replace(s, shape=tuple(map(size, s.axes))) for name, s in grown.items()}

    @functools.cached_property
    def sources(self) -> Mapping[str, str]:
        """{destination leaf: source leaf}."""
        return {name: name for name in self.src_spec} if self.tree is None else self.tree

    def leaf_step(self, name: str, power: int | None = None) -> LeafStep:
        """The step of one destination leaf, or of its optimizer moment that is of a power in the gradient."""
        spec, leaf = self.dst_spec[name], self.leaves[name]
        maps = tuple(self.maps[axis] for axis in spec.axes)
        if power is None:
            return LeafStep(leaf, maps, leaf_key(self.seed, name))
        return LeafStep(leaf.moment(spec, self.maps), maps, power=power)

    def __repr__(self) -> str:
        return f"<Step {self.policy}: {len(self.leaves)} leaves>"

    def to_json(self) -> Table:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Fields that came later: without them, a plan of an earlier version keeps its digest, which receipts name.
        later = {"scalar_head": False, "residual_mult": 1.0}
        cfgs = {name: to_dict(getattr(self, name)) for name in ("src_cfg", "dst_cfg")}
        data |= {name: {k: v for k, v in cfg.items() if k not in later or v != later[k]} for name, cfg in cfgs.items()}
        data |= {"notes": list(self.notes)}
        data["maps"] = {axis: axis_map.to_json() for axis, axis_map in sorted(self.maps.items())}
        data["leaves"] = {name: dataclasses.asdict(leaf) for name, leaf in sorted(self.leaves.items())}
        for name, tree in (("tree", data.pop("tree")), ("src_tree", data.pop("src_tree"))):
            if tree is not None:
                data[name] = {n: s if isinstance(s, str) else s.to_json() for n, s in sorted(tree.items())}
        return data

    @classmethod
    def from_json(cls, data: Any) -> "Step":
        """The inverse of to_json. Raises UserError where a field is missing, unknown, or of another type."""
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in (*data, "tree", "src_tree")]
        require(not missing, f"plan: the field {', '.join(map(repr, missing))} is missing")
        maps, tree = (convert(Table, data.get(name, {}), f"plan.{name}") for name in ("maps", "src_tree"))
        data = {**data, "maps": {axis: AxisMap.from_json(m, f"plan.maps.{axis}") for axis, m in maps.items()}}
        if "src_tree" in data:
            data["src_tree"] = {name: ParamSpec.from_json(spec) for name, spec in tree.items()}
        return from_dict(cls, data, "plan")

    def require_whole(self) -> None:
        """Raises UserError where configs, axes and leaves do not belong together."""
        for which, cfg in (("src", self.src_cfg), ("dst", self.dst_cfg)):
            for axis, size in cfg.axis_sizes.items():
                require(axis in self.maps, f"plan.maps: the axis {axis} is missing")
                have = getattr(self.maps[axis], f"{which}_size")
                require(have == size, f"plan.maps.{axis}: {which}_size is {have}, but {size} in {which}_cfg")
        src = self.src_spec
        for name, spec in src.items():
            for axis, size in zip(spec.axes, spec.shape, strict=True):
                require(axis in self.maps, f"plan.maps: the axis {axis} of {name} is missing")
                known = self.maps[axis].src_size
                require(known == size, f"plan.maps.{axis}: of {known} units, but {name} has {size}")
        for name, source in self.sources.items():
            require(source in src, f"plan.tree.{name}: {source!r} is not a leaf of the source")
        for names in (self.leaves.keys(), self.dst_spec.keys()):
            different = names ^ self.sources.keys()
            require(not different, f"plan.leaves: {abridged(sorted(different))}: in one of the two trees only")
        for name, spec in self.dst_spec.items():
            shape = tuple(self.maps[axis].dst_size for axis in spec.axes)
            require(shape == spec.shape, f"plan.maps: lead {name} to {list(shape)}, dst_cfg to {list(spec.shape)}")


@check_names
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A growth from one tree of parameters to another, as data: print it, check it, apply it, store it as JSON.

    Plans come from growth.plan, compose and surgery. Every use of the grown tree takes its config from `dst_cfg`.

    Attributes:
      src_cfg, dst_cfg: the configs of the first source and of the last destination.
      policy: the policies of the steps, joined by " + ".
      seed: the seed of the step, or those of several steps.
      masked, preserving, lively, notes: as in Step, for all steps together.
    """

    steps: tuple[Step, ...]
    src_cfg: ModelConfig = dataclasses.field(init=False)
    dst_cfg: ModelConfig = dataclasses.field(init=False)
    policy: str = dataclasses.field(init=False)
    seed: int | list[int] = dataclasses.field(init=False)
    masked: bool = dataclasses.field(init=False)
    preserving: bool = dataclasses.field(init=False)
    lively: bool = dataclasses.field(init=False)
    notes: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self):
        steps: tuple[Step, ...] = tuple(self.steps if isinstance(self.steps, (list, tuple)) else ())
        kinds = abridged(sorted({type(step).__name__ for step in steps})) or "nothing"
        found = f"a list of {kinds}" if isinstance(self.steps, (list, tuple)) else type(self.steps).__name__
        good = bool(steps) and all(isinstance(step, Step) for step in steps)
        require(good, f"Plan: steps must be a list of growth.Step, got {found}; growth.compose joins plans")
        steps[-1].require_whole()
        if others := steps[:-1]:  # this Plan checks those before it
            _require_follows(Plan(others), steps[-1], f"plan step {len(others)}", f"plan step {len(others) + 1}")
        derived = {"steps": steps, "src_cfg": steps[0].src_cfg, "dst_cfg": steps[-1].dst_cfg}
        derived["policy"] = " + ".join(step.policy for step in steps)
        derived["seed"] = steps[0].seed if len(steps) == 1 else [step.seed for step in steps]
        derived["masked"] = any(step.masked for step in steps)
        derived |= {name: all(getattr(step, name) for step in steps) for name in ("preserving", "lively")}
        derived["notes"] = tuple(dict.fromkeys(note for step in steps for note in step.notes))
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def src_spec(self) -> Spec:
        """{leaf: ParamSpec} of the source, sorted."""
        return self.steps[0].src_spec

    @property
    def dst_spec(self) -> Spec:
        """{leaf: ParamSpec} of the result, sorted."""
        return self.steps[-1].dst_spec

    @functools.cached_property
    def maps(self) -> Mapping[str, AxisMap]:
        """{axis: AxisMap} from the source to the result."""
        first, *others = (step.maps for step in self.steps)
        return {axis: functools.reduce(lambda a, b, x=axis: a.compose(b[x]), others, m) for axis, m in first.items()}

    @property
    def leaves(self) -> Mapping[str, LeafPlan]:
        """{leaf: LeafPlan} of a plan with one step; those of several are in `steps`."""
        number = len(self.steps)
        require(number == 1, f"plan.leaves: the plan has {number} steps; plan.steps[i].leaves has those of one")
        return self.steps[0].leaves

    @functools.cached_property
    def sources(self) -> Mapping[str, str]:
        """{leaf of the result: leaf of the source}."""
        return {name: self._names(name)[0] for name in self.dst_spec}

    def _names(self, name: str) -> list[str]:
        """The names of a leaf of the result: in the source, and after every step."""
        names = [name]
        for step in reversed(self.steps):
            names.append(step.sources[names[-1]])
        return names[::-1]

    def leaf_steps(self, name: str, power: int | None = None) -> tuple[LeafStep, ...]:
        """The LeafStep of every step for a leaf of the result, or for its moment that is of a power in the gradient."""
        return tuple(step.leaf_step(n, power) for step, n in zip(self.steps, self._names(name)[1:], strict=True))

    def replace(self, **fields: object) -> "Plan":
        """The plan with other values in some fields of its only step, for example leaves={**plan.leaves, name: ...}.

        Raises:
          UserError: a field that a Step does not have, or a value that is not of its type or does not fit the others; a
            plan of several steps.
        """
        for name in fields:
            known = [field.name for field in dataclasses.fields(Step)]
            require_known(name, known, f"plan.replace: growth.Step has no field {name!r}")
        number = len(self.steps)
        one = "works on plans of one step, and this one has"
        require(number == 1, f"plan.replace: {one} {number}; make growth.Plan(steps) of changed plan.steps")
        return Plan((dataclasses.replace(self.steps[0], **fields),))

    @property
    def grown_axes(self) -> tuple[str, ...]:
        """Axes with fresh units."""
        return tuple(axis for axis, axis_map in self.maps.items() if axis_map.fresh.any())

    @property
    def is_model(self) -> bool:
        """True where the result is the whole tree of dst_cfg under its own names; surgery may leave less."""
        shapes = lambda spec: {name: leaf.shape for name, leaf in spec.items()}  # noqa: E731
        return shapes(self.dst_spec) == shapes(flat_spec(self.dst_cfg))

    def moves_exactly(self, name: str) -> bool:
        """True where the entries that a leaf keeps of the source arrive unchanged."""
        return all(step.moves_exactly for step in self.leaf_steps(name))

    def tally(self, name: str) -> dict[str, int]:
        """Counts the entries of a leaf that are copied, scaled, zero and fresh; they add up to its size."""
        return count(self.leaf_steps(name))

    def to_json(self) -> Table:
        steps = [step.to_json() for step in self.steps]
        return steps[0] if len(steps) == 1 else {"steps": steps}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Plan":
        """The inverse of to_json.

        Raises:
          UserError: a field is missing, unknown, or of another type; steps that do not follow each other.
        """
        hint = "; json.loads reads text" if isinstance(data, str) else ""
        expected = "plan: expected the dict that Plan.to_json returns, got"
        require(isinstance(data, Mapping), f"{expected} {type(data).__name__}{hint}")
        if "steps" not in data:
            return cls((Step.from_json(data),))
        steps = convert(tuple[Table, ...], data["steps"], "plan.steps")
        require(len(steps) > 0, "plan.steps: empty")
        return cls(tuple(map(Step.from_json, steps)))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the plan, hexadecimal: equal plans have equal digests, in every process."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        before, after = (sum(leaf.size for leaf in spec.values()) for spec in (self.src_spec, self.dst_spec))
        return f"<Plan {self.policy}: {self._axes()}; {before:,} -> {after:,} parameters; print it for its leaves>"

    def __str__(self) -> str:
        return "\n".join([*self._head(), tables.text(self._rows()), *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rows, lines = self._rows(), [*self._head(), *(f"note: {note}" for note in self.notes)]
        return "".join(f"<div>{html.escape(line)}</div>" for line in lines) + tables.html(rows[1:], rows[0])

    def _axes(self) -> str:
        # In the order of the config, which is the same for a plan that comes from JSON.
        maps = [self.maps[axis] for axis in self.src_cfg.axis_sizes if axis in self.maps]
        changes = [f"{m.axis} {m.src_size} -> {m.dst_size}" for m in maps if not m.is_identity]
        return ", ".join(changes) or "every axis keeps its size"

    def _head(self) -> Iterator[str]:
        """Lines for people: the policy and its promise, what grows, what else changes in the config."""
        promise = "preserves the function" if self.preserving else "does not preserve the function"
        yield f"policy {self.policy}: {promise}" + (", behind masks at 0" if self.preserving and self.masked else "")
        yield f"axes: {self._axes()}"
        for name in ("vocab_size", "rms_eps", "input_mult", "output_mult"):
            pair = getattr(self.src_cfg, name), getattr(self.dst_cfg, name)
            if pair[0] != pair[1]:
                shown = (float(f"{value:.6g}") if isinstance(value, float) else value for value in pair)
                yield f"config: {name} {' -> '.join(map(str, shown))}"

    def _rows(self) -> list[tuple[str, ...]]:
        """Rows of text that say what becomes of every leaf, with totals in parameters and bytes."""
        rows: list[tuple[str, ...]] = [("leaf", "from", "to", *KINDS)]
        counts = {name: np.array(list(self.tally(name).values())) for name in self.dst_spec}
        width = {name: np.dtype(leaf.dtype).itemsize for name, leaf in self.dst_spec.items()}
        for name, leaf in self.dst_spec.items():
            shapes = ("x".join(map(str, spec.shape)) for spec in (self.src_spec[self.sources[name]], leaf))
            rows.append((name, *shapes, *(f"{n:,}" for n in counts[name].tolist())))
        nbytes = np.sum([counts[name] * width[name] for name in counts], axis=0).tolist()
        total = np.sum(list(counts.values()), axis=0).tolist()
        before = sum(leaf.size for leaf in self.src_spec.values())
        before_bytes = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in self.src_spec.values())
        rows.append(("total", f"{before:,}", f"{sum(total):,}", *(f"{n:,}" for n in total)))
        return [*rows, ("bytes", *map(_size, (before_bytes, sum(nbytes), *nbytes)))]


def compose(first: Plan, then: Plan) -> Plan:
    """The plan that does `first` and then `then`; bit for bit what one after the other gives.

    >>> from tele_jax import growth
    >>> cfg = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=10)
    >>> wider = growth.widen_mlp(cfg, 20)
    >>> compose(wider, growth.insert_layers(wider.dst_cfg, 3)).steps
    (<Step exact: 12 leaves>, <Step exact: 12 leaves>)

    Raises:
      UserError: `then` does not start from what `first` leads to (the fields or leaves that differ are named); one of
        the two needs masks and the other, which grows something too, must not have them, or copies channels unevenly.
    """
    require_plan(first, "compose: the first plan")
    require_plan(then, "compose: the second plan")
    _require_follows(first, then.steps[0], "compose: the first plan", "the second plan")
    return Plan((*first.steps, *then.steps))


def _require_follows(before: Plan, step: Step, made_by: str, taken_by: str) -> None:
    """Raises UserError unless a step can follow a plan; made_by, taken_by: name the two in messages."""
    made, taken = to_dict(before.dst_cfg), to_dict(step.src_cfg)
    lines = [f"{field} {made[field]!r} -> {taken[field]!r}" for field in made if made[field] != taken[field]]
    have, want = before.dst_spec, step.src_spec
    lines += sorted(have.keys() ^ want.keys())
    lines += [
        f"{n} {have[n].shape} -> {want[n].shape}" for n in sorted(have.keys() & want.keys()) if have[n] != want[n]
    ]
    require(not lines, f"{made_by} produces another model than {taken_by} starts from: {abridged(lines)}")
    grows = [part for part in (before, step) if any(part.maps[axis].fresh.any() for axis in MASKED_AXES)]
    why = ""
    if len({part.masked for part in grows}) > 1:
        why = "the new units of one start behind masks, those of the other must not"
    elif before.masked and before.maps["embed"].fresh.any() and (step.maps["embed"].scale != 1).any():
        why = "masks weigh the mean of a norm, and copies in embed are scaled to keep the mean without masks"
    together = f"compose: {before.policy} and {step.policy} cannot be done in one go: {why}"
    require(not why, f"{together}; train until the masks are 1, then grow again")


def require_plan(plan: object, where: str) -> None:
    """Raises UserError, naming the argument, for what is not a Plan."""
    require(isinstance(plan, Plan), f"{where}: expected a Plan as growth.plan makes it, got {type(plan).__name__}")


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
