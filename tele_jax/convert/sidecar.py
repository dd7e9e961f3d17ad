"""The small files beside the weights: the tokenizer and what belongs to it. They travel along as they are found."""

import contextlib
import fnmatch
import operator
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tele_jax.errors import UserError
from tele_jax.files import read_bytes, read_table, require_regular
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
    """The same for a checkpoint of ours; a tokenizer that is not in it is looked for above it, as chat does."""
    files = find(step_dir, programs)
    if not {file.name for file in files} & set(TOKENIZERS):
        with contextlib.suppress(UserError):  # a checkpoint from elsewhere may come without
            files.append(Path(find_tokenizer(step_dir)))
    return files


def copy(files: Iterable[Path], directory: Path) -> None:
    for file in files:
        shutil.copyfile(file, directory / file.name)


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
    """Of a SentencePiece model: a protobuf message whose field 1, repeated, is a piece. Needs no extra installed."""
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
    """Of the `tokenizers` library's JSON: vocabulary and added tokens."""
    document = read_table(file)
    vocabulary = document["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in document.get("added_tokens") or []]
    return max(map(operator.index, ids)) + 1
