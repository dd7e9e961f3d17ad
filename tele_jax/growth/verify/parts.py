"""The comparison of functions, part by part: embedding, each layer and head, before and after growth.

Random inputs go through each part on its own; the functions agree where all parts do. A few short rows are evidence,
and no proof for other inputs. All is computed in float64 numpy, from the formulas and not by the model's own code, and
leaves are read in blocks, so that a layer need not fit into memory.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from tele_jax.axes import Leaves, ParamSpec
from tele_jax.config import ModelConfig
from tele_jax.growth.plan import Plan

BLOCK_BYTES = 64 * 2**20  # bytes of a leaf, as stored, that are read at once
LENGTH = 8  # tokens of a row
# Sizes of the residual stream: usual, and so small that the norm's epsilon matters.
SCALES = (1.0, 1e-3)


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """A model before or after: config, leaves {dotted name: array or checkpoint.LazyArray}, masks by axis name."""

    cfg: ModelConfig
    spec: Mapping[str, ParamSpec]
    leaves: Leaves
    masks: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def vector(self, name: str, layer: int | None = None) -> np.ndarray:
        """A small leaf in float64."""
        return np.asarray(self.leaves[name][... if layer is None else layer]).astype(np.float64)


def parts(plan: Plan, src: Leaves, dst: Leaves, unit: int | None) -> dict[str, float]:
    """{part: largest difference of its outputs, relative to the largest value of the row} for one unit.

    A unit is a destination layer or, where unit is None, the embedding and the head (see entries.each). Each part has
    random inputs of its own. src, dst: the leaves, those of the unit at least.
    """
    masks = {axis: np.where(m.fresh, 0.0, 1.0) for axis, m in plan.maps.items()} if plan.masked else {}
    old = Side(plan.src_cfg, plan.src_spec, src)
    new = Side(plan.dst_cfg, plan.dst_spec, dst, masks)
    # New channels have to hold zeros, but may hold anything behind masks.
    known = ~plan.maps["embed"].fresh if plan.masked else np.ones(plan.dst_cfg.embed_dim, bool)
    if unit is not None:
        return {f"layers[{unit}]": _layer(plan, old, new, known, unit)}
    return {"embed": _embedding(plan, old, new, known), "head": _head(plan, old, new)}


def _embedding(plan: Plan, old: Side, new: Side, known: np.ndarray) -> float:
    after_ids, before_ids = shared_tokens(plan)
    tokens = np.random.default_rng(0).integers(0, len(after_ids), 64)
    made, expected = embed(new, after_ids[tokens]), _lift(plan, embed(old, before_ids[tokens]))
    return _difference(made[:, known], expected[:, known])


def _layer(plan: Plan, old: Side, new: Side, known: np.ndarray, layer: int) -> float:
    rng = np.random.default_rng([1, layer])
    x = _inputs(rng, plan.src_cfg.embed_dim)
    lifted = _with_noise(plan, _lift(plan, x), rng)
    fresh, source = plan.maps["layers"].fresh[layer], int(plan.maps["layers"].index[layer])
    expected = x if fresh or source < 0 else block(old, source, x)
    made = block(new, layer, lifted)
    return _difference(made[..., known], _lift(plan, expected)[..., known])


def _head(plan: Plan, old: Side, new: Side) -> float:
    rng = np.random.default_rng(2)
    after_ids, before_ids = shared_tokens(plan)
    x = _inputs(rng, plan.src_cfg.embed_dim)
    before, after = logits(old, x), logits(new, _with_noise(plan, _lift(plan, x), rng))
    return _difference(after[..., after_ids], before[..., before_ids])


def shared_tokens(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(ids in the result, ids in the source) of the tokens that both have."""
    before = plan.maps["vocab"].index[: plan.dst_cfg.vocab_size]
    after = np.flatnonzero((before >= 0) & (before < plan.src_cfg.vocab_size))
    return after, before[after]


def _inputs(rng: np.random.Generator, width: int) -> np.ndarray:
    """Random residual streams float64[len(SCALES), LENGTH, width]."""
    return rng.standard_normal((len(SCALES), LENGTH, width)) * np.array(SCALES)[:, None, None]


def _lift(plan: Plan, x: np.ndarray) -> np.ndarray:
    """The residual stream [..., D] of the grown model where the source has x; 0 in new channels."""
    for step in plan.steps:
        writers = [n for n, s in step.dst_spec.items() if s.stack and "embed" in s.outputs and s.role == "kernel"]
        leaf, axis_map = step.leaves[writers[0]], step.maps["embed"]
        factor = leaf.coefficient * (axis_map.scale if "embed" in leaf.scaled else 1.0)
        x = np.where(axis_map.index >= 0, x[..., axis_map.index] * factor, 0.0)
    return x


