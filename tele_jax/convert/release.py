"""A released checkpoint on disk, opened: its config, the tensors that hold each leaf of ours, and its conventions.

Conventions are the way in which the code of a release generates: what ends a text, how tokens are drawn, what stands
first. They are read from generation_config.json, tokenizer_config.json, tokenizer.json and config.json, and travel in
the checkpoint's provenance, through training and growth:

    "generation": {
      "eos_token_ids": [2],                      each of them ends a text
      "do_sample": False,                        whether it samples without being asked
      "sampling": {"temperature": 0.3, ...},     keywords of sampling.sampling; empty where the release says nothing
      "document_start": None                     the id before the first token of a text
    }
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tele_jax.config import ModelConfig, require
from tele_jax.convert import beside, configs, families, files, gguf, gguf_tokenizer
from tele_jax.convert.configs import Keys
from tele_jax.convert.families import FORMATS, Part, Tensor
from tele_jax.convert.files import Stored
from tele_jax.errors import UserError, abridged
from tele_jax.files import PathLike, Table, read_table


@dataclasses.dataclass(frozen=True)
class Release:
    """A release, opened and compared with its config.json by `open_release`.

    cfg: with the dtype that the parameters will have. keys: its config.json. parts: by leaf and layer, the part and the
    tensor in which it lies. files: that travel along. documents: files that are made from the metadata of a GGUF file,
    by name. notes: one line each, for the user. constants: by name, buffers that carry nothing and are not what such
    buffers usually are; kept to be written again. generation: how its code generates.
    """

    path: Path
    format: str
    cfg: ModelConfig
    keys: configs.Keys
    parts: Mapping[tuple[str, int | None], tuple[Part, Stored]]
    files: list[Path]
    documents: Mapping[str, Table | bytes]
    notes: list[str]
    prefix: str
    constants: dict[str, float]
    generation: Table

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the headers, and of size and times of every file: what an import goes by, resumed or not.

        The time of the last change cannot be set, unlike that of the last modification, which copying keeps.
        """
        digest = hashlib.sha256(repr(sorted(self.keys.values.items())).encode())
        stored = {part: stored for part, (_, stored) in self.parts.items()}
        digest.update(repr(sorted(map(repr, stored.values()))).encode())
        for file in sorted({s.file for s in stored.values()}):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        return digest.hexdigest()


