"""The one encoder: documents, dialogues and examples of seqio Tasks become inputs, targets and loss weights.

A document is its tokens and then the end-of-sequence token. Its inputs are its targets moved right by one, with the
end-of-sequence token in front, which so separates documents (templates.separator): every token is predicted, the first
too. In pretraining a dialogue is a document like others, and its markers are learned. In fine-tuning it begins with its
first marker, which is given: inputs are tokens[:-1] and targets tokens[1:], as in the released template without BOS,
and only answers count (dialogue.py). An example of a seqio Task is what the Task gives, id for id.

Where a document ends is given as lengths; packing (packing.py) turns them into segment ids and positions.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from tele_jax.data import dialogue, templates
from tele_jax.data.documents import WHOLE, Content, Document, cut_text, text_of
from tele_jax.data.messages import Message
from tele_jax.data.templates import separator
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.settings import DEFAULT_DIALOGUES, DialogueConfig

Kind = Literal["pretrain", "sft"]
COLUMNS = ("inputs", "targets", "loss_weights")  # rows of an example


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples one after the other.

    Attributes:
      columns: [3, N], the COLUMNS of all examples; int32, or float64 where a loss weight is neither 0 nor 1.
      lengths: int64 [n], positions of each example; their sum is N.
      documents: number of documents that end here.
      shortened: number of dialogues that were longer than a row and lost turns or text.
      split: number of dialogues of which examples are parts, split at turns.
      dropped: number of dialogues of which nothing is left.
      text_bytes: UTF-8 bytes of the documents; None where parts of them are missing, or a Task gave ids.
    """

    columns: np.ndarray
    lengths: np.ndarray
    documents: int
    shortened: int = 0
    split: int = 0
    dropped: int = 0
    text_bytes: int | None = None


def encode(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    kind: Kind,
    seq_len: int,
    *,
    threads: int = 1,
    piece_bytes: int = WHOLE,
    how: DialogueConfig = DEFAULT_DIALOGUES,
) -> Encoded:
    """Encodes documents whose contents are of one sort: texts, dialogues or features.

    Args:
      documents: at least one.
      vocabulary: makes the tokens.
      kind: "pretrain" learns every token, except answers marked as not to be learned; "sft" learns answers.
      seq_len: in fine-tuning, the most positions of an example.
      threads: threads of the tokenizer library.
      piece_bytes: texts are cut into pieces of about this size before they are encoded.
      how: which tokens of dialogues are learned, and what becomes of long ones.

    Raises:
      UserError: the vocabulary lacks the markers of dialogues; features that are no example. The caller adds where.
    """
    ended = sum(document.ends for document in documents)
    contents = [document.content for document in documents]
    if examples := [content for content in contents if isinstance(content, Mapping)]:
        return joined([_features(features, vocabulary, kind, seq_len) for features in examples], ended)
    text_bytes = len("".join(map(text_of, contents)).encode())
    if dialogues := [content for content in contents if not isinstance(content, (str, Mapping))]:
        made = [_dialogue(messages, vocabulary, kind, seq_len, how) for messages in dialogues]
        examples = [example for each, *_ in made for example in each]
        shortened, split = sum(is_cut for _, is_cut, _ in made), sum(is_split for *_, is_split in made)
        dropped = sum(not each for each, *_ in made)
        whole = not (shortened or split or dropped)
        counts = {"shortened": shortened, "split": split, "dropped": dropped}
        return joined(examples, ended, **counts, text_bytes=text_bytes if whole else None)
    targets, lengths = _texts(documents, vocabulary, threads, piece_bytes)
    columns = np.empty((3, len(targets)), np.int32)
    columns[0, 1:], columns[1], columns[2] = targets[:-1], targets, 1
    columns[0, (np.cumsum(lengths) - lengths)[lengths > 0]] = separator(vocabulary)
    return Encoded(columns, lengths, ended, text_bytes=text_bytes)


