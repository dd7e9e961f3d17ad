"""Reward models: a scalar head scores whole answers, and learns from pairs which of two is better."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tele_jax import losses
from tele_jax.align import pairs
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, checked, require
from tele_jax.data import sources
from tele_jax.data.batches import HeldOut
from tele_jax.data.record_rows import RecordBatches


@checked
class RewardStage(pairs.PairStage):
    """Training of a reward model, which begins as the model before it, with a scalar head drawn from `seed`."""

    kind: Literal["reward"]  # trains a reward model, stages/reward.py
    # Coefficient of the mean of (score of chosen + score of rejected)^2, which keeps scores centred at 0: with
    # differences alone, any constant could be added (arXiv 2312.09244, appendix A).
    centre: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(self.centre >= 0, f"centre={self.centre} must not be negative")
        require(self.lora is None, "lora: the scalar head is no adapter, and has to be trained; leave lora out")
        trained = "optimizer.trained='new': growth did not add the scalar head, which has to be trained; leave it out"
        require(self.optimizer.trained == "all", trained)


Settings = RewardStage
SCORES = True  # see stages/__init__.py
UNREAD = ("vocab",)  # its loss reads scalars, no logits
shapes = pairs.shapes


def batches(stage: RewardStage, index: sources.Indexes) -> RecordBatches:
    """Pairs of answers."""
    return RecordBatches(stage, "pairs", index)


def model(stage: RewardStage, cfg: ModelConfig) -> ModelConfig:
    """The model with a scalar head."""
    return cfg.replace(scalar_head=True)


def loss(
    stage: RewardStage,
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: Any = None,
    beside: None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The loss of losses.reward with the margins of the pairs, and with `centre`; see stages.__init__."""
    chosen, rejected = pairs.scores(cfg, params, batch, masks, stage.seq_len).T
    weights = stage.pair_weights(batch)
    found = losses.reward(chosen, rejected, margin=batch["margin"]) + stage.centre * jnp.square(chosen + rejected)
    figures = pairs.figures(chosen - rejected, (chosen, rejected), weights)
    return jnp.sum(found * weights), jnp.sum(weights), figures


def evaluate(
    stage: RewardStage, cfg: ModelConfig, params: Params, held_out: Mapping[str, HeldOut], mesh: Mesh
) -> dict[str, float]:
    """The accuracy and the mean margin of the held-out pairs of every domain."""
    margins = lambda scores, batch: scores[:, 0] - scores[:, 1]  # noqa: E731
    return pairs.evaluate(stage, pairs.compiled_scores, margins, cfg, params, held_out, mesh)
