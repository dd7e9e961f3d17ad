"""One axis at a time: each operator is a plan for a single change, and `compose` puts them together.

    plan = widen_embed(cfg, 80)
    plan = compose(plan, insert_layers(plan.dst_cfg, [0, 1, 1]))

`policies.plan` does all axes in one step, which moves every byte once; these are for what it does not say, such as one
axis by `exact` and another by `copy`.
"""

from collections.abc import Sequence
from typing import Any

from tele_jax.config import ModelConfig, require, whole
from tele_jax.growth.plan import Plan
from tele_jax.growth.policies import plan


def widen_embed(cfg: ModelConfig, embed_dim: int, **how: Any) -> Plan:
    """The residual stream to embed_dim channels. how: policy, seed and epsilon, as growth.plan takes them."""
    return plan(cfg, cfg.replace(embed_dim=embed_dim), **how)


def widen_mlp(cfg: ModelConfig, mlp_dim: int, **how: Any) -> Plan:
    """The hidden layer of every mlp to mlp_dim units."""
    return plan(cfg, cfg.replace(mlp_dim=mlp_dim), **how)


def widen_heads(cfg: ModelConfig, num_heads: int, num_kv_heads: int | None = None, **how: Any) -> Plan:
    """Attention to num_heads query heads in num_kv_heads groups (by default as many groups as before, or one a head
    where the model is multi-head): whole groups more, larger groups, or each group split into several.

    Raises:
      UserError: too few groups to hold the heads that there are, or heads that do not divide into them.
    """
    changes = {"num_heads": num_heads} | ({} if num_kv_heads is None else {"num_kv_heads": num_kv_heads})
    return plan(cfg, cfg.replace(**changes), **how)


def insert_layers(cfg: ModelConfig, layers: int | Sequence[int], **how: Any) -> Plan:
    """To `layers` layers, copies spread evenly; or the source layer of every destination layer, a repeated one a copy.

    >>> insert_layers(cfg, [0, 1, 1, 2])     # from 3 to 4 layers, the second one twice
    """
    if isinstance(layers, str) or not hasattr(layers, "__len__"):
        return plan(cfg, cfg.replace(num_layers=whole(layers, "layers")), **how)
    ids = [whole(i, f"layers[{n}]") for n, i in enumerate(layers)]  # before their number is taken for a size
    return plan(cfg, cfg.replace(num_layers=len(ids)), layers=ids, **how)


def grow_vocab(cfg: ModelConfig, vocab_size: int, padded_vocab_size: int | None = None, **how: Any) -> Plan:
    """To vocab_size tokens in padded_vocab_size rows (by default without padding, or as many rows as there are where
    they are enough): new tokens come after the old ones, whose logits stay.
    """
    rows = max(vocab_size, cfg.padded_vocab_size) if padded_vocab_size is None else padded_vocab_size
    return plan(cfg, cfg.replace(vocab_size=vocab_size, padded_vocab_size=rows), **how)


def pad_vocab(cfg: ModelConfig, multiple: int, **how: Any) -> Plan:
    """Rows of the vocabulary up to a multiple, so that they divide over a mesh; the function does not see them."""
    require(multiple > 0, f"pad_vocab: multiple={multiple} must be above 0")
    rows = -(-cfg.padded_vocab_size // multiple) * multiple
    return plan(cfg, cfg.replace(padded_vocab_size=rows), **how)


def change_multipliers(
    cfg: ModelConfig,
    *,
    input_mult: float | None = None,
    output_mult: float | None = None,
    mup_base_width: int | None = None,
) -> Plan:
    """The multipliers that are given, with the change folded into the embedding and the head.

    A tied model has one table for both, and keeps its effective multipliers (see plan.dst_cfg).
    """
    given = {"input_mult": input_mult, "output_mult": output_mult, "mup_base_width": mup_base_width}
    return plan(cfg, cfg.replace(**{name: value for name, value in given.items() if value is not None}))
