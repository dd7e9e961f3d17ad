"""Causal attention in five forms that agree, and the rotary position embedding of its queries and keys.

`reference` is the formula; `xla` skips the masked half; `blocks` skips it in its gradient as well and keeps no weights
for that; `cached` reads only the slots of a cache that are in use.

`splash` is JAX's own Pallas kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention): scores never reach HBM,
forward or backward. Off TPUs it runs interpreted, which is for tests.

Shapes: q [B, S, N, H], k and v [B, T, K, H] with N a multiple of K: query head n reads kv head n // (N/K).
q_index [B, S] and kv_index [B, T] (int32) order the tokens: a query sees keys with kv_index <= q_index. Segment ids
of the same shapes, where given, must be equal as well. visible_until [B, T] (int32), where given, ends the visibility
of a key: only queries with q_index < visible_until see it. A row of a tree of tokens in depth-first order, in which a
key is visible until its last descendant, holds texts that share beginnings (inference/score.py).
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tele_jax.config import ModelConfig
from tele_jax.model import platforms
from tele_jax.sharding import BATCH, mesh_of_step, platform

BLOCK = 128  # queries per block of the xla form; smaller skips more of the masked half, larger feeds the matrix unit
# Slots of a cache in a block of the cached form. On two CPU cores, 12 layers of 12 heads of 64, 8 rows, 1,900 slots in
# use, a step takes 79 ms with 256, 160 with 512 (a block no longer stays in the L2 cache), 126 with all slots at once
# (2026-11-25, the processor not recorded).
SLOT_BLOCK = 256
# Blocks of the splash kernels, largest first. The backward kernel writes one partial gradient of q per block of keys:
# blocks twice as long give half as many, at little more of the masked half.
SPLASH_BLOCKS = (512, 256, 128)
SPLASH_KV_BLOCKS = (1024, 512, 256, 128)
SAVED = "attention"  # name of the arrays that the remat policy "attention" keeps: outputs, and normalizers of blocks


def attend(implementation: str, q, k, v, q_index, kv_index, segment_ids=None, visible_until=None) -> jax.Array:
    """Attention [B, S, N, H] by "reference", "xla", "blocks", "splash", or "auto".

    "auto" takes splash on TPUs where its blocks divide the rows, blocks on CPUs, else xla; rows of one block take the
    reference.
    """
    # All but the reference rely on row order being causal order, which holds in training but not against a cache.
    in_row_order = q.shape[1] == k.shape[1] and kv_index is q_index
    if implementation == "reference" or not in_row_order:
        return checkpoint_name(reference(q, k, v, q_index, kv_index, segment_ids, segment_ids, visible_until), SAVED)
    wanted = implementation == "splash" or (implementation == "auto" and platform() == "tpu" and q.shape[1] > BLOCK)
    if wanted and (reason := unsuited(q, k, visible_until)) is not None:
        warnings.warn(f"attention: splash does not do {reason}; taking the xla form, which is slower", stacklevel=2)
    elif wanted:
        return splash(q, k, v, segment_ids, interpret=platform() != "tpu")
    if q.shape[1] <= BLOCK:
        return checkpoint_name(reference(q, k, v, q_index, kv_index, segment_ids, segment_ids, visible_until), SAVED)
    if implementation == "blocks" or (implementation == "auto" and platform() == "cpu"):
        return blocks(q, k, v, segment_ids, visible_until)
    return checkpoint_name(xla(q, k, v, q_index, segment_ids, visible_until), SAVED)


def reference(q, k, v, q_index, kv_index, q_segments=None, kv_segments=None, visible_until=None) -> jax.Array:
    """Attention by its formula, softmax(q k^T / sqrt(H) + mask) v, with the softmax in float32 or better."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BSKGH,BTKH->BKGST", grouped, k, preferred_element_type=accumulate) / head_dim**0.5
    visible = kv_index[:, None, :] <= q_index[:, :, None]
    if q_segments is not None and kv_segments is not None:
        visible &= q_segments[:, :, None] == kv_segments[:, None, :]
    if visible_until is not None:
        visible &= q_index[:, :, None] < visible_until[:, None, :]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", weights, v).reshape(q.shape)


def xla(q, k, v, index, segment_ids=None, visible_until=None) -> jax.Array:
    """Attention of rows in causal order: each block of queries meets only the keys up to the block's end."""
    blocks = []
    for start in range(0, q.shape[1], BLOCK):
        end = min(start + BLOCK, q.shape[1])
        segments = (None, None) if segment_ids is None else (segment_ids[:, start:end], segment_ids[:, :end])
        until = None if visible_until is None else visible_until[:, :end]
        blocks.append(
            reference(q[:, start:end], k[:, :end], v[:, :end], index[:, start:end], index[:, :end], *segments, until)
        )
    return jnp.concatenate(blocks, axis=1)


