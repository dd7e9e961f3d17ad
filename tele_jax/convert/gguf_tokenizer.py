"""The tokenizer in the metadata of a GGUF file: to the files that load_vocabulary reads, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tele_jax.config import ModelConfig
from tele_jax.convert import beside
from tele_jax.data.templates import document_start
from tele_jax.data.vocabulary import SentencePieceVocabulary, Vocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import Table, read_table

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2 = {**_BYTES, "use_regex": True}


def _split(pattern: str) -> list[Table]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, {**_BYTES, "use_regex": False}]


# How text is cut before byte-level BPE, by llama.cpp's name for it: as in the tokenizer.json of GPT-2, SmolLM, Llama 3
# and Qwen2. llama.cpp knows more names; a tokenizer of another one is not carried over.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: Mapping[str, list[Table]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": _split(_WORDS % "{1,3}"),
    "qwen2": _split(_WORDS % ""),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # in `token_type`; the numbers are SentencePiece's


def read(fields: Mapping[str, Any]) -> tuple[dict[str, Table | bytes], list[str]]:
    """(files by name, notes) of the tokenizer in the metadata of a GGUF file."""
    model, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if not tokens or not kinds or len(tokens) != len(kinds):
        return {}, ["no tokenizer: the metadata have no list of tokens and of their types"]
    documents: dict[str, Table | bytes] = {}
    if model == "llama" and "tokenizer.ggml.scores" in fields:
        documents["tokenizer.model"] = _sentencepiece(fields, tokens, kinds)
    elif model == "gpt2" and cut in CUTS:
        documents["tokenizer.json"] = _byte_level(fields["tokenizer.ggml.merges"], tokens, kinds, cut)
    else:
        return {}, [
            f"no tokenizer: that of the file ({model!r}, cut as {cut!r}) is none that tele_jax builds; name one"
        ]
    config: Table = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_start(fields)}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for name, key in names.items():
        i = fields.get(f"tokenizer.ggml.{key}_token_id")
        if i is not None and i < len(tokens):
            config[name] = tokens[i]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return documents | {"tokenizer_config.json": config}, []


def adds_start(fields: Mapping[str, Any]) -> bool:
    """Tells whether llama.cpp puts the BOS token before a text; its default is yes for SentencePiece alone."""
    return fields.get("tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.model") == "llama")


def _byte_level(merges: list[str], tokens: list[str], kinds: list[int], cut: str) -> Table:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **plain, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    cuts = CUTS[cut]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": cuts[0] if len(cuts) == 1 else {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": None,
        "decoder": {**_GPT2, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "ignore_merges": cut == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ", 1) for pair in merges],
        },
    }


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> bytes:
    proto = need("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto()
    for token, kind, score in zip(tokens, kinds, fields["tokenizer.ggml.scores"], strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    train, normal = model.trainer_spec, model.normalizer_spec
    train.model_type, train.byte_fallback = train.BPE, True
    for key, name in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos"), ("pad_id", "padding")):
        setattr(train, key, fields.get(f"tokenizer.ggml.{name}_token_id", -1 if name == "padding" else 0))
    normal.name, normal.remove_extra_whitespaces, normal.escape_whitespaces = "identity", False, True
    normal.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    return model.SerializeToString()


def of_checkpoint(
    files: Sequence[Path], provenance: Sequence[Table], cfg: ModelConfig, template: str | None
) -> tuple[Table, Table, list[str]]:
    """(metadata, special ids for the model's config, notes) of the tokenizer among the files beside a checkpoint."""
    tokenizer = next((file for name in beside.TOKENIZERS for file in files if file.name == name), None)
    if tokenizer is None:
        return {}, {}, ["no tokenizer beside the checkpoint: the file has none, and llama.cpp runs it on ids alone"]
    try:
        vocabulary = load_vocabulary(tokenizer)
    except UserError as error:
        if template is not None:
            raise
        return {}, {}, [f"no tokenizer in the file: {error}"]
    documents, ids, notes = beside.make(vocabulary, provenance, cfg.max_seq_len, template)
    chat = documents["tokenizer_config.json"].get("chat_template")
    metadata, more = write(vocabulary, cfg.vocab_size, document_start(vocabulary, provenance), chat)
    return metadata, ids, notes + more


def write(vocabulary: Vocabulary, rows: int, start: int | None, template: str | None) -> tuple[Table, list[str]]:
    """(metadata by key, notes) of a vocabulary; without metadata where llama.cpp would cut text otherwise.

    rows: of the embedding; ids that the vocabulary does not have are marked as unused.
    start: the id that stands before a text. template: the chat template in Jinja.
    """
    found = _of_sentencepiece(vocabulary) if isinstance(vocabulary, SentencePieceVocabulary) else _of_json(vocabulary)
    if found is None:
        return {}, ["no tokenizer in the file: llama.cpp has no name for the way in which it cuts text"]
    key = "tokenizer.ggml."
    unused = {"tokens": lambda i: f"[PAD{i}]", "token_type": lambda _: UNUSED, "scores": lambda _: 0.0}
    for name, make in unused.items():
        if name in found:
            found[name] = [*found[name], *map(make, range(len(found[name]), rows))][:rows]
    found |= {"add_bos_token": start is not None, "add_space_prefix": vocabulary.adds_dummy_prefix}
    for name, i in (("unknown_token_id", vocabulary.unk_id), ("bos_token_id", vocabulary.bos_id)):
        if i >= 0:
            found[name] = i
    if start is not None:
        found["bos_token_id"] = start
    return {key + name: value for name, value in found.items()} | (
        {} if template is None else {"tokenizer.chat_template": template}
    ), []


def _of_sentencepiece(vocabulary: SentencePieceVocabulary) -> Table:
    pieces = need("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(vocabulary.sp_model).pieces
    return {
        "model": "llama",
        "tokens": [piece.piece for piece in pieces],
        "scores": [float(piece.score) for piece in pieces],
        "token_type": [int(piece.type) for piece in pieces],
    }


def _of_json(vocabulary: Vocabulary) -> Table | None:
    document = read_table(vocabulary.path)
    cuts = document["pre_tokenizer"]
    cuts = cuts["pretokenizers"] if cuts["type"] == "Sequence" else [cuts]
    cut = next((name for name, known in CUTS.items() if list(map(_essence, known)) == list(map(_essence, cuts))), None)
    if cut is None:
        return None
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in document.get("added_tokens") or []}
    names = [vocabulary.piece(i) for i in range(vocabulary.vocab_size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": cut,
        "tokens": [name or f"[PAD{i}]" for i, name in enumerate(names)],
        "token_type": [added.get(i, NORMAL if name else UNUSED) for i, name in enumerate(names)],
        "merges": merges,
    }


def _essence(cut: Table) -> Table:
    """A pre-tokenizer without the keys that do not change ids."""
    return {key: value for key, value in cut.items() if key != "trim_offsets"}
