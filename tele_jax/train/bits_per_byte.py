"""Bits per byte: the loss of a text in bits over its length in UTF-8 bytes, comparable across tokenizers."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tele_jax.config import ModelConfig
from tele_jax.model.loss import next_token_loss
from tele_jax.train.step import put_batch


@functools.partial(jax.jit, static_argnums=0)
def _loss(cfg, params, batch, masks):
    return next_token_loss(cfg, params, batch, masks)


def bits_per_byte(
    cfg: ModelConfig, params: Mapping[str, Any], held_out: Mapping[str, Any], mesh: Mesh, masks: Any = None
) -> dict[str, float]:
    """Bits per byte of every domain: sum of token losses / ln 2 / bytes (arXiv 2404.16645).

    held_out: by domain, what data.feed.held_out returns: `batches` of rows and `num_bytes` of text in them. The number
    of rows has to divide over the mesh, over which they are cut. Every process has all rows, and gets all figures.
    """
    result = {}
    with jax.set_mesh(mesh):
        for domain, text in held_out.items():
            total = 0.0
            for batch in text.batches:
                placed = put_batch(batch, mesh, len(batch["tokens"]))
                total += float(_loss(cfg, params, placed, masks)[0])
            result[domain] = total / math.log(2) / text.num_bytes
    return result
