"""Causal attention in three forms that agree: `reference`, the formula; `xla`, which skips the masked half; `splash`.

`splash` is JAX's own Pallas kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention): scores never reach HBM,
forward or backward. Off TPUs it runs interpreted, which is for tests.

Shapes: q [B, S, N, H], k and v [B, T, K, H] with N a multiple of K: query head n reads kv head n // (N/K).
q_index [B, S] and kv_index [B, T] (int32) order the tokens: a query sees keys with kv_index <= q_index. Segment ids
of the same shapes, where given, must be equal as well.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tele_jax.sharding import BATCH, mesh_of_step, platform

BLOCK = 128  # queries per block of the xla form; smaller skips more of the masked half, larger feeds the matrix unit
# Of the splash kernels, largest first. The backward kernel writes one partial gradient of q per block of keys: with
# blocks twice as long they are half as many, at little more of the masked half.
SPLASH_BLOCKS = (512, 256, 128)
SPLASH_KV_BLOCKS = (1024, 512, 256, 128)
SAVED = "attention"  # name of what the remat policy "attention" keeps: outputs, and what their gradients need of them


def attend(implementation: str, q, k, v, q_index, kv_index, segment_ids=None) -> jax.Array:
    """Attention [B, S, N, H] by "reference", "xla", "splash", or "auto".

    "auto" takes splash on TPUs, where its blocks divide the rows, else xla as soon as there is a block to skip.
    """
    # All but the reference rely on row order being causal order, which holds in training but not against a cache.
    in_row_order = q.shape[1] == k.shape[1] and kv_index is q_index
    if implementation == "reference" or not in_row_order:
        return checkpoint_name(reference(q, k, v, q_index, kv_index, segment_ids, segment_ids), SAVED)
    wanted = implementation == "splash" or (implementation == "auto" and platform() == "tpu" and q.shape[1] > BLOCK)
    if wanted and (reason := unsuited(q, k)) is not None:
        warnings.warn(f"attention: splash does not do {reason}; taking the xla form, which is slower", stacklevel=2)
    elif wanted:
        return splash(q, k, v, segment_ids, interpret=platform() != "tpu")
    if q.shape[1] <= BLOCK:
        return checkpoint_name(reference(q, k, v, q_index, kv_index, segment_ids, segment_ids), SAVED)
    return checkpoint_name(xla(q, k, v, q_index, segment_ids), SAVED)


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


def unsuited(q, k) -> str | None:
    """What of these shapes and dtypes splash cannot do, or None."""
    mesh = mesh_of_step()
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype.name}"
    if q.shape[1] % SPLASH_BLOCKS[-1]:
        return f"rows of {q.shape[1]} tokens (a multiple of {SPLASH_BLOCKS[-1]} would do)"
    if mesh is None:
        return None
    ways, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    if q.shape[0] % ways:
        return f"{q.shape[0]} rows on mesh data x fsdp = {ways}"
    if k.shape[2] % tensor:
        return f"{k.shape[2]} kv heads on mesh tensor = {tensor}"
    return None


def splash(q, k, v, segment_ids=None, *, interpret: bool = False) -> jax.Array:
    """The same by the Pallas kernels, each device on its own rows and heads; S must be a multiple of 128."""
    local = functools.partial(_splash_local, interpret=interpret)
    mesh = mesh_of_step()
    if mesh is None:
        return local(q, k, v, segment_ids)
    heads, rows = P(BATCH, None, "tensor", None), P(BATCH, None)
    # The kernels say nothing of which axes their results vary over, so the check is off.
    mapped = jax.shard_map(
        local, in_specs=(heads, heads, heads, None if segment_ids is None else rows), out_specs=heads, check_vma=False
    )
    return mapped(q, k, v, segment_ids)


def _splash_local(q, k, v, segment_ids, *, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads, head_dim = q.shape[1:]
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    long_block = next(size for size in SPLASH_KV_BLOCKS if length % size == 0)
    kernel = kernels.make_splash_mha_single_device(
        mask=kernels.MultiHeadMask([kernels.CausalMask((length, length))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=long_block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q / head_dim**0.5, k, v))
    segments = None if segment_ids is None else kernels.SegmentIds(q=segment_ids, kv=segment_ids)
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v, segments), 1, 2)
