"""Causal attention in two forms that agree: `reference`, the formula, and `xla`, which skips the masked half.

Shapes: q [B, S, N, H], k and v [B, T, K, H] with N a multiple of K: query head n reads kv head n // (N/K).
q_index [B, S] and kv_index [B, T] (int32) order the tokens: a query sees keys with kv_index <= q_index. Segment ids
of the same shapes, where given, must be equal as well.
"""

import jax
import jax.numpy as jnp

BLOCK = 128  # queries per block of the xla form; smaller skips more of the masked half, larger feeds the matrix unit


def attend(implementation: str, q, k, v, q_index, kv_index, segment_ids=None) -> jax.Array:
    """Attention [B, S, N, H] by "reference", "xla", or "auto", which takes xla as soon as there is a block to skip."""
    # The xla form relies on row order being causal order, which holds in training but not against a cache.
    in_row_order = q.shape[1] == k.shape[1] and kv_index is q_index
    if implementation == "reference" or not in_row_order or q.shape[1] <= BLOCK:
        return reference(q, k, v, q_index, kv_index, segment_ids, segment_ids)
    return xla(q, k, v, q_index, segment_ids)


def reference(q, k, v, q_index, kv_index, q_segments=None, kv_segments=None) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, the softmax in float32 or better."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BSKGH,BTKH->BKGST", grouped, k, preferred_element_type=accumulate) / head_dim**0.5
    visible = kv_index[:, None, :] <= q_index[:, :, None]
    if q_segments is not None:
        visible &= q_segments[:, :, None] == kv_segments[:, None, :]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", weights, v).reshape(q.shape)


def xla(q, k, v, index, segment_ids=None) -> jax.Array:
    """The same for rows in causal order: each block of queries meets only the keys up to its own end."""
    blocks = []
    for start in range(0, q.shape[1], BLOCK):
        end = min(start + BLOCK, q.shape[1])
        segments = (None, None) if segment_ids is None else (segment_ids[:, start:end], segment_ids[:, :end])
        blocks.append(
            reference(q[:, start:end], k[:, :end], v[:, :end], index[:, start:end], index[:, :end], *segments)
        )
    return jnp.concatenate(blocks, axis=1)
