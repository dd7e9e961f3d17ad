"""Low-rank adapters of kernels (LoRA, arXiv 2106.09685), derived from the axis names of the parameters.

A kernel W, inputs -> outputs, acts as W + scale * a b, with a: inputs -> rank and b: rank -> outputs. The tree of
adapters has the names of the kernels, and a and b at their ends:

    cfg, params = ...
    config = tele.lora.LoraConfig(rank=8, targets=("attn", "mlp.down"))
    adapters = tele.lora.init(cfg, config, jax.random.key(0))     # {"layers": {"attn": {"q": {"a": ..., "b": ...}}}}
    logits = tele.forward(cfg, tele.lora.attach(cfg, params, adapters, config), tokens)
    merged = tele.lora.merge(cfg, params, adapters, config)       # the same function as an ordinary tree

a and b carry axis names like every parameter, so that shardings, learning rates, decay and storage follow from `spec`.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import Params, ParamSpec, check_tree, flatten, unflatten
from tele_jax.config import ModelConfig, require, require_config
from tele_jax.errors import UserError
from tele_jax.model import inputs
from tele_jax.model.platforms import Adapted
from tele_jax.model.spec import flat_spec
from tele_jax.settings import LoraConfig

__all__ = ["LoraConfig", "attach", "init", "merge", "spec", "unmerge"]

RELEASED = {"self_attention.": "attn"}  # names of modules in TeleChat's released fine-tuning, and ours


def __dir__() -> list[str]:
    return __all__


def kernels(cfg: ModelConfig, lora: LoraConfig) -> dict[str, ParamSpec]:
    """The kernels that lora.targets name, by dotted name, sorted.

    Raises:
      UserError: an argument of another type; a target that names no kernel inside the layers.
    """
    require_config(cfg, "lora: cfg")
    require(isinstance(lora, LoraConfig), f"lora: expected a LoraConfig, got {type(lora).__name__}")
    # The head is not multiplied by platforms.project, and tables are not multiplied at all.
    known = {name: leaf for name, leaf in flat_spec(cfg).items() if leaf.role == "kernel" and leaf.stack}
    chosen: set[str] = set()
    for target in lora.targets:
        part = f".{RELEASED.get(target, target)}."
        found = {name for name in known if part in f".{name}."}
        require(bool(found), f"lora.targets: {target!r} names none of the kernels {', '.join(known)}")
        chosen |= found
    return {name: known[name] for name in sorted(chosen)}


def spec(cfg: ModelConfig, lora: LoraConfig) -> Params:
    """The tree of adapters as axes.ParamSpec leaves: float32, or float64 if the parameters are.

    Raises UserError as `kernels`.
    """
    leaves, chosen = {}, kernels(cfg, lora)
    dtype = jnp.promote_types(cfg.param_dtype, jnp.float32)
    for name, leaf in chosen.items():
        stacked, middle = len(leaf.stack), len(leaf.stack) + len(leaf.inputs)
        stack, inward, outward = leaf.shape[:stacked], leaf.shape[stacked:middle], leaf.shape[middle:]
        leaves[f"{name}.a"] = ParamSpec((*stack, *inward, lora.rank), dtype, leaf.stack, leaf.inputs, ("rank",))
        leaves[f"{name}.b"] = ParamSpec((*stack, lora.rank, *outward), dtype, leaf.stack, ("rank",), leaf.outputs)
    return unflatten(leaves)


def init(cfg: ModelConfig, lora: LoraConfig, key: jax.Array) -> Params:
    """Fresh adapters, which change nothing yet: a is normal with variance 1 / inputs (the variance is ours), b is 0.

    The values of a leaf depend on the key and its name alone.

    >>> cfg = ModelConfig(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=64)
    >>> adapters = init(cfg, LoraConfig(rank=4, targets=("q",)), jax.random.key(0))
    >>> jax.tree.map(jnp.shape, adapters)
    {'layers': {'attn': {'q': {'a': (2, 16, 4), 'b': (2, 4, 2, 8)}}}}

    Raises:
      UserError: as `kernels`; key is no random key; float64 parameters without jax_enable_x64.
    """
    leaves = flatten(spec(cfg, lora))
    inputs.require_key(key, "lora.init: key")
    inputs.require_x64(cfg)

    def fresh(name: str, leaf: ParamSpec) -> jax.Array:
        if leaf.inputs == ("rank",):
            return jnp.zeros(leaf.shape, leaf.dtype)
        fan_in = math.prod(leaf.shape[len(leaf.stack) : -1])
        drawn = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape, leaf.dtype)
        return drawn / math.sqrt(fan_in)

    return unflatten({name: fresh(name, leaf) for name, leaf in leaves.items()})


def attach(cfg: ModelConfig, params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The parameters with adapters beside their kernels, which stay as they are: for forward, losses and generate.

    Gradients with respect to the adapters need none of the kernels. Raises UserError as `merge`.
    """
    leaves, pairs = _checked(cfg, params, adapters, lora)
    return unflatten(leaves | {name: Adapted(leaves[name], *pair, lora.scale) for name, pair in pairs.items()})


