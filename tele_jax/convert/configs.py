"""config.json of a release <-> ModelConfig. Keys and their meaning: docs/convert.md."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from tele_jax import files
from tele_jax.config import ModelConfig, Ntk, Rope
from tele_jax.convert import families
from tele_jax.convert.families import FORMATS
from tele_jax.convert.keys import require_known
from tele_jax.errors import UserError
from tele_jax.files import Table

_REQUIRED = object()
# Tele-FLM's init std is no key of its configs: as in published.py, 0.024 for matrices at muP base width 256.
_TELE_FLM_STD = 4e-3
_TELE_FLM_MATRIX_STD_AT_256 = 0.024
# L0 of TeleChat's rotary rule is no key either (newer copies have base_seqlen): the code of the tied 7B family, which
# has this vocabulary, says 4096, that of the 12B 8192.
_VOCAB_7B = 160_256
_TOKEN_IDS = ("unk_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
_RELEASED_TOKEN_IDS = {
    "tele_flm": {"bos_token_id": 1, "eos_token_id": 2},
    "telechat": {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
}
# What a config of ours has that no config.json of theirs says.
UNSAID = ("vocab_size", "init_std", "matrix_init_std", "dtype", "param_dtype", "remat", "attention")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a config.json. where: for messages, the path of the file."""

    values: Mapping[str, Any]
    where: str

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A value of a type; `null` counts as absent. Raises UserError."""
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{self.where}: {name} is {value!r}, expected {kind.__name__}")
        return value

    def expect(self, **allowed: Any) -> None:
        """Raises UserError where a key is there and has another value: the model would be another function."""
        for name, value in allowed.items():
            if self.values.get(name) not in (None, value):
                found, known = json.dumps(self.values[name]), json.dumps(value)
                raise UserError(f"{self.where}: {name} is {found}, but tele_jax has only {known}")


def read_json(path: Path) -> Keys:
    """The config.json of a directory. Raises UserError."""
    file = path / "config.json"
    missing = "missing; a released checkpoint is a directory with config.json and its weights"
    return Keys(files.read_table(file, missing=missing), str(file))


def detect(keys: Keys) -> str:
    """The format that a config.json is of. Raises UserError for an unknown architecture."""
    model_type = keys.get("model_type", str)
    if model_type.lower() == "teleflm":
        return "tele_flm"
    if model_type == "telechat":
        return "telechat_52b" if "n_embd" in keys.values else "telechat"
    if model_type == "llama":
        return "llama"
    raise UserError(
        f"{keys.where}: unknown architecture {model_type!r}; known are TeleFLM, telechat and llama (formats "
        f"{', '.join(FORMATS)})"
    )


def read(keys: Keys, format: str) -> ModelConfig:
    """The model that a config.json describes; all rows of its vocabulary count as tokens.

    Raises:
      UserError: a key is missing, of another type, says what tele_jax cannot do, or is set and not known (keys.py).
    """
    noted = keys.values if isinstance(keys.values, _Noting) else _Noting(keys.values)
    keys = Keys(noted, keys.where)
    if keys.values.get("quantization_config") is not None:
        raise UserError(f"{keys.where}: quantized weights (quantization_config); tele_jax reads plain ones only")
    try:
        cfg = ModelConfig(**_READERS[format](keys))
        require_known(noted, noted.read, keys.where, format)
        return cfg
    except UserError as error:
        message = str(error)
        raise error if message.startswith(keys.where) else UserError(f"{keys.where}: {message}") from None


def write(cfg: ModelConfig, format: str, dtype: DTypeLike, release: Mapping[str, Any] | None = None) -> Table:
    """The config.json of a model that is as the format has it (families.fold).

    dtype: of the weights. release: {"format", "config"} of the release that the model was imported from. Where it is of
    this format, its config is returned as it was if the model is still the one it describes; else those of its keys
    are kept that say nothing about the model. Of another format only the ids of special tokens are taken.
    """
    name = jnp.dtype(dtype).name
    source = {} if release is None else release["config"]
    if release is None or release["format"] != format:
        ids = {key: source[key] for key in _TOKEN_IDS if key in source}
        return {**_WRITERS[format](cfg), **_RELEASED_TOKEN_IDS.get(format, {}), **ids, "torch_dtype": name}
    spelled = {key: name for key in ("torch_dtype", "dtype") if key in source}
    noted = _Noting(source)
    if _describes(noted, cfg, format):
        return {**source, **spelled}
    kept = {key: value for key, value in source.items() if key not in noted.read}
    layers = {"layer_types": ["full_attention"] * cfg.num_layers} if source.get("layer_types") else {}
    return {**kept, **_WRITERS[format](cfg), **layers, **spelled}


class _Noting(dict):
    """A config that notes which of its keys are read: those describe the model, and all others do not."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _describes(source: Mapping[str, Any], cfg: ModelConfig, format: str) -> bool:
    was = read(Keys(source, "config.json"), format)
    unsaid = {key: getattr(cfg, key) for key in UNSAID}
    rope = dataclasses.replace(was.rope, tables=cfg.rope.tables)
    return was.replace(padded_vocab_size=was.padded_vocab_size, rope=rope, **unsaid) == cfg