def blocks(read: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Groups documents into blocks of at least so many characters."""
    block, count = [], 0
    for document in read:
        block.append(document)
        count += len(text_of(document.content))
        if count >= characters:
            yield block
            block, count = [], 0
    if block:
        yield block


def joined(examples: Sequence[np.ndarray], documents: int, **counts: int | None) -> Encoded:
    """Joins examples, [3, n] each, that were encoded before. counts: the other fields of Encoded."""
    lengths = np.array([example.shape[1] for example in examples], np.int64)
    columns = np.concatenate([np.zeros((3, 0), np.int32), *examples], axis=1)
    return Encoded(columns, lengths, documents, **counts)  # pyright: ignore[reportArgumentType]


def _texts(
    documents: Sequence[Document], vocabulary: Vocabulary, threads: int, piece_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the targets of all texts, int32 [N], and the length of each, int64 [n]."""
    pieces, first_piece, continue_text = [], [], []
    for document in documents:
        text = text_of(document.content)
        first_piece.append(len(pieces))
        parts = [text[begin:end] for begin, end in cut_text(text, piece_bytes) or [(0, 0)]]
        pieces += parts
        continue_text += [not document.begins, *[True] * (len(parts) - 1)]
    if len(pieces) > 1:
        ids = vocabulary.encode_batch(pieces, threads)
    else:
        ids = [np.array(vocabulary.encode(pieces[0]), np.int32)]
    if vocabulary.adds_dummy_prefix:  # no space where a text goes on
        for i in np.flatnonzero(continue_text):
            ids[i] = np.array(vocabulary.encode_continuation(pieces[i]), np.int32)
    tokens = np.concatenate(ids)
    lengths = np.add.reduceat(np.fromiter(map(len, ids), np.int64, len(ids)), first_piece)
    ends = np.array([document.ends for document in documents])
    targets = np.full(len(tokens) + ends.sum(), separator(vocabulary), np.int32)
    targets[np.arange(len(tokens)) + np.repeat(np.cumsum(ends) - ends, lengths)] = tokens
    return targets, lengths + ends


def _dialogue(
    messages: Sequence[Message], vocabulary: Vocabulary, kind: Kind, seq_len: int, how: DialogueConfig
) -> tuple[list[np.ndarray], bool, bool]:
    """Returns examples [3, n], one or in fine-tuning any number; whether something is missing; whether it was split."""
    if kind == "pretrain":
        tokens, weights = dialogue.render(messages, vocabulary, given=1)
        tokens = [separator(vocabulary), *tokens, separator(vocabulary)]
        return [_columns(tokens[:-1], tokens[1:], [*weights, 1])], False, False
    found = dialogue.samples(messages, vocabulary, seq_len + 1, too_long=how.too_long, next_user=how.next_user)
    examples = [_columns(one.tokens[:-1], one.tokens[1:], one.weights[1:]) for one in found]
    return examples, any(one.is_cut for one in found), any(one.is_part for one in found)


def _columns(inputs: Sequence[int], targets: Sequence[int], weights: Sequence[int | float]) -> np.ndarray:
    """Returns [3, n]: int32, or float64, which holds every id, where a weight is neither 0 nor 1."""
    return np.array([inputs, targets, weights], np.int32 if set(weights) <= {0, 1} else np.float64)


def _features(features: Mapping[str, np.ndarray], vocabulary: Vocabulary, kind: Kind, seq_len: int) -> np.ndarray:
    """Turns the features of an example of a seqio Task, int [n] each, into int32 [3, n]; keeps every id of the Task.

    `targets` alone are a document that is learned. `inputs` and `targets` are one document, inputs first, of which the
    targets are learned. With `loss_weights` as well, the three are taken as they are. In pretraining a document without
    the end-of-sequence token at its end gets it.
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
    else:
        given = features.get("inputs", targets[:0])
        tokens = np.concatenate([[separator(vocabulary)], given, targets])
        if kind == "pretrain" and tokens[-1] != separator(vocabulary):
            tokens = np.append(tokens, separator(vocabulary))
        columns = [tokens[:-1], tokens[1:], np.arange(1, len(tokens)) > len(given)]
    if kind == "sft" and len(columns[0]) > seq_len:
        raise UserError(f"{len(columns[0]):,} tokens, more than a row of {seq_len:,}")
    return np.array(columns, np.int32)


def takes_system(vocabulary: Vocabulary) -> bool:
    """Tells whether the dialogue template of a vocabulary has a place for a system message."""
    return templates.marker_ids(templates.choose(vocabulary), vocabulary).system is not None


def check_system(messages: Content, vocabulary: Vocabulary, where: str) -> None:
    """Raises UserError for a dialogue with a system message that the template has no place for."""
    if not isinstance(messages, (str, Mapping)) and messages[0]["role"] == "system" and not takes_system(vocabulary):
        try:
            dialogue.render(messages, vocabulary)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
