"""Encodes the turns of a dialogue by a template, in the strings of the released code, and fits them to a length.

dialogue.py says what the tokens are, and which of them are learned.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tele_jax.data import templates
from tele_jax.data.messages import Message, weight_of
from tele_jax.data.templates import Said, Template
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError

Spoken = str | list[int]  # text, or ids where markers are ids
Weights = list[int | float]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer, as ids or as text: what can be cut. The answer is None where it is asked for."""

    question: Spoken
    answer: Spoken | None
    weight: int | float = 1  # of the answer's tokens in the loss


def _said(spoken: Spoken) -> Said | list[int]:
    return Said(spoken) if isinstance(spoken, str) else spoken


def _ids(spoken: Spoken) -> list[int]:
    return [] if isinstance(spoken, str) else spoken


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The part of a dialogue that fits a length, with its tokens and weights."""

    system: Spoken | None
    turns: list[Turn]
    tokens: list[int]
    weights: Weights


class Encoder:
    """Encodes dialogues by a template and a vocabulary, in the strings that the released code encodes.

    Attributes:
      shortest: tokens of the markers, of what ends a reply, and of one token of an answer.
    """

    def __init__(self, vocabulary: Vocabulary, template: Template | None, given: int = 0, *, next_user: bool = False):
        """Reads the markers. given: weight of the tokens that are not of an answer. next_user: as dialogue.render."""
        self._given, self._next_user = given, next_user and not given
        self._vocabulary, self._template = vocabulary, template or templates.choose(vocabulary)
        self._markers = templates.marker_ids(self._template, vocabulary)
        self._is_text = self._template.markers == "text"
        if next_user and self._is_text:
            raise UserError(
                f"next_user learns the id of {self._template.user}, which is text in the template "
                f"{self._template.name}; leave next_user out"
            )
        empty = Turn("" if self._is_text else [], None)
        self.shortest = len(self.prompt(None, [empty])[0]) + len(self._markers.end) + 1

    def open(
        self, messages: Sequence[Message], drawn: Mapping[int, Sequence[int]] | None = None
    ) -> tuple[Spoken | None, list[Turn]]:
        """Returns the system message, if there is one, and the turns: texts where markers are text, otherwise ids."""
        template, vocabulary = self._template, self._vocabulary
        first = int(messages[0]["role"] == "system")
        if first and self._markers.system is None:
            raise UserError(
                f"the template {template.name} has no place for a system message"
                if template.system is None
                else f"tokenizer {vocabulary.path}: it has no piece {template.system!r} for the system message"
            )
        take = (lambda text: text) if self._is_text else vocabulary.encode
        turns = []
        for i in range(first, len(messages), 2):
            question = messages[i]["content"]
            answer, weight = None, 1
            if i + 1 < len(messages):
                weight = weight_of(messages[i + 1])
                ids = (drawn or {}).get(i + 1)
                answer = take(messages[i + 1]["content"]) if ids is None else list(ids)
            turns.append(Turn(take(question.strip() if template.strips else question), answer, weight))
        system = messages[0]["content"].strip() if self._is_text else messages[0]["content"]
        return (take(system) if first else None), turns

    def prompt(self, system: Spoken | None, turns: Sequence[Turn]) -> tuple[list[int], Weights]:
        """Encodes a dialogue that ends with a question: tokens, and weights that are all 0."""
        if not self._is_text:
            return self._of_ids(system, turns)
        parts: list[str | Said | list[int]] = self._opening(system)
        for turn in turns:
            parts += self._asked(turn)
            if turn.answer is not None:
                parts += [_said(turn.answer), self._template.between]
        tokens = templates.encode_parts(self._template, self._vocabulary, parts)
        return tokens, [0] * len(tokens)

    def sample(self, system: Spoken | None, turns: Sequence[Turn]) -> tuple[list[int], Weights]:
        """Encodes a dialogue that ends with an answer: tokens and weights."""
        if not self._is_text:
            return self._of_ids(system, turns)
        tokens: list[int] = []
        weights: Weights = []
        opening, end = self._opening(system), self._markers.end
        for number, turn in enumerate(turns, start=1):
            asked = templates.encode_parts(self._template, self._vocabulary, [*opening, *self._asked(turn)])
            opening = []
            between = self._template.between if number < len(turns) else ""
            answer = templates.encode_parts(self._template, self._vocabulary, [_said(turn.answer or ""), between])
            said = self._before(answer, between)
            tokens += asked + answer
            weights += [self._given] * len(asked) + [turn.weight] * said + [self._given] * (len(answer) - said)
        return tokens + end, weights + [turns[-1].weight] * len(end)

    def reply(self, answer: str) -> list[int]:
        """Encodes an answer apart from its prompt, with what ends it."""
        parts = [Said(answer)]
        encode = self._vocabulary.encode
        ids = templates.encode_parts(self._template, self._vocabulary, parts) if self._is_text else encode(answer)
        return ids + self._markers.end

    def _opening(self, system: Spoken | None) -> list[str | Said | list[int]]:
        return [] if system is None else [self._template.system or "", _said(system)]

    def _asked(self, turn: Turn) -> list[str | Said | list[int]]:
        return [self._template.user, _said(turn.question), self._template.bot]

    def _before(self, tokens: Sequence[int], tail: str) -> int:
        """Counts the tokens that end before `tail`, the text at the end of all, begins."""
        left, count = len(tail.encode()), len(tokens)
        while left > 0:
            count -= 1
            left -= len(self._vocabulary.piece_bytes[tokens[count]])
        return count

    def _of_ids(self, system: Spoken | None, turns: Sequence[Turn]) -> tuple[list[int], Weights]:
        markers = self._markers
        spoken = [] if system is None else [*(markers.system or []), *_ids(system), *markers.after_system]
        tokens = markers.start + spoken
        weights: Weights = [self._given] * len(tokens)
        for number, turn in enumerate(turns, start=1):
            asked = [*markers.user, *_ids(turn.question), *markers.bot]
            tokens += asked
            marker = turns[number - 2].weight if self._next_user and number > 1 else self._given
            weights += [marker] * len(markers.user) + [self._given] * (len(asked) - len(markers.user))
            if turn.answer is not None:
                end = markers.end if number == len(turns) else markers.between
                tokens += [*_ids(turn.answer), *end]
                weight = turn.weight
                said = len(turn.answer) + (len(markers.end) if end[: len(markers.end)] == markers.end else 0)
                weights += [weight] * said + [self._given] * (len(turn.answer) + len(end) - said)
        return tokens, weights


def fit(
    system: Spoken | None,
    turns: list[Turn],
    max_tokens: int | None,
    least: int,
    encode: Callable[[Any, Sequence[Turn]], tuple[list[int], Weights]],
) -> Fitted:
    """Drops and cuts turns as `render` describes; the caller cuts off the right end of what is still too long.

    The released code drops the oldest messages one by one, so that half a turn can stay.
    """
    if max_tokens is None:
        return Fitted(system, turns, *encode(system, turns))
    if max_tokens < least:
        raise UserError(f"max_tokens={max_tokens}: a dialogue needs at least {least}")

    def fits(system: Spoken | None, turns: Sequence[Turn]) -> bool:
        return len(encode(system, turns)[0]) <= max_tokens

    def first_that_fits(count: int, is_enough: Callable[[int], bool]) -> int:
        """Returns the least number below count for which is_enough holds, as it does for all above it; else count."""
        return bisect.bisect_left(range(count), True, key=is_enough)

    whole = Fitted(system, turns, *encode(system, turns))
    if len(whole.tokens) <= max_tokens:
        return whole
    first = first_that_fits(len(turns), lambda n: fits(system, turns[n:]))
    if first < len(turns):
        return Fitted(system, turns[first:], *encode(system, turns[first:]))
    last = turns[-1]

    def without(n: int) -> Turn:
        return dataclasses.replace(last, question=last.question[n:])

    length = len(last.question)
    cut = first_that_fits(length, lambda n: fits(system, [without(n)]))
    if cut >= length and length:  # nothing would be left of the question
        system = None
        cut = first_that_fits(length, lambda n: fits(None, [without(n)]))
    return Fitted(system, [without(cut)], *encode(system, [without(cut)]))
