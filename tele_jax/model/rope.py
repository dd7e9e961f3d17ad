"""Rotary position embedding, half-split pairs: dimension i is rotated together with i + head_dim/2."""

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.config import ModelConfig
from tele_jax.model import platforms


def tables(cfg: ModelConfig, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Tables of cos and sin, each [..., head_dim/2], for int32 positions [...]; float32, or float64 as activations are.

    `length` is the total length of the sequence, prompt and continuation: with NTK scaling the base depends on it, and
    a table by the length so far would rotate cached keys by another base than later queries.
    """
    dtype = jnp.promote_types(cfg.dtype, jnp.float32)
    base, factor = cfg.rope_length_factors(length)
    if cfg.rope.tables == "float16":
        return _released_tables(cfg.head_dim, positions, base, factor, dtype)
    inverse_frequency = base ** (-np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    angles = positions[..., None].astype(dtype) * jnp.asarray(inverse_frequency, dtype)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    return platforms.compute_once(cos), platforms.compute_once(sin)


def _released_tables(head_dim: int, positions: jax.Array, base: float, factor: float, dtype) -> tuple:
    """The tables as TeleChat's code computes them: in float32, rounded to float16 before and after the factor."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(np.float64(np.float32(base)), exponent.astype(np.float64)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(np.float32(1) / power)
    rounded = (_to_float16(_to_float16(f(angles)) * np.float32(factor)) for f in (jnp.cos, jnp.sin))
    return tuple(table.astype(dtype) for table in rounded)


def _to_float16(x: jax.Array) -> jax.Array:
    """Rounds float32 values below 65504 to the nearest numbers that float16 has.

    XLA may leave out a conversion to float16 and back; reduce_precision stays, but has no subnormal numbers, which in
    float16 are the multiples of 2^-24 below 2^-14.
    """
    subnormal = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, jax.lax.reduce_precision(x, 5, 10))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, S, heads, H] by cos and sin [B, S, H/2]; computes in their dtype, returns the dtype of x.

    x is cut before it is widened, and narrowed before it is put together: otherwise a compiler writes the product
    before, and in the backward pass the gradient, to memory in the wider dtype.
    """
    first, second = (half.astype(cos.dtype) for half in jnp.split(x, 2, axis=-1))
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    halves = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([half.astype(x.dtype) for half in halves], axis=-1)
