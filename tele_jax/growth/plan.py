"""Plans: growth as data. One AxisMap per axis, one LeafPlan per leaf, and the destination config as resolved.

`Plan` is one step. Several in one go are `compose.Composed`; what both can do is `Growth`.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from tele_jax.axes import ParamSpec
from tele_jax.config import ModelConfig, check_seed, convert, from_dict, require, to_dict
from tele_jax.errors import UserError
from tele_jax.growth import describe
from tele_jax.growth.axis_map import AxisMap
from tele_jax.model.spec import flat_spec

Fill = Literal["normal", "constant"]


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What happens to one leaf.

    An entry whose axes all come from the source is `coefficient` times the source entry (times the scales of the axes
    in `scaled` and the shares of those in `shared`), unless one of the axes in `zero` is fresh there: then it is 0.
    Every other entry is 0 if one of the axes in `zero` is fresh, else filled: normal with standard deviation `value`,
    or the constant `value`.
    """

    coefficient: float = 1.0
    zero: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    fill: Fill = "constant"
    value: float = 0.0

    @property
    def moves_exactly(self) -> bool:
        """Whether source entries arrive as they were."""
        return self.coefficient == 1 and not self.scaled and not self.shared

    def factors(self, axis_map: AxisMap) -> np.ndarray | None:
        """float64[dst_size], the factors along one axis; None where there are none."""
        scale = axis_map.scale if axis_map.axis in self.scaled else None
        share = axis_map.share if axis_map.axis in self.shared else None
        return scale if share is None else share if scale is None else scale * share

    def moment(self, spec: ParamSpec, maps: Mapping[str, AxisMap]) -> "LeafPlan":
        """The plan of an optimizer moment, which grows like the gradient; every new entry is 0.

        a*theta has gradient g/a. Of a unit split into copies, what produces it has the gradient times its share (that
        is how much of it is read), and what reads it the gradient times its scale (that is how much of it there is).
        """
        copied = [axis for axis in spec.axes if (maps[axis].scale != 1).any() or (maps[axis].share != 1).any()]
        scaled = tuple(axis for axis in copied if axis in spec.inputs)
        shared = tuple(axis for axis in copied if axis in spec.outputs or spec.role == "scale")
        return LeafPlan(1 / self.coefficient, spec.axes, scaled, shared)