# ---- Llama and Tele-FLM ------------------------------------------------------------------------------------------


# The keys that are fields of ours as they stand: (their key, our field, default); both ways.
_LLAMA_KEYS = (
    ("hidden_size", "embed_dim", _REQUIRED),
    ("intermediate_size", "mlp_dim", _REQUIRED),
    ("num_hidden_layers", "num_layers", _REQUIRED),
    ("num_attention_heads", "num_heads", _REQUIRED),
    ("num_key_value_heads", "num_kv_heads", None),
    ("head_dim", "head_dim", None),
    ("vocab_size", "vocab_size", _REQUIRED),
    ("max_position_embeddings", "max_seq_len", 2048),
    ("rms_norm_eps", "rms_eps", 1e-6),
    ("tie_word_embeddings", "tie_embeddings", False),
    ("initializer_range", "init_std", 0.02),
)
_TELECHAT_KEYS = (
    ("hidden_size", "embed_dim", _REQUIRED),
    ("n_layer", "num_layers", _REQUIRED),
    ("n_head", "num_heads", _REQUIRED),
    ("num_key_value_heads", "num_kv_heads", None),
    ("ffn_hidden_size", "mlp_dim", _REQUIRED),
    ("vocab_size", "vocab_size", _REQUIRED),
    ("layer_norm_epsilon", "rms_eps", 1e-5),
    ("tie_word_embeddings", "tie_embeddings", True),
    ("initializer_range", "init_std", 0.02),
)
_52B_KEYS = (
    ("n_embd", "embed_dim", _REQUIRED),
    ("n_inner", "mlp_dim", _REQUIRED),
    ("n_layer", "num_layers", _REQUIRED),
    ("n_head", "num_heads", _REQUIRED),
    ("n_positions", "max_seq_len", 4096),
    ("vocab_size", "vocab_size", _REQUIRED),
    ("layer_norm_epsilon", "rms_eps", 1e-5),
)
_TYPES = {"rms_eps": float, "init_std": float, "tie_embeddings": bool}  # other fields are whole numbers


def _read_keys(keys: Keys, table: Sequence[tuple[str, str, Any]]) -> Table:
    return {field: keys.get(key, _TYPES.get(field, int), default) for key, field, default in table}


def _write_keys(cfg: ModelConfig, table: Sequence[tuple[str, str, Any]]) -> Table:
    """The table's keys; the vocabulary of a file has all rows of the embedding."""
    return {key: getattr(cfg, "padded_vocab_size" if key == "vocab_size" else field) for key, field, _ in table}


