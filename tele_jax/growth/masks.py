"""Growth masks: 1 on what was there before, c on what is new, where c rises from 0 to 1 over some steps.

A mask is a small vector per grown axis, a function of the step alone: there is nothing to checkpoint, and a step
compiled with masks does not compile again while they move.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.growth.plan import Plan
from tele_jax.model.decoder import MASKED_AXES


def require_unmasked(provenance: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises UserError for a checkpoint from the middle of a mask ramp: without its masks it is another function."""
    mask = provenance[-1].get("mask") if provenance else None
    if mask is not None:
        raise UserError(
            f"{where}: grown behind masks that stand at {mask:.2f}; train on until they are 1 and dropped, or take the "
            "checkpoint from before the growth"
        )


def vectors(plan: Plan, c: float) -> dict[str, np.ndarray]:
    """float32 vector per grown axis: 1 on old entries, c on new ones."""
    return {
        axis: np.where(plan.maps[axis].fresh, np.float32(c), np.float32(1))
        for axis in MASKED_AXES
        if plan.maps[axis].fresh.any()
    }


@dataclasses.dataclass(frozen=True)
class MaskSchedule:
    """masks = MaskSchedule(plan, start=100, ramp=5000)(step): 0 up to `start`, then linear to 1 over `ramp` steps.

    Returns None from step start + ramp on, and for plans that need no masks: the model is the plain one then.
    """

    plan: Plan
    start: int = 0
    ramp: int = 5000

    def __post_init__(self):
        require(self.start >= 0 and self.ramp >= 0, f"start={self.start} and ramp={self.ramp} must not be negative")

    def __call__(self, step: int) -> dict[str, np.ndarray] | None:
        if not self.plan.masked or step >= self.start + self.ramp:
            return None
        return vectors(self.plan, max(0, step - self.start) / max(self.ramp, 1)) or None
