"""Supervised fine-tuning: dialogues, of which the answers alone count in the loss."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import Params
from tele_jax.config import ModelConfig, checked, require
from tele_jax.data import sources
from tele_jax.data.batches import Batches
from tele_jax.data.feed import Batch
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import TrainStage

SEEDS = "noise_seeds"  # of a batch: uint32[B], one for the noise of every row


@checked
class SftStage(TrainStage):
    """Fine-tuning has the fields of all training stages, and these; its optimizer starts anew, on other goals."""

    kind: Literal["sft"]
    # A row holds several dialogues, with no attention between them. False: one dialogue a row. The batch is trimmed to
    # its longest row, rounded up to an eighth of seq_len, so that at most eight programs are compiled.
    packed: bool = True
    # The loss is the mean over all learned tokens of a batch, or over its dialogues, of each of which it is the mean.
    # (Of a dialogue that is split over rows, each part counts as one.)
    mean_over: Literal["tokens", "dialogues"] = "tokens"
    # Size of the noise on the embedding in training, NEFTune (arXiv 2310.05914); 0: none. The paper has 5, 10 and 15.
    neftune_alpha: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(self.neftune_alpha >= 0, f"neftune_alpha={self.neftune_alpha} must not be negative")
        require(
            not (self.neftune_alpha and self.mask_ramp),
            "neftune_alpha and mask_ramp: noise would reach units that the masks of a growth still close; open the "
            "masks in a stage before",
        )

    @property
    def fresh_optimizer(self) -> bool:
        return True


Settings = SftStage


def batches(stage: SftStage, index: sources.Indexes) -> Batches:
    """Rows of whole dialogues; the loss weights are above 0 on answers and 0 elsewhere."""
    return Batches(stage, "sft", index, prepare=functools.partial(prepare, stage), packed=stage.packed)


def prepare(stage: SftStage, batch: Batch, places: np.ndarray) -> Batch:
    """Adds to a batch what the options of the stage need.

    With mean_over="dialogues" the loss weights of each dialogue in a row are divided by their sum. With noise, `SEEDS`
    are a function of the stage's seed and of the place of the row in the stage: the noise is the same however the batch
    is cut into microbatches and over devices.

    Args:
      places: uint64[B], numbers of the rows in the stage.
    """
    if not stage.packed:
        unit = max(1, stage.seq_len // 8)
        used = int(np.count_nonzero(batch["segment_ids"], axis=1).max())
        end = min(-(-max(used, 1) // unit) * unit, stage.seq_len)
        batch = {name: np.ascontiguousarray(rows[:, :end]) for name, rows in batch.items()}
    if stage.mean_over == "dialogues":
        weights = batch["loss_weights"].astype(np.float64)
        count = int(batch["segment_ids"].max(initial=0)) + 1
        of_row = np.arange(len(weights))[:, None] * count + batch["segment_ids"]
        sums = np.bincount(of_row.ravel(), weights.ravel(), minlength=len(weights) * count)[of_row]
        batch = batch | {"loss_weights": (weights / np.where(sums > 0, sums, 1)).astype(np.float32)}
    if stage.neftune_alpha:
        mixed = np.random.SeedSequence(stage.seed).generate_state(1, np.uint64)[0] + places
        seeds = [np.random.SeedSequence(int(each)).generate_state(1)[0] for each in mixed]
        batch = batch | {SEEDS: np.array(seeds, np.uint32)}
    return batch


def loss(
    stage: SftStage,
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: Any = None,
    beside: None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross entropy of the learned tokens in nats; see stages.__init__."""
    noise = None
    if stage.neftune_alpha:
        noise = stage.neftune_alpha * embedding_noise(batch[SEEDS], batch["segment_ids"], cfg.embed_dim)
    return *next_token_loss(cfg, params, batch, masks, noise), {}


def embedding_noise(seeds: jax.Array, segment_ids: jax.Array, embed_dim: int) -> jax.Array:
    """Noise U(-1, 1) / sqrt(length * embed_dim) of NEFTune (arXiv 2310.05914, algorithm 1): float32[B, S, D].

    The length is that of the dialogue that a token is of, not of the row, so that packing does not change the noise.

    Args:
      seeds: uint32[B], of the noise of each row.
      segment_ids: int32[B, S]; 0 is padding.
    """
    length = segment_ids.shape[1]
    sizes = jax.vmap(lambda ids: jnp.zeros(length + 1, jnp.int32).at[ids].add(1)[ids])(segment_ids)
    draw = lambda seed: jax.random.uniform(jax.random.key(seed), (length, embed_dim), minval=-1.0, maxval=1.0)  # noqa: E731
    return jax.vmap(draw)(seeds) / jnp.sqrt(sizes * jnp.float32(embed_dim))[..., None]
