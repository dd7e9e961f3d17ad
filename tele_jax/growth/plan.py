"""Plans: growth as data. One AxisMap per axis, one LeafPlan per leaf, and the destination config as resolved."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from tele_jax.axes import ParamSpec
from tele_jax.config import ModelConfig, from_dict, to_dict
from tele_jax.errors import UserError
from tele_jax.growth.axis_map import NEW, AxisMap
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


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A growth, resolved: every use of the grown tree takes its config from `dst_cfg`."""

    src_cfg: ModelConfig
    dst_cfg: ModelConfig
    policy: str
    maps: Mapping[str, AxisMap]
    leaves: Mapping[str, LeafPlan]
    seed: int = 0
    masked: bool = False  # new structures have to start behind masks at 0
    preserving: bool = True  # the function is unchanged (behind masks at 0, where masked)
    lively: bool = True  # everything new can learn, each unit in its own way
    notes: tuple[str, ...] = ()

    @property
    def src_spec(self) -> dict[str, ParamSpec]:
        return flat_spec(self.src_cfg)

    @property
    def dst_spec(self) -> dict[str, ParamSpec]:
        return flat_spec(self.dst_cfg)

    @property
    def grown_axes(self) -> tuple[str, ...]:
        """Axes with fresh units."""
        return tuple(axis for axis, axis_map in self.maps.items() if axis_map.fresh.any())

    def to_json(self) -> dict[str, Any]:
        return {
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """The inverse of to_json; raises UserError where a field is missing or unknown."""
        try:
            return cls(
                src_cfg=from_dict(ModelConfig, data["src_cfg"], "plan.src_cfg"),
                dst_cfg=from_dict(ModelConfig, data["dst_cfg"], "plan.dst_cfg"),
                policy=data["policy"],
                seed=data["seed"],
                masked=data["masked"],
                preserving=data["preserving"],
                lively=data["lively"],
                notes=tuple(data["notes"]),
                maps={axis: AxisMap.from_json(m) for axis, m in data["maps"].items()},
                leaves={
                    name: from_dict(LeafPlan, leaf, f"plan.leaves.{name}") for name, leaf in data["leaves"].items()
                },
            )
        except KeyError as error:
            raise UserError(f"plan: the field {error} is missing") from None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the plan, hexadecimal: equal plans have equal digests, in every process."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def tally(self, name: str) -> dict[str, int]:
        """How many entries of a leaf are copied, scaled, zero and fresh; they add up to its size."""
        spec, leaf = self.dst_spec[name], self.leaves[name]
        known, not_zero, both = 1, 1, 1
        for axis in spec.axes:
            axis_map = self.maps[axis]
            is_known = axis_map.index != NEW
            is_kept = ~axis_map.fresh if axis in leaf.zero else np.ones_like(is_known)
            known *= int(is_known.sum())
            not_zero *= int(is_kept.sum())
            both *= int((is_known & is_kept).sum())
        moved = "copied" if leaf.moves_exactly else "scaled"
        filled = "zero" if leaf.fill == "constant" and leaf.value == 0 else "fresh"
        counts = dict.fromkeys(("copied", "scaled", "zero", "fresh"), 0)
        counts[moved] += both
        counts["zero"] += spec.size - not_zero
        counts[filled] += not_zero - both
        return counts

    def __str__(self) -> str:
        rows = [("leaf", "from", "to", "copied", "scaled", "zero", "fresh")]
        total = dict.fromkeys(("copied", "scaled", "zero", "fresh"), 0)
        for name, spec in self.dst_spec.items():
            tally = self.tally(name)
            total = {kind: total[kind] + tally[kind] for kind in total}
            shapes = ("x".join(map(str, s.shape)) for s in (self.src_spec[name], spec))
            rows.append((name, *shapes, *(f"{tally[kind]:,}" for kind in total)))
        source = sum(s.size for s in self.src_spec.values())
        rows.append(("total", f"{source:,}", f"{sum(total.values()):,}", *(f"{n:,}" for n in total.values())))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        axes = ", ".join(f"{m.axis} {m.src_size} -> {m.dst_size}" for m in self.maps.values() if not m.is_identity)
        if not self.preserving:
            promise = "does not preserve the function"
        else:
            promise = "preserves the function" + (", behind masks at 0" if self.masked else "")
        changed = [
            f"{field.name} {getattr(self.src_cfg, field.name)} -> {getattr(self.dst_cfg, field.name)}"
            for field in dataclasses.fields(ModelConfig)
            if field.name in ("rms_eps", "input_mult", "output_mult")
            and getattr(self.src_cfg, field.name) != getattr(self.dst_cfg, field.name)
        ]
        head = [f"policy {self.policy}: {promise}", f"axes: {axes or 'none grow'}"]
        return "\n".join([*head, *(f"config: {c}" for c in changed), *table, *(f"note: {n}" for n in self.notes)])
