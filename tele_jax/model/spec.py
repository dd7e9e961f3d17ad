"""Descriptions of the parameters without their values, read from the modules by abstract evaluation."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tele_jax import axes
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, require, require_config
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
    return abstract(spec(cfg))


def abstract(spec: Params) -> Params:
    """A tree of ParamSpec as jax.ShapeDtypeStruct leaves."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), spec)


def count_params(cfg: ModelConfig) -> int:
    """Number of parameters, padding rows of the vocabulary included."""
    return sum(leaf.size for leaf in flat_spec(cfg).values())


def check_prepared(cfg: ModelConfig, params: Params) -> bool:
    """Tells whether generate.prepare made params, which then have one tree per layer. UserError where cfg differs."""
    require(isinstance(params, Mapping), f"params: expected a nested dict, got {type(params).__name__}")
    is_prepared = isinstance(layers := params.get("layers"), tuple)
    leaves = axes.flatten({key: value for key, value in params.items() if key != "layers" or not is_prepared})
    if is_prepared:
        depth = len(layers)
        require(depth == cfg.num_layers, f"params: {depth} layers, but cfg has {cfg.num_layers}")
        for name, leaf in axes.flatten(layers[0]).items():
            leaves[f"layers.{name}"] = jax.ShapeDtypeStruct((depth, *leaf.shape), leaf.dtype)
    axes.check_tree(leaves, flat_spec(cfg), "params are not those of cfg", dtypes=False)
    return is_prepared
