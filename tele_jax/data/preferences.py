"""Records for alignment: pairs of answers, rankings of answers, and prompts alone, read as messages (dialogue.py).

    {"prompt": text | messages, "chosen": text | message, "rejected": text | message}     a pair
    {"chosen": messages, "rejected": messages}       a pair of whole dialogues that differ in the last answer alone
    {"prompt": text | messages, "answers": [best, ..., worst]}                            a ranking
    {"prompt": text | messages, ...}                 a prompt; its other fields are what a reward may look up

A prompt that is a text is the question of the user. What two dialogues share is compared message by message, never by
the characters with which two strings begin. A pair may have a "margin": a finite number, by how much more the chosen
answer should be worth. "system" and "tools" are as in dialogues (dialogue_formats.py).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tele_jax.data.dialogue_formats import LABELS, from_record
from tele_jax.data.messages import LARGEST, MARKS, Message
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.settings import DialogueConfig

RecordKind = Literal["pairs", "prompts"]
_SHARED = ("system", "tools")  # fields of a record that change its prompt


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt, whose last message is a question, and answers to it, the best first.

    Attributes:
      prompt: the messages.
      answers: two in a pair, more in a ranking, none in a prompt alone.
      margin: by how much more the first of two answers should be worth.
      fields: the record itself, of a prompt alone.
    """

    prompt: Sequence[Message]
    answers: tuple[str, ...] = ()
    margin: float = 0.0
    fields: Table = dataclasses.field(default_factory=dict)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of the (better, worse) answer, of every pair of answers."""
        return list(itertools.combinations(range(len(self.answers)), 2))


def read_record(record: object, kind: RecordKind, how: DialogueConfig) -> Preference:
    """Reads a record.

    Args:
      record: a JSON value.
      kind: "pairs", rankings among them, or "prompts".
      how: `system` of it counts here.

    Raises:
      UserError: it is no such record, has a field that is not understood, or its dialogues differ before the last
        answer. The caller adds where.
    """
    if not isinstance(record, Mapping):
        raise UserError("not a table")
    how = DialogueConfig(system=how.system)
    if kind == "prompts":
        if "prompt" not in record:
            raise UserError('not a table with the key "prompt", as the format prompts asks for')
        return Preference(_prompt(record, how), fields=dict(record))
    names = _answers(record)
    known = {"prompt", "chosen", "rejected", "answers", "margin", *_SHARED, *LABELS}
    for field in record.keys() - known:
        raise UserError(f"the field {field!r} of the record is not understood; take it out, or the record")
    return _preference(record, names, how)


def _answers(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answers of a record, the best first, by the names that messages give them."""
    if "answers" in record:
        answers = record["answers"]
        if {"chosen", "rejected", "margin"} & record.keys():
            raise UserError('"answers" is a ranking, which has neither "chosen" and "rejected" nor a "margin"')
        if not isinstance(answers, Sequence) or isinstance(answers, str) or len(answers) < 2:
            raise UserError('"answers" is not a list of at least two answers, the best first')
        return {f"answers[{i}]": answer for i, answer in enumerate(answers)}
    if not {"chosen", "rejected"} <= record.keys():
        raise UserError('not a table with the keys "chosen" and "rejected", or "answers", as the format pairs asks for')
    return {name: record[name] for name in ("chosen", "rejected")}


def _preference(record: Mapping[str, Any], names: Mapping[str, Any], how: DialogueConfig) -> Preference:
    dialogues = {name: _dialogue(record, answer, name, how) for name, answer in names.items()}
    prompts = {name: _said(messages[:-1]) for name, messages in dialogues.items()}
    if "prompt" in record:
        prompts = {"prompt": _said(_prompt(record, how)), **prompts}
    (first, shared), *others = prompts.items()
    for other, prompt in others:
        if prompt != shared:
            i = next((i for i, (a, b) in enumerate(zip(shared, prompt)) if a != b), min(len(shared), len(prompt)))
            raise UserError(f"{first} and {other} have no common prompt: they differ in messages[{i}] already")
    margin = 0.0 if record.get("margin") is None else record["margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= LARGEST:
        raise UserError(f'"margin" is {margin!r}, not a finite number, in float32')
    prompt = next(iter(dialogues.values()))[:-1]
    return Preference(prompt, tuple(messages[-1]["content"] for messages in dialogues.values()), float(margin))


def _given(prompt: Any) -> list[Any]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence):
        raise UserError('"prompt" is neither a text nor a list of messages')
    return list(prompt)


def _prompt(record: Mapping[str, Any], how: DialogueConfig) -> list[Message]:
    shared = {name: record[name] for name in _SHARED if name in record}
    return from_record({"messages": _given(record["prompt"]), **shared}, "messages", how, complete=False)


def _dialogue(record: Mapping[str, Any], answer: Any, name: str, how: DialogueConfig) -> list[Message]:
    """Returns the whole dialogue of an answer: a text, a message, a list of one, or all messages up to it."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    messages = [answer] if isinstance(answer, Mapping) else answer
    if not isinstance(messages, Sequence):
        raise UserError(f'"{name}" is neither a text nor messages')
    if len(messages) < 2:
        if "prompt" not in record:
            raise UserError(f'"{name}" is an answer alone, and the record has no "prompt"')
        messages = [*_given(record["prompt"]), *messages]
    shared = {field: record[field] for field in _SHARED if field in record}
    try:
        read = from_record({"messages": list(messages), **shared}, "messages", how)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    for i, message in enumerate(read):
        for mark in MARKS:
            if message.get(mark) is not None:
                raise UserError(f"{name}: messages[{i}].{mark} is of fine-tuning; every answer of a pair is learned")
    return read


def _said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [("assistant" if m["role"] == "bot" else m["role"], m["content"]) for m in messages]
