"""Descriptions of the parameters without their values, read from the modules by abstract evaluation."""

import functools

import jax
import jax.numpy as jnp

from tele_jax import axes
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, require_config
from tele_jax.model import decoder


@functools.lru_cache(maxsize=64)
def _flat_spec(cfg: ModelConfig) -> tuple[tuple[str, axes.ParamSpec], ...]:
    boxed = decoder.abstract_boxed(cfg)
    # The dtype is the config's: without jax_enable_x64, evaluation would say float32 for float64, and be remembered.
    dtype = jnp.dtype(cfg.param_dtype)
    named = jax.tree.map(lambda box: box.spec(dtype), boxed, is_leaf=lambda x: isinstance(x, axes.Named))
    return tuple(axes.flatten(named).items())


def spec(cfg: ModelConfig) -> Params:
    """The parameter tree of cfg as axes.ParamSpec leaves (shape, dtype, axis names); allocates nothing."""
    return axes.unflatten(flat_spec(cfg))


def flat_spec(cfg: ModelConfig) -> dict[str, axes.ParamSpec]:
    """The parameters of cfg by dotted name, sorted, as axes.ParamSpec. Raises UserError unless cfg is a ModelConfig."""
    require_config(cfg, "cfg")
    return dict(_flat_spec(cfg))


def abstract_params(cfg: ModelConfig) -> Params:
    """The parameter tree as jax.ShapeDtypeStruct leaves."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), spec(cfg))


def count_params(cfg: ModelConfig) -> int:
    """Number of parameters, padding rows of the vocabulary included."""
    return sum(leaf.size for leaf in flat_spec(cfg).values())
