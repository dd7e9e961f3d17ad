"""Direct preference optimisation: the model learns from pairs of answers, compared with a reference model.

The reference's log-probabilities are computed once and kept (align/reference.py), so that it takes no memory in the
step. A prompt and its answer are the tokens that chat encodes and the model draws, so a model ends its answers as it is
taught to.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tele_jax import losses
from tele_jax.align import pairs, reference
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, checked, require
from tele_jax.data import sources
from tele_jax.data.batches import HeldOut
from tele_jax.data.feed import LiveFeed, RowFeed
from tele_jax.data.record_rows import RecordBatches
from tele_jax.data.surroundings import Surroundings


@checked
class DpoStage(pairs.PairStage):
    """Direct preference optimisation (arXiv 2305.18290); see losses.dpo for the equations."""

    kind: Literal["dpo"]  # direct preference optimisation, stages/dpo.py
    # Reference: an earlier stage of the run, or the path of a checkpoint. None: the model with which the stage begins;
    # with lora, the model without the adapters that are trained.
    reference: str | None = None
    beta: float = 0.1  # weight of the KL divergence from the reference
    loss: Literal["sigmoid", "ipo", "conservative"] = "sigmoid"  # kind of losses.dpo
    label_smoothing: float = 0.0  # of conservative: the share of pairs whose answers are the wrong way round
    length_normalised: bool = False  # divides log-probabilities by the tokens of their answers
    # Weight of the cross entropy of a token of the chosen answer, which is added (arXiv 2404.19733, section 2).
    sft_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.beta < math.inf, f"beta={self.beta} must be above 0, and finite")
        require(self.sft_weight >= 0, f"sft_weight={self.sft_weight} must not be negative")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, f"label_smoothing={smoothing} must be in [0, 0.5)")
        require(
            (smoothing > 0) == (self.loss == "conservative"),
            f"label_smoothing={smoothing} and loss={self.loss!r}: it is above 0 with 'conservative', and 0 otherwise",
        )

    @property
    def models(self) -> dict[str, str]:
        return {} if self.reference is None else {"reference": self.reference}


Settings = DpoStage


def batches(stage: DpoStage, index: sources.Indexes) -> RecordBatches:
    """Pairs of answers."""
    return RecordBatches(stage, "pairs", index)


def shapes(stage: DpoStage) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch, for `tele plan`."""
    return pairs.shapes(stage) | {"reference": jax.ShapeDtypeStruct((stage.batch_size, 2), jnp.float32)}


def feed(stage: DpoStage, batches: RecordBatches, around: Surroundings) -> LiveFeed | RowFeed:
    """Batches with the log-probabilities of the reference.

    Raises:
      UserError: there is no model before the stage.
      DamageError: a file of log-probabilities is damaged.
    """
    rows = stage.batch_size // stage.microbatches
    reference.attach(batches, around, around.checkpoints.get("reference"), rows)
    return around.feed(batches, stage.batch_size)


def loss(
    stage: DpoStage,
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: Any = None,
    beside: None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The loss of losses.dpo; see stages.__init__. Rewards are beta (log p - log p of the reference)."""
    logp = pairs.log_probabilities(cfg, params, batch, masks, stage.seq_len)
    lengths, weights = batch["answer_lengths"], stage.pair_weights(batch)
    known = batch["reference"]
    divided = {"chosen_len": lengths[:, 0], "rejected_len": lengths[:, 1]} if stage.length_normalised else {}
    how: dict[str, Any] = {"beta": stage.beta, "kind": stage.loss, "label_smoothing": stage.label_smoothing, **divided}
    found = losses.dpo(logp[:, 0], logp[:, 1], known[:, 0], known[:, 1], **how)
    found += stage.sft_weight * -logp[:, 0] / lengths[:, 0]
    rewards = stage.beta * (logp - known) / (lengths if stage.length_normalised else 1)
    figures = pairs.figures(rewards[:, 0] - rewards[:, 1], (rewards[:, 0], rewards[:, 1]), weights)
    more = {"chosen_length": lengths[:, 0], "rejected_length": lengths[:, 1], "chosen_logp": logp[:, 0]}
    figures |= {name: jax.lax.stop_gradient(jnp.sum(value * weights)) for name, value in more.items()}
    return jnp.sum(found * weights), jnp.sum(weights), figures


def evaluate(
    stage: DpoStage, cfg: ModelConfig, params: Params, held_out: Mapping[str, HeldOut], mesh: Mesh
) -> dict[str, float]:
    """The accuracy and the mean margin of the held-out pairs of every domain, by the rewards of DPO."""

    def margins(logp: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        rewards = stage.beta * (logp - batch["reference"])
        rewards = rewards / batch["answer_lengths"] if stage.length_normalised else rewards
        return rewards[:, 0] - rewards[:, 1]

    return pairs.evaluate(stage, pairs.compiled_log_probabilities, margins, cfg, params, held_out, mesh)
