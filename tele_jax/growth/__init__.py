"""Growth of a trained model into a larger one, as pure functions on parameter trees.

plan = growth.plan(small_cfg, large_cfg)       what happens to every leaf; print it, check it
big = growth.apply(plan, params)               the grown parameters
opt = growth.apply_opt(plan, opt_state)        moments that belong to them
rep = growth.verify(plan, params, big, tokens) a comparison: same logits, everything new can learn
growth.check(plan, mesh)                       what can be known to be wrong before a byte moves
small = growth.shrink(plan, big)               the left inverse
growth.stream(plan, src, dst)                  the same from checkpoint to checkpoint, in bounded memory
growth.stream_outline(plan, src, dst)          bytes, disk and memory that this would take
growth.verify_stored(plan, src, dst)           and the comparison, block by block
growth.sharded(plan, mesh, state)              the same compiled for arrays that lie on a mesh
growth.lazy(plan, params)                      grown leaves that are computed where they are read
growth.compose(plan, other)                    two growths in one go
growth.widen_mlp(cfg, 300), insert_layers, ...  one axis at a time, see operators.py
"""

from tele_jax.growth.apply import GrownArray, apply, lazy, shrink
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.check import check
from tele_jax.growth.leaf import LeafPlan
from tele_jax.growth.masks import MaskSchedule
from tele_jax.growth.opt_state import apply_opt
from tele_jax.growth.plan import Plan, Step, compose
from tele_jax.growth.policies import (
    change_multipliers,
    grow_vocab,
    insert_layers,
    pad_vocab,
    plan,
    widen_embed,
    widen_heads,
    widen_mlp,
)
from tele_jax.growth.sharded import sharded, state_shardings
from tele_jax.growth.stream import Outline, Streamed, stream
from tele_jax.growth.stream import outline as stream_outline
from tele_jax.growth.verify.report import Report, verify, verify_stored

__all__ = [
    "AxisMap",
    "GrownArray",
    "LeafPlan",
    "MaskSchedule",
    "Outline",
    "Plan",
    "Report",
    "Step",
    "Streamed",
    "apply",
    "apply_opt",
    "change_multipliers",
    "check",
    "compose",
    "grow_vocab",
    "insert_layers",
    "lazy",
    "pad_vocab",
    "plan",
    "sharded",
    "shrink",
    "state_shardings",
    "stream",
    "stream_outline",
    "verify",
    "verify_stored",
    "widen_embed",
    "widen_heads",
    "widen_mlp",
]