def blocks(q, k, v, segment_ids=None, visible_until=None) -> jax.Array:
    """Attention of rows in causal order, block by block, as is its gradient (arXiv 2205.14135 without its inner loop).

    The gradient needs q, k, v, the result and the logarithm of every softmax's denominator, and computes the weights
    again. On one CPU core (2026-11-25, the processor not recorded), 8 rows of 512 tokens, 4 heads of 64: 25 ms forward
    and 86 with the gradient, against 60 and 153 of the xla form.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # Rows of one head in one piece, [B, K, S, G, H]: that is what products of batches of matrices are fast on.
    grouped = (q / head_dim**0.5).reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 1, 3, 4)
    result = _blocks(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids, visible_until)
    return result.transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _spans(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _rows(x: jax.Array, start: int, end: int) -> jax.Array:
    """Gives one block of queries [B, K, S, G, H] as rows of a matrix: [B, K, s * G, H]."""
    return x[:, :, start:end].reshape(*x.shape[:2], (end - start) * x.shape[3], *x.shape[4:])


def _scores(q, k, segment_ids, visible_until, start: int, end: int) -> jax.Array:
    """Scores of one block of queries [B, K, S, G, H] with the keys [B, K, T, H] up to its end: [B, K, s * G, end]."""
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BKRH,BKTH->BKRT", _rows(q, start, end), k[:, :, :end], preferred_element_type=accumulate)
    visible = (jnp.arange(start, end)[:, None] >= jnp.arange(end))[None]
    if segment_ids is not None:
        visible &= segment_ids[:, start:end, None] == segment_ids[:, None, :end]
    if visible_until is not None:
        visible &= jnp.arange(start, end)[:, None] < visible_until[:, None, :end]
    visible = jnp.repeat(visible, q.shape[3], axis=1)[:, None]
    return jnp.where(visible, scores, jnp.finfo(accumulate).min)


@jax.custom_vjp
def _blocks(q, k, v, segment_ids, visible_until) -> jax.Array:
    """Attention [B, K, S, G, H] of scaled queries of that shape and of keys and values [B, K, S, H]."""
    return _blocks_forward(q, k, v, segment_ids, visible_until)[0]


def _blocks_forward(q, k, v, segment_ids, visible_until):
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    results, normalizers = [], []
    for start, end in _spans(q.shape[2]):
        scores = _scores(q, k, segment_ids, visible_until, start, end)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        result = jnp.einsum(
            "BKRT,BKTH->BKRH", weights.astype(q.dtype), v[:, :, :end], preferred_element_type=accumulate
        )
        shape = (*q.shape[:2], end - start, *q.shape[3:])
        results.append((result / total).astype(q.dtype).reshape(shape))
        normalizers.append((largest + jnp.log(total)).reshape(shape[:-1]))
    result = checkpoint_name(jnp.concatenate(results, axis=2), SAVED)
    normalizer = checkpoint_name(jnp.concatenate(normalizers, axis=2), SAVED)
    return result, (q, k, v, segment_ids, visible_until, result, normalizer)


def _blocks_backward(residuals, gradient):
    q, k, v, segment_ids, visible_until, result, normalizer = residuals
    accumulate = normalizer.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=accumulate)
    # The gradient of every score is lowered by the mean of its row's gradients, under the weights.
    mean = jnp.sum(gradient.astype(accumulate) * result.astype(accumulate), axis=-1)
    # Transposed, [B, K, H, T]: XLA transposes the first factor of such a product; of these the rows are the narrow one.
    of_q, of_k, of_v = [], *(jnp.zeros(x.swapaxes(2, 3).shape, accumulate) for x in (k, v))
    for start, end in reversed(_spans(q.shape[2])):  # the longest first: it fills of_k and of_v
        rows, rows_gradient = _rows(q, start, end), _rows(gradient, start, end)
        weights = jnp.exp(
            _scores(q, k, segment_ids, visible_until, start, end) - _rows(normalizer, start, end)[..., None]
        )
        of_weights = product("BKRH,BKTH->BKRT", rows_gradient, v[:, :, :end])
        of_scores = (weights * (of_weights - _rows(mean, start, end)[..., None])).astype(q.dtype)
        part = product("BKRT,BKTH->BKRH", of_scores, k[:, :, :end])
        of_q.append(part.astype(q.dtype).reshape(*q.shape[:2], end - start, *q.shape[3:]))
        of_k = of_k.at[..., :end].add(product("BKRH,BKRT->BKHT", rows, of_scores))
        of_v = of_v.at[..., :end].add(product("BKRH,BKRT->BKHT", rows_gradient, weights.astype(q.dtype)))
    of_k, of_v = (x.swapaxes(2, 3).astype(k.dtype) for x in (of_k, of_v))
    return jnp.concatenate(of_q[::-1], axis=2), of_k, of_v, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def indices(*values) -> tuple[jax.Array, ...]:
    """Start indices for a dynamic slice, all int32: they must be of one type, also with 64 bits enabled."""
    return tuple(jnp.asarray(value, jnp.int32) for value in values)


def cached(q, k, v, layer, q_index, kv_index, used) -> jax.Array:
    """Attention [B, S, N, H] of new tokens against one layer of a cache, block by block with a running softmax.

    Args:
      q: [B, S, N, H].
      k, v: keys and values of all layers and slots, [L, B, K, T, H]; T at most SLOT_BLOCK, or a multiple of it.
      layer: number of the layer, int or int32[].
      q_index: int32[B, S], positions of the queries.
      kv_index: int32[B, T], positions of the tokens in the slots. A query sees those up to its own, at least one.
      used: int32[], number of slots in use; blocks beyond them are not read.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, slots = k.shape[2:4]
    block = min(SLOT_BLOCK, slots)
    if slots % block:
        raise ValueError(f"a cache of {slots} slots does not divide into blocks of {block}")
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    lowest = jnp.finfo(accumulate).min
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)

    def partial(start):
        """Returns (unnormalized result, largest score, sum of weights) over the slots from start on."""
        shape = (1, batch, kv_heads, block, head_dim)
        piece = lambda x: jax.lax.dynamic_slice(x, indices(layer, 0, 0, start, 0), shape)[0]  # noqa: E731
        index = jax.lax.dynamic_slice_in_dim(kv_index, start, block, axis=1)
        scores = jnp.einsum("BKGSH,BKTH->BKGST", grouped, piece(k), preferred_element_type=accumulate) / head_dim**0.5
        visible = index[:, None, :] <= q_index[:, :, None]
        scores = jnp.where(visible[:, None, None], scores, lowest)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        result = jnp.einsum("BKGST,BKTH->BKGSH", weights.astype(q.dtype), piece(v), preferred_element_type=accumulate)
        return result, largest, jnp.sum(weights, axis=-1, keepdims=True)

    def add(i, sofar):
        result, largest, total = sofar
        more, more_largest, more_total = partial(i * block)
        new_largest = jnp.maximum(largest, more_largest)
        keep, take = jnp.exp(largest - new_largest), jnp.exp(more_largest - new_largest)
        return result * keep + more * take, new_largest, total * keep + more_total * take

    result, largest, total = partial(0)
    if slots > block:
        result, _, total = jax.lax.fori_loop(1, (used + block - 1) // block, add, (result, largest, total))
    return (result / total).astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def unsuited(q, k, visible_until=None) -> str | None:
    """The reason why splash cannot do these shapes or dtypes, or None."""
    mesh = mesh_of_step()
    if visible_until is not None:
        return "rows of trees of tokens"
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
    """Attention by the Pallas kernels, each device on its own rows and heads; S must be a multiple of 128."""
    local = functools.partial(_splash_local, interpret=interpret)
    mesh = mesh_of_step()
    if mesh is None:
        return local(q, k, v, segment_ids)
    heads, rows = P(BATCH, None, "tensor", None), P(BATCH, None)
    # The kernels do not declare the axes over which their results vary, so the check is off.
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
    attended = jax.vmap(kernel)(q, k, v, segments)
    return jnp.swapaxes(attended, 1, 2)  # pyright: ignore[reportArgumentType] - a tuple only with save_residuals


# ---- rotary position embedding, half-split pairs: dimension i is rotated together with i + head_dim/2 ----------------


def rotary_tables(cfg: ModelConfig, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Tables of cos and sin, each [..., head_dim/2], for int32 positions [...]; float32, or float64 as activations are.

    `length` is the total length of the sequence, prompt and continuation: with NTK scaling the base depends on it, and
    a table by the length so far would rotate cached keys by another base than later queries.
    """
    dtype = jnp.promote_types(cfg.dtype, jnp.float32)
    base, factor = cfg.rope_length_factors(length)
    if cfg.rope.tables == "float16":
        return _released_tables(cfg.head_dim, positions, base, factor, dtype)
    inverse_frequency = base ** (-np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    angles = positions[..., None].astype(dtype) * jnp.asarray(inverse_frequency, dtype)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    return platforms.compute_once(cos), platforms.compute_once(sin)


def _released_tables(head_dim: int, positions: jax.Array, base: float, factor: float, dtype) -> tuple:
    """The tables as TeleChat's code computes them: in float32, rounded to float16 before and after the factor."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(np.float64(np.float32(base)), exponent.astype(np.float64)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(np.float32(1) / power)
    rounded = (_to_float16(_to_float16(f(angles)) * np.float32(factor)) for f in (jnp.cos, jnp.sin))
    return tuple(table.astype(dtype) for table in rounded)


def _to_float16(x: jax.Array) -> jax.Array:
    """Rounds float32 values below 65504 to the nearest numbers that float16 has.

    XLA may leave out a conversion to float16 and back; reduce_precision stays, but has no subnormal numbers, which in
    float16 are the multiples of 2^-24 below 2^-14.
    """
    subnormal = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, jax.lax.reduce_precision(x, 5, 10))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, S, heads, H] by cos and sin [B, S, H/2]; computes in their dtype, returns the dtype of x.

    x is cut before it is widened, and narrowed before it is put together: otherwise a compiler writes the product
    before, and in the backward pass the gradient, to memory in the wider dtype.
    """
    first, second = (half.astype(cos.dtype) for half in jnp.split(x, 2, axis=-1))
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    halves = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([half.astype(x.dtype) for half in halves], axis=-1)
