"""Checks of the arguments that users give to the model: tokens, keys, positions, segments and masks."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tele_jax.config import ModelConfig, require
from tele_jax.errors import UserError

# Growth masks: axis name -> float vector over that axis, 1 on old entries and c in [0, 1] on new ones.
Mask = jax.Array | np.ndarray
Masks = Mapping[str, Mask]
MASKED_AXES = ("embed", "mlp", "heads", "layers")  # kv_heads need none: the heads that read new ones are masked


def require_key(key: object, where: str) -> None:
    """Raises UserError, naming the argument, unless key is a random key."""
    is_key = isinstance(key, jax.Array) and (key.dtype == jnp.uint32 or jnp.issubdtype(key.dtype, jax.dtypes.prng_key))
    require(is_key, f"{where}: expected jax.random.key(seed), got {type(key).__name__}")


def has_x64() -> bool:
    """True where jax_enable_x64 is set."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def require_x64(cfg: ModelConfig) -> None:
    """Raises UserError for float64 without jax_enable_x64."""
    wide = "float64" in (cfg.dtype, cfg.param_dtype)
    require(
        not wide or has_x64(),
        'float64 needs jax.config.update("jax_enable_x64", True)',
    )


def check_shapes(cfg: ModelConfig, tokens, positions, segment_ids, masks: Masks) -> None:
    """Raises UserError, at trace time, for shapes that JAX would broadcast silently."""
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        fits = array is None or array.shape == tokens.shape
        require(fits, f"{name}: shape {getattr(array, 'shape', None)}, but tokens have {tokens.shape}")
    for axis, mask in masks.items():
        require(axis in MASKED_AXES, f"masks: {axis!r} is not one of {', '.join(MASKED_AXES)}")
        size = cfg.axis_sizes[axis]
        require(mask.shape == (size,), f"masks: {axis} has shape {mask.shape}, but the axis has size {size}")


def checked_tokens(cfg: ModelConfig, tokens: object) -> jax.Array:
    """The tokens as an array int32[B, S]. Raises UserError for anything else, and for ids beyond the vocabulary."""
    if not isinstance(tokens, jax.Array):
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise UserError("forward: tokens: rows of unequal length; expected int32[B, S]") from None
    fits = tokens.ndim == 2 and jnp.issubdtype(tokens.dtype, jnp.integer) and tokens.size > 0
    require(fits, f"forward: tokens: expected int32[B, S], got {tokens.dtype}{list(tokens.shape)}")
    if not isinstance(tokens, Tracer) and getattr(tokens, "is_fully_addressable", True):
        least, most = int(tokens.min()), int(tokens.max())
        inside = least >= 0 and most < cfg.padded_vocab_size
        beyond = least if least < 0 else most
        require(inside, f"forward: tokens: id {beyond} is not in the vocabulary of {cfg.vocab_size} tokens")
    return jnp.asarray(tokens, jnp.int32)
