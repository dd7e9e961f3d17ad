"""A span of a document, or a dialogue, as one training example: inputs, targets and loss weights, position by position.

A document is its tokens and then the end-of-sequence token. Its inputs are its targets moved right by one, with the
end-of-sequence token in front, which so becomes what separates documents (`separator`): every token is predicted, the
first too. Generation and evaluation put the same token before a document (`document_start`).
An example of a seqio Task is what the Task gives, id for id (`from_features`).
A dialogue begins with its first marker instead, which is given, not predicted: inputs are tokens[:-1], targets
tokens[1:], exactly as the released template without BOS.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tele_jax.config import as_written, written_table
from tele_jax.data import dialogue, templates
from tele_jax.data.sources import Corpus, Format
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError

Kind = Literal["pretrain", "sft"]
COLUMNS = ("inputs", "targets", "loss_weights")  # rows of an example


def separator(vocabulary: Vocabulary) -> int:
    """The id that stands after every document in training, and so conditions the first token of the next one."""
    return vocabulary.eos_id


@dataclasses.dataclass(frozen=True)
class _Sampling:
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


@dataclasses.dataclass(frozen=True)
class _Generation:
    """The field "generation" of the entry of an import, see convert/conventions.py."""

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    sampling: _Sampling = _Sampling()
    document_start: int | None = None


def release_of(provenance: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The entry of the import that a model comes from, with all of its field "generation"; None where there is none.

    Raises:
      DamageError: a field of it is not what an import writes.
    """
    for number, entry in reversed(list(enumerate(provenance))):
        if entry.get("kind") == "import":
            where, fields = f"provenance[{number}]", {"config": dict[str, Any], "constants": dict[str, float]}
            written_table(entry, where, {"format": str, "prefix": str, **fields})
            generation = as_written(_Generation, entry.get("generation", {}), f"{where}.generation")
            sampling = {k: v for k, v in dataclasses.asdict(generation.sampling).items() if v is not None}
            return entry | {"generation": dataclasses.asdict(generation) | {"sampling": sampling}}
    return None


def document_start(vocabulary: Vocabulary, provenance: Sequence[Mapping[str, Any]]) -> int | None:
    """The id that conditions the first token of a document in a model; None where nothing does.

    That is the separator where the model was trained here on documents, by the last stage that was; else what the code
    of a release puts before a text, as its files say (the import notes it). Fine-tuning on dialogues, which begin with
    their first marker, and growth change nothing of that.

    Args:
      vocabulary: of the model.
      provenance: of the checkpoint.

    Raises:
      DamageError: the entry of an import is not what was written.
    """
    kind = next((e["kind"] for e in reversed(provenance) if e.get("kind") in ("pretrain", "import")), None)
    if kind == "pretrain":
        return separator(vocabulary)
    release = release_of(provenance)
    return None if release is None else release["generation"]["document_start"]


def continues(corpus: Corpus, i: int, vocabulary: Vocabulary) -> bool:
    """Tells whether span `i` goes on within its document, and the tokenizer would put a space there that is none."""
    if not vocabulary.adds_dummy_prefix or corpus.format == "dialogues":
        return False
    return bool(corpus.begin[i] > 0 or (corpus.format == "text" and corpus.offset[i] > 0))


def check_format(domain: str, format: Format, kind: Kind) -> None:
    """Raises UserError if fine-tuning is to be fed with something that has no answers."""
    if kind == "sft" and format != "dialogues":
        raise UserError(
            f"sources.{domain}: fine-tuning learns answers, so its files have to be dialogues, not {format}"
        )


def check_systems(corpus: Corpus, vocabulary: Vocabulary) -> None:
    """Raises UserError, with its place, for the first system message that the template has no place for."""
    if corpus.format == "dialogues" and not _takes_systems(vocabulary):
        for i in range(len(corpus)):
            where = f"{corpus.files[corpus.file[i]]}: dialogue at byte {corpus.offset[i]:,}"
            check_system(corpus.messages(i), vocabulary, where)


