"""Checks of the arguments that users give to the model: tokens, keys, positions, segments and masks."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tele_jax.axes import Params, check_tree, flatten
from tele_jax.config import ModelConfig, require
from tele_jax.errors import UserError

# Growth masks: axis name -> float vector over that axis, 1 on old entries and c in [0, 1] on new ones.
Mask = jax.Array | np.ndarray
Masks = Mapping[str, Mask]
MASKED_AXES = ("embed", "mlp", "heads", "layers")  # kv_heads need none: the heads that read new ones are masked


def require_key(key: object, where: str) -> None:
    """Raises UserError, naming the argument, unless key is one random key: typed, or as jax.random.PRNGKey makes it."""
    what, is_key = type(key).__name__, False
    if isinstance(key, (jax.Array, np.ndarray)):
        is_typed, what = jnp.issubdtype(key.dtype, jax.dtypes.prng_key), f"{key.dtype}{list(key.shape)}"
        shape = () if is_typed else jax.eval_shape(jax.random.PRNGKey, 0).shape
        is_key = key.shape == shape and (is_typed or key.dtype == np.uint32)
    require(is_key, f"{where}: expected jax.random.key(seed), got {what}")


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
    array = checked_integers(tokens, "tokens")
    if not isinstance(array, Tracer) and getattr(array, "is_fully_addressable", True):
        least, most = int(array.min()), int(array.max())
        inside = least >= 0 and most < cfg.vocab_size
        beyond = least if least < 0 else most
        require(inside, f"forward: tokens: id {beyond} is not in the vocabulary of {cfg.vocab_size} tokens")
    return jnp.asarray(array, jnp.int32)


def checked_integers(values: object, name: str) -> jax.Array:
    """The values of an argument as an array of integers [B, S]. Raises UserError for anything else."""
    array = _array(values, name, "int32[B, S]")
    fits = array.ndim == 2 and jnp.issubdtype(array.dtype, jnp.integer) and array.size > 0
    require(fits, f"forward: {name}: expected int32[B, S], got {array.dtype}{list(array.shape)}")
    return array


def optional_integers(values: object, name: str) -> jax.Array | None:
    """None, or else what `checked_integers` makes of the values."""
    return None if values is None else jnp.asarray(checked_integers(values, name))


def check_params(params: object, expected: Params, where: str = "forward") -> None:
    """Raises UserError where the names or shapes of the leaves are not the expected ones; their dtypes are free."""
    if not isinstance(params, Mapping):
        raise UserError(f"{where}: params: expected a nested dict, got {type(params).__name__}")
    check_tree(flatten(params), flatten(expected), f"{where}: params are not those of cfg", dtypes=False)


def checked_masks(masks: object) -> Masks | None:
    """The masks as arrays. Raises UserError for what is no dict of numbers."""
    require(masks is None or isinstance(masks, Mapping), f"forward: masks: expected a dict, got {type(masks).__name__}")
    if not isinstance(masks, Mapping):
        return None
    arrays = {axis: _array(mask, f"masks: {axis}", "numbers") for axis, mask in masks.items()}
    for axis, mask in arrays.items():
        is_number = jnp.issubdtype(mask.dtype, jnp.number)
        require(is_number, f"forward: masks: {axis}: expected numbers, got {mask.dtype}{list(mask.shape)}")
    return arrays


def _array(values: Any, name: str, expected: str) -> Any:
    """An array of an argument that may be a list, also one that jit has filled with tracers."""
    if isinstance(values, jax.Array):
        return values
    try:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))
        return jnp.asarray(values) if traced else np.asarray(values)
    except (TypeError, ValueError):
        raise UserError(f"forward: {name}: rows of unequal length; expected {expected}") from None
