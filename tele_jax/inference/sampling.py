"""Sampling of the next token from logits, by temperature, top-k, top-p and a repetition penalty."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tele_jax.config import require, whole

_MAX_TEMPERATURE = 1e30  # all tokens are equally likely long before


class Sampling(struct.PyTreeNode):
    """Settings by which the next token is drawn, made by `sampling`; a field that is None is not applied."""

    temperature: jax.Array | np.float32 | None = None  # None: greedy
    top_p: jax.Array | np.float32 | None = None
    repetition_penalty: jax.Array | np.float32 | None = None
    top_k: int | None = struct.field(pytree_node=False, default=None)
    keep_stop: bool = struct.field(pytree_node=False, default=False)


def sampling(
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    keep_stop: bool = False,
) -> Sampling:
    """Checks settings, which `draw` applies to the logits of a row in this order:

    repetition_penalty: in [1e-6, 1e6]; the logits of tokens that occurred (prompt included) are divided by it where
      positive and multiplied where negative (CTRL, arXiv 1909.05858); 1 does nothing.
    temperature: at least 0; divides the logits; 0, or what float32 flushes to it, takes the largest.
    top_k: at least 1; only the k largest stay.
    top_p: in (0, 1]; only the largest of those stay, up to and with the one that brings their probability to p.

    keep_stop: a stop id that was drawn stays at the end of its row; `draw` does not read it.
    """
    for name, value in (("temperature", temperature), ("top_p", top_p), ("repetition_penalty", repetition_penalty)):
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        require(is_number or (name == "top_p" and value is None), f"{name}={value!r} must be a number")
    require(math.isfinite(temperature) and temperature >= 0, f"temperature={temperature} must be 0 (greedy) or above")
    require(top_k is None or whole(top_k, "top_k") >= 1, f"top_k={top_k} must be at least 1")
    require(top_p is None or 0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
    require(
        1e-6 <= repetition_penalty <= 1e6,  # beyond, logits would overflow
        f"repetition_penalty={repetition_penalty} must be above 0, in [1e-6, 1e6]; 1 does nothing",
    )
    # Devices flush what is smaller to 0, and 0 / 0 is no number; in the limit the largest is taken anyway.
    greedy = temperature < float(np.finfo(np.float32).tiny)
    return Sampling(
        temperature=None if greedy else np.float32(min(temperature, _MAX_TEMPERATURE)),
        top_p=None if greedy or top_p is None or top_p == 1 else np.float32(top_p),
        repetition_penalty=None if repetition_penalty == 1 else np.float32(repetition_penalty),
        top_k=None if greedy else top_k,
        keep_stop=keep_stop,
    )


def draw(logits: jax.Array, seen: jax.Array | None, keys: jax.Array, how: Sampling) -> jax.Array:
    """The next token of every row, int32[B], for logits [B, V], seen bool[B, V] and random keys [B]."""
    if how.repetition_penalty is not None and seen is not None:
        penalized = jnp.where(logits > 0, logits / how.repetition_penalty, logits * how.repetition_penalty)
        logits = jnp.where(seen, penalized, logits)
    if how.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The maximum is taken off first so that a small temperature cannot overflow it.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    categorical = jax.vmap(jax.random.categorical)
    if how.top_k is None and how.top_p is None:
        return categorical(keys, logits / how.temperature).astype(jnp.int32)
    largest = logits.shape[-1] if how.top_k is None else min(how.top_k, logits.shape[-1])
    values, ids = jax.lax.top_k(logits, largest)
    values = values / how.temperature  # after the choice: a large temperature makes them equal
    if how.top_p is not None:
        probabilities = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        values = jnp.where(before < how.top_p, values, -jnp.inf)
    return jnp.take_along_axis(ids, categorical(keys, values)[:, None], axis=-1)[:, 0].astype(jnp.int32)
