"""Small released checkpoints, random, made by numpy from the released layouts; no code of ours takes part.

Every maker gives (config.json, {name: array}); `leaves` says, by loops over heads and layers, which numbers of them
each of our parameters must have.
"""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
L, D, N, K, F, V = 3, 24, 6, 2, 40, 56  # layers, embed, heads, kv heads, mlp, rows of the vocabulary


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    header, end = {}, 0
    for name, values in tensors.items():
        offsets = [end, end + values.nbytes]
        header[name] = {"dtype": NAMES[values.dtype], "shape": list(values.shape), "data_offsets": offsets}
        end += values.nbytes
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(values).tobytes() for values in tensors.values())
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= read_safetensors(file)
    return tensors


def save(directory: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A directory as published: several shards have an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    names = sorted(tensors)
    places = {name: f"part-{i * shards // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        write_safetensors(directory / file, {name: tensors[name] for name in names if places[name] == file})
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


class Random:
    """Weights of a standard deviation that keeps activations of order one."""

    def __init__(self, seed: int, dtype):
        self._generator, self._dtype = np.random.default_rng(seed), dtype

    def matrix(self, rows: int, columns: int, fan_in: int) -> np.ndarray:
        return (self._generator.standard_normal((rows, columns)) / np.sqrt(fan_in)).astype(self._dtype)

    def scale(self, size: int) -> np.ndarray:
        return (1 + 0.3 * self._generator.standard_normal(size)).astype(self._dtype)

    def bias(self, size: int) -> np.ndarray:
        return (0.3 * self._generator.standard_normal(size)).astype(self._dtype)


def llama(seed=0, dtype=np.float32, *, kv_heads=K, head_dim=D // N, tied=False, biases=False, **keys):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": V,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": tied,
        "attention_bias": biases,
        "mlp_bias": biases,
        "hidden_act": "silu",
        "torch_dtype": np.dtype(dtype).name,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **keys,
    }
    random = Random(seed, dtype)
    tensors = {"model.embed_tokens.weight": random.matrix(V, D, D if tied else 1)}
    for i in range(L):
        layer = f"model.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = random.scale(D)
        for name, heads in (("q", N), ("k", kv_heads), ("v", kv_heads)):
            tensors[layer + f"self_attn.{name}_proj.weight"] = random.matrix(heads * head_dim, D, D)
            if biases:
                tensors[layer + f"self_attn.{name}_proj.bias"] = np.zeros(heads * head_dim, dtype)
        tensors[layer + "self_attn.o_proj.weight"] = random.matrix(D, N * head_dim, N * head_dim)
        tensors[layer + "post_attention_layernorm.weight"] = random.scale(D)
        tensors[layer + "mlp.gate_proj.weight"] = random.matrix(F, D, D)
        tensors[layer + "mlp.up_proj.weight"] = random.matrix(F, D, D)
        tensors[layer + "mlp.down_proj.weight"] = random.matrix(D, F, F)
        if biases:
            tensors[layer + "self_attn.o_proj.bias"] = random.bias(D)
            tensors[layer + "mlp.gate_proj.bias"] = np.zeros(F, dtype)
            tensors[layer + "mlp.up_proj.bias"] = np.zeros(F, dtype)
            tensors[layer + "mlp.down_proj.bias"] = random.bias(D)
    tensors["model.norm.weight"] = random.scale(D)
    if not tied:
        tensors["lm_head.weight"] = random.matrix(V, D, D)
    return config, tensors


def tele_flm(seed=0, dtype=np.float32, **keys):
    config, tensors = llama(seed, dtype, kv_heads=N)
    for key in ("head_dim", "mlp_bias"):
        del config[key]
    config |= {
        "architectures": ["TeleFLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_teleflm.TeleFLMForCausalLM"},
        "model_type": "TeleFLM",
        "use_mup": True,
        "input_mult": 1.5,
        "output_mult": 2.0,
        "mup_scale_factor": 3,
        **keys,
    }
    return config, tensors


def telechat(seed=0, dtype=np.float32, *, tied=True, prefix="", kv_heads=N, **keys):
    config = {
        "architectures": ["TelechatForCausalLM"],
        "model_type": "telechat",
        "hidden_size": D,
        "n_layer": L,
        "n_head": N,
        "n_inner": None,
        "ffn_hidden_size": F,
        "vocab_size": V,
        "layer_norm_epsilon": 1e-5,
        "training_seqlen": 32,
        "base_seqlen": 16,
        "embed_layernorm": False,
        "flash_attn": True,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        **({} if tied else {"tie_word_embeddings": False}),
        **({} if kv_heads == N else {"num_key_value_heads": kv_heads}),
        **keys,
    }
    random = Random(seed, dtype)
    tensors = {prefix + "word_embeddings.weight": random.matrix(V, D, D if tied else 1)}
    for i in range(L):
        layer = f"{prefix}h.{i}."
        tensors[layer + "input_layernorm.weight"] = random.scale(D)
        tensors[layer + "post_attention_layernorm.weight"] = random.scale(D)
        tensors[layer + "self_attention.query.weight"] = random.matrix(D, D, D)
        tensors[layer + "self_attention.key_value.weight"] = random.matrix(2 * kv_heads * (D // N), D, D)
        tensors[layer + "self_attention.dense.weight"] = random.matrix(D, D, D)
        tensors[layer + "self_attention.dense.bias"] = random.bias(D)
        tensors[layer + "mlp.gate_proj.weight"] = random.matrix(F, D, D)
        tensors[layer + "mlp.up_proj.weight"] = random.matrix(F, D, D)
        tensors[layer + "mlp.down_proj.weight"] = random.matrix(D, F, F)
        tensors[layer + "mlp.down_proj.bias"] = random.bias(D)
    tensors[prefix + "ln_f.weight"] = random.scale(D)
    if not tied:
        tensors["lm_head.weight"] = random.matrix(V, D, D)
    return config, tensors


def telechat_52b(seed=0, dtype=np.float32, **keys):
    config = {
        "model_type": "telechat",
        "n_embd": D,
        "n_inner": F,
        "n_layer": L,
        "n_head": N,
        "n_positions": 64,
        "vocab_size": V,
        "layer_norm_epsilon": 1e-5,
        "rotary_theta": 10_000,
        "relative_encoding": "rotary",
        "use_RMSNorm": True,
        "add_bias_linear": False,
        "use_mup": True,
        "input_mult": 1.0,
        "output_mult": 1.0,
        "mup_scale_factor": 2.0,
        "mup_base_width": D // 2,
        "scale_attn_by_inverse_layer_idx": True,
        **keys,
    }
    random = Random(seed, dtype)
    tensors = {"transformer.wte.weight": random.matrix(V, D, 1)}
    for i in range(L):
        layer = f"transformer.h.{i}."
        tensors[layer + "ln_1.weight"] = random.scale(D)
        tensors[layer + "ln_2.weight"] = random.scale(D)
        tensors[layer + "attn.c_attn.weight"] = random.matrix(D, 3 * D, D)
        tensors[layer + "attn.c_proj.weight"] = random.matrix(D, D, D)
        tensors[layer + "attn.masked_bias"] = np.array(-1e4, dtype)
        tensors[layer + "mlp.c_fc.weight"] = random.matrix(D, 2 * F, D)
        tensors[layer + "mlp.c_proj.weight"] = random.matrix(F, D, F)
    tensors["transformer.ln_f.weight"] = random.scale(D)
    tensors["lm_head.weight"] = random.matrix(V, D, D)
    return config, tensors


MAKERS = {"llama": llama, "tele_flm": tele_flm, "telechat": telechat, "telechat_52b": telechat_52b}


def leaves(format: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters by dotted name, as the numbers in `tensors` say."""
    tensors = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    per_layer = [
        {"telechat": _telechat_layer, "telechat_52b": _52b_layer}.get(format, _llama_layer)(tensors, i)
        for i in range(L)
    ]
    names = {
        "telechat": ("word_embeddings.weight", "ln_f.weight"),
        "telechat_52b": ("wte.weight", "ln_f.weight"),
    }.get(format, ("model.embed_tokens.weight", "model.norm.weight"))
    found = {"embed.table": tensors[names[0]], "final_norm.scale": tensors[names[1]]}
    if "lm_head.weight" in tensors:
        found["lm_head.kernel"] = tensors["lm_head.weight"].T
    return found | {f"layers.{name}": np.stack([layer[name] for layer in per_layer]) for name in per_layer[0]}


def _heads(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """[out, in] with head-major rows -> [in, heads, head_dim]."""
    heads = [matrix[j * head_dim : (j + 1) * head_dim].T for j in range(len(matrix) // head_dim)]
    return np.stack(heads, axis=1)


def _llama_layer(tensors: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    weight = lambda name: tensors[f"model.layers.{i}.{name}.weight"]  # noqa: E731
    head_dim = len(weight("self_attn.q_proj")) // N
    layer = {
        "attn_norm.scale": weight("input_layernorm"),
        "attn.q": _heads(weight("self_attn.q_proj"), head_dim),
        "attn.k": _heads(weight("self_attn.k_proj"), head_dim),
        "attn.v": _heads(weight("self_attn.v_proj"), head_dim),
        "attn.o": np.stack([weight("self_attn.o_proj")[:, j * head_dim : (j + 1) * head_dim].T for j in range(N)]),
        "mlp_norm.scale": weight("post_attention_layernorm"),
        "mlp.gate": weight("mlp.gate_proj").T,
        "mlp.up": weight("mlp.up_proj").T,
        "mlp.down": weight("mlp.down_proj").T,
    }
    if f"model.layers.{i}.mlp.down_proj.bias" in tensors:
        layer["attn.o_bias"] = tensors[f"model.layers.{i}.self_attn.o_proj.bias"]
        layer["mlp.down_bias"] = tensors[f"model.layers.{i}.mlp.down_proj.bias"]
    return layer


def _telechat_layer(tensors: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    get = lambda name: tensors[f"h.{i}.{name}"]  # noqa: E731
    d = D // N
    fused = get("self_attention.key_value.weight")
    pairs = range(len(fused) // (2 * d))
    return {
        "attn_norm.scale": get("input_layernorm.weight"),
        "attn.q": _heads(get("self_attention.query.weight"), d),
        "attn.k": np.stack([fused[2 * d * j : 2 * d * j + d].T for j in pairs], axis=1),
        "attn.v": np.stack([fused[2 * d * j + d : 2 * d * (j + 1)].T for j in pairs], axis=1),
        "attn.o": np.stack([get("self_attention.dense.weight")[:, j * d : (j + 1) * d].T for j in range(N)]),
        "attn.o_bias": get("self_attention.dense.bias"),
        "mlp_norm.scale": get("post_attention_layernorm.weight"),
        "mlp.gate": get("mlp.gate_proj.weight").T,
        "mlp.up": get("mlp.up_proj.weight").T,
        "mlp.down": get("mlp.down_proj.weight").T,
        "mlp.down_bias": get("mlp.down_proj.bias"),
    }


def _52b_layer(tensors: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    get = lambda name: tensors[f"h.{i}.{name}.weight"]  # noqa: E731
    d = D // N
    fused = get("attn.c_attn")
    q, k, v = (np.stack([fused[:, p * D + j * d : p * D + (j + 1) * d] for j in range(N)], axis=1) for p in range(3))
    return {
        "attn_norm.scale": get("ln_1"),
        "attn.q": q,
        "attn.k": k,
        "attn.v": v,
        "attn.o": np.stack([get("attn.c_proj")[j * d : (j + 1) * d] for j in range(N)]),
        "mlp_norm.scale": get("ln_2"),
        "mlp.gate": get("mlp.c_fc")[:, :F],
        "mlp.up": get("mlp.c_fc")[:, F:],
        "mlp.down": get("mlp.c_proj"),
    }
