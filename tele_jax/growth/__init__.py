"""Growth of a trained model into a larger one, as pure functions on parameter trees.

plan = growth.plan(small_cfg, large_cfg)       what happens to every leaf; print it, check it
big = growth.apply(plan, params)               the grown parameters
opt = growth.apply_opt(plan, opt_state)        moments that belong to them
rep = growth.verify(plan, params, big, tokens) proof: same logits, everything new can learn
small = growth.shrink(plan, big)               the left inverse
growth.stream(plan, src, dst)                  the same from checkpoint to checkpoint, in bounded memory
"""

from tele_jax.growth.apply import apply, apply_opt, shrink
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.compose import Composed, compose
from tele_jax.growth.masks import MaskSchedule
from tele_jax.growth.plan import Growth, LeafPlan, Plan
from tele_jax.growth.policies import plan
from tele_jax.growth.stream import Streamed, stream
from tele_jax.growth.verify import Report, verify

__all__ = [
    "AxisMap",
    "Composed",
    "Growth",
    "LeafPlan",
    "MaskSchedule",
    "Plan",
    "Report",
    "Streamed",
    "apply",
    "apply_opt",
    "compose",
    "plan",
    "shrink",
    "stream",
    "verify",
]
