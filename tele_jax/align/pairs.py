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

    def __post_init__(self):
        super().__post_init__()
        why = "the other answers, or the reference, would be scored without masks; open them in a stage before"
        require(not self.mask_ramp, f"mask_ramp: {why}")

    @property
    def fresh_optimizer(self) -> bool:
        return True

    @property
    def measures(self) -> tuple[str, ...]:
        return "accuracy", "margin"

    def pair_weights(self, batch: Rows) -> jax.Array:
        """Weights of the pairs of a batch, float32[B]."""
        return batch["pair_weights"] if self.rankings == "whole" else jnp.ones_like(batch["pair_weights"])


def shapes(stage: PairStage) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch of pairs whose longest sequence fills a row; see stages.__init__."""
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}
    rows = {name: ((2, stage.seq_len), dtype) for name, dtype in {**dtypes, "loss_weights": jnp.float32}.items()}
    rows |= {"lengths": ((2,), jnp.int32), "sequences": ((2,), jnp.int32)}
    rows |= {"margin": ((), jnp.float32), "pair_weights": ((), jnp.float32)}
    return {name: jax.ShapeDtypeStruct((stage.batch_size, *more), dtype) for name, (more, dtype) in rows.items()}


def rows_of(batch: Rows) -> dict[str, jax.Array]:
    """The 2B sequences of B pairs as rows: [B, 2, ...] becomes [2B, ...], the chosen answer of a pair first."""
    names = ("tokens", "targets", "loss_weights", "segment_ids", "positions", "lengths")
    return {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in names}


def scores(cfg: ModelConfig, params: Params, rows: Rows, masks: decoder.Masks | None = None) -> jax.Array:
    """Scores of a reward model, [n], of sequences [n, S], read at the last token by its index, lengths - 1.

    Neither the padding nor the other rows change a score. Raises UserError where cfg has no scalar head.
    """
    x = whole_rows(decoder.hidden(cfg, params, rows["tokens"], rows["positions"], rows["segment_ids"], masks))
    last = jnp.take_along_axis(x, rows["lengths"][:, None, None] - 1, axis=1)[:, 0]
    return scalar_of(cfg, params, last)


def log_probabilities(cfg: ModelConfig, params: Params, rows: Rows, masks: decoder.Masks | None = None) -> jax.Array:
    """Log-probabilities in nats of the answers of sequences [n, S], each the sum over its tokens and its end: [n]."""
    return -jnp.sum(token_losses(cfg, params, rows, masks) * rows["loss_weights"], axis=-1)


compiled_scores = functools.partial(jax.jit, static_argnums=0)(scores)
compiled_log_probabilities = functools.partial(jax.jit, static_argnums=0)(log_probabilities)


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
    of_rows: Callable[[ModelConfig, Params, Rows], jax.Array],
    margins: Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray],
    cfg: ModelConfig,
    params: Params,
    held_out: Mapping[str, HeldOut],
    mesh: Mesh,
) -> dict[str, float]:
    """The accuracy and the mean margin of the held-out pairs of every domain; every pair of a ranking counts.

    Args:
      of_rows: compiled, a value of every sequence, [n].
      margins: margins(values [B, 2], batch) -> [B].
    """
    found = {}
    with jax.set_mesh(mesh):
        for domain, held in held_out.items():
            known = []
            for batch in held.batches:
                rows = put_batch(rows_of(batch), mesh, 2 * len(batch["lengths"]))  # pyright: ignore[reportArgumentType]
                values = to_host(of_rows(cfg, params, rows)).astype(np.float64).reshape(-1, 2)
                known.append(margins(values, batch)[batch["pair_weights"] > 0])
            margin = np.concatenate(known)
            found[f"accuracy/{domain}"] = float(np.mean((1 + np.sign(margin)) / 2))
            found[f"margin/{domain}"] = float(np.mean(margin))
    return found