def _read_llama(keys: Keys) -> Table:
    keys.expect(hidden_act="silu", partial_rotary_factor=1.0, sliding_window=None)
    _read_layer_types(keys)
    biases = keys.get("attention_bias", bool, False), keys.get("mlp_bias", bool, False)
    if biases[0] != biases[1]:
        raise UserError(
            f"{keys.where}: attention_bias is {biases[0]} and mlp_bias is {biases[1]}; tele_jax has both or none"
        )
    return {**_read_keys(keys, _LLAMA_KEYS), "rope": Rope(theta=_read_theta(keys)), "output_biases": biases[0]}


def _read_theta(keys: Keys) -> float:
    """transformers wrote rope_theta and rope_scaling up to version 4, rope_parameters from 5 on; all have to agree."""
    bases = {"rope_theta": keys.get("rope_theta", float, None)}
    for name in ("rope_parameters", "rope_scaling"):
        table = keys.get(name, dict, {})
        inner = Keys(table, f"{keys.where}: {name}")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise UserError(f"{keys.where}: {name}: rotary scaling {kind!r} of Llama is none that tele_jax has")
        inner.expect(partial_rotary_factor=1.0)
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        if unknown := [key for key, value in table.items() if key not in known and value is not None]:
            raise UserError(f"{inner.where}: {unknown[0]} is {table[unknown[0]]!r}, which tele_jax does not know there")
        bases[f"rope_theta in {name}"] = inner.get("rope_theta", float, None)
    stated = {name: base for name, base in bases.items() if base is not None}
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{name} is {base:g}" for name, base in stated.items())
        raise UserError(f"{keys.where}: {said}: two rotary bases, of which programs take one or the other")
    return next(iter(stated.values()), 10_000.0)


def _read_layer_types(keys: Keys) -> None:
    """Every layer of ours has full attention; newer configs say it layer by layer."""
    kinds, layers = keys.get("layer_types", list, []), keys.get("num_hidden_layers", int)
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise UserError(f"{keys.where}: layer_types holds {other[0]!r}, but tele_jax has only full_attention")
    if kinds and len(kinds) != layers:
        raise UserError(f"{keys.where}: layer_types describes {len(kinds)} layers, but num_hidden_layers is {layers}")


def _write_llama(cfg: ModelConfig) -> Table:
    theta = families.constant_theta(cfg, "llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_write_keys(cfg, _LLAMA_KEYS),
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": cfg.output_biases,
        "mlp_bias": cfg.output_biases,
        "hidden_act": "silu",
        "use_cache": True,
        **({"num_labels": 1} if cfg.scalar_head else {}),
    }


def _read_tele_flm(keys: Keys) -> Table:
    keys.expect(attention_bias=False, mlp_bias=False)
    fields = _read_llama(keys)
    return fields | _read_multipliers(keys, fields["embed_dim"])


def _read_multipliers(keys: Keys, embed: int) -> Table:
    """output_mult / mup_scale_factor multiplies the logits; the factor is the width over muP's base width."""
    if embed < 1:
        raise UserError(f"{keys.where}: the hidden size is {embed}, must be above 0")
    if not keys.get("use_mup", bool, False):
        return {"init_std": _TELE_FLM_STD, "matrix_init_std": _TELE_FLM_MATRIX_STD_AT_256 / math.sqrt(embed / 256)}
    scale = keys.get("mup_scale_factor", float)
    output_mult = keys.get("output_mult", float)
    if not scale > 0:
        raise UserError(f"{keys.where}: mup_scale_factor is {scale}, must be above 0")
    base = embed / scale
    stated = keys.get("mup_base_width", int, None)
    if stated is not None and stated != base:
        raise UserError(
            f"{keys.where}: mup_base_width is {stated}, but {embed} (hidden size) / {scale:g} (mup_scale_factor) is "
            f"{base:g}"
        )
    if base != int(base) or base < 1:  # no width of a model: only the quotient counts then
        output_mult, base = output_mult / scale, embed
    return {
        "input_mult": keys.get("input_mult", float),
        "output_mult": output_mult,
        "mup_base_width": int(base),
        "init_std": _TELE_FLM_STD,
        "matrix_init_std": _TELE_FLM_MATRIX_STD_AT_256 * math.sqrt(256 / base),
    }


