"""The small files beside the weights: the tokenizer and what belongs to it, as they travel, and as they are made.

A Llama export is complete with them: transformers, with which it is tested, and other programs read tokenizer.json,
tokenizer_config.json (with the chat template) and generation_config.json, with nothing of ours installed, and
`apply_chat_template` gives the ids of `tele chat`. Only the protection against typed markers stays here: those programs
read a marker in a message as one.
"""

import contextlib
import fnmatch
import json
import operator
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tele_jax.data import templates
from tele_jax.data.templates import Template, document_start
from tele_jax.data.vocabulary import SentencePieceVocabulary, Vocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import Table, read_bytes, read_table, require_regular
from tele_jax.inference.chat import find_tokenizer

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
# Patterns of what travels. Programs of a release (*.py) go back only into the format that they are for.
_TOKENIZER_FILES = (
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.j*"),
    *("vocab.json", "merges.txt", "tokenization_*.py", "generation_config.json"),
)
_PROGRAMS = ("configuration_*.py", "modeling_*.py", "generation_*.py")


def find(directory: Path, programs: bool = True) -> list[Path]:
    """The files of a directory that travel, sorted. UserError where one of their names is no file."""
    patterns = _TOKENIZER_FILES + (_PROGRAMS if programs else ())
    names = [name for name in os.listdir(directory) if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    found = [directory / name for name in sorted(names)]
    for file in found:
        require_regular(file)
    return found


def find_beside(step_dir: Path, programs: bool) -> list[Path]:
    """The files that travel with a checkpoint of ours, and a tokenizer above it where it has none, as chat finds it."""
    files = find(step_dir, programs)
    if not {file.name for file in files} & set(TOKENIZERS):
        with contextlib.suppress(UserError):  # a checkpoint from elsewhere may come without
            files.append(Path(find_tokenizer(step_dir)))
    return files


def copy(files: Iterable[Path], directory: Path) -> None:
    for file in files:
        shutil.copyfile(file, directory / file.name)


def write(documents: Mapping[str, Table | bytes], directory: Path) -> None:
    """Writes files by name: tables as JSON, bytes as they are."""
    for name, document in documents.items():
        text = "" if isinstance(document, bytes) else json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (directory / name).write_bytes(document if isinstance(document, bytes) else text.encode())


def count_ids(files: Iterable[Path]) -> tuple[int, str] | None:
    """(number of ids that the tokenizer has, the file that says so), or None where there is no tokenizer.

    Raises:
      UserError: a file is not what its name says.
    """
    counters = {
        "tokenizer.model": _count_pieces,
        "tokenizer.json": _count_tokenizers,
        "added_tokens.json": lambda file: max(map(operator.index, read_table(file).values()), default=-1) + 1,
    }
    counts = []
    for file in files:
        if file.name in counters:
            try:
                counts.append((counters[file.name](file), file.name))
            except UserError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                raise UserError(f"{file}: not a tokenizer file") from None
    return max(counts) if {name for _, name in counts} & set(TOKENIZERS) else None


def _count_pieces(file: Path) -> int:
    """Counts the pieces of a SentencePiece model, which are field 1 of its protobuf message. Needs no extra."""
    data, position, count = read_bytes(file), 0, 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        tag = varint()
        if tag & 7 != 2:  # every field of the message is a message
            raise ValueError("not a SentencePiece model")
        length = varint()
        position += length
        count += tag == (1 << 3 | 2)
    if position != len(data) or not count:
        raise ValueError("not a SentencePiece model")
    return count


def _count_tokenizers(file: Path) -> int:
    """Counts the vocabulary and the added tokens in a JSON file of the library `tokenizers`."""
    document = read_table(file)
    vocabulary = document["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in document.get("added_tokens") or []]
    return max(map(operator.index, ids)) + 1


# ---- what other programs read ----------------------------------------------------------------------------------------


# What belongs to a tokenizer as it was released, and does not to the one that is written instead.
_OF_THE_RELEASE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def ready_to_chat(
    beside: list[Path], provenance: Sequence[Table], max_seq_len: int, template: str | None
) -> tuple[list[Path], Table, Table, list[str]]:
    """(files to copy, documents to write, special ids, notes) of a model whose tokenizer is translated for others."""
    tokenizer = next((file for name in TOKENIZERS for file in beside if file.name == name), None)
    if tokenizer is None:
        return beside, {}, {}, ["no tokenizer beside the checkpoint: the export has none, and no chat template"]
    try:
        vocabulary = load_vocabulary(tokenizer)
    except UserError as error:
        if template is not None:
            raise
        return beside, {}, {}, [f"the tokenizer is copied as it is, without a chat template: {error}"]
    documents, ids, notes = make(vocabulary, provenance, max_seq_len, template)
    replaced = {*documents, *_OF_THE_RELEASE}
    kept = [file for file in beside if file.name not in replaced and file.suffix not in (".py", ".jinja")]
    return [file for file in kept if file.name != "chat_template.json"], documents, ids, notes


def is_a_release_of(provenance: Sequence[Table], format: str) -> bool:
    """Tells whether the model is as imported from this format, or grown from that: its files are still right."""
    trained = [entry for entry in provenance if entry.get("kind") in ("import", "pretrain", "sft")]
    return bool(trained) and comes_from(trained[-1:], format)


def comes_from(provenance: Sequence[Table], format: str) -> bool:
    return any(entry.get("kind") == "import" and entry.get("format") == format for entry in provenance)


SPACE = "\u2581"


def make(
    vocabulary: Vocabulary,
    provenance: Sequence[Table],
    max_seq_len: int,
    template: str | None = None,
) -> tuple[Table, dict[str, int | list[int]], list[str]]:
    """The documents by file name, the special ids for config.json, and notes for the user.

    Args:
      vocabulary: of the model.
      provenance: of the checkpoint: whether it was fine-tuned on dialogues, and on which release.
      max_seq_len: the context that is promised.
      template: name of the dialogue template; by default that of the vocabulary or of the release.

    Raises:
      UserError: there is no template of this name, or the vocabulary lacks its markers.
    """
    chosen, notes = _template(vocabulary, provenance, template)
    ends = [vocabulary.eos_id] if chosen is None else templates.stop_ids(chosen, vocabulary)
    end = vocabulary.eos_id if chosen is None else templates.marker_ids(chosen, vocabulary).end[0]
    start = document_start(vocabulary, provenance)
    ids: dict[str, int | list[int]] = {"eos_token_id": [end, *(i for i in ends if i != end)] if len(ends) > 1 else end}
    for name, i in (("bos_token_id", vocabulary.bos_id), ("pad_token_id", vocabulary.pad_id)):
        if i >= 0:
            ids[name] = i
    names = {"unk_token": vocabulary.unk_id, "bos_token": vocabulary.bos_id, "eos_token": end}
    names["pad_token"] = vocabulary.pad_id
    config: Table = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **{name: vocabulary.piece(i) for name, i in names.items() if i >= 0},
    }
    if chosen is not None:
        config["chat_template"] = chat_template(chosen, vocabulary)
    generation = {**ids, "do_sample": False, **({} if chosen is None else chosen.greedy)}
    document = tokenizer_json(vocabulary, start)
    return (
        {"tokenizer.json": document, "tokenizer_config.json": config, "generation_config.json": generation},
        ids,
        notes,
    )


def _template(
    vocabulary: Vocabulary, provenance: Sequence[Table], name: str | None
) -> tuple[Template | None, list[str]]:
    kinds = [entry.get("kind") for entry in provenance if entry.get("kind") in ("import", "pretrain", "sft")]
    if name is None and kinds[-1:] == ["pretrain"]:
        return None, ["no chat template: the model was last trained on plain text; --template NAME writes one"]
    try:
        return templates.choose(vocabulary, name, provenance), []
    except UserError as error:
        if name is not None:
            raise
        return None, [f"no chat template: {error}; --template NAME writes one"]


def chat_template(template: Template, vocabulary: Vocabulary) -> str:
    """The Jinja template whose text has, tokenized by tokenizer.json, the ids of dialogue.render_prompt."""
    if template.markers == "ids":
        markers = templates.marker_ids(template, vocabulary)
        name = lambda ids: "".join(vocabulary.piece_bytes[i].decode() or vocabulary.piece(i) for i in ids)  # noqa: E731
        start, after, user, bot, between, end = map(
            name,
            (markers.start, markers.after_system, markers.user, markers.bot, markers.between, markers.end),
        )
        system = None if markers.system is None else name(markers.system)
    else:
        start, after, user, bot, between, end = "", "", template.user, template.bot, template.between, template.end
        system = template.system
    content = "message['content']"
    question = f"{content}.strip()" if template.strips else content
    said = f"{content}.strip()" if template.markers == "text" else content
    first = (
        "{{ raise_exception('this model has no place for a system message') }}"
        if system is None
        else f"{{{{ {json.dumps(system, ensure_ascii=False)} + {said} + {json.dumps(after, ensure_ascii=False)} }}}}"
    )
    quoted = {k: json.dumps(v, ensure_ascii=False) for k, v in dict(u=user, b=bot, m=between, e=end, s=start).items()}
    return (
        (f"{{{{ {quoted['s']} }}}}" if start else "")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'system' %}"
        + "{% if not loop.first %}{{ raise_exception('the system message has to come first') }}{% endif %}"
        + first
        + "{% elif message['role'] == 'user' %}"
        + f"{{{{ {quoted['u']} + {question} + {quoted['b']} }}}}"
        + "{% elif message['role'] == 'assistant' %}"
        + f"{{{{ {content} + ({quoted['e']} if loop.last else {quoted['m']}) }}}}"
        + "{% else %}{{ raise_exception('the role ' + message['role'] + ' is none of this model') }}{% endif %}"
        + "{% endfor %}"
    )


