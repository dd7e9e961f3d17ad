"""Checks of the features of a seqio Task and of their vocabularies, before its examples are read."""

import hashlib
from typing import Any

from tele_jax.data.encode import Kind
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.extras import need

tf = need("tensorflow")
seqio = need("seqio")
Task = Any  # of seqio, which is imported when it is used

FEATURES = (("targets",), ("inputs", "targets"), ("inputs", "loss_weights", "targets"))  # that are understood, sorted
COMPARED = 512  # ids that are compared of a vocabulary of an unknown class


def reason(error: Exception) -> str:
    """Returns the first line of an error's message, without what TensorFlow puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].split("}} ")[-1] if lines else ""
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def check_features(task: Task, kind: Kind) -> None:
    """Raises UserError unless the encoder takes the features of a Task."""
    features = task.output_features
    if tuple(sorted(features)) not in FEATURES:
        raise UserError(
            f"task {task.name}: its features are {', '.join(sorted(features)) or 'none'}; they have to be targets, or "
            "inputs and targets"
        )
    for name, feature in features.items():
        if not feature.dtype.is_integer or feature.rank != 1:
            raise UserError(
                f"task {task.name}: its feature {name} is {feature.dtype.name} of rank {feature.rank}, not token ids "
                "in a row"
            )
    if kind == "sft" and "inputs" not in features:
        raise UserError(
            f"task {task.name}: fine-tuning learns answers, so it needs the features inputs and targets, not targets "
            "alone"
        )


def check_vocabularies(task: Task, vocabulary: Vocabulary) -> None:
    """Raises UserError where the ids of a Task are not those of the run's tokenizer, as far as can be told."""
    for name, feature in task.output_features.items():
        if name != "loss_weights":
            check_vocabulary(task.name, name, feature.vocabulary, vocabulary)


def check_vocabulary(task: str, feature: str, theirs: Any, ours: Vocabulary) -> None:
    """Raises UserError where the ids of a feature of a Task are not those of the run's tokenizer, as far as known."""
    if differs := _differs(theirs, ours):
        raise UserError(f"task {task}: the vocabulary of {feature} is not the tokenizer {ours.path}: {differs}")


def _differs(theirs: Any, ours: Vocabulary) -> str:
    """Describes how a vocabulary differs from ours; empty where it does not."""
    if isinstance(theirs, Vocabulary):
        return "" if theirs.sha256 == ours.sha256 else f"it is that of {theirs.path}"
    if isinstance(theirs, seqio.SentencePieceVocabulary):
        path = theirs.sentencepiece_model_file
        try:
            with tf.io.gfile.GFile(path, "rb") as file:
                same = hashlib.sha256(file.read()).hexdigest() == ours.sha256
        except Exception as error:
            return f"{path} cannot be read ({reason(error)})"
        return "" if same else f"it is that of {path}"
    if theirs.vocab_size > ours.vocab_size:
        return f"it has {theirs.vocab_size:,} ids, and the tokenizer {ours.vocab_size:,}"
    if isinstance(theirs, seqio.PassThroughVocabulary):
        return ""
    spelled = [i for i in range(theirs.vocab_size) if _text(ours.piece_bytes[i])]
    for i in spelled[:: max(1, len(spelled) // COMPARED)]:
        try:
            text = theirs.decode([i])
        except Exception as error:
            return f"it cannot decode the id {i} ({reason(error)})"
        if not isinstance(text, str) or text.strip() != _text(ours.piece_bytes[i]):
            return f"the id {i} is {text!r}, and in the tokenizer {ours.piece_bytes[i].decode()!r}"
    return ""


def _text(spelled: bytes) -> str:
    """Returns the text of a piece without spaces around it, which vocabularies treat differently; "" for no text."""
    try:
        return spelled.decode().strip()
    except UnicodeDecodeError:
        return ""
