"""TeleChat and TeleChat-52B in torch, from the released code: plain functions of the released tensors.

Letters: B batch, S sequence, D embed, N heads, d head_dim, F mlp, V vocab.
"""

import math

import torch
from torch.nn import functional


def telechat(config, weights, tokens, length, *, half_tables=False, noise=0.0):
    """Logits [B, S, V] of TeleChat; `length` is the total one, which its rotary rule goes by."""
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    heads, dim = config["n_head"], config["hidden_size"] // config["n_head"]
    kv_heads = config.get("num_key_value_heads", heads)
    trained, original = config["training_seqlen"], config["base_seqlen"]
    longest = max(length, trained)
    alpha = max(2 ** math.ceil(math.log2(longest / original) + 1) - 1, 1)
    base = 10_000 * alpha ** (dim / (dim - 2))
    factor = 0.1 * math.log(longest / trained) + 1 if longest > trained else 1.0
    cos, sin = tables(base, dim, tokens.shape[1], factor, half_tables)
    eps = config["layer_norm_epsilon"]

    x = weights["word_embeddings.weight"][tokens] + noise
    for i in range(config["n_layer"]):
        w = {name.removeprefix(f"h.{i}."): v for name, v in weights.items() if name.startswith(f"h.{i}.")}
        y = rms_norm(x, w["input_layernorm.weight"], eps)
        q = split_heads(y @ w["self_attention.query.weight"].T, heads, dim)
        pairs = split_heads(y @ w["self_attention.key_value.weight"].T, kv_heads, 2 * dim)
        k, v = pairs[..., :dim], pairs[..., dim:]
        mixed = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + mixed @ w["self_attention.dense.weight"].T + w["self_attention.dense.bias"]
        y = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        y = functional.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T + w["mlp.down_proj.bias"]
    head = weights.get("lm_head.weight", weights["word_embeddings.weight"])
    return rms_norm(x, weights["ln_f.weight"], eps) @ head.T


def telechat_52b(config, weights, tokens, length):
    """Logits [B, S, V] of TeleChat-52B: matrices lie in x out, queries, keys and values in one."""
    heads, dim = config["n_head"], config["n_embd"] // config["n_head"]
    base = config["rotary_theta"]
    if length > 4096:
        base = base * max(2 ** math.ceil(math.log2(length / 4096) + 1) - 1, 1)
    cos, sin = tables(base, dim, tokens.shape[1], 1.0, False)
    eps = config["layer_norm_epsilon"]
    x = weights["transformer.wte.weight"][tokens] * config["input_mult"]
    for i in range(config["n_layer"]):
        w = lambda name, i=i: weights[f"transformer.h.{i}.{name}.weight"]  # noqa: E731
        y = rms_norm(x, w("ln_1"), eps) @ w("attn.c_attn")
        q, k, v = (split_heads(part, heads, dim) for part in y.chunk(3, dim=-1))
        x = x + attention(rotate(q, cos, sin), rotate(k, cos, sin), v) @ w("attn.c_proj")
        gate, up = (rms_norm(x, w("ln_2"), eps) @ w("mlp.c_fc")).chunk(2, dim=-1)
        x = x + (functional.silu(gate) * up) @ w("mlp.c_proj")
    logits = rms_norm(x, weights["transformer.ln_f.weight"], eps) @ weights["lm_head.weight"].T
    return logits * (config["output_mult"] / config["mup_scale_factor"])


def tables(base, dim, count, factor, half):
    """cos and sin [S, d/2]; rounded to float16 before and after the factor where `half` says so."""
    inverse = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(count).float()[:, None] * inverse
    if half:
        return factor * angles.cos().half(), factor * angles.sin().half()
    return factor * angles.cos(), factor * angles.sin()


def rms_norm(x, scale, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def split_heads(x, heads, dim):
    """[B, S, N * d] -> [B, N, S, d]"""
    return x.view(*x.shape[:2], heads, dim).transpose(1, 2)


def rotate(x, cos, sin):
    """Half-split: i turns together with i + d/2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q, k, v):
    """Causal; keys and values of a head serve a group of queries. [B, N, S, d] -> [B, S, N * d]"""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2)
