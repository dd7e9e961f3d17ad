"""Bits per byte: the loss of a text in bits over its length in UTF-8 bytes, comparable across tokenizers."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tele_jax.config import ModelConfig
from tele_jax.model.loss import next_token_loss


@functools.partial(jax.jit, static_argnums=0)
def _loss(cfg, params, batch, masks):
    return next_token_loss(cfg, params, batch, masks)


def bits_per_byte(
    cfg: ModelConfig, params: Mapping[str, Any], held_out: Mapping[str, Any], mesh: Mesh, masks: Any = None
) -> dict[str, float]:
    """Bits per byte of every domain: sum of token losses / ln 2 / bytes (FACTS section 2).

    held_out: by domain, what data.feed.held_out returns: `batches` of rows and `num_bytes` of text in them.
    """
    result = {}
    with jax.set_mesh(mesh):
        for domain, text in held_out.items():
            # Rows are replicated: held-out batches need not divide over the mesh.
            total = sum(float(_loss(cfg, params, dict(batch), masks)[0]) for batch in text.batches)
            result[domain] = total / math.log(2) / text.num_bytes
    return result
