"""Documents that contain parts of a benchmark."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import OverlapConfig
from tele_jax.errors import UserError
from tele_jax.files import expand


def load(config: OverlapConfig) -> np.ndarray:
    """All n-grams of the benchmarks, sorted: uint64 [M].

    A text of fewer than n tokens is left out: short answers are everywhere.

    Raises:
      UserError: a pattern without files, a file that is not UTF-8, not JSON, or a whole without a single n-gram.
    """
    grams = [np.zeros(0, np.uint64)]
    for path in expand(config.files, "overlap.files"):
        for text in _texts(path, config.fields):
            grams.append(_grams(text, config))
    found = np.unique(np.concatenate(grams))
    if not len(found):
        raise UserError(f"overlap.files: no text of at least {config.ngram} tokens in {', '.join(config.files)}")
    return found


def _texts(path: str, fields: tuple[str, ...]) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            if not path.endswith((".jsonl", ".json")):
                yield file.read()
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        record = json.loads(line)
                        texts = list(_strings(record if not fields else [record.get(f) for f in fields]))
                    except (ValueError, AttributeError, RecursionError):
                        what = "not JSON" if not fields else f"no JSON record with {' or '.join(fields)}"
                        raise UserError(f"{path}:{number}: {what}; overlap.files are jsonl or plain text") from None
                    yield from texts
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _grams(text: str, config: OverlapConfig) -> np.ndarray:
    """Hashes of the text's n-grams; of longer ones where most characters are Han or kana."""
    chars = hashing.characters(text)
    unspaced = int(hashing.is_unspaced(chars).sum())
    chinese = 2 * unspaced > int(hashing.is_word(chars).sum())
    return hashing.ngrams(hashing.tokens(text), config.zh_ngram if chinese else config.ngram)


def overlap(document: Document, config: OverlapConfig, benchmarks: np.ndarray) -> Document | Drop:
    """Drops a document that shares `min_matches` n-grams or more with the benchmarks."""
    grams = np.unique(_grams(document.text, config))
    at = np.minimum(np.searchsorted(benchmarks, grams), len(benchmarks) - 1)
    matches = int((benchmarks[at] == grams).sum())
    if matches >= config.min_matches:
        return Drop("benchmark overlap", f"{matches} n-grams")
    return document
