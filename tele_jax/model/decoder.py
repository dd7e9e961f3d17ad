"""The decoder as Flax modules. A parameter is declared here and nowhere else; see axes.py for what its names decide.

Letters: B batch, S sequence, T cache slots, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab, L layers.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from tele_jax.axes import Params, declare
from tele_jax.config import ModelConfig, require_config
from tele_jax.model import attention, inputs
from tele_jax.model.attention import SAVED, attend, cached, indices
from tele_jax.model.heads import declare_heads, logits_of
from tele_jax.model.inputs import MASKED_AXES as MASKED_AXES
from tele_jax.model.inputs import Mask
from tele_jax.model.inputs import Masks as Masks
from tele_jax.model.platforms import gated, project
from tele_jax.sharding import constrain, lookup, mesh_of_step, platform, whole_rows

UNROLLED_LAYERS = 16  # on CPUs; the program, and the time to compile it, grow with them


class Context(struct.PyTreeNode):
    """Inputs that are equal in all layers."""

    positions: jax.Array  # int32[B, S]
    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array | None  # int32[B, S]
    embed_mask: Mask | None  # [D]
    mlp_mask: Mask | None  # [F]
    heads_mask: Mask | None  # [N]
    slot: jax.Array | None = None  # int32[], where in the cache the first of these tokens goes
    visible_until: jax.Array | None = None  # int32[B, S], see model/attention.py
    noise: jax.Array | None = None  # [B, S, D], on the embedding


# Position of padding, later than every token's: no query sees padding. The outputs of padding itself have no meaning.
NOWHERE = 2**31 - 1


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens so far, all rows in the same slots. The layers update the cache in place."""

    k: jax.Array  # [L, B, K, T, H], so that the slots of a head are read in one go
    v: jax.Array  # [L, B, K, T, H]
    positions: jax.Array  # int32[B, T], positions of the tokens in the slots; NOWHERE in empty slots