def _write_multipliers(cfg: ModelConfig) -> Table:
    return {
        "use_mup": True,
        "input_mult": cfg.input_mult,
        "output_mult": cfg.output_mult,
        "mup_scale_factor": cfg.width_ratio,
    }


def _write_tele_flm(cfg: ModelConfig) -> Table:
    keys = _write_llama(cfg)
    for key in ("head_dim", "rope_scaling", "rope_parameters", "mlp_bias", "initializer_range"):
        del keys[key]  # none of the released configs'
    return {
        **keys,
        "architectures": ["TeleFLMForCausalLM"],
        "model_type": "TeleFLM",
        **_write_multipliers(cfg),
    }


# ---- TeleChat ----------------------------------------------------------------------------------------------------


def _read_telechat(keys: Keys) -> Table:
    keys.expect(embed_layernorm=False, logn=False, apply_residual_connection_post_layernorm=False, semi_causal=False)
    trained, fields = keys.get("training_seqlen", int), _read_keys(keys, _TELECHAT_KEYS)
    usual = _original_length(fields["tie_embeddings"], fields["vocab_size"])
    return {
        **fields,
        "max_seq_len": keys.get("seq_length", int, trained),
        "rope": Rope(ntk=Ntk(original_length=keys.get("base_seqlen", int, usual), trained_length=trained)),
        "output_biases": True,
    }


def _original_length(tied: bool, vocab: int) -> int:
    return 4096 if tied or vocab == _VOCAB_7B else 8192


def _write_telechat(cfg: ModelConfig) -> Table:
    ntk = cfg.rope.ntk
    assert ntk is not None  # families.require_expressible
    keys = {
        "architectures": ["TelechatForCausalLM"],
        "model_type": "telechat",
        **_write_keys(cfg, _TELECHAT_KEYS),
        "training_seqlen": ntk.trained_length,
        "seq_length": cfg.max_seq_len,
        "embed_layernorm": False,
        "logn": False,
        "apply_residual_connection_post_layernorm": False,
        "flash_attn": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if cfg.num_kv_heads == cfg.num_heads:
        del keys["num_key_value_heads"]
    if ntk.original_length != _original_length(cfg.tie_embeddings, cfg.padded_vocab_size):
        keys["base_seqlen"] = ntk.original_length
    return keys


# ---- TeleChat-52B ------------------------------------------------------------------------------------------------


def _read_52b(keys: Keys) -> Table:
    keys.expect(relative_encoding="rotary", use_RMSNorm=True, add_bias_linear=False, tie_word_embeddings=False)
    fields = _read_keys(keys, _52B_KEYS)
    rope = Rope(theta=keys.get("rotary_theta", float, 10_000.0), ntk=families.NTK_52B)
    return {**fields, "rope": rope, **_read_multipliers(keys, fields["embed_dim"])}


def _write_52b(cfg: ModelConfig) -> Table:
    ntk = cfg.rope.ntk
    keys = {
        "model_type": "telechat",
        **_write_keys(cfg, _52B_KEYS),
        "rotary_theta": cfg.rope.theta if ntk == families.NTK_52B else families.constant_theta(cfg, "telechat_52b"),
        "relative_encoding": "rotary",
        "use_RMSNorm": True,
        "add_bias_linear": False,
        **_write_multipliers(cfg),
    }
    if cfg.mup_base_width is not None:
        keys["mup_base_width"] = cfg.mup_base_width
    return keys


_READERS = {"tele_flm": _read_tele_flm, "telechat": _read_telechat, "telechat_52b": _read_52b, "llama": _read_llama}
_WRITERS = {"tele_flm": _write_tele_flm, "telechat": _write_telechat, "telechat_52b": _write_52b, "llama": _write_llama}
