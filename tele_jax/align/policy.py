"""A policy on devices: log-probabilities and values of rows, and how far a step moves it."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tele_jax import losses
from tele_jax.axes import Params
from tele_jax.config import ModelConfig
from tele_jax.model import decoder
from tele_jax.model.heads import head_kernel, scalar_of
from tele_jax.model.loss import cross_entropy
from tele_jax.sharding import whole_rows


def tempered(cfg: ModelConfig, temperature: float) -> ModelConfig:
    """The model whose softmax at temperature 1 is that of cfg at this temperature: its logits are divided by it."""
    return cfg if temperature == 1 else cfg.replace(output_mult=cfg.output_mult / temperature)


def outputs(
    cfg: ModelConfig, params: Params, batch: Mapping[str, jax.Array], *, values: bool = False, trunk: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probabilities of the targets in nats, [B, S], and values, [B, S], or None; float32 or better.

    The value at a position is that of the state before its target is drawn. trunk=False: the gradient of the values
    reaches the scalar head alone.
    """
    x = whole_rows(decoder.hidden(cfg, params, batch["tokens"], batch["positions"], batch["segment_ids"]))
    logp = -cross_entropy(x, head_kernel(cfg, params), batch["targets"], cfg.logit_mult, cfg.vocab_size)
    return logp, scalar_of(cfg, params, x if trunk else jax.lax.stop_gradient(x)) if values else None


@functools.partial(jax.jit, static_argnums=(0, 3))
def evaluate(cfg: ModelConfig, params: Params, batch: Mapping[str, jax.Array], values: bool) -> tuple:
    """`outputs`, compiled."""
    return outputs(cfg, params, batch, values=values)


def figures(
    logp: jax.Array,
    old_logp: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    clip: tuple[float, float],
    level: str = "token",
) -> dict[str, jax.Array]:
    """Sums over the positions that count, with weights [B, S], of what tells how far a step moves the policy.

    entropy: the mean of -log p of the drawn tokens, an estimate. clip_fraction: ratios outside the clip. kl_old: k3 of
    the policy at the start of the rollout against the present one.
    """
    ratio = losses.ratios(logp, old_logp, mask, level=level)
    clipped = (ratio < 1 - clip[0]) | (ratio > 1 + clip[1])
    moved = jnp.where(mask > 0, logp - old_logp, 0)
    found = {"entropy": -jnp.where(mask > 0, logp, 0), "clip_fraction": clipped, "kl_old": jnp.expm1(moved) - moved}
    return {name: jax.lax.stop_gradient(jnp.sum(value * weights)) for name, value in found.items()}