def open_release(
    path: PathLike,
    format: str | None = None,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    rope_tables: str = "float32",
) -> Release:
    """Opens a directory or a GGUF file and compares all in it with its config.json or metadata; reads no weights.

    Args:
      format: what it has to be; by default what its config.json says.
      dtype: of the parameters: "bfloat16", "float32" or "float64"; by default that of the files, and float32 for GGUF.
      vocab_size: tokens; rows of the embedding from there on are padding. By default what the tokenizer beside the
        weights has, or for llama, and where there is none, all rows.
      rope_tables: see config.Rope; "float16" for telechat alone.

    Raises:
      UserError: another format or an unknown one, a model that tele_jax cannot run, a file or tensor that is missing,
        of another shape or unknown, pickle files, a dtype that parameters cannot have; a file is cut short or damaged.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UserError(f"format {format!r}: not one of {', '.join(FORMATS)}")
    if (file := gguf.find(path, format)) is not None:
        return _open_gguf(file, dtype, vocab_size, rope_tables)
    if not path.is_dir():
        problem = "is a file; name the directory that holds it" if path.is_file() else "no such directory"
        raise UserError(f"{path}: {problem}; expected a released checkpoint")
    keys = configs.read_json(path)
    found = configs.detect(keys)
    if format not in (None, found):
        raise UserError(f"{keys.where}: is of format {found}, not {format}; leave the format out, or say {found}")
    cfg = configs.read(keys, found)
    stored = files.read_directory(path)
    cfg = cfg.replace(scalar_head=families.SCALAR_HEAD in stored)
    prefix = "transformer." if found == "telechat" and any(n.startswith("transformer.") for n in stored) else ""
    expected = families.expected(cfg, found, prefix=prefix)
    weights = _compare(keys.where, cfg, expected, stored)
    cfg = cfg.replace(**_dtypes(weights, dtype))
    if rope_tables != "float32":
        _require_tables(found)
        cfg = cfg.replace(rope=dataclasses.replace(cfg.rope, tables=rope_tables))
    travelling = beside.find(path)
    cfg, notes = _cut_vocabulary(path, cfg, found, travelling, vocab_size)
    generation, unfollowed = read_conventions(path, keys)
    if alone := _left_alone(path, stored):
        notes.append(f"left alone: {abridged(alone)}, which {files.SINGLE} or its index does not need")
    return Release(
        path=path,
        format=found,
        cfg=cfg,
        keys=keys,
        parts={(part.leaf, part.layer): (part, stored[t.name]) for t in expected for part in t.parts},
        files=travelling,
        documents={},
        notes=[*notes, *unfollowed],
        prefix=prefix,
        generation=generation,
        constants=_read_constants(expected, stored),
    )


def _open_gguf(file: Path, dtype: str | None, vocab_size: int | None, rope_tables: str) -> Release:
    require(rope_tables == "float32", "rope tables in float16: only the code of telechat rounds them, not that of gguf")
    opened = gguf.open_file(file)
    cfg = configs.read(opened.keys, "llama")
    expected = families.expected(cfg, "gguf")
    weights = _compare(opened.keys.where, cfg, expected, opened.stored)
    cfg = cfg.replace(**_dtypes(weights, dtype or "float32"))
    cfg, notes = _cut_vocabulary(file, cfg, "llama", [], vocab_size)
    documents, unread = gguf_tokenizer.read(opened.fields)
    ends, start = _ids(opened.keys, "eos_token_id"), _ids(opened.keys, "bos_token_id")
    start = start if gguf_tokenizer.adds_start(opened.fields) else []
    kinds = sorted({getattr(stored, "kind", stored.dtype) for stored in weights})
    return Release(
        path=file,
        format="llama",
        cfg=cfg,
        keys=opened.keys,
        parts={(part.leaf, part.layer): (part, opened.stored[t.name]) for t in expected for part in t.parts},
        files=[],
        documents=documents,
        notes=[f"GGUF: weights in {', '.join(kinds)}, read as {cfg.param_dtype}", *notes, *unread],
        prefix="",
        constants=_read_constants(expected, opened.stored),
        generation={
            "eos_token_ids": ends,
            "do_sample": False,
            "sampling": {},
            "document_start": next(iter(start), None),
        },
    )


def _require_tables(format: str) -> None:
    require(
        format == "telechat", f"rope tables in float16: only the code of telechat rounds them, not that of {format}"
    )


def _left_alone(path: Path, stored: Mapping[str, Stored]) -> list[str]:
    """Names of files of weights beside those that were read."""
    read = {tensor.file.name for tensor in stored.values()}
    return sorted(file.name for file in path.glob("*.safetensors") if file.name not in read)


def _compare(where: str, cfg: ModelConfig, expected: list[Tensor], stored: dict[str, Stored]) -> list[Stored]:
    """The tensors that hold leaves. Raises UserError naming what differs from `where`, the file with the config."""
    rows = [t for t in expected if t.parts and t.parts[0].leaf == "embed.table"]
    for tensor in rows:
        if tensor.name in stored and stored[tensor.name].shape[1:] == tensor.shape[1:] != ():
            have = stored[tensor.name].shape[0]
            if have != tensor.shape[0]:
                raise UserError(
                    f"{stored[tensor.name].file}: {tensor.name} has {have:,} rows, but vocab_size in "
                    f"{Path(where).name} is {tensor.shape[0]:,}: config and weights are of different vocabularies"
                )
    for have in stored.values():
        if have.dtype not in files.DTYPES and not families.is_buffer(have.name, have.dtype):
            raise UserError(f"{have.file}: {have.name} is of dtype {have.dtype}; known are {', '.join(files.DTYPES)}")
    lines = []
    for tensor in expected:
        if tensor.name not in stored:
            if tensor.parts or tensor.constant == 0.0:
                lines.append(f"{tensor.name} {list(tensor.shape)}: missing")
        elif stored[tensor.name].shape != tensor.shape:
            have = stored[tensor.name]
            lines.append(
                f"{have.file.name}: {tensor.name}: has shape {list(have.shape)}, expected {list(tensor.shape)}"
            )
    names = {tensor.name for tensor in expected}
    for name in sorted(stored.keys() - names):
        if name == "lm_head.weight" and cfg.tie_embeddings:
            _require_same(stored[name], stored[rows[0].name])
        elif not families.is_buffer(name, stored[name].dtype):
            lines.append(f"{stored[name].file.name}: {name} {list(stored[name].shape)}: unknown")
    if lines:
        raise UserError(f"{Path(where).parent}: not what its {Path(where).name} describes: " + abridged(lines, "; "))
    return [stored[tensor.name] for tensor in expected if tensor.parts]


def _require_same(head: Stored, table: Stored) -> None:
    """A head beside a tied embedding must be its copy."""
    with files.Files() as opened:
        step, same = 2**24, (head.shape, head.dtype) == (table.shape, table.dtype)
        for begin in range(0, head.nbytes if same else 0, step):
            pieces = []
            for stored in (head, table):
                piece = np.empty((1, min(step, head.nbytes - begin)), np.uint8)
                opened.read(stored.file, np.array([stored.offset + begin]), piece)
                pieces.append(piece)
            same = same and bool((pieces[0] == pieces[1]).all())
    if not same:
        raise UserError(
            f"{head.file}: {head.name} is not {table.name}, though by config.json the two are tied "
            "(tie_word_embeddings)"
        )


def _dtypes(weights: Iterable[Stored], dtype: str | None) -> dict[str, str]:
    held: dict[str, Stored] = {}
    for stored in weights:
        held.setdefault(stored.dtype, stored)
    known = ("bfloat16", "float32", "float64")
    if dtype is None:
        if len(held) > 1:
            example = ", ".join(f"{name} ({stored.name})" for name, stored in sorted(held.items()))
            raise UserError(f"the weights are of several dtypes: {example}; choose one with --dtype")
        dtype = files.DTYPES[next(iter(held))].name
        if dtype not in known:
            raise UserError(
                f"the weights are {dtype}, which parameters of tele_jax cannot be; choose --dtype float32, which "
                "changes no number, or --dtype bfloat16, which rounds"
            )
    elif dtype not in known:
        raise UserError(f"dtype {dtype!r}: not one of {', '.join(known)}")
    return {"param_dtype": dtype, "dtype": dtype}


def _cut_vocabulary(
    path: Path, cfg: ModelConfig, format: str, travelling: list[Path], vocab_size: int | None
) -> tuple[ModelConfig, list[str]]:
    rows = cfg.padded_vocab_size
    counted = beside.count_ids(travelling)
    if counted is not None and counted[0] > rows:
        raise UserError(
            f"{path / counted[1]}: has {counted[0]:,} ids, but the embedding only {rows:,} rows: a tokenizer of "
            "another model"
        )
    if vocab_size is not None:
        if not 0 < vocab_size <= rows:
            raise UserError(f"vocab_size {vocab_size}: the embedding has {rows:,} rows")
        if counted is not None and vocab_size < counted[0]:
            raise UserError(f"vocab_size {vocab_size}: {path / counted[1]} has {counted[0]:,} ids")
        source = "as told"
    elif counted is not None and format != "llama":
        vocab_size, source = counted[0], f"that many ids are in {counted[1]}"
    else:
        return cfg, []
    if vocab_size == rows:
        return cfg, []
    note = f"vocabulary: {vocab_size:,} tokens ({source}); rows {vocab_size:,} to {rows - 1:,} are padding"
    return cfg.replace(vocab_size=vocab_size, padded_vocab_size=rows), [note]


def _read_constants(expected: Iterable[Tensor], stored: Mapping[str, Stored]) -> dict[str, float]:
    """Buffers that are not full of what they should be. Raises UserError for biases that ours do not have."""
    odd = {}
    with files.Files() as opened:
        for tensor in expected:
            if tensor.parts or tensor.name not in stored:
                continue
            have = stored[tensor.name]
            dtype = files.DTYPES[have.dtype]
            raw = np.empty((1, math.prod(have.shape)), f"u{dtype.itemsize}")
            have.read(opened, np.zeros(1, np.int64), raw)
            values = raw.view(dtype).astype(np.float64)
            if tensor.constant == 0.0 and values.any():
                raise UserError(f"{have.file}: {have.name} is not zero; tele_jax has no bias there")
            if tensor.constant != 0.0 and values.item() != float(jnp.asarray(tensor.constant, dtype)):
                odd[tensor.name] = values.item()
    if name := next((name for name, value in odd.items() if not np.isfinite(value)), None):
        raise UserError(f"{stored[name].file}: {name}: is not a finite number")
    return odd


# ---- conventions -----------------------------------------------------------------------------------------------------


# Keys that choose among tokens in another way than ours; what they are when they do nothing.
_OTHER_WAYS: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "min_p": (0, 0.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "bad_words_ids": (),
    "force_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
}
_DEFAULT_TOP_K = 50  # of transformers, where a model samples and the file does not say
_LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast")  # put <s> first unless told otherwise


def read_conventions(path: Path, config: Keys) -> tuple[Table, list[str]]:
    """The conventions of the release in a directory, and a line for each key that is not followed.

    Raises:
      UserError: a file that is no table of JSON, or a value of another type; names file and key.
    """
    generation = _table(path / "generation_config.json")
    stated = generation if generation.values else config
    drawing = generation.get("do_sample", bool, False)
    sampling: Table = {}
    if generation.values:
        for name in ("temperature", "top_p", "repetition_penalty"):
            if (value := generation.get(name, float, None)) is not None:
                sampling[name] = value
        top_k = generation.get("top_k", int, _DEFAULT_TOP_K if drawing else None)
        if top_k:  # 0 is all of them
            sampling["top_k"] = top_k
        if drawing:
            sampling.setdefault("temperature", 1.0)
        _check(sampling, generation.where)
    notes = [
        f"generation_config.json: {name} is {value!r}, which is not followed"
        for name, value in generation.values.items()
        if name in _OTHER_WAYS and value is not None and value not in _OTHER_WAYS[name] and value not in ([], {})
    ]
    return {
        "eos_token_ids": _ids(stated, "eos_token_id"),
        "do_sample": drawing,
        "sampling": sampling,
        "document_start": _document_start(path, stated),
    }, notes


def _table(file: Path) -> Keys:
    return Keys(read_table(file) if file.exists() or file.is_symlink() else {}, str(file))


def _check(sampling: Mapping[str, Any], where: str) -> None:
    from tele_jax.inference.generate import sampling as check

    try:
        check(**sampling)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _ids(keys: Keys, name: str) -> list[int]:
    value = keys.values.get(name)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise UserError(f"{keys.where}: {name} is {value!r}, expected an id or a list of ids")
    return [i for i in found if i >= 0]  # -1 is none


def _document_start(path: Path, stated: Keys) -> int | None:
    """The id that the tokenizer of the release puts before a text."""
    tokenizer = _table(path / "tokenizer_config.json")
    adds = tokenizer.get("add_bos_token", bool, None)
    if adds is None:
        by_template = _first_of_template(_table(path / "tokenizer.json"))
        if by_template is not None:
            return by_template
        adds = tokenizer.values.get("tokenizer_class") in _LLAMA_TOKENIZERS
    bos = _ids(stated, "bos_token_id") if adds else []
    return bos[0] if bos else None


def _first_of_template(document: Keys) -> int | None:
    """The id that the post-processor of a tokenizer.json puts before one text."""
    processor = document.get("post_processor", dict, {})
    parts = processor.get("processors")
    for part in parts if isinstance(parts, list) else [processor]:
        try:
            if part["type"] == "TemplateProcessing" and "SpecialToken" in part["single"][0]:
                return int(part["special_tokens"][part["single"][0]["SpecialToken"]["id"]]["ids"][0])
        except (KeyError, TypeError, IndexError, ValueError):
            continue
    return None
