"""Supervised fine-tuning: dialogues, of which the answers alone count in the loss."""

from typing import Literal

from tele_jax.config import checked
from tele_jax.data import sources
from tele_jax.data.batches import Batches
from tele_jax.settings import TrainStage
from tele_jax.stages.pretrain import loss

__all__ = ["Settings", "SftStage", "batches", "loss"]


@checked
class SftStage(TrainStage):
    """Fine-tuning has the fields that all training stages share; its optimizer starts anew, on other data and goals."""

    kind: Literal["sft"]

    @property
    def fresh_optimizer(self) -> bool:
        return True


Settings = SftStage


def batches(stage: SftStage, index: sources.Indexes) -> Batches:
    """Rows of whole dialogues; the loss weights are 1 on answers and 0 elsewhere."""
    return Batches(stage, "sft", index)