def check_system(messages: Sequence[dialogue.Message], vocabulary: Vocabulary, where: str) -> None:
    """The same for one dialogue. where: it is, for the message."""
    if messages[0]["role"] == "system" and not _takes_systems(vocabulary):
        try:
            dialogue.render(messages, vocabulary)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _takes_systems(vocabulary: Vocabulary) -> bool:
    return templates.marker_ids(templates.choose(vocabulary), vocabulary).system is not None


def from_features(features: Mapping[str, np.ndarray], vocabulary: Vocabulary, kind: Kind) -> np.ndarray:
    """An example of a seqio Task as int32 [3, n]; no id that the Task gives is changed or left out.

    `targets` alone are a document that is learned. `inputs` and `targets` are one document, inputs first, of which the
    targets are learned. With `loss_weights` as well, the three are taken as they are: the columns of an example. In
    pretraining a document without the end-of-sequence token at its end gets it.

    Args:
      features: int [n] each.
      vocabulary: gives the separator, which comes before the first token.
      kind: "pretrain" or "sft".

    Raises:
      UserError: nothing is learned, or the features do not fit each other; it is left to the caller to say where.
    """
    targets = features["targets"]
    if len(targets) == 0:
        raise UserError("targets is empty")
    if "loss_weights" in features:
        columns = [features[name] for name in COLUMNS]
        if len({len(column) for column in columns}) > 1:
            raise UserError(f"inputs, targets and loss_weights have {', '.join(str(len(c)) for c in columns)} entries")
        if not np.isin(columns[2], (0, 1)).all() or not columns[2].any():
            raise UserError("loss_weights are 0 or 1, and one of them has to be 1")
        return np.array(columns, np.int32)
    given = features.get("inputs", targets[:0])
    tokens = np.concatenate([[separator(vocabulary)], given, targets])
    if kind == "pretrain" and tokens[-1] != separator(vocabulary):
        tokens = np.append(tokens, separator(vocabulary))
    weights = np.arange(1, len(tokens)) > len(given)
    return np.array([tokens[:-1], tokens[1:], weights], np.int32)


def example(
    corpus: Corpus, i: int, vocabulary: Vocabulary, kind: Kind, seq_len: int, *, max_bytes: int | None = None
) -> np.ndarray:
    """Span or dialogue `i` as int32 [3, n]: rows inputs, targets, loss_weights (0 or 1).

    In pretraining a dialogue is a document like others: every token counts, the first marker included, but for answers
    that are marked as not to be learned. In fine-tuning n is at most seq_len, and only answers count (dialogue.py).

    Args:
      corpus: where it is.
      i: its number.
      vocabulary: makes the tokens.
      kind: "pretrain" or "sft".
      seq_len: the longest that a dialogue may be in fine-tuning.
      max_bytes: a text that is longer is cut at a character, and does not end then. Dialogues are never cut so.

    Raises:
      UserError: the vocabulary lacks the markers of dialogues, or the file has changed.
    """
    if kind == "sft":
        tokens, weights = dialogue.render(corpus.messages(i), vocabulary, max_tokens=seq_len + 1)
        return np.array([tokens[:-1], tokens[1:], weights[1:]], np.int32)
    ends = bool(corpus.last[i])
    if corpus.format == "dialogues":
        targets, weights = dialogue.render(corpus.messages(i), vocabulary, given=1)
    else:
        text = corpus.text(i)
        if max_bytes is not None and corpus.num_bytes[i] > max_bytes:
            text, ends = text.encode()[:max_bytes].decode(errors="ignore"), False
        targets = vocabulary.encode_continuation(text) if continues(corpus, i, vocabulary) else vocabulary.encode(text)
        weights = [1] * len(targets)
    if ends:
        targets.append(separator(vocabulary))
        weights.append(1)
    return np.array([[separator(vocabulary), *targets][: len(targets)], targets, weights], np.int32)
