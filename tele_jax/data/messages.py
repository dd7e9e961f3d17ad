"""The messages of a dialogue: what they may say, and by which weight an answer is learned (dialogue.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.errors import UserError

Message = Mapping[str, Any]  # strings, and the marks

LARGEST = float(np.finfo(np.float32).max)  # batches have weights and margins in float32

MARKS = ("weight", "train", "loss")  # of an answer: by which weight it is learned, or whether


def weight_of(message: Message) -> int | float:
    """Returns the weight of the tokens of an answer in the loss: an int where it is 0 or 1.

    >>> weight_of({"content": "Hi"}), weight_of({"content": "Hi", "train": False}), weight_of({"weight": 0.42})
    (1, 0, 0.42)
    """
    marks = [message[mark] for mark in MARKS if message.get(mark) is not None]
    if not all(marks):
        return 0
    weight = message.get("weight")
    return 1 if weight is None or weight == 1 else float(weight)


def is_blank(value: object) -> bool:
    """Tells whether a field may be overlooked: it is null or an empty list."""
    return value is None or (isinstance(value, list) and not value)


def _check_fields(i: int, message: Mapping[str, object]) -> None:
    """Raises UserError for invalid marks, and for what is not understood."""
    answers = message["role"] in ("assistant", "bot")
    marks = set()
    for field, value in message.items():
        if field in ("role", "content") or is_blank(value):
            continue
        if field not in MARKS:
            raise UserError(f"messages[{i}]: the field {field!r} is not understood; take it out, or the record")
        number = isinstance(value, bool | int | float)
        if field == "weight" and not (number and 0 <= value <= LARGEST):
            raise UserError(f"messages[{i}].weight is {value!r}; a weight is a finite number of at least 0, in float32")
        if field != "weight" and not (number and value in (0, 1)):
            raise UserError(f"messages[{i}].{field} is {value!r}; an answer is learned (1) or not (0)")
        if value and not answers:
            raise UserError(f"messages[{i}].{field} is {value!r}, but only answers are learned")
        marks.add(bool(value))
    if len(marks) > 1:
        raise UserError(f"messages[{i}]: its marks ({', '.join(MARKS)}) contradict each other")


def check(messages: object, *, complete: bool = True) -> None:
    """Raises UserError unless `messages` is a dialogue as dialogue.py describes it.

    Args:
      messages: anything.
      complete: whether the last message has to be an answer (for training) or a question (for a prompt).
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError("messages is not a list")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(f'messages[{i}] is not a table of the strings "role" and "content"')
        if not message["content"]:
            raise UserError(f"messages[{i}].content is empty")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise UserError(f"messages[{i}].content: character {error.start} is half a surrogate pair") from None
        if message["role"] not in ("system", "user", "assistant", "bot"):
            raise UserError(f"messages[{i}].role is {message['role']!r}, not one of system, user, assistant")
        if message["role"] == "system" and i > 0:
            raise UserError(f"messages[{i}]: the system message has to come first")
        _check_fields(i, message)
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    skipped = len(messages) - len(spoken)
    for i, message in enumerate(spoken):
        expected = "user" if i % 2 == 0 else "assistant"
        if (message["role"] == "user") != (expected == "user"):
            raise UserError(f"messages[{i + skipped}].role is {message['role']!r}, but it is the turn of {expected}")
    if len(spoken) % 2 != (0 if complete else 1) or not spoken:
        raise UserError(f"the last message has to be {'an answer' if complete else 'a question'}")
    if complete and not any(map(weight_of, spoken[1::2])):
        raise UserError("none of the answers is to be learned")
