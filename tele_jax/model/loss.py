"""Next-token cross entropy that never holds the logits of a whole batch: they are made and used chunk by chunk.

The vocabulary is cut so that every chunk takes a slice of each of OUTER equal blocks; with the vocabulary sharded over
a mesh axis that divides OUTER, each device then works on its own part of every chunk.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tele_jax.config import ModelConfig
from tele_jax.model import decoder
from tele_jax.sharding import whole_rows

OUTER = 16
CHUNK = 8192  # logits per token and chunk; 4 bytes each


def next_token_loss(
    cfg: ModelConfig, params: Mapping[str, Any], batch: Mapping[str, jax.Array], masks: decoder.Masks | None = None
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted losses in nats, sum of weights), scalars in float32 or better.

    batch: `tokens`, `targets` int32[B, S], `loss_weights` float32[B, S], and optionally `segment_ids`, `positions`.
    """
    losses = token_losses(cfg, params, batch, masks)
    weights = batch["loss_weights"].astype(losses.dtype)
    return jnp.sum(losses * weights), jnp.sum(weights)


def token_losses(
    cfg: ModelConfig, params: Mapping[str, Any], batch: Mapping[str, jax.Array], masks: decoder.Masks | None = None
) -> jax.Array:
    """Cross entropy in nats of every target, [B, S]."""
    x = decoder.hidden(cfg, params, batch["tokens"], batch.get("positions"), batch.get("segment_ids"), masks)
    kernel = decoder.head_kernel(cfg, params).astype(cfg.dtype)
    return cross_entropy(whole_rows(x), kernel, batch["targets"], cfg.logit_mult, cfg.vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(x: jax.Array, kernel: jax.Array, targets: jax.Array, mult: float, vocab_size: int) -> jax.Array:
    """-log softmax(mult * x @ kernel)[targets] over the first vocab_size columns: [B, S].

    x [B, S, D], kernel [D, V], targets int32[B, S].
    """
    return _forward(x, kernel, targets, mult, vocab_size)[0]


def _chunks(vocab: int) -> tuple[int, int, int]:
    """(outer, number of chunks, width): outer * number * width = vocab, outer * width <= CHUNK where V allows it."""
    outer = OUTER if vocab % OUTER == 0 else 1
    inner = vocab // outer
    number = next(n for n in range(1, inner + 1) if inner % n == 0 and (inner // n) * outer <= max(CHUNK, outer))
    # A vocabulary with a large prime factor would fall apart into single columns: better one chunk.
    return (outer, number, inner // number) if number <= 64 else (outer, 1, inner)


def _logits(x, kernel, chunk, mult, vocab_size):
    """Logits [B, S, outer, width] of one chunk, and the column numbers [outer, width]."""
    vocab = kernel.shape[1]
    outer, number, width = _chunks(vocab)
    part = jax.lax.dynamic_index_in_dim(kernel.reshape(-1, outer, number, width), chunk, axis=2, keepdims=False)
    columns = jnp.arange(outer)[:, None] * (number * width) + chunk * width + jnp.arange(width)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    logits = whole_rows(jnp.einsum("BSD,Dow->BSow", x, part, preferred_element_type=accumulate), tensor=2) * mult
    if vocab_size < vocab:
        logits = jnp.where(columns < vocab_size, logits, -jnp.inf)
    return logits, part, columns


def _forward(x, kernel, targets, mult, vocab_size):
    _, number, _ = _chunks(kernel.shape[1])
    accumulate = jnp.promote_types(x.dtype, jnp.float32)

    def step(carry, chunk):
        top, total, target_logit = carry
        logits, _, columns = _logits(x, kernel, chunk, mult, vocab_size)
        new_top = jnp.maximum(top, jnp.max(logits, axis=(-2, -1)))
        # The first column is never padding, so that new_top is finite from the first chunk on.
        total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[..., None, None]), axis=(-2, -1))
        hit = columns == targets[..., None, None]
        target_logit = target_logit + jnp.sum(jnp.where(hit, logits, 0), axis=(-2, -1))
        return (new_top, total, target_logit), None

    zeros = jnp.zeros(targets.shape, accumulate)
    (top, total, target_logit), _ = jax.lax.scan(step, (zeros - jnp.inf, zeros, zeros), jnp.arange(number))
    log_normalizer = top + jnp.log(total)
    return log_normalizer - target_logit, (x, kernel, targets, log_normalizer)


def _backward(mult, vocab_size, residuals, gradient):
    x, kernel, targets, log_normalizer = residuals
    _, number, _ = _chunks(kernel.shape[1])

    def step(x_gradient, chunk):
        logits, part, columns = _logits(x, kernel, chunk, mult, vocab_size)
        probability = jnp.exp(logits - log_normalizer[..., None, None])
        hit = columns == targets[..., None, None]
        logit_gradient = ((probability - hit) * (gradient * mult)[..., None, None]).astype(x.dtype)
        logit_gradient = whole_rows(logit_gradient, tensor=2)
        x_gradient = x_gradient + jnp.einsum(
            "BSow,Dow->BSD", logit_gradient, part, preferred_element_type=x_gradient.dtype
        )
        kernel_gradient = jnp.einsum("BSD,BSow->Dow", x, logit_gradient, preferred_element_type=x_gradient.dtype)
        return x_gradient, kernel_gradient.astype(kernel.dtype)

    start = jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    x_gradient, kernel_gradient = jax.lax.scan(step, start, jnp.arange(number))
    kernel_gradient = jnp.moveaxis(kernel_gradient, 0, 2).reshape(kernel.shape)
    return x_gradient.astype(x.dtype), kernel_gradient, None


cross_entropy.defvjp(_forward, _backward)