def tokenizer_json(vocabulary: Vocabulary, start: int | None) -> Table:
    """A document of the `tokenizers` library that gives the vocabulary's ids.

    start: the id that stands before a text where special tokens are asked for (examples.document_start).
    """
    if isinstance(vocabulary, SentencePieceVocabulary):
        document = _from_sentencepiece(vocabulary)
    else:
        document = read_table(vocabulary.path)
    if start is not None:
        name = vocabulary.piece(start)
        special = {"id": name, "ids": [start], "tokens": [name]}
        part = {"Sequence": {"id": "A", "type_id": 0}}
        first = {"SpecialToken": {"id": name, "type_id": 0}}
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, part],
            "pair": [first, part, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: special},
        }
    return document


def _from_sentencepiece(vocabulary: Any) -> Table:
    """SentencePiece's BPE as that of `tokenizers`.

    Pieces that SentencePiece finds in text before all else (digits, say) are cut out by a pattern, and found whole by
    `ignore_merges`. Every way to put a learned piece together from two others is a merge; the order is that of scores.
    """
    model = need("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(vocabulary.sp_model)
    kinds = model.SentencePiece
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    special = [i for i, piece in enumerate(model.pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fixed = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    normal = {piece.piece for piece in model.pieces if piece.type == kinds.NORMAL}
    learned = sorted((piece for piece in model.pieces if piece.type == kinds.NORMAL), key=lambda piece: -piece.score)
    merges = []
    for piece in learned:
        text = piece.piece
        halves = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += sorted(
            ([left, right] for left, right in halves if left in normal and right in normal),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
    steps: list[Table] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[Table] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.adds_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    pattern = "|".join(map(re.escape, sorted(fixed, key=len, reverse=True)))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": model.pieces[i].piece, **flags} for i in special],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": split if fixed else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[vocabulary.unk_id].piece if vocabulary.unk_id >= 0 else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
