"""GGUF files, the format of llama.cpp: a Llama is read from one, quantised or not, and written in three dtypes.

The package `gguf` (extra [gguf]) reads and writes metadata, and dequantises. Numbers go through region.py in pieces,
as those of safetensors do: a quantised tensor is never whole in memory. Tensors and their names: families.expected.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tele_jax.convert.configs import Keys
from tele_jax.convert.families import Tensor
from tele_jax.convert.files import DTYPES, Files, Stored
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import Table, require_regular

SINGLE = "model.gguf"
_MAGIC = b"GGUF"
# Keys of metadata that are keys of a Llama's config.json; both ways. The first ones have to be there.
_REQUIRED = (
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("context_length", "max_position_embeddings"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
)
_OPTIONAL = (
    ("attention.head_count_kv", "num_key_value_heads"),
    ("rope.dimension_count", "head_dim"),
    ("rope.freq_base", "rope_theta"),
    ("vocab_size", "vocab_size"),
)
# Channels of a head: without them llama.cpp takes width / heads, and refuses a model of other heads.
_HEAD_SIZES = ("attention.key_length", "attention.value_length")
# Keys that may have one value only: with another, the model would be another function.
_ONLY: Mapping[str, Any] = {
    "rope.scaling.type": "none",
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "tensor_data_layout": "Meta AI original pth",
}
_IDS = (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"), ("padding_token_id", "pad_token_id"))


@dataclasses.dataclass(frozen=True)
class Quantised(Stored):
    """A quantised tensor, which reads as float32. kind: its quantisation, such as Q4_1."""

    kind: str

    @property
    def nbytes(self) -> int:
        numbers, size = self._block
        return math.prod(self.shape) // numbers * size

    @property
    def _block(self) -> tuple[int, int]:
        """(numbers, bytes) of a block, in which numbers share their scales."""
        gguf = _package()
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]

    def read(self, files: Files, places: np.ndarray, rows: np.ndarray) -> None:
        """Reads whole blocks, dequantises them, and takes out the numbers asked for."""
        gguf, (numbers, size), width = _package(), self._block, rows.shape[1]
        first, last = places // numbers, -(-(places + width) // numbers)
        count = int((last - first).max())
        first = np.minimum(first, math.prod(self.shape) // numbers - count)  # no block behind the last one
        raw = np.empty((len(places), count * size), np.uint8)
        files.read(self.file, self.offset + first * size, raw)
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType[self.kind])
        inside = (places - first * numbers)[:, None] + np.arange(width)
        rows[...] = np.take_along_axis(values, inside, axis=1).view(rows.dtype)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A GGUF file without its numbers. keys: its metadata as the config.json of a Llama. fields: all metadata."""

    keys: Keys
    stored: dict[str, Stored]
    fields: Mapping[str, Any]


def _package() -> Any:
    return need("gguf", how="pip install tele_jax[gguf]")


def find(path: Path, format: str | None) -> Path | None:
    """The GGUF file that a path names, itself or the only one in a directory; None where that is another release.

    Raises:
      UserError: the format is to be gguf and there is no such file, or there are several; or it is to be another one.
    """
    wanted = format == "gguf"
    if path.is_file():
        with path.open("rb") as stream:
            found = [path] if wanted or stream.read(4) == _MAGIC else []
    else:
        found = sorted(path.glob("*.gguf")) if wanted or not (path / "config.json").exists() else []
    if wanted and len(found) != 1:
        raise UserError(f"{path}: {len(found)} GGUF files (*.gguf) there; name one")
    if found and format not in (None, "gguf"):
        raise UserError(f"{path}: is of format gguf, not {format}; leave the format out, or say gguf")
    return found[0] if len(found) == 1 else None


def open_file(path: Path) -> Opened:
    """Reads the metadata and the list of tensors of a GGUF file.

    Raises:
      UserError: no GGUF file, one of another family, a quantisation that `gguf` does not read, rotary scaling, a part
        of a split file; the file is cut short or damaged.
    """
    require_regular(path)
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of numpy and of the package, which checks little
        with path.open("rb") as stream:
            what = "damaged or cut short" if stream.read(4) == _MAGIC else "not a GGUF file"
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path}: {what}, or with a quantisation that the package gguf does not know ({detail})"
        ) from None
    family = fields.get("general.architecture")
    if family != "llama":
        raise UserError(f"{path}: is a GGUF file of the family {family!r}; tele_jax reads llama")
    if reader.byte_order != "I" or np.little_endian is False:
        raise UserError(
            f"{path}: its bytes are in another order than this machine's; convert it with gguf-convert-endian"
        )
    if fields.get("split.count", 1) > 1:
        raise UserError(f"{path}: is one of {fields['split.count']} parts; join them with llama-gguf-split --merge")
    stored = {tensor.name: _stored(path, tensor) for tensor in reader.tensors}
    return Opened(Keys(_config(path, fields, stored), str(path)), stored, fields)


