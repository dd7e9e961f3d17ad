"""Next-token cross entropy with the logits of one chunk of tokens, of at most CHUNK_BYTES, in memory at a time.

In training the gradients are made in the same pass, while the logits of a chunk are there: three products with the
head's kernel and not four. On a mesh each device works on its own rows and its own part of the vocabulary.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from tele_jax.axes import Params
from tele_jax.config import ModelConfig
from tele_jax.model import decoder
from tele_jax.model.heads import head_kernel
from tele_jax.sharding import BATCH, mesh_of_step, platform, whole_rows

# The largest chunk of logits on one device: in bytes, but always so many tokens; fewer would not feed a matrix unit.
CHUNK_BYTES, CHUNK_TOKENS = 2**28, 1024
# The largest gradient of the head, whole over fsdp, that a device sums over all chunks before it is reduced, once; a
# larger one is reduced for every chunk. It is float32: 2.6e9 bytes for TeleChat-7B, 3.3e9 for Tele-FLM-102B uncut.
WHOLE_GRADIENT_BYTES = 2**32
CPU_CHUNK_BYTES, CPU_CHUNK_TOKENS = 2**24, 128  # smaller on CPUs, so that a chunk stays in the processor's cache


def next_token_loss(
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: decoder.Masks | None = None,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of weighted losses in nats, sum of weights), scalars in float32 or better.

    batch: `tokens`, `targets` int32[B, S], `loss_weights` float32[B, S], and optionally `segment_ids`, `positions`.
    noise: [B, S, D], is added to the embedding.
    """
    x, kernel = _head(cfg, params, batch, masks, noise)
    weights = batch["loss_weights"].astype(jnp.promote_types(cfg.dtype, jnp.float32))
    total = weighted_cross_entropy(x, kernel, batch["targets"], weights, cfg.logit_mult, cfg.vocab_size)
    return total, jnp.sum(weights)  # pyright: ignore[reportReturnType] - no types pass through partial(custom_vjp)


def token_losses(
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: decoder.Masks | None = None,
    rope_length: int | None = None,
) -> jax.Array:
    """The cross entropy of every target in nats, [B, S]; rope_length: as decoder.hidden."""
    x, kernel = _head(cfg, params, batch, masks, rope_length=rope_length)
    return cross_entropy(x, kernel, batch["targets"], cfg.logit_mult, cfg.vocab_size)