def merge(cfg: ModelConfig, params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The parameters W + scale * a b, computed in float32 (float64 for float64 W), then cast to the dtype of W.

    Args:
      params: nested dict of arrays, as tele.spec(cfg) describes it, of any float dtype.
      adapters: nested dict of arrays, as `spec` describes it.

    Raises:
      UserError: as `kernels`; names every leaf that is missing, is not expected, has another shape or is not of floats.
    """
    return _merged(cfg, params, adapters, lora, 1.0)


def unmerge(cfg: ModelConfig, params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """Undoes `merge`, up to rounding; arguments and errors as there."""
    return _merged(cfg, params, adapters, lora, -1.0)


def _merged(cfg: ModelConfig, params: Params, adapters: Params, lora: LoraConfig, sign: float) -> Params:
    leaves, pairs = _checked(cfg, params, adapters, lora)
    stacked = {name: len(leaf.stack) for name, leaf in flat_spec(cfg).items()}
    scale = sign * lora.scale
    return unflatten(leaves | {n: _added(leaves[n], a, b, scale, stacked[n]) for n, (a, b) in pairs.items()})


def check(cfg: ModelConfig, adapters: Params, lora: LoraConfig) -> None:
    """Raises UserError as `kernels`, and where names or shapes of adapters are not those of `spec`, or not floats."""
    expected = flatten(spec(cfg, lora))
    what = "lora: adapters are not those of the model and its LoraConfig"
    check_tree(_floats(adapters, "adapters"), expected, what, dtypes=False)


def _floats(tree: Params, name: str) -> dict[str, Any]:
    """Flattens an argument. Raises UserError, naming it, where it is no nested dict, or has an array of no floats."""
    require(isinstance(tree, Mapping), f"lora: {name}: expected a nested dict of arrays, got {type(tree).__name__}")
    leaves = flatten(tree)
    for leaf, array in leaves.items():
        dtype = getattr(array, "dtype", jnp.float32)  # what is no array is named where shapes are compared
        require(jnp.issubdtype(dtype, jnp.floating), f"lora: {name}: {leaf} is {dtype}, and has to be of floats")
    return leaves


def _checked(cfg: ModelConfig, params: Params, adapters: Params, lora: LoraConfig):
    """Returns the parameters by dotted name, and {name of a kernel: (a, b)}."""
    check(cfg, adapters, lora)
    leaves, parts = _floats(params, "params"), flatten(adapters)
    check_tree(leaves, flat_spec(cfg), "lora: params are not those of cfg", dtypes=False)
    if twice := [name for name, leaf in leaves.items() if isinstance(leaf, Adapted)]:
        raise UserError(f"lora: params: {twice[0]} has an adapter already; merge it first")
    return leaves, {name: (parts[f"{name}.a"], parts[f"{name}.b"]) for name in kernels(cfg, lora)}


def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, stacked: int) -> jax.Array:
    """The kernel + scale * a b; a: [stack, inputs, rank], b: [stack, rank, outputs]."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    layers = tuple(range(stacked))
    sums = (((a.ndim - 1,), (stacked,)), (layers, layers))
    product = jax.lax.dot_general(a.astype(wide), b.astype(wide), sums, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(wide) + scale * product).astype(kernel.dtype)


def merge_tile(leaf: ParamSpec, tile: np.ndarray, start: tuple[int, ...], a, b, scale: float) -> np.ndarray:
    """Merges a rectangle of a kernel that begins at `start`; a and b are whole."""
    cut = tuple(slice(first, first + size) for first, size in zip(start, tile.shape, strict=True))
    stacked, middle = len(leaf.stack), len(leaf.stack) + len(leaf.inputs)
    return np.asarray(
        _added(jnp.asarray(tile), a[cut[:middle]], b[(*cut[:stacked], slice(None), *cut[middle:])], scale, stacked)
    )
