"""Several growths in one go: composed before any data moves, with the bits of one after the other."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tele_jax.axes import ParamSpec
from tele_jax.config import ModelConfig, to_dict
from tele_jax.errors import UserError
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.plan import Growth, Plan
from tele_jax.model.decoder import MASKED_AXES


@dataclasses.dataclass(frozen=True, eq=False)
class Composed(Growth):
    """Plans that follow each other; made by `compose`. Its maps lead from the first source to the last destination."""

    steps: tuple[Plan, ...]

    @property
    def src_cfg(self) -> ModelConfig:
        return self.steps[0].src_cfg

    @property
    def dst_cfg(self) -> ModelConfig:
        return self.steps[-1].dst_cfg

    @property
    def src_spec(self) -> dict[str, ParamSpec]:
        return self.steps[0].src_spec

    @property
    def dst_spec(self) -> dict[str, ParamSpec]:
        return self.steps[-1].dst_spec

    @property
    def policy(self) -> str:
        return " + ".join(step.policy for step in self.steps)

    @property
    def seed(self) -> list[int]:
        return [step.seed for step in self.steps]

    @functools.cached_property
    def maps(self) -> Mapping[str, AxisMap]:
        first, *others = (step.maps for step in self.steps)
        return {axis: functools.reduce(lambda a, b, x=axis: a.compose(b[x]), others, m) for axis, m in first.items()}

    @functools.cached_property
    def sources(self) -> Mapping[str, str]:
        def origin(name: str) -> str:
            for step in reversed(self.steps):
                name = step.sources[name]
            return name

        return {name: origin(name) for name in self.dst_spec}

    @property
    def masked(self) -> bool:
        return any(step.masked for step in self.steps)

    @property
    def preserving(self) -> bool:
        return all(step.preserving for step in self.steps)

    @property
    def lively(self) -> bool:
        return all(step.lively for step in self.steps)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for step in self.steps for note in step.notes))

    def to_json(self) -> dict[str, Any]:
        return {"steps": [step.to_json() for step in self.steps]}


def compose(first: Growth, then: Growth) -> Growth:
    """The growth that does `first` and then `then`; bit for bit what one after the other gives.

    >>> compose(plan(small, medium), plan(medium, large)).dst_cfg == large

    Raises:
      UserError: `then` does not start from what `first` leads to (the fields or leaves that differ are named); one of
        the two needs masks and the other, which grows something too, must not have them, or copies channels unevenly.
    """
    made, taken = to_dict(first.dst_cfg), to_dict(then.src_cfg)
    lines = [f"{field} {made[field]!r} -> {taken[field]!r}" for field in made if made[field] != taken[field]]
    have, want = first.dst_spec, then.src_spec
    lines += [f"{name}" for name in sorted(have.keys() ^ want.keys())]
    lines += [
        f"{n} {have[n].shape} -> {want[n].shape}" for n in sorted(have.keys() & want.keys()) if have[n] != want[n]
    ]
    if lines:
        raise UserError(f"compose: the second plan does not start from what the first leads to: {', '.join(lines)}")
    parts = [part for part in (first, then) if set(MASKED_AXES) & set(part.grown_axes)]
    why = ""
    if len({part.masked for part in parts}) > 1:
        why = "the new units of one start behind masks, those of the other must not"
    elif first.masked and "embed" in first.grown_axes and (then.maps["embed"].scale != 1).any():
        why = "masks weigh the mean of a norm, and copies in embed are scaled to keep the mean without masks"
    if why:
        raise UserError(
            f"compose: {first.policy} and {then.policy} cannot be done in one go: {why}; "
            "train until the masks are 1, then grow again"
        )
    return combined((*first.steps, *then.steps))


def combined(steps: Sequence[Plan]) -> Growth:
    """Steps that follow each other, as one growth."""
    return steps[0] if len(steps) == 1 else Composed(tuple(steps))
