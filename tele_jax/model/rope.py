"""Rotary position embedding, half-split pairs: dimension i is rotated together with i + head_dim/2."""

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.config import ModelConfig


def tables(cfg: ModelConfig, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [..., head_dim/2], for int32 positions [...].

    `length` is the total length of the sequence, prompt and what will be generated: with NTK scaling the base
    depends on it, and a table that depended on the part seen so far would rotate cached keys by another base than
    later queries. float32, or float64 where the activations are.
    """
    dtype = jnp.promote_types(cfg.dtype, jnp.float32)
    base, factor = cfg.rope_length_factors(length)
    inverse_frequency = base ** (-np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    angles = positions[..., None].astype(dtype) * jnp.asarray(inverse_frequency, dtype)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, S, heads, H] by cos and sin [B, S, H/2]; keeps the dtype of x."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