def empty_cache(cfg: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache of `slots` tokens per row: at most attention.SLOT_BLOCK, or a multiple of it."""
    shape = (cfg.num_layers, batch, cfg.num_kv_heads, slots, cfg.head_dim)
    positions = jnp.full((batch, slots), NOWHERE, jnp.int32)
    return Cache(k=jnp.zeros(shape, cfg.dtype), v=jnp.zeros(shape, cfg.dtype), positions=positions)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, mask: Mask | None) -> jax.Array:
    """RMS norm with a mask c (or 1): c*g*x / sqrt(sum(c x^2)/sum(c) + eps), in float32 or better."""
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = scale.astype(precise.dtype)
    if mask is None:
        mean_square = jnp.mean(precise**2, axis=-1, keepdims=True)
    else:
        mask = mask.astype(precise.dtype)
        mean_square = jnp.sum(mask * precise**2, axis=-1, keepdims=True) / jnp.sum(mask)
        scale = scale * mask
    return (precise * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


class Norm(nn.Module):
    """RMSNorm over embed. `writes` names the output axes of a norm that stands in the residual stream itself."""

    cfg: ModelConfig
    writes: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask | None) -> jax.Array:
        return rms_norm(x, declare(self, "scale", inputs=("embed",), outputs=self.writes), self.cfg.rms_eps, mask)


class Attention(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, layer, ctx: Context) -> tuple[jax.Array, Cache | None]:
        cfg = self.cfg
        x = whole_rows(x)
        kernel_q = declare(self, "q", inputs=("embed",), outputs=("heads", "head_dim"))
        kernel_k = declare(self, "k", inputs=("embed",), outputs=("kv_heads", "head_dim"))
        kernel_v = declare(self, "v", inputs=("embed",), outputs=("kv_heads", "head_dim"))
        kernel_o = declare(self, "o", inputs=("heads", "head_dim"), outputs=("embed",))
        q = attention.rotate(project("BSD,DNH->BSNH", x, kernel_q), ctx.cos, ctx.sin)
        k = attention.rotate(project("BSD,DKH->BSKH", x, kernel_k), ctx.cos, ctx.sin)
        v = project("BSD,DKH->BSKH", x, kernel_v)
        if cache is None or ctx.slot is None:
            rows = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
            y = attend(cfg.attention, q, k, v, rows, rows, ctx.segment_ids, ctx.visible_until)
        else:
            at = indices(layer, 0, 0, ctx.slot, 0)
            cache = cache.replace(
                k=jax.lax.dynamic_update_slice(cache.k, k.swapaxes(1, 2)[None], at),
                v=jax.lax.dynamic_update_slice(cache.v, v.swapaxes(1, 2)[None], at),
            )
            y = cached(q, cache.k, cache.v, layer, ctx.positions, cache.positions, ctx.slot + x.shape[1])
        if ctx.heads_mask is not None:
            y = y * ctx.heads_mask.astype(y.dtype)[:, None]
        y = constrain(project("BSNH,NHD->BSD", y, kernel_o))
        if cfg.output_biases:
            y = y + declare(self, "o_bias", outputs=("embed",)).astype(x.dtype)
        return y, cache


class Mlp(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        x = whole_rows(x)
        gate = project("BSD,DF->BSF", x, declare(self, "gate", inputs=("embed",), outputs=("mlp",)))
        up = project("BSD,DF->BSF", x, declare(self, "up", inputs=("embed",), outputs=("mlp",)))
        y = gated(whole_rows(gate, tensor=2), whole_rows(up, tensor=2))
        if ctx.mlp_mask is not None:
            y = y * ctx.mlp_mask.astype(y.dtype)
        down = declare(self, "down", inputs=("mlp",), outputs=("embed",))
        y = constrain(project("BSF,FD->BSD", y, down))
        if self.cfg.output_biases:
            y = y + declare(self, "down_bias", outputs=("embed",)).astype(x.dtype)
        return y


class Block(nn.Module):
    """One layer. `own` holds the inputs that differ from layer to layer: the mask, and with a cache the number."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, Cache | None], own: tuple[Mask | None, Any], ctx: Context):
        x, cache = carry
        layer_mask, layer = own
        before = x = checkpoint_name(x, "stream")
        y, cache = Attention(self.cfg, name="attn")(
            Norm(self.cfg, name="attn_norm")(x, ctx.embed_mask), cache, layer, ctx
        )
        factor = self.cfg.residual_mult
        x = x + (y if factor == 1 else factor * y)
        y = Mlp(self.cfg, name="mlp")(Norm(self.cfg, name="mlp_norm")(x, ctx.embed_mask), ctx)
        x = x + (y if factor == 1 else factor * y)
        if layer_mask is not None:
            x = before + layer_mask.astype(x.dtype) * (x - before)
        return (constrain(x), cache), None


# Values of the forward pass that a layer keeps for the backward pass; the rest is computed again there.
#   full       the layer's input
#   attention  the input and the results of attention, so that its kernel need not run again
#   products   these and the results of all matrix products: only elementwise parts are computed again
#   offload    the values of `attention`, in the host's memory
REMAT = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["stream", SAVED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialised(cfg: ModelConfig) -> type[Block]:
    """Block under the remat policy of cfg; "none" keeps everything."""
    return Block if cfg.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[cfg.remat])


def unrolled(cfg: ModelConfig) -> bool:
    """True where the layers are written out one after another and not as a loop: on one CPU, up to UNROLLED_LAYERS.

    A loop copies the values kept for the backward pass into arrays over all layers, and back. On a mesh of CPU devices,
    whose programs are compiled and compared and need not be fast, that costs less than compiling each layer.
    """
    return platform() == "cpu" and mesh_of_step() is None and cfg.num_layers <= UNROLLED_LAYERS


class Embed(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        table = declare(self, "table", inputs=("vocab",), outputs=("embed",))
        x = lookup(table, tokens, self.cfg.dtype)
        return (x if noise is None else x + noise.astype(x.dtype)) * self.cfg.input_mult


class Decoder(nn.Module):
    """The model up to the head: tokens -> (final hidden state [B, S, D], cache)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens, ctx: Context, layers_mask: Mask | None, cache: Cache | None):
        cfg = self.cfg
        x = Embed(cfg, name="embed")(tokens, ctx.noise)
        if cfg.embed_norm:
            x = Norm(cfg, writes=("embed",), name="embed_norm")(x, ctx.embed_mask)
        layers = nn.scan(
            rematerialised(cfg) if cache is None else Block,
            variable_axes={"params": 0, "intermediates": 0},  # the latter for `activations`
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] - one for each argument, as its docs say
            length=cfg.num_layers,
            unroll=cfg.num_layers if unrolled(cfg) else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, name="layers")
        numbers = None if cache is None else jnp.arange(cfg.num_layers)
        (x, cache), _ = layers((constrain(x), cache), (layers_mask, numbers), ctx)
        x = Norm(cfg, name="final_norm")(x, ctx.embed_mask)
        if self.is_initializing():
            declare_heads(cfg)
        return x, cache


def _context(cfg: ModelConfig, positions, length: int, segment_ids=None, masks: Masks | None = None, slot=None):
    masks = masks or {}
    cos, sin = attention.rotary_tables(cfg, positions, length)
    return Context(positions, cos, sin, segment_ids, masks.get("embed"), masks.get("mlp"), masks.get("heads"), slot)


def init_boxed(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, each boxed with its axis names (axes.Named)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(cfg).init(key, tokens, _context(cfg, tokens, 1), None, None)["params"]


@functools.lru_cache(maxsize=64)
def abstract_boxed(cfg: ModelConfig) -> Params:
    """The shapes of `init_boxed`; nothing is computed."""
    return jax.eval_shape(lambda: init_boxed(cfg, jax.random.key(0)))


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters: a nested dict of arrays of cfg.param_dtype, layers stacked on the leading axis.

    >>> cfg = ModelConfig(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=64)
    >>> init(cfg, jax.random.key(0))["layers"]["attn"]["q"].shape    # layers, embed, heads, head_dim
    (2, 16, 2, 8)

    Raises:
      UserError: cfg is no ModelConfig, or key no random key; float64 parameters without jax_enable_x64.
    """
    require_config(cfg, "init: cfg")
    inputs.require_key(key, "init: key")
    inputs.require_x64(cfg)
    return _init(cfg, key)


@functools.partial(jax.jit, static_argnums=0)
def _init(cfg: ModelConfig, key: jax.Array) -> Params:
    return nn.meta.unbox(init_boxed(cfg, key))


def _apply(module: nn.Module, params: Params, *args: object) -> Any:
    return module.apply({"params": params}, *args)


def hidden(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    masks: Masks | None = None,
    rope_length: int | None = None,
    visible_until: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Final hidden state [B, S, D] in cfg.dtype after the last norm.

    positions, int32[B, S], default to the index in the row; rope_length, which NTK scaling goes by, to S.
    visible_until, int32[B, S]: the index in the row from which on a token is seen no more; see model/attention.py.
    noise, [B, S, D], is added to the embedding, before the input multiplier.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    inputs.require_x64(cfg)
    masks = masks or {}
    inputs.check_shapes(cfg, tokens, positions, segment_ids, masks)
    ctx = _context(cfg, positions, tokens.shape[1] if rope_length is None else rope_length, segment_ids, masks)
    ctx = ctx.replace(visible_until=visible_until, noise=noise)
    return _apply(Decoder(cfg), params, tokens, ctx, masks.get("layers"), None)[0]


def hidden_cached(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    slot: jax.Array,
    rope_length: int,
) -> tuple[jax.Array, Cache]:
    """Returns (`hidden` of tokens that come after those in the cache, the cache with these tokens in it).

    Args:
      params: the parameter tree, or one in which params["layers"] is a sequence of trees, one per layer
        (generate.prepare).
      tokens: int32[B, S].
      positions: int32[B, S]; NOWHERE for padding.
      cache: keys and values of the tokens before; its buffers are reused where the caller donates them.
      slot: int32[], the slot of the first of the S tokens. The last must not go beyond the cache.
      rope_length: the length of the whole sequence, which NTK scaling goes by in every part of it.
    """
    inputs.require_x64(cfg)
    inputs.check_shapes(cfg, tokens, positions, None, {})
    ctx = _context(cfg, positions, rope_length, slot=slot)
    cache = cache.replace(positions=jax.lax.dynamic_update_slice(cache.positions, positions, indices(0, slot)))
    if isinstance(params["layers"], Mapping):
        return _apply(Decoder(cfg), params, tokens, ctx, None, cache)
    carry = (constrain(_embedded(cfg, params, tokens)), cache)
    for number, layer in enumerate(params["layers"]):
        carry, _ = _apply(Block(cfg), layer, carry, (None, number), ctx)
    return rms_norm(carry[0], params["final_norm"]["scale"], cfg.rms_eps, None), carry[1]


def _embedded(cfg: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """The input of the first layer."""
    x = _apply(Embed(cfg), params["embed"], tokens)
    return rms_norm(x, params["embed_norm"]["scale"], cfg.rms_eps, None) if cfg.embed_norm else x


def layer_states(cfg: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """The residual stream before the first layer and after every layer: [L + 1, B, S, D] in cfg.dtype."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ctx = _context(cfg, positions, tokens.shape[1])
    x = _embedded(cfg, params, tokens)

    def step(x, layer):
        (y, _), _ = _apply(Block(cfg), layer, (x, None), (None, None), ctx)
        return y, y

    return jnp.concatenate([x[None], jax.lax.scan(step, x, params["layers"])[1]])


def activations(cfg: ModelConfig, params: Params, tokens: jax.Array) -> dict[str, jax.Array]:
    """Outputs by part: "attn" and "mlp" [L, B, S, D], and [B, S, D] "embed", which enters the first layer, "hidden"."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    start = "embed_norm" if cfg.embed_norm else "embed"
    ctx = _context(cfg, positions, tokens.shape[1])
    (x, _), kept = Decoder(cfg.replace(remat="none")).apply(
        {"params": params}, tokens, ctx, None, None,
        capture_intermediates=lambda module, _: module.name in (start, "attn", "mlp"), mutable=["intermediates"],
    )  # fmt: skip
    found: Any = kept["intermediates"]
    attn, mlp = (found["layers"][name]["__call__"][0] for name in ("attn", "mlp"))
    return {"embed": found[start]["__call__"][0], "attn": attn[0], "mlp": mlp, "hidden": x}


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    masks: Masks | None = None,
) -> jax.Array:
    """Logits float32[B, S, V] (float64 where cfg.dtype is) of int32 tokens [B, S]; V = vocab_size, padding rows cut.

    Args:
      positions: int32[B, S] for the rotary embedding; the row index by default.
      segment_ids: int32[B, S]; attention stays within equal ids and goes back along the row only.
      masks: growth masks by axis name, see growth/masks.py; None for a plain model.

    Raises:
      UserError: an argument of another kind or shape, ids beyond the vocabulary (where they are known: not inside jit),
        rows longer than the model's positions, or parameters that are not those of cfg.
    """
    require_config(cfg, "forward: cfg")
    inputs.check_params(params, nn.meta.unbox(abstract_boxed(cfg)))
    tokens = inputs.checked_tokens(cfg, tokens)
    if positions is None:
        cfg.require_positions(tokens.shape[1])
    positions = inputs.optional_integers(positions, "positions")
    segment_ids = inputs.optional_integers(segment_ids, "segment_ids")
    masks = inputs.checked_masks(masks)
    return logits_of(cfg, params, hidden(cfg, params, tokens, positions, segment_ids, masks))