def _with_noise(plan: Plan, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fills new channels that are behind masks with random numbers, since they may hold anything."""
    if not plan.masked:
        return x
    return np.where(plan.maps["embed"].fresh, rng.standard_normal(x.shape), x)


def _difference(made: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest entry of its row; inf for what is no number."""
    axes = tuple(range(1, made.ndim))
    largest = np.maximum(np.abs(expected).max(axis=axes), np.finfo(np.float64).tiny)
    difference = np.abs(made - expected).max(axis=axes) / largest
    return float(difference.max()) if np.isfinite(difference).all() else math.inf


def states(side: Side, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the residual stream float64[B, S, D] of tokens int[B, S] before the first layer, and after each."""
    x = embed(side, tokens.ravel()).reshape(*tokens.shape, -1)
    yield x
    for layer in range(side.cfg.num_layers):
        x = block(side, layer, x)
        yield x


# ---- the model, in formulas ------------------------------------------------------------------------------------------


def embed(side: Side, tokens: np.ndarray) -> np.ndarray:
    """The residual stream float64[n, D] of tokens int[n] before the first layer."""
    name = next(n for n, s in side.spec.items() if s.role == "table")
    spec, array = side.spec[name], side.leaves[name]
    x = np.empty((len(tokens), spec.shape[1]))
    # In blocks, since reading one stored row costs a whole chunk.
    for part in blocks(spec.shape[0], spec.shape[1] * np.dtype(spec.dtype).itemsize):
        inside = (tokens >= part.start) & (tokens < part.stop)
        if inside.any():
            x[inside] = np.asarray(array[part])[tokens[inside] - part.start]
    x *= side.cfg.input_mult
    return norm(side, x, side.vector("embed_norm.scale")) if "embed_norm.scale" in side.leaves else x


def block(side: Side, layer: int, x: np.ndarray) -> np.ndarray:
    """One layer on the residual stream x float64[B, S, D]."""
    before = x
    factor = side.cfg.residual_mult
    x = x + factor * attention(side, layer, norm(side, x, side.vector("layers.attn_norm.scale", layer)))
    x = x + factor * mlp(side, layer, norm(side, x, side.vector("layers.mlp_norm.scale", layer)))
    return before + (x - before) * side.masks["layers"][layer] if "layers" in side.masks else x


def norm(side: Side, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """RMSNorm: c g x / sqrt(sum(c x^2) / sum(c) + eps)."""
    c = side.masks.get("embed", np.ones(x.shape[-1]))
    mean_square = (c * x**2).sum(axis=-1, keepdims=True) / c.sum()
    return c * scale * x / np.sqrt(mean_square + side.cfg.rms_eps)


def attention(side: Side, layer: int, x: np.ndarray) -> np.ndarray:
    cfg = side.cfg
    q, k, v = (linear(side, f"layers.attn.{name}", x, layer) for name in "qkv")  # [B, S, heads, H]
    length = x.shape[1]
    base, factor = cfg.rope_length_factors(length)
    angles = np.arange(length)[:, None] * base ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    cos, sin = (f(angles)[:, None, :] * factor for f in (np.cos, np.sin))

    def rotate(y: np.ndarray) -> np.ndarray:
        first, second = np.split(y, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q, k = rotate(q), rotate(k)
    group = cfg.num_heads // cfg.num_kv_heads
    k, v = (np.repeat(y, group, axis=2) for y in (k, v))
    scores = np.einsum("bsnh,btnh->bnst", q, k) / math.sqrt(cfg.head_dim)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y = np.einsum("bnst,btnh->bsnh", weights, v)
    if "heads" in side.masks:
        y = y * side.masks["heads"][:, None]
    return _biased(side, linear(side, "layers.attn.o", y, layer), "layers.attn.o_bias", layer)


def mlp(side: Side, layer: int, x: np.ndarray) -> np.ndarray:
    gate, up = (linear(side, f"layers.mlp.{name}", x, layer) for name in ("gate", "up"))
    y = gate / (1 + np.exp(-np.clip(gate, -700, None))) * up * side.masks.get("mlp", 1.0)
    return _biased(side, linear(side, "layers.mlp.down", y, layer), "layers.mlp.down_bias", layer)


def _biased(side: Side, x: np.ndarray, bias: str, layer: int) -> np.ndarray:
    return x + side.vector(bias, layer) if bias in side.leaves else x


def linear(side: Side, name: str, x: np.ndarray, layer: int) -> np.ndarray:
    """The product of x [B, S, *inputs] and a layer's kernel [*inputs, *outputs], block by block of its rows."""
    spec, array = side.spec[name], side.leaves[name]
    shape = spec.shape[len(spec.stack) :]
    rows, inputs = shape[0], len(spec.inputs)
    outputs = shape[inputs:]
    out = np.zeros((*x.shape[:2], math.prod(outputs)))
    for part in blocks(rows, math.prod(shape[1:]) * np.dtype(spec.dtype).itemsize):
        kernel = np.asarray(array[(layer, part)]).astype(np.float64).reshape(-1, out.shape[-1])
        out += x[:, :, part].reshape(*x.shape[:2], -1) @ kernel
    return out.reshape(*x.shape[:2], *outputs)


def logits(side: Side, x: np.ndarray) -> np.ndarray:
    """Logits [B, S, vocab_size] of the residual stream after the last layer."""
    cfg = side.cfg
    x = norm(side, x, side.vector("final_norm.scale"))
    (head,) = [n for n, s in side.spec.items() if ("vocab" in s.outputs or (cfg.tie_embeddings and s.role == "table"))]
    spec, array = side.spec[head], side.leaves[head]
    out = np.zeros((*x.shape[:2], cfg.padded_vocab_size))
    for part in blocks(spec.shape[0], spec.shape[1] * np.dtype(spec.dtype).itemsize):
        kernel = np.asarray(array[part]).astype(np.float64)
        if spec.role == "table":
            out[..., part] = x @ kernel.T
        else:
            out += x[..., part] @ kernel
    return out[..., : cfg.vocab_size] * cfg.logit_mult


def blocks(size: int, row_bytes: int) -> Iterator[slice]:
    """Yields slices of about BLOCK_BYTES that cover `size` rows."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
