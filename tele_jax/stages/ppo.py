"""PPO with a value head on the trunk of the policy; the KL divergence from the reference is a part of the reward.

The reward of a reply stands at its last drawn token, and at every drawn token stands -kl_coef * k1, the estimate of the
divergence whose gradient is right inside a reward (arXiv 1909.08593, equation 2, with the controller of section 2.2).
"""

from collections.abc import Mapping
from typing import Literal

import jax
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

CONTROL, CONTROL_LIMIT = 0.1, 0.2  # arXiv 1909.08593: gain of the controller, and limit of the error that it sees


@checked
class PpoStage(RolloutStage):
    """Settings of PPO, beside those of RolloutStage. It begins with a new optimizer state."""

    kind: Literal["ppo"]  # proximal policy optimisation, stages/ppo.py
    gamma: float = 1.0  # discount of later rewards
    lam: float = 0.95  # of the generalised advantage estimate (arXiv 1506.02438)
    clip: float = 0.2  # the ratio counts in [1 - clip, 1 + clip]
    # Largest change of a value since the start of the rollout that lowers the loss; None: no limit.
    value_clip: float | None = 0.2
    value_coef: float = 0.1  # weight of the loss of the value head
    value_in_trunk: bool = True  # False: the gradient of the value's loss reaches the value head alone
    whiten_advantages: bool = True  # to mean 0 and variance 1 over the drawn tokens of a rollout
    # Divergence of a whole reply from the reference, in nats, to which kl_coef is adapted. None: kl_coef is fixed.
    kl_target: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be in [0, 1]")
        require(0 < self.clip <= 1, f"clip={self.clip} must be in (0, 1]")
        require(self.value_coef >= 0, f"value_coef={self.value_coef} must not be negative")
        require(
            self.value_clip is None or self.value_clip > 0, f"value_clip={self.value_clip} must be above 0, or None"
        )
        require(self.lora is None, "lora: the value head is no adapter, and has to be trained; leave lora out")
        trained = "optimizer.trained='new': growth did not add the value head, which has to be trained; leave it out"
        require(self.optimizer.trained == "all", trained)
        require(self.dynamic_draws == 0, "dynamic_draws compares replies to one prompt, as grpo does; ppo has values")
        require(
            self.kl_target is None or (self.kl_target > 0 and self.kl_coef > 0),
            f"kl_target={self.kl_target} and kl_coef={self.kl_coef}: both must be above 0; the controller starts from "
            "kl_coef",
        )


Settings = PpoStage
batches = Prompts  # each with the fields of its record, which rewards read
rollout = RolloutStage.drawn_at_once


def shapes(stage: PpoStage) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch, see experience.rows and `complete`."""
    return stage.shapes("old_values", "advantages", "returns")


def model(stage: PpoStage, cfg: ModelConfig) -> ModelConfig:
    """The policy with a value head."""
    return cfg.replace(scalar_head=True)


def feed(stage: PpoStage, batches: Prompts, around: Surroundings) -> RolloutFeed:
    """Minibatches of replies that the policy draws to the prompts."""
    return RolloutFeed(stage, batches, around, complete, adapt=adapt, values=True)


def adapt(stage: PpoStage, kl_coef: float, kl: float) -> float:
    """The weight of the KL divergence after a rollout whose replies have so much of it, in nats a reply."""
    if stage.kl_target is None:
        return kl_coef
    error = min(max((kl - stage.kl_target) / stage.kl_target, -CONTROL_LIMIT), CONTROL_LIMIT)
    return kl_coef * (1 + CONTROL * error)


def complete(
    stage: PpoStage, rows: Mapping[str, np.ndarray], rewards: np.ndarray, group: np.ndarray, kl_coef: float
) -> Arrays:
    """Advantages and returns, float32 [N, S]; the reward of a reply stands where its last token is predicted."""
    mask = rows["loss_weights"]
    of_token = np.zeros(mask.shape, np.float32)
    if "ref_logp" in rows:
        of_token -= kl_coef * (rows["old_logp"] - rows["ref_logp"]) * mask
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1] > 0, axis=1)  # by index: no token value says where a reply ends
    of_token[np.arange(len(mask)), last] += rewards
    advantages, returns = losses.gae(of_token, rows["old_values"], mask, gamma=stage.gamma, lam=stage.lam)
    if stage.whiten_advantages:
        advantages = losses.whiten(advantages, mask)
    return {"advantages": np.asarray(advantages, np.float32), "returns": np.asarray(returns, np.float32)}


def loss(
    stage: PpoStage,
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: None = None,
    beside: None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The clipped losses of the policy and of the values, means over the drawn tokens.

    See stages.__init__, experience.rows and feed.RolloutFeed for the batch.
    """
    cfg = policy.tempered(cfg, stage.temperature)
    logp, values = policy.outputs(cfg, params, batch, values=True, trunk=stage.value_in_trunk)
    assert values is not None
    mask, old = batch["loss_weights"], batch["old_logp"]
    weights, count = losses.token_weights(mask, kind="dapo")
    shown, clip = weights, (stage.clip, stage.clip)
    if stage.sampler_cap is not None:
        weights = weights * losses.sampler_weights(old, batch["sampler_logp"], mask, cap=stage.sampler_cap)
    total, _ = losses.ppo_policy(logp, old, batch["advantages"], mask, clip=clip, weights=weights)
    of_values, _ = losses.ppo_value(values, batch["old_values"], batch["returns"], mask, clip=stage.value_clip)
    figures = policy.figures(logp, old, mask, shown, clip)
    figures["value_loss"] = jax.lax.stop_gradient(of_values)
    return total + stage.value_coef * of_values, count, figures
