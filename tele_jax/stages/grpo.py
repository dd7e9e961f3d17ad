"""GRPO and what came of it: replies to a prompt are compared with each other, and no value is learned.

The settings that make the published methods, beside those that are the defaults:

    GRPO       arXiv 2402.03300
    RLOO       arXiv 2402.14740   advantages="rloo", loss_over="limit", kl_in="reward"
    Dr. GRPO   arXiv 2503.20783   advantages="dr_grpo", loss_over="limit"
    DAPO       arXiv 2503.14476   loss_over="tokens", clip_high=0.28, dynamic_draws, overlong_tokens
    GSPO       arXiv 2507.18071   ratio="sequence", clip_low=3e-4, clip_high=4e-4
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax import losses
from tele_jax.align import policy
from tele_jax.align.experience import Arrays
from tele_jax.align.feed import RolloutFeed
from tele_jax.align.prompts import Prompts
from tele_jax.align.prompts import check as check
from tele_jax.align.prompts import evaluate as evaluate
from tele_jax.align.rollouts import RolloutStage
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, checked, require
from tele_jax.data.surroundings import Surroundings

# Names of losses.token_weights by what the loss is a mean over.
NORMALISATIONS = {"sequences": "grpo", "tokens": "dapo", "limit": "dr_grpo"}


@checked
class GrpoStage(RolloutStage):
    """Settings of GRPO, beside those of RolloutStage. It begins with a new optimizer state."""

    kind: Literal["grpo"]  # group relative policy optimisation, stages/grpo.py
    answers: int = 8  # replies that are drawn to a prompt
    # Reward minus the mean of its group: divided by the standard deviation (grpo), or not (dr_grpo), or minus the mean
    # of the other replies alone (rloo).
    advantages: Literal["grpo", "rloo", "dr_grpo"] = "grpo"
    # The loss is a mean over the tokens of each reply, and then over replies; over all tokens; or a sum over tokens
    # divided by max_new_tokens, and a mean over replies.
    loss_over: Literal["sequences", "tokens", "limit"] = "sequences"
    ratio: Literal["token", "sequence"] = "token"  # importance ratio of each token, or the mean one of its reply
    clip_low: float = 0.2  # the ratio counts from 1 - clip_low
    clip_high: float = 0.2  # the ratio counts up to 1 + clip_high
    # The KL divergence is a term of the loss of every token, or (as k1, summed over a reply) taken off the reward: then
    # the best policy is the known one, proportional to reference * exp(reward / kl_coef); see docs/alignment.md.
    kl_in: Literal["loss", "reward"] = "loss"
    # Value of the term in the loss; the gradient of both is that of k2, which is the divergence's.
    kl_kind: Literal["k2", "k3"] = "k3"

    def __post_init__(self):
        require(self.answers >= 2, f"answers={self.answers}: replies are compared with each other, so at least 2")
        super().__post_init__()
        require(0 < self.clip_low <= 1, f"clip_low={self.clip_low} must be in (0, 1]")
        require(self.clip_high > 0, f"clip_high={self.clip_high} must be above 0")


Settings = GrpoStage
batches = Prompts  # each with the fields of its record, which rewards read
rollout = RolloutStage.drawn_at_once


def shapes(stage: GrpoStage) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch, see experience.rows and `complete`."""
    return stage.shapes("advantages")


def feed(stage: GrpoStage, batches: Prompts, around: Surroundings) -> RolloutFeed:
    """Minibatches of replies that the policy draws to the prompts."""
    return RolloutFeed(stage, batches, around, complete)


def complete(
    stage: GrpoStage, rows: Mapping[str, np.ndarray], rewards: np.ndarray, group: np.ndarray, kl_coef: float
) -> Arrays:
    """The advantage of a reply in its group, at all its tokens: float32 [N, S]."""
    if stage.kl_in == "reward" and "ref_logp" in rows:
        rewards = rewards - kl_coef * ((rows["old_logp"] - rows["ref_logp"]) * rows["loss_weights"]).sum(axis=1)
    found = losses.group_advantages(rewards.astype(np.float32), group, kind=stage.advantages)
    return {"advantages": np.asarray(found, np.float32)[:, None] * rows["loss_weights"]}


def loss(
    stage: GrpoStage,
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: None = None,
    beside: None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The clipped loss of the policy, and stage.kl_coef times the KL divergence from the reference.

    See stages.__init__, experience.rows and feed.RolloutFeed for the batch.
    """
    logp, _ = policy.outputs(policy.tempered(cfg, stage.temperature), params, batch)
    mask, old = batch["loss_weights"], batch["old_logp"]
    kind = NORMALISATIONS[stage.loss_over]
    weights, count = losses.token_weights(mask, kind=kind, length=stage.max_new_tokens if kind == "dr_grpo" else None)
    shown, _ = losses.token_weights(mask, kind="dapo" if kind == "dapo" else "grpo")  # figures are means
    if stage.sampler_cap is not None:
        weights = weights * losses.sampler_weights(old, batch["sampler_logp"], mask, cap=stage.sampler_cap)
    clip = (stage.clip_low, stage.clip_high)
    total, _ = losses.ppo_policy(logp, old, batch["advantages"], mask, clip=clip, level=stage.ratio, weights=weights)
    figures = policy.figures(logp, old, mask, shown, clip, stage.ratio)
    if "ref_logp" in batch and stage.kl_coef and stage.kl_in == "loss":
        ratio = jax.lax.stop_gradient(losses.ratios(logp, old, mask))
        kept = jnp.where(mask > 0, logp - batch["ref_logp"], 0)
        terms = losses.kl_loss(kept, 0.0 * kept, kind=stage.kl_kind) * ratio
        figures["kl_loss"] = jnp.sum(terms * shown)
        total += stage.kl_coef * jnp.sum(terms * weights)
    return total, count, figures
