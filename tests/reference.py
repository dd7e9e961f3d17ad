"""The decoder in float64 numpy, written from the formulas and for reading; nothing of tele_jax computes here.

Letters: B batch, S sequence, D embed, N heads, K kv_heads, H head_dim, F mlp, V vocab, P padded vocab, L layers.
Growth masks are a dict with any of "embed" [D], "mlp" [F], "heads" [N], "layers" [L], each entry in [0, 1].
"""

import math

import numpy as np


def rms_norm(x, scale, eps, c=None):
    """y = c g x / sqrt(sum(c x^2) / sum(c) + eps) over the last axis; c = 1 is the usual RMSNorm."""
    c = np.ones(x.shape[-1]) if c is None else c
    mean_square = np.sum(c * x * x, axis=-1, keepdims=True) / np.sum(c)
    return c * scale * x / np.sqrt(mean_square + eps)


def rope_base_and_factor(cfg, length):
    """The rotary base and the factor on cos and sin for `length` tokens in total, as TeleChat's code has them."""
    ntk = cfg.rope.ntk
    if ntk is None:
        return cfg.rope.theta, 1.0
    n = max(length, ntk.trained_length)
    # 2^ceil(log2(n/L0) + 1) is the least power of two, whole or not, that is at least 2 n/L0; below 2 alpha is 1.
    power_of_two = 1
    while power_of_two * ntk.original_length < 2 * n:
        power_of_two *= 2
    alpha = max(power_of_two - 1, 1)
    exponent = {"ntk": lambda d: d / (d - 2), "linear": lambda d: 1}[ntk.base](cfg.head_dim)
    factor = ntk.attention_slope * math.log(n / ntk.trained_length) + 1
    return cfg.rope.theta * alpha**exponent, factor


