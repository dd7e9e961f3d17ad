"""Growth of a trained model into a larger one, as pure functions on parameter trees.

plan = growth.plan(small_cfg, large_cfg)        what happens to every leaf; print it                 policies.py
growth.check(plan, mesh)                        finds what is wrong before a byte moves              check.py
big = growth.apply(plan, params)                the grown parameters                                 apply.py
opt = growth.apply_opt(plan, opt_state)         moments that belong to them                          opt_state.py
rep = growth.verify(plan, params, big, tokens)  a comparison: same logits, everything new can learn  verify/
small = growth.shrink(plan, big)                the left inverse                                     apply.py
growth.stream(plan, src, dst)                   from checkpoint to checkpoint, in bounded memory     stream.py
growth.stream_outline(plan, src, dst)           bytes, disk and memory that this would take          stream.py
growth.verify_stored(plan, src, dst)            the comparison, block by block                       verify/
growth.sharded(plan, mesh, state)               growth compiled for arrays that lie on a mesh        sharded.py
growth.lazy(plan, params)                       grown leaves that are computed where they are read   apply.py
growth.compose(plan, other)                     a plan with the steps of both                        plan.py
growth.widen_mlp(cfg, 300), insert_layers, ...  one axis at a time                                   policies.py
growth.MaskSchedule(plan, ramp=5000)            masks of policy msg, from 0 to 1                     masks.py
growth.layers.distances(cfg, params, tokens)    scores for layers="distance"                         layers.py

A plan consists of AxisMap (axis_map.py), LeafPlan (leaf.py, with the contract of the kernels), Step and Plan (plan.py).
The kernels, in JAX and in host memory, are kernel.py. gradient_powers.py measures an optimizer, surgery.py
makes plans for other changes to a tree, and receipt.py does what `tele grow` and a growth stage do.
"""

from tele_jax.growth import layers
from tele_jax.growth.apply import GrownArray, apply, lazy, shrink
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.check import check
from tele_jax.growth.leaf import LeafPlan
from tele_jax.growth.masks import MaskSchedule
from tele_jax.growth.opt_state import apply_opt
from tele_jax.growth.plan import Plan, Step, compose
from tele_jax.growth.policies import (
    change_multipliers,
    expand_blocks,
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
from tele_jax.growth.verify import Report, verify, verify_stored

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
    "expand_blocks",
    "grow_vocab",
    "insert_layers",
    "layers",
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


def __dir__() -> list[str]:
    return __all__
