"""Means inside one tree: fewer heads of keys and values, and new tokens as means of old ones."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.axes import Params, check_tree, flatten, require_arrays, unflatten
from tele_jax.config import ModelConfig, require, require_config, whole
from tele_jax.growth.merging import check_dtypes
from tele_jax.model.spec import flat_spec


def pool_kv_heads(cfg: ModelConfig, params: Params, num_kv_heads: int) -> tuple[ModelConfig, dict[str, Any]]:
    """Makes fewer heads of keys and values, each the mean of the old ones of its group of queries (arXiv 2305.13245).

    Returns the config and the parameters, numpy arrays of the dtypes of `params`. The function stays where the heads of
    a group were equal; elsewhere the paper trains on for 5% of the original steps.

    >>> cfg = ModelConfig(num_layers=1, embed_dim=8, num_heads=4, mlp_dim=2, vocab_size=3)
    >>> params = unflatten({name: np.ones(leaf.shape) for name, leaf in flat_spec(cfg).items()})
    >>> pool_kv_heads(cfg, params, 2)[1]["layers"]["attn"]["k"].shape
    (1, 8, 2, 2)

    Raises:
      UserError: parameters that are not those of cfg; a number that does not divide that of cfg.
    """
    leaves, size = _checked_leaves(cfg, params, "pool_kv_heads"), whole(num_kv_heads, "num_kv_heads")
    fits = size > 0 and cfg.num_kv_heads % size == 0
    require(fits, f"pool_kv_heads: {cfg.num_kv_heads} heads of keys and values do not make {size} groups of one size")
    groups = np.arange(cfg.num_kv_heads).reshape(size, -1)
    return cfg.replace(num_kv_heads=size), _with_means(cfg, leaves, "kv_heads", [], groups)


def add_tokens(cfg: ModelConfig, params: Params, of: Sequence[Sequence[int]]) -> tuple[ModelConfig, dict[str, Any]]:
    """Adds tokens after the old ones; each is the mean of the old tokens that `of` lists, in embedding and head.

    Returns the config and the parameters, numpy arrays of the dtypes of `params`. Padding rows of the vocabulary are
    taken first. For a word that becomes one token, `of` has the ids that it had before.

    Raises:
      UserError: parameters that are not those of cfg; a token of no old ones, or of ids that are not there.
    """
    leaves = _checked_leaves(cfg, params, "add_tokens")
    require(len(of) > 0, "add_tokens: of is empty; list the old tokens of each new one")
    groups = [[whole(i, f"add_tokens: of[{n}]") for i in ids] for n, ids in enumerate(of)]
    for number, ids in enumerate(groups):
        fits = bool(ids) and all(0 <= i < cfg.vocab_size for i in ids)
        require(fits, f"add_tokens: of[{number}]={ids}: expected ids from 0 to {cfg.vocab_size - 1}, at least one")
    tokens = cfg.vocab_size + len(groups)
    rows = max(tokens, cfg.padded_vocab_size)
    made = _with_means(cfg, leaves, "vocab", range(cfg.vocab_size), groups, range(tokens, rows))
    return dataclasses.replace(cfg, vocab_size=tokens, padded_vocab_size=rows), made


def _checked_leaves(cfg: ModelConfig, params: Params, what: str) -> dict[str, np.ndarray]:
    require_config(cfg, f"{what}: cfg")
    leaves = flatten(params)
    require_arrays(leaves, what)
    check_tree(leaves, flat_spec(cfg), f"{what}: the parameters do not fit the config", dtypes=False)
    check_dtypes(leaves, leaves, what)
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def _with_means(
    cfg: ModelConfig,
    leaves: Mapping[str, np.ndarray],
    axis: str,
    before: Sequence[int],
    groups: Sequence[Sequence[int]] | np.ndarray,
    after: Sequence[int] = (),
) -> dict[str, Any]:
    """The tree with, along an axis, the units `before`, the mean of each group, and the units `after`."""
    spec, made = flat_spec(cfg), dict(leaves)
    for name in (name for name, leaf in spec.items() if axis in leaf.axes):
        leaf, place = leaves[name], spec[name].axes.index(axis)
        means = [np.take(leaf, list(ids), place).astype(np.float64).mean(place, keepdims=True) for ids in groups]
        parts = [np.take(leaf, list(before), place), *(m.astype(leaf.dtype) for m in means)]
        made[name] = np.concatenate([*parts, np.take(leaf, list(after), place)], place)
    return unflatten(made)