def rotate(x, positions, base, factor):
    """Half-split rotary embedding of x [B,S,heads,H]: the pair (i, i + H/2) turns by position * base^(-2i/H)."""
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = positions[:, :, None] * base ** (-i / half)
        cos, sin = factor * np.cos(angle), factor * np.sin(angle)
        a, b = x[..., i], x[..., i + half]
        y[..., i] = a * cos - b * sin
        y[..., i + half] = b * cos + a * sin
    return y


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(cfg, w, x, positions, segment_ids, c_heads):
    """Causal attention of normed x [B,S,D] within equal segment ids, up to and with the output projection."""
    base, factor = rope_base_and_factor(cfg, x.shape[1])
    q = rotate(np.einsum("bsd,dnh->bsnh", x, w["q"]), positions, base, factor)
    k = rotate(np.einsum("bsd,dkh->bskh", x, w["k"]), positions, base, factor)
    v = np.einsum("bsd,dkh->bskh", x, w["v"])
    rows = np.arange(x.shape[1])
    visible = rows[:, None] >= rows[None, :]
    visible = visible[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    group = cfg.num_heads // cfg.num_kv_heads
    out = np.zeros_like(x)
    for n in range(cfg.num_heads):
        scores = np.einsum("bsh,bth->bst", q[:, :, n], k[:, :, n // group]) / math.sqrt(cfg.head_dim)
        weights = softmax(np.where(visible, scores, -np.inf))
        head = np.einsum("bst,bth->bsh", weights, v[:, :, n // group])
        out += np.einsum("bsh,hd->bsd", c_heads[n] * head, w["o"][n])
    return out + w.get("o_bias", 0.0)


def mlp(w, x, c_mlp):
    gate, up = x @ w["gate"], x @ w["up"]
    return (c_mlp * gate / (1 + np.exp(-gate)) * up) @ w["down"] + w.get("down_bias", 0.0)


def forward(cfg, params, tokens, positions=None, segment_ids=None, masks=None, noise=0.0):
    """Logits float64[B,S,V] of tokens int[B,S]; params is the nested dict of the design, in any float dtype.

    noise, [B,S,D], is added to the embedding.
    """
    tokens = np.asarray(tokens)
    params = _float64(params)
    masks = _float64(masks or {})
    positions = np.arange(tokens.shape[1]) if positions is None else np.asarray(positions)
    positions = np.broadcast_to(positions, tokens.shape)
    segment_ids = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids)
    c_embed = masks.get("embed")
    c_mlp = masks.get("mlp", np.ones(cfg.mlp_dim))
    c_heads = masks.get("heads", np.ones(cfg.num_heads))
    c_layers = masks.get("layers", np.ones(cfg.num_layers))

    table = params["embed"]["table"]
    x = (table[tokens] + noise) * cfg.input_mult
    if "embed_norm" in params:
        x = rms_norm(x, params["embed_norm"]["scale"], cfg.rms_eps, c_embed)
    for i in range(cfg.num_layers):
        w = _layer(params["layers"], i)
        y = x
        normed = rms_norm(y, w["attn_norm"]["scale"], cfg.rms_eps, c_embed)
        y = y + cfg.residual_mult * attention(cfg, w["attn"], normed, positions, segment_ids, c_heads)
        normed = rms_norm(y, w["mlp_norm"]["scale"], cfg.rms_eps, c_embed)
        y = y + cfg.residual_mult * mlp(w["mlp"], normed, c_mlp)
        x = x + c_layers[i] * (y - x)
    x = rms_norm(x, params["final_norm"]["scale"], cfg.rms_eps, c_embed)
    logits = x @ (table.T if cfg.tie_embeddings else params["lm_head"]["kernel"])
    mult = cfg.output_mult
    if cfg.mup_base_width is not None:
        mult = mult * cfg.mup_base_width / cfg.embed_dim
    return logits[..., : cfg.vocab_size] * mult


def loss(logits, targets, weights):
    """Mean cross entropy in nats: logits [B,S,V], targets int[B,S], weighted by weights [B,S]."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(log_probs, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return -(picked * weights).sum() / np.sum(weights)


def shapes(cfg):
    """Shape of every parameter by dotted name, as the table of the design says."""
    L, D, P = cfg.num_layers, cfg.embed_dim, cfg.padded_vocab_size
    N, K, H, F = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.mlp_dim
    out = {
        "embed.table": (P, D),
        "layers.attn_norm.scale": (L, D),
        "layers.attn.q": (L, D, N, H),
        "layers.attn.k": (L, D, K, H),
        "layers.attn.v": (L, D, K, H),
        "layers.attn.o": (L, N, H, D),
        "layers.mlp_norm.scale": (L, D),
        "layers.mlp.gate": (L, D, F),
        "layers.mlp.up": (L, D, F),
        "layers.mlp.down": (L, F, D),
        "final_norm.scale": (D,),
    }
    if not cfg.tie_embeddings:
        out["lm_head.kernel"] = (D, P)
    if cfg.scalar_head:
        out["scalar_head.kernel"] = (D, 1)
    if cfg.output_biases:
        out["layers.attn.o_bias"] = (L, D)
        out["layers.mlp.down_bias"] = (L, D)
    if cfg.embed_norm:
        out["embed_norm.scale"] = (D,)
    return out


def random_params(cfg, rng, scale):
    """Random float64 parameters: norm scales around 1, biases nonzero, kernels of standard deviation
    scale / sqrt(fan-in), so that with scale 1 activations and logits are of order 1 at every width.
    """
    fan_in = {
        "embed.table": cfg.embed_dim if cfg.tie_embeddings else 1,
        "layers.attn.o": cfg.num_heads * cfg.head_dim,
        "layers.mlp.down": cfg.mlp_dim,
    }
    params = {}
    for name, shape in shapes(cfg).items():
        noise = rng.standard_normal(shape)
        if name.endswith("scale"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * scale * noise
        else:
            value = scale * noise / math.sqrt(fan_in.get(name, cfg.embed_dim))
        _set(params, name, value)
    return params


def init_count(cfg):
    """Number of parameters, padded vocabulary rows included, by the closed formula."""
    d, kv_width, width = cfg.embed_dim, cfg.num_kv_heads * cfg.head_dim, cfg.num_heads * cfg.head_dim
    layer = 2 * d * width + 2 * d * kv_width + 3 * d * cfg.mlp_dim + 2 * d
    if cfg.output_biases:
        layer += 2 * d
    tables = 1 if cfg.tie_embeddings else 2
    norms = 2 if cfg.embed_norm else 1
    return cfg.num_layers * layer + tables * cfg.padded_vocab_size * d + norms * d


def _float64(tree):
    if isinstance(tree, dict):
        return {key: _float64(value) for key, value in tree.items()}
    return np.asarray(tree, dtype=np.float64)


def _layer(tree, i):
    if isinstance(tree, dict):
        return {key: _layer(value, i) for key, value in tree.items()}
    return tree[i]


def _set(tree, name, value):
    *path, last = name.split(".")
    for key in path:
        tree = tree.setdefault(key, {})
    tree[last] = value