def _stored(path: Path, tensor: Any) -> Stored:
    kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape.tolist()))
    if kind in DTYPES:
        return Stored(tensor.name, path, int(tensor.data_offset), shape, kind)
    gguf = _package()
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]), np.uint8), tensor.tensor_type)
    except (NotImplementedError, KeyError):
        raise UserError(
            f"{path}: {tensor.name} is quantised as {kind}, which the package gguf does not read; take another file"
        ) from None
    return Quantised(tensor.name, path, int(tensor.data_offset), shape, "F32", kind)


def _config(path: Path, fields: Mapping[str, Any], stored: Mapping[str, Stored]) -> Table:
    """The metadata as the config.json of a Llama release."""
    own = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    if missing := [key for key, _ in _REQUIRED if key not in own]:
        raise UserError(f"{path}: llama.{missing[0]} is missing")
    config = {theirs: _shortest(own.pop(key)) for key, theirs in (*_REQUIRED, *_OPTIONAL) if key in own}
    for key in _HEAD_SIZES:
        size = own.pop(key, None)
        if size is not None and size != config.setdefault("head_dim", size):
            raise UserError(
                f"{path}: llama.{key} is {size}, but heads of {config['head_dim']} rotate; tele_jax has one"
            )
    for key, value in own.items():
        if key not in _ONLY or value != _ONLY[key]:
            known = f"has only {_ONLY[key]!r}" if key in _ONLY else "does not know it: it may describe another model"
            raise UserError(f"{path}: llama.{key} is {value!r}, but tele_jax {known}")
    if "vocab_size" not in config and "token_embd.weight" in stored:
        config["vocab_size"] = stored["token_embd.weight"].shape[0]
    biases = "blk.0.attn_output.bias" in stored
    ids = {theirs: fields[f"tokenizer.ggml.{key}"] for key, theirs in _IDS if f"tokenizer.ggml.{key}" in fields}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        **ids,
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": biases,
        "mlp_bias": biases,
    }


def _shortest(value: Any) -> Any:
    """A float32 of the metadata as the shortest decimal that is the same float32: 1e-05 and not 9.99999975e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# ---- writing -----------------------------------------------------------------------------------------------------


def create(
    file: Path, tensors: Sequence[Tensor], config: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> dict[str, Stored]:
    """Makes a file of its full size with its metadata, but without numbers.

    config: config.json of the Llama. tokenizer: metadata of the tokenizer by key; empty for none.
    """
    gguf = _package()
    with _quiet():
        writer = gguf.GGUFWriter(file, "llama")
        for key, theirs in (*_REQUIRED, *_OPTIONAL):
            _add(gguf, writer, f"llama.{key}", config[theirs])
        for key in _HEAD_SIZES:
            _add(gguf, writer, f"llama.{key}", config["head_dim"])
        for key, theirs in _IDS:
            i = config.get(theirs)
            if (i := i[0] if isinstance(i, list) else i) is not None:
                _add(gguf, writer, f"tokenizer.ggml.{key}", i)
        kinds = {dtype: gguf.GGMLQuantizationType[name] for name, dtype in DTYPES.items()}
        matrix = next(jnp.dtype(t.dtype) for t in tensors if len(t.shape) > 1)
        types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
        _add(gguf, writer, "general.file_type", int(gguf.LlamaFileType[types[matrix.name]]))
        for key, value in tokenizer.items():
            _add(gguf, writer, key, value)
        for tensor in tensors:
            kind = kinds[jnp.dtype(tensor.dtype)]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
    align = writer.data_alignment
    end, stored = -(-file.stat().st_size // align) * align, {}
    names = {dtype: name for name, dtype in DTYPES.items()}
    for tensor in tensors:
        stored[tensor.name] = Stored(tensor.name, file, end, tensor.shape, names[jnp.dtype(tensor.dtype)])
        end += -(-tensor.nbytes // align) * align
    with file.open("r+b") as stream:
        stream.truncate(end)
    return stored


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}.get(type(value), kinds.ARRAY)
    writer.add_key_value(key, value, kind)


@contextlib.contextmanager
def _quiet():
    """Keeps back what the writer logs about its plan."""
    logger = logging.getLogger("gguf.gguf_writer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
