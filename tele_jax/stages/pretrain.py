"""Pretraining: every token of the text counts in the loss."""

from collections.abc import Mapping
from typing import Any, Literal

import jax

from tele_jax.axes import Params
from tele_jax.config import ModelConfig, checked
from tele_jax.data import sources
from tele_jax.data.batches import Batches
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import TrainStage


@checked
class PretrainStage(TrainStage):
    """Pretraining has the fields that all training stages share."""

    kind: Literal["pretrain"]


Settings = PretrainStage


def batches(stage: PretrainStage, index: sources.Indexes) -> Batches:
    """Rows cut from documents that follow each other without padding."""
    return Batches(stage, "pretrain", index)


def loss(
    stage: TrainStage,
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: Any = None,
    beside: None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross entropy of the next token in nats; see stages.__init__."""
    return *next_token_loss(cfg, params, batch, masks), {}