def _head(
    cfg: ModelConfig,
    params: Params,
    batch: Mapping[str, jax.Array],
    masks: decoder.Masks | None,
    noise: jax.Array | None = None,
    rope_length: int | None = None,
):
    rows = (batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
    x = decoder.hidden(cfg, params, *rows, masks, rope_length, noise=noise)
    return whole_rows(x), head_kernel(cfg, params)


def cross_entropy(x: jax.Array, kernel: jax.Array, targets: jax.Array, mult: float, vocab_size: int) -> jax.Array:
    """Cross entropy -log softmax(mult * x @ kernel)[targets] over the first vocab_size columns: [B, S].

    x [B, S, D], kernel [D, V] of any dtype, targets int32[B, S]. The product is computed in x's dtype, the rest in
    float32 or better. Gradients compute the logits again, unless the logits of one device fit in CHUNK_BYTES.
    """
    local = functools.partial(_losses, mult=mult, vocab_size=vocab_size)
    return _on_each_device(local, x, kernel, (targets,), out=(P(BATCH),))[0]


def score_targets(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, mult: float, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (log-probabilities of the targets in nats, where a target is the likeliest token), [B, S] each.

    Arguments as for `cross_entropy`. Of several tokens that are equally likely, the first counts as the likeliest.
    """
    local = functools.partial(_losses, mult=mult, vocab_size=vocab_size, compare=True)
    losses, is_likeliest = _on_each_device(local, x, kernel, (targets,), out=(P(BATCH), P(BATCH)))
    return -losses, is_likeliest


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_cross_entropy(x, kernel, targets, weights, mult: float, vocab_size: int) -> jax.Array:
    """The sum of weights * cross_entropy(x, kernel, targets, mult, vocab_size); weights [B, S], float32 or better."""
    return jnp.sum(cross_entropy(x, kernel, targets, mult, vocab_size) * weights)


def _forward(x, kernel, targets, weights, mult, vocab_size):
    local = functools.partial(_losses_and_gradients, mult=mult, vocab_size=vocab_size)
    out = (P(BATCH), P(BATCH), P("fsdp", "tensor"))
    losses, x_gradient, kernel_gradient = _on_each_device(local, x, kernel, (targets, weights), out=out)
    return jnp.sum(losses * weights), (losses, x_gradient, kernel_gradient)


def _backward(mult, vocab_size, residuals, gradient):
    losses, x_gradient, kernel_gradient = residuals
    scaled = ((g * gradient).astype(g.dtype) for g in (x_gradient, kernel_gradient))
    return *scaled, None, losses * gradient


weighted_cross_entropy.defvjp(_forward, _backward)


def _on_each_device(local: Callable, x: jax.Array, kernel: jax.Array, rows: tuple[jax.Array, ...], out: tuple[P, ...]):
    """Runs local(x, kernel, *rows, axes) on every device's part where a mesh is set and the shapes divide, or once."""
    mesh = mesh_of_step()
    if mesh is not None:
        data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
        fits = x.shape[0] % (data * fsdp) == 0 and kernel.shape[0] % fsdp == 0 and kernel.shape[1] % tensor == 0
        if fits:
            specs = (P(BATCH), P("fsdp", "tensor"), *(P(BATCH) for _ in rows))
            run = functools.partial(local, axes=_Axes())
            return jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)(x, kernel, *rows)
    return local(x, kernel, *rows, axes=_Axes(None, None, None))


class _Axes:
    """The mesh axes of the rows and of the vocabulary, or none of them."""

    def __init__(self, data: str | None = "data", fsdp: str | None = "fsdp", tensor: str | None = "tensor"):
        self.data, self.fsdp, self.tensor = data, fsdp, tensor

    def gathered(self, kernel: jax.Array) -> jax.Array:
        """Gathers the kernel over fsdp: [D/f, V/t] -> [D, V/t]."""
        return kernel if self.fsdp is None else jax.lax.all_gather(kernel, self.fsdp, axis=0, tiled=True)

    def scattered(self, gradient: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Sums a gradient over fsdp, in dtype, and cuts it again: [D, V/t] -> [D/f, V/t]."""
        if self.fsdp is None:
            return gradient
        # The cut runs along an extra leading dimension: along a minor one, TPU programs reduce the whole array.
        parts = gradient.astype(dtype).reshape(jax.lax.axis_size(self.fsdp), -1, gradient.shape[1])
        return jax.lax.psum_scatter(parts, self.fsdp, scatter_dimension=0).astype(gradient.dtype)

    def over_data(self, x: jax.Array) -> jax.Array:
        return x if self.data is None else jax.lax.psum(x, self.data)

    def sum(self, x: jax.Array) -> jax.Array:
        return x if self.tensor is None else jax.lax.psum(x, self.tensor)

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.tensor is None else jax.lax.pmax(x, self.tensor)

    def columns(self, count: int) -> jax.Array:
        """The numbers of this device's columns of the vocabulary."""
        first = 0 if self.tensor is None else jax.lax.axis_index(self.tensor) * count
        return first + jnp.arange(count)


def _chunks(tokens: int, vocab: int) -> int:
    """The least number of equal chunks of the tokens that are small enough, or have no more than CHUNK_TOKENS."""
    least, size = (CPU_CHUNK_TOKENS, CPU_CHUNK_BYTES) if platform() == "cpu" else (CHUNK_TOKENS, CHUNK_BYTES)
    most = max(least, size // (4 * vocab))
    return next(n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n <= most)


def _by_chunk(count: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts rows into chunks: [B, S, ...] -> [count, B * S / count, ...]."""
    return tuple(a.reshape(count, -1, *a.shape[2:]) for a in arrays)


def _softmax(x, kernel, targets, mult, vocab_size, axes: _Axes):
    """Returns losses [T] of tokens [T], and for gradients logits [T, V/t], log normalizer [T, 1], hits bool[T, V/t]."""
    columns = axes.columns(kernel.shape[1])
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    logits = checkpoint_name(jnp.einsum("TD,DV->TV", x, kernel, preferred_element_type=accumulate), "logits") * mult
    logits = jnp.where(columns < vocab_size, logits, -jnp.inf)
    # A device may hold padding alone, but all of them together do not.
    top = axes.max(jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    log_normalizer = top + jnp.log(axes.sum(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)))
    hit = columns == targets[:, None]
    of_target = axes.sum(jnp.sum(jnp.where(hit, logits, 0), axis=-1))
    return log_normalizer[:, 0] - of_target, logits, log_normalizer, hit


def _losses(x, kernel, targets, *, mult, vocab_size, axes, compare=False):
    """Returns (losses [B, S],), and with `compare` also where the target is the likeliest token, bool[B, S]."""
    kernel = axes.gathered(kernel.astype(x.dtype))
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    fits = accumulate.itemsize * targets.size * kernel.shape[1] <= CHUNK_BYTES
    kept = jax.checkpoint_policies.save_only_these_names(*["logits"] * fits)

    @functools.partial(jax.checkpoint, policy=kept)
    def step(_, part):
        losses, logits, *_ = _softmax(part[0], kernel, part[1], mult, vocab_size, axes)
        if not compare:
            return None, (losses,)
        columns = axes.columns(kernel.shape[1])
        largest = axes.max(jnp.max(logits, axis=-1, keepdims=True))
        likeliest = -axes.max(jnp.max(jnp.where(logits == largest, -columns, -(2**31) + 1), axis=-1))
        return None, (losses, likeliest == part[1])

    parts = _by_chunk(_chunks(targets.size, kernel.shape[1]), x, targets)
    return tuple(values.reshape(targets.shape) for values in jax.lax.scan(step, None, parts)[1])


def _losses_and_gradients(x, kernel, targets, weights, *, mult, vocab_size, axes):
    """Returns losses [B, S] and the gradients of their weighted sum: of x, of the kernel, each in its dtype."""
    whole = axes.gathered(kernel.astype(x.dtype))
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    once = accumulate.itemsize * whole.size <= WHOLE_GRADIENT_BYTES
    scatter = functools.partial(axes.scattered, dtype=x.dtype)

    def step(kernel_gradient, part):
        x, targets, weights = part
        losses, logits, log_normalizer, hit = _softmax(x, whole, targets, mult, vocab_size, axes)
        of_logits = ((jnp.exp(logits - log_normalizer) - hit) * (weights * mult)[:, None]).astype(x.dtype)
        of_x = axes.sum(jnp.einsum("TV,DV->TD", of_logits, whole, preferred_element_type=accumulate))
        part = jnp.einsum("TD,TV->DV", x, of_logits, preferred_element_type=accumulate)
        return kernel_gradient + (part if once else scatter(part)), (losses, of_x.astype(x.dtype))

    parts = _by_chunk(_chunks(targets.size, whole.shape[1]), x, targets, weights)
    start = jnp.zeros((whole if once else kernel).shape, accumulate)
    kernel_gradient, (losses, of_x) = jax.lax.scan(step, start, parts)
    kernel_gradient = axes.over_data(scatter(kernel_gradient) if once else kernel_gradient).astype(kernel.dtype)
    return losses.reshape(targets.shape), of_x.reshape(x.shape), kernel_gradient