class Growth:
    """What one step and several have in common: from a tree of parameters to another, as data.

    Attributes:
      src_cfg, dst_cfg: every use of the grown tree takes its config from `dst_cfg`.
      src_spec, dst_spec: {leaf: ParamSpec}, sorted.
      steps: the plans of one step each, in order.
      maps: {axis: AxisMap} from the source to the destination.
      sources: {destination leaf: source leaf}.
      masked: new structures have to start behind masks at 0.
      preserving: the function is unchanged (behind masks at 0, where masked).
      lively: everything new can learn, each unit in its own way.
      notes: what is not preserved, and why; what else a reader should know.
    """

    src_cfg: ModelConfig
    dst_cfg: ModelConfig
    policy: str
    maps: Mapping[str, AxisMap]
    masked: bool
    preserving: bool
    lively: bool
    notes: tuple[str, ...]
    steps: "tuple[Plan, ...]"
    src_spec: dict[str, ParamSpec]
    dst_spec: dict[str, ParamSpec]
    sources: Mapping[str, str]

    @property
    def grown_axes(self) -> tuple[str, ...]:
        """Axes with fresh units."""
        return tuple(axis for axis, axis_map in self.maps.items() if axis_map.fresh.any())

    @property
    def is_model(self) -> bool:
        """Whether the result is the whole tree of dst_cfg, under its own names: surgery may leave less."""
        return {n: s.shape for n, s in self.dst_spec.items()} == {
            n: s.shape for n, s in flat_spec(self.dst_cfg).items()
        }

    def leaf_steps(self, name: str) -> "tuple[tuple[Plan, str], ...]":
        """(step, what the leaf is called after it), in order, for a leaf of the destination."""
        found: list[tuple[Plan, str]] = []
        for step in reversed(self.steps):
            found.append((step, name))
            name = step.sources[name]
        return tuple(reversed(found))

    def moves_exactly(self, name: str) -> bool:
        """Whether what a leaf keeps of the source arrives as it was."""
        return all(step.leaves[leaf].moves_exactly for step, leaf in self.leaf_steps(name))

    def tally(self, name: str) -> dict[str, int]:
        """How many entries of a leaf are copied, scaled, zero and fresh; they add up to its size."""
        return describe.tally(self, name)

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the plan, hexadecimal: equal plans have equal digests, in every process."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Growth) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return describe.table(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(Growth):
    """A growth in one step, resolved.

    Attributes beside those of Growth:
      leaves: {destination leaf: LeafPlan}.
      seed: of the fresh values.
      tree: {destination leaf: source leaf} for a result that is not the tree of dst_cfg, such as a part of it.
      src_tree: {leaf: ParamSpec} for a source that is not the tree of src_cfg, such as what `tree` led to.
    """

    src_cfg: ModelConfig
    dst_cfg: ModelConfig
    policy: str
    maps: Mapping[str, AxisMap]
    leaves: Mapping[str, LeafPlan]
    seed: int = 0
    masked: bool = False
    preserving: bool = True
    lively: bool = True
    notes: tuple[str, ...] = ()
    tree: Mapping[str, str] | None = None
    src_tree: Mapping[str, ParamSpec] | None = None

    @property
    def steps(self) -> "tuple[Plan, ...]":
        return (self,)

    @property
    def src_spec(self) -> dict[str, ParamSpec]:
        return flat_spec(self.src_cfg) if self.src_tree is None else dict(sorted(self.src_tree.items()))

    @property
    def dst_spec(self) -> dict[str, ParamSpec]:
        if self.tree is None and self.src_tree is None:
            return flat_spec(self.dst_cfg)
        src = self.src_spec
        return {name: self._grown(src[self.sources[name]]) for name in sorted(self.sources)}

    def _grown(self, spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(spec, shape=tuple(self.maps[axis].dst_size for axis in spec.axes))

    @property
    def sources(self) -> Mapping[str, str]:
        return {name: name for name in self.src_spec} if self.tree is None else self.tree

    def to_json(self) -> dict[str, Any]:
        data = {
            "src_cfg": to_dict(self.src_cfg),
            "dst_cfg": to_dict(self.dst_cfg),
            "policy": self.policy,
            "seed": self.seed,
            "masked": self.masked,
            "preserving": self.preserving,
            "lively": self.lively,
            "notes": list(self.notes),
            "maps": {axis: m.to_json() for axis, m in sorted(self.maps.items())},
            "leaves": {name: dataclasses.asdict(leaf) for name, leaf in sorted(self.leaves.items())},
        }
        if self.tree is not None:
            data["tree"] = dict(sorted(self.tree.items()))
        if self.src_tree is not None:
            data["src_tree"] = {name: spec.to_json() for name, spec in sorted(self.src_tree.items())}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Growth:
        """The inverse of to_json, of a composed growth as well.

        Raises:
          UserError: a field is missing, unknown, or of another type; steps that do not follow each other.
        """
        require(isinstance(data, Mapping), f"plan: expected a table, got {type(data).__name__}")
        if "steps" in data:
            from tele_jax.growth.compose import compose

            steps = convert(tuple[dict[str, Any], ...], data["steps"], "plan.steps")
            require(len(steps) > 0, "plan.steps: empty")
            return functools.reduce(compose, map(cls.from_json, steps))
        unknown = data.keys() - {field.name for field in dataclasses.fields(cls)}
        require(not unknown, f"plan: unknown field {', '.join(sorted(unknown))}")
        try:
            plan = cls(
                src_cfg=from_dict(ModelConfig, data["src_cfg"], "plan.src_cfg"),
                dst_cfg=from_dict(ModelConfig, data["dst_cfg"], "plan.dst_cfg"),
                policy=convert(str, data["policy"], "plan.policy"),
                seed=check_seed(data["seed"], "plan.seed"),
                masked=convert(bool, data["masked"], "plan.masked"),
                preserving=convert(bool, data["preserving"], "plan.preserving"),
                lively=convert(bool, data["lively"], "plan.lively"),
                notes=convert(tuple[str, ...], data["notes"], "plan.notes"),
                maps={axis: AxisMap.from_json(m, f"plan.maps.{axis}") for axis, m in data["maps"].items()},
                leaves={
                    name: from_dict(LeafPlan, leaf, f"plan.leaves.{name}") for name, leaf in data["leaves"].items()
                },
                tree=convert(dict[str, str] | None, data.get("tree"), "plan.tree"),
                src_tree={n: ParamSpec.from_json(s) for n, s in data["src_tree"].items()}
                if "src_tree" in data
                else None,
            )
        except KeyError as error:
            raise UserError(f"plan: the field {error} is missing") from None
        except UserError:
            raise
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"plan: not what to_json makes: {error}") from None
        plan._require_whole()
        return plan

    def _require_whole(self) -> None:
        """Raises UserError where leaves and axes do not belong together."""
        src = self.src_spec
        for name, spec in src.items():
            for axis, size in zip(spec.axes, spec.shape, strict=True):
                known = self.maps.get(axis)
                require(known is not None, f"plan.maps: the axis {axis} of {name} is missing")
                require(known.src_size == size, f"plan.maps.{axis}: of {known.src_size} units, but {name} has {size}")
        for name, source in self.sources.items():
            require(source in src, f"plan.tree.{name}: {source!r} is not a leaf of the source")
        for names in (self.leaves.keys(), self.dst_spec.keys()):
            different = names ^ self.sources.keys()
            require(not different, f"plan.leaves: {', '.join(sorted(different)[:3])}: in one of the two trees only")
        for name, spec in self.dst_spec.items():
            shape = tuple(self.maps[axis].dst_size for axis in spec.axes)
            require(shape == spec.shape, f"plan.maps: lead {name} to {list(shape)}, dst_cfg to {list(spec.shape)}")
        for name, leaf in self.leaves.items():
            numbers = math.isfinite(leaf.coefficient) and leaf.coefficient != 0 and math.isfinite(leaf.value)
            require(numbers, f"plan.leaves.{name}: {leaf.coefficient} and {leaf.value} must be finite, the first not 0")
