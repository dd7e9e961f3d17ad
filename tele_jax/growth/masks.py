"""Growth masks: vectors with 1 on old units and c on new ones, where c rises from 0 to 1 over some training steps.

A mask is a small vector per grown axis, and a function of the step alone: there is nothing to checkpoint, and a step
compiled with masks does not compile again while they move.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from tele_jax.config import check_fields, require, whole
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table
from tele_jax.growth.plan import Plan
from tele_jax.model.decoder import MASKED_AXES

# c over the share x in [0, 1] of an axis's ramp. cosine: half a wave, (1 - cos(pi x)) / 2, level at both ends.
_SHAPES = {"linear": lambda x: x, "cosine": lambda x: math.sin(math.pi / 2 * x) ** 2}


def mask_of(provenance: Sequence[Table], where: str) -> float | None:
    """The value at which the masks of a checkpoint stand, from 0 (closed) to 1; None without. Raises DamageError."""
    mask = provenance[-1].get("mask") if provenance else None
    if mask is not None and (isinstance(mask, bool) or not isinstance(mask, (int, float)) or not 0 <= mask <= 1):
        raise DamageError(f"{where}: provenance[{len(provenance) - 1}].mask: damaged, {mask!r} is no mask")
    return mask


def require_unmasked(provenance: Sequence[Table], where: str) -> None:
    """Raises UserError for a checkpoint from the middle of a mask ramp: without its masks it is another function."""
    if (mask := mask_of(provenance, where)) is not None:
        shown = min(math.floor(mask * 100), 99) / 100  # never 1.00, which would say that they are dropped
        raise UserError(
            f"{where}: grown behind masks that stand at {shown:.2f}; train on until they are 1 and dropped "
            "(`tele train` with config.start and mask_ramp, or the run that it is of), or take the checkpoint from "
            "before the growth"
        )


def masked_axes(plan: Plan) -> tuple[str, ...]:
    """The grown axes that have a mask, in the order of MASKED_AXES."""
    return tuple(axis for axis in MASKED_AXES if plan.maps[axis].fresh.any())


def vectors(plan: Plan, c: float | Mapping[str, float]) -> dict[str, np.ndarray]:
    """The masks {axis: float32[size]} with 1 on old units and c (or c[axis], where c is a mapping) on new ones.

    Raises:
      UserError: a mapping without one of the grown axes.

    >>> from tele_jax import ModelConfig, growth
    >>> cfg = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=3, vocab_size=10)
    >>> vectors(growth.widen_mlp(cfg, 5, policy="msg"), 0.25)
    {'mlp': array([1.  , 1.  , 1.  , 0.25, 0.25], dtype=float32)}
    """
    axes = masked_axes(plan)
    each = c if isinstance(c, Mapping) else dict.fromkeys(axes, c)
    missing = [axis for axis in axes if axis not in each]
    require(not missing, f"masks: no value for {', '.join(missing)}, which the plan grows")
    return {axis: np.where(plan.maps[axis].fresh, np.float32(each[axis]), np.float32(1)) for axis in axes}


@check_fields
@dataclasses.dataclass(frozen=True)
class MaskSchedule:
    """A schedule of masks: c is 0 up to `start`, then rises to 1 over `ramp`.

    Called with a step it gives {axis: float32[size]}; or None from the end of the ramp on, where the model is the plain
    one, and for plans that need no masks.

    >>> from tele_jax import ModelConfig, growth
    >>> cfg = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=3, vocab_size=10)
    >>> MaskSchedule(growth.widen_mlp(cfg, 5, policy="msg"), start=100, ramp=400)(200)
    {'mlp': array([1.  , 1.  , 1.  , 0.25, 0.25], dtype=float32)}

    Attributes:
      start: the time at which c begins to rise from 0, in `unit`.
      ramp: the time that c of one axis takes from 0 to 1, in `unit`. With an order the whole takes `ramp` for each
        axis, as grow_time does in Masked Structural Growth (arXiv 2305.02869).
      unit: "steps"; or "tokens", which are step * tokens_per_step, whether or not a position counts in the loss.
      order: "together", or every axis that grows, once: each begins when the one before it is complete.
      shape: "linear", or "cosine", half a wave that is level at both ends.
      tokens_per_step: batch_size * seq_len; for unit "tokens".

    Raises:
      UserError: a negative start or ramp, an order that is not the axes of the plan, tokens without tokens_per_step.
    """

    plan: Plan
    start: int = 0
    ramp: int = 5000
    unit: Literal["steps", "tokens"] = "steps"
    order: Literal["together"] | Sequence[str] = "together"
    shape: Literal["linear", "cosine"] = "linear"
    tokens_per_step: int | None = None

    def __post_init__(self):
        require(self.start >= 0 and self.ramp >= 0, f"start={self.start} and ramp={self.ramp} must not be negative")
        counted = self.unit == "steps" or (self.tokens_per_step or 0) > 0
        require(counted, f"unit: 'tokens' needs tokens_per_step above 0, got {self.tokens_per_step}")
        if self.order != "together":
            axes = masked_axes(self.plan)
            require(
                not isinstance(self.order, str) and sorted(self.order) == sorted(axes),
                f"order: {self.order!r} is neither 'together' nor a list of the axes that grow behind masks, each "
                f"once: {', '.join(axes) or 'none'}",
            )
            object.__setattr__(self, "order", tuple(self.order))

    def __call__(self, step: int) -> dict[str, np.ndarray] | None:
        begins, elapsed, shape = self._begins(), whole(step, "step") * self._units_per_step, _SHAPES[self.shape]
        if step >= self.masked_steps:
            return None
        # All in integers up to one division: the same c in steps as in tokens.
        share = {axis: max(0, min(elapsed - begin, self.ramp)) / max(self.ramp, 1) for axis, begin in begins.items()}
        return vectors(self.plan, {axis: shape(x) for axis, x in share.items()})

    @property
    def masked_steps(self) -> int:
        """The number of steps, from step 0 on, that have masks; the plain model follows."""
        begins = self._begins()
        return -(-(max(begins.values()) + self.ramp) // self._units_per_step) if begins else 0

    def closed_steps(self) -> dict[str, np.ndarray]:
        """The number of steps, from step 0 on, in which a unit's parameters have no gradient: {axis: int32[size]}.

        These are the steps in which c is 0. New kv_heads have no mask of their own, but only new heads read them, so
        that they wait for these. Axes that are not masked (vocab) are left out: they learn from the first step.
        """
        unit = self._units_per_step
        # c > 0 behind `begin`; a ramp of 0 drops the masks at it.
        first = {axis: begin // unit + 1 if self.ramp else -(-begin // unit) for axis, begin in self._begins().items()}
        if "heads" in first:
            first["kv_heads"] = first["heads"]
        return {axis: np.where(self.plan.maps[axis].fresh, n, 0).astype(np.int32) for axis, n in first.items()}

    def _begins(self) -> dict[str, int]:
        """{axis: when its c begins to rise, in `unit`}; empty for a plan without masks."""
        axes = masked_axes(self.plan) if self.plan.masked else ()
        return {
            axis: self.start + self.ramp * (0 if self.order == "together" else self.order.index(axis)) for axis in axes
        }

    @property
    def _units_per_step(self) -> int:
        return self.tokens_per_step or 1 if self.unit == "tokens" else 1
