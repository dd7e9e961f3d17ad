"""Training on pairs of answers: what reward models and DPO have in common."""

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tele_jax.axes import Params
from tele_jax.config import ModelConfig, checked, require
from tele_jax.data.batches import HeldOut
from tele_jax.model import decoder
from tele_jax.model.heads import scalar_of
from tele_jax.model.loss import token_losses
from tele_jax.settings import TrainStage
from tele_jax.sharding import put_batch, to_host, whole_rows

Rows = Mapping[str, jax.Array]


@checked
class PairStage(TrainStage):
    """Fields of the stages that train on pairs; their optimizers start anew, on other goals."""

    # Weight of the K (K - 1) / 2 pairs of a ranking of K answers. whole: they weigh as much as one pair together
    # (InstructGPT, arXiv 2203.02155, section 3.5); pairs: each weighs as much as a pair that stands alone.
    rankings: Literal["whole", "pairs"] = "whole"
    # Rows into which the answers of a batch are packed; None: batch_size, two answers a row on average. Fewer have less
    # padding, above all where the longest answers are much longer than most. A multiple of data x fsdp x microbatches.
    rows: int | None = None

    def __post_init__(self):
        super().__post_init__()
        rows, parts = self.num_rows, self.microbatches
        most = f"rows={rows} of {2 * self.batch_size} answers: give from 1 to that many"
        require(0 < rows <= 2 * self.batch_size, most)
        require(rows % parts == 0, f"rows={rows} does not divide into microbatches={parts}")
        why = "the other answers, or the reference, would be scored without masks; open them in a stage before"
        require(not self.mask_ramp, f"mask_ramp: {why}")

    @property
    def fresh_optimizer(self) -> bool:
        return True

    @property
    def num_rows(self) -> int:
        return self.batch_size if self.rows is None else self.rows

    @property
    def measures(self) -> tuple[str, ...]:
        return "accuracy", "margin"

    def pair_weights(self, batch: Rows) -> jax.Array:
        """Weights of the pairs of a batch, float32[B]."""
        return batch["pair_weights"] if self.rankings == "whole" else jnp.ones_like(batch["pair_weights"])


def shapes(stage: PairStage) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch of pairs whose answers are all of the greatest length; see stages.__init__."""
    integers, floats, pairs = jnp.int32, jnp.float32, (stage.batch_size,)
    rows = (stage.num_rows, -(-2 * stage.batch_size // stage.num_rows) * stage.seq_len)
    found = {name: (rows, integers) for name in ("tokens", "targets", "segment_ids", "positions")}
    found |= {"loss_weights": (rows, floats), "margin": (pairs, floats), "pair_weights": (pairs, floats)}
    found |= {name: ((*pairs, 2), integers) for name in ("ends", "sequences")} | {
        "answer_lengths": ((*pairs, 2), floats)
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in found.items()}


def scores(
    cfg: ModelConfig, params: Params, rows: Rows, masks: decoder.Masks | None = None, rope_length: int | None = None
) -> jax.Array:
    """Scores of a reward model for the answers in rows [R, S], each read at its last token by its index.

    rows["ends"]: the index of every answer's last token in the R * S of the rows, of the shape of the result. Neither
    the padding nor other answers change a score. rope_length: as decoder.hidden. Raises UserError where cfg has no
    scalar head.
    """
    how = (rows["tokens"], rows["positions"], rows["segment_ids"], masks, rope_length)
    return scalar_of(cfg, params, whole_rows(decoder.hidden(cfg, params, *how))).reshape(-1)[rows["ends"]]


def log_probabilities(
    cfg: ModelConfig, params: Params, rows: Rows, masks: decoder.Masks | None = None, rope_length: int | None = None
) -> jax.Array:
    """Log-probabilities in nats of the answers in rows [R, S], each the sum over its tokens and its end: [n, 2].

    The answers have the segment ids 1, 2, ..., 2n; rows["ends"] is of the shape of the result. rope_length: as
    decoder.hidden.
    """
    logp = -token_losses(cfg, params, rows, masks, rope_length) * rows["loss_weights"]
    own = rows["segment_ids"] == 1 + jnp.arange(rows["ends"].size)[:, None, None]
    return jnp.sum(jnp.where(own, logp, 0), axis=(1, 2)).reshape(rows["ends"].shape)


compiled_scores = functools.partial(jax.jit, static_argnums=(0, 4))(scores)
compiled_log_probabilities = functools.partial(jax.jit, static_argnums=(0, 4))(log_probabilities)


def figures(margin: jax.Array, rewards: tuple[jax.Array, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
    """Sums over pairs for the log, weighted: of rewards [B] of chosen and rejected answers, and of their difference.

    accuracy: pairs whose chosen answer has the larger reward; equal rewards count half.
    """
    found = {"accuracy": right(margin), "margin": margin, "chosen_reward": rewards[0], "rejected_reward": rewards[1]}
    return {name: jax.lax.stop_gradient(jnp.sum(value * weights)) for name, value in found.items()}


def right(margin: jax.Array) -> jax.Array:
    """1 where a margin is above 0, 0 where below, a half where it is 0."""
    return (1 + jnp.sign(margin)) / 2


def evaluate(
    stage: PairStage,
    of_rows: Callable[..., jax.Array],
    margins: Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray],
    cfg: ModelConfig,
    params: Params,
    held_out: Mapping[str, HeldOut],
    mesh: Mesh,
) -> dict[str, float]:
    """The accuracy and the mean margin of the held-out pairs of every domain; every pair of a ranking counts.

    Args:
      of_rows: compiled_scores or compiled_log_probabilities.
      margins: margins(values [B, 2], batch) -> [B].
    """
    found = {}
    with jax.set_mesh(mesh):
        for domain, held in held_out.items():
            known = []
            for batch in held.batches:
                placed = put_batch(batch, mesh, len(batch["margin"]))
                values = to_host(of_rows(cfg, params, placed, None, stage.seq_len)).astype(np.float64)
                known.append(margins(values, batch)[batch["pair_weights"] > 0])
            margin = np.concatenate(known)
            found[f"accuracy/{domain}"] = float(np.mean((1 + np.sign(margin)) / 2))
            found[f"margin/{domain}"] = float(np.mean(margin))
    return found
