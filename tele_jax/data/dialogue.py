"""Dialogues as tokens, for training and for chat, in the template of a family (templates.py). TeleChat's template
(arXiv 2401.03804) is

    <_system> system text <_user> question <_bot> answer <_end> <_user> question <_bot> answer <_end> ...

`<_system>` is there only if the dialogue has a system message. There is no BOS but TeleChat2's `<_start>`: the first
marker is where a dialogue begins, in training as in chat.

The ids are those of the released code, of which there are two kinds. Where markers are ids, every text is encoded
apart from them, and from each other. Where they are text (TeleChat-52B, Tele-FLM Instruct), a prompt is encoded
as one string, markers, questions and answers together; in training the string of a turn is its question with its
markers, then the answer is a string of its own. Tokenizers with a dummy prefix, as the released ones, begin every
such string with a space.

The answers are learned: a token has weight 1 when it belongs to an answer or is the `<_end>` after it, and weight 0
otherwise. So the position that holds `<_bot>` learns the first token of the answer, and the last token of the answer
learns `<_end>`; `<_bot>` itself is given by the prompt and has weight 0, and so has the `<_user>` that follows
`<_end>`, which the released trainer counts. Where an answer inside a dialogue does not end as the last one does
(TeleChat-52B, Tele-FLM Instruct), that end is not learned: a reply has to end as the last one.

A message is {"role": "system" | "user" | "assistant", "content": str}; "bot" is another name for "assistant". The
system message comes first, if at all; then user and assistant take turns, and the user begins. An answer that says
"weight": 0, "train": false or "loss": false is not learned, and neither is the end after it.

A record is {"messages": [...]} or, as TeleChat2's, {"dialog": [...]}, and may have its system message as "system".
Fields that nothing here understands are refused by name, but for LABELS: none is ignored.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tele_jax.data import templates
from tele_jax.data.templates import Said, Template
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError

Message = Mapping[str, Any]  # strings, and the marks
Spoken = str | list[int]  # text, or ids where markers are ids

MARKS = ("weight", "train", "loss")  # of an answer: whether it is learned
# Fields of a record that say where it is from, and nothing about what is learned.
LABELS = frozenset({"id", "source", "url", "title", "language", "lang", "license", "category", "meta", "metadata"})


def from_record(record: object) -> list[Message]:
    """Returns the messages of a record, the system message among them.

    Raises:
      UserError: it is no record of a dialogue, or has a field that is not understood.
    """
    if not isinstance(record, Mapping):
        raise UserError('not a table with the key "messages", as the format dialogues asks for')
    if {"input", "output"} <= set(record):
        raise UserError(
            'a record of "input" and "output" has its markers inside its text, where they cannot be told from typed '
            'ones; write it as "messages"'
        )
    key = "dialog" if "dialog" in record and "messages" not in record else "messages"
    if key not in record:
        raise UserError('not a table with the key "messages", as the format dialogues asks for')
    for field, value in record.items():
        if field not in (key, "system", *LABELS) and not _says_nothing(value):
            raise UserError(f"the field {field!r} of the record is not understood; take it out, or the record")
    messages, system = record[key], record.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError('"system" is not a string')
    if system and isinstance(messages, list):
        if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
            raise UserError('there are two system messages: "system" and the first of the messages')
        messages = [{"role": "system", "content": system}, *messages]
    check(messages)
    return messages


def is_learned(message: Message) -> bool:
    """Tells whether an answer is learned: none of its marks says otherwise."""
    return not any(message.get(mark) in (0, False) for mark in MARKS if message.get(mark) is not None)


def _says_nothing(value: object) -> bool:
    return value is None or (isinstance(value, list) and not value)


def _check_fields(i: int, message: Mapping[str, object]) -> None:
    """Raises UserError for marks that cannot be obeyed, and for what is not understood."""
    answers = message["role"] in ("assistant", "bot")
    marks = set()
    for field, value in message.items():
        if field in ("role", "content") or _says_nothing(value):
            continue
        if field not in MARKS:
            raise UserError(f"messages[{i}]: the field {field!r} is not understood; take it out, or the record")
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"messages[{i}].{field} is {value!r}; an answer is learned (1) or not (0)")
        if value and not answers:
            raise UserError(f"messages[{i}].{field} is {value!r}, but only answers are learned")
        marks.add(bool(value))
    if len(marks) > 1:
        raise UserError(f"messages[{i}]: its marks ({', '.join(MARKS)}) contradict each other")


def check(messages: object, *, complete: bool = True) -> None:
    """Raises UserError unless `messages` is a dialogue as described above.

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
    if complete and not any(map(is_learned, spoken[1::2])):
        raise UserError("none of the answers is to be learned")


def render(
    messages: Sequence[Message],
    vocabulary: Vocabulary,
    max_tokens: int | None = None,
    template: Template | None = None,
    *,
    given: int = 0,
) -> tuple[list[int], list[int]]:
    """Encodes a whole dialogue as (tokens, weights), two lists of one length; weights are 0 or 1, see above.

        tokens, weights = render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], v)
        tokens       # [v.user_id, *v.encode("Hi"), v.bot_id, *v.encode("Hello"), v.end_id]
        weights      # [0, 0, 0, 1, 1], where Hi and Hello are one token each

    Args:
      messages: the dialogue; the last one is an answer.
      vocabulary: has the template's markers.
      max_tokens: if the dialogue is longer, the oldest turns go, then the left end of the question; then, which the
        released code does not have to face, the system message, and at last the right end of the answer with its end.
      template: that of the vocabulary by default.
      given: weight of everything but answers: 0 in fine-tuning, 1 in pretraining.

    Raises:
      UserError: messages that are not such a dialogue; a vocabulary without the markers; a system message where the
        template has no place for one; max_tokens too small for the markers and a token of the answer.
    """
    check(messages)
    encoder = _Encoder(vocabulary, template, given)
    fitted = _fit(*encoder.open(messages), max_tokens, encoder.shortest, encoder.sample)
    return fitted.tokens[:max_tokens], fitted.weights[:max_tokens]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The tokens of a dialogue after which the model answers, and what did not fit.

    Attributes:
      tokens: they end in `<_bot>`.
      dropped_turns: the oldest questions with their answers that were left out.
      cut_question: whether the left end of the question was left out.
      dropped_system: whether the system message was left out.
    """

    tokens: list[int]
    dropped_turns: int = 0
    cut_question: bool = False
    dropped_system: bool = False


def render_prompt(
    messages: Sequence[Message], vocabulary: Vocabulary, max_tokens: int | None = None, template: Template | None = None
) -> list[int]:
    """Encodes a dialogue whose last message is a question; the tokens end in `<_bot>`, after which the model answers.

    Args:
      messages: the dialogue so far.
      vocabulary: has the template's markers.
      max_tokens: if the prompt is longer, the oldest turns go, then the left end of the question, then the system
        message.
      template: that of the vocabulary by default.

    Raises:
      UserError: as `render`.
    """
    return fit_prompt(messages, vocabulary, max_tokens, template).tokens


def fit_prompt(
    messages: Sequence[Message],
    vocabulary: Vocabulary,
    max_tokens: int | None = None,
    template: Template | None = None,
    drawn: Mapping[int, Sequence[int]] | None = None,
) -> Prompt:
    """Does what `render_prompt` does, and reports what had to be left out.

    drawn: the ids that the model drew for an answer, without what ended it, by its index in messages. They stand in the
      prompt as they are; text that is encoded again can have other ids.
    """
    check(messages, complete=False)
    encoder = _Encoder(vocabulary, template)
    system, turns = encoder.open(messages, drawn or {})
    fitted = _fit(system, turns, max_tokens, encoder.shortest, encoder.prompt)
    return Prompt(
        fitted.tokens,
        dropped_turns=len(turns) - len(fitted.turns),
        cut_question=len(fitted.turns[-1].question) < len(turns[-1].question),
        dropped_system=system is not None and fitted.system is None,
    )


def shortest(vocabulary: Vocabulary, template: Template | None = None) -> int:
    """Returns the least max_tokens of `render` and `render_prompt`: markers, end, and one token of an answer."""
    return _Encoder(vocabulary, template).shortest


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A question and its answer, as ids or as text: what can be cut. The answer is None where it is asked for."""

    question: Spoken
    answer: Spoken | None
    is_learned: bool = True  # the answer


def _said(spoken: Spoken) -> Said | list[int]:
    return Said(spoken) if isinstance(spoken, str) else spoken


def _ids(spoken: Spoken) -> list[int]:
    return [] if isinstance(spoken, str) else spoken


@dataclasses.dataclass(frozen=True)
class _Fitted:
    system: Spoken | None
    turns: list[_Turn]
    tokens: list[int]
    weights: list[int]


class _Encoder:
    """Encodes dialogues by a template and a vocabulary, in the strings that the released code encodes.

    Attributes:
      shortest: tokens of the markers, of what ends a reply, and of one token of an answer.
    """

    def __init__(self, vocabulary: Vocabulary, template: Template | None, given: int = 0):
        """Reads the markers. given: weight of the tokens that are not of an answer."""
        self._given = given
        self._vocabulary, self._template = vocabulary, template or templates.choose(vocabulary)
        self._markers = templates.marker_ids(self._template, vocabulary)
        self._is_text = self._template.markers == "text"
        empty = _Turn("" if self._is_text else [], None)
        self.shortest = len(self.prompt(None, [empty])[0]) + len(self._markers.end) + 1

    def open(
        self, messages: Sequence[Message], drawn: Mapping[int, Sequence[int]] | None = None
    ) -> tuple[Spoken | None, list[_Turn]]:
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
            answer, learned = None, True
            if i + 1 < len(messages):
                learned = is_learned(messages[i + 1])
                ids = (drawn or {}).get(i + 1)
                answer = take(messages[i + 1]["content"]) if ids is None else list(ids)
            turns.append(_Turn(take(question.strip() if template.strips else question), answer, learned))
        system = messages[0]["content"].strip() if self._is_text else messages[0]["content"]
        return (take(system) if first else None), turns

    def prompt(self, system: Spoken | None, turns: Sequence[_Turn]) -> tuple[list[int], list[int]]:
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

    def sample(self, system: Spoken | None, turns: Sequence[_Turn]) -> tuple[list[int], list[int]]:
        """Encodes a dialogue that ends with an answer: tokens and weights."""
        if not self._is_text:
            return self._of_ids(system, turns)
        tokens: list[int] = []
        weights: list[int] = []
        opening, end = self._opening(system), self._markers.end
        for number, turn in enumerate(turns, start=1):
            asked = templates.encode_parts(self._template, self._vocabulary, [*opening, *self._asked(turn)])
            opening = []
            between = self._template.between if number < len(turns) else ""
            answer = templates.encode_parts(self._template, self._vocabulary, [_said(turn.answer or ""), between])
            said = self._before(answer, between)
            tokens += asked + answer
            weights += [self._given] * len(asked) + [int(turn.is_learned)] * said + [self._given] * (len(answer) - said)
        return tokens + end, weights + [int(turns[-1].is_learned)] * len(end)

    def _opening(self, system: Spoken | None) -> list[str | Said | list[int]]:
        return [] if system is None else [self._template.system or "", _said(system)]

    def _asked(self, turn: _Turn) -> list[str | Said | list[int]]:
        return [self._template.user, _said(turn.question), self._template.bot]

    def _before(self, tokens: Sequence[int], tail: str) -> int:
        """Counts the tokens that end before `tail`, the text at the end of all, begins."""
        left, count = len(tail.encode()), len(tokens)
        while left > 0:
            count -= 1
            left -= len(self._vocabulary.piece_bytes[tokens[count]])
        return count

    def _of_ids(self, system: Spoken | None, turns: Sequence[_Turn]) -> tuple[list[int], list[int]]:
        markers = self._markers
        tokens = markers.start + ([] if system is None else (markers.system or []) + _ids(system))
        weights = [self._given] * len(tokens)
        for number, turn in enumerate(turns, start=1):
            asked = [*markers.user, *_ids(turn.question), *markers.bot]
            tokens += asked
            weights += [self._given] * len(asked)
            if turn.answer is not None:
                end = markers.end if number == len(turns) else markers.between
                tokens += [*_ids(turn.answer), *end]
                weight = int(turn.is_learned)
                weights += [weight] * len(turn.answer) + [weight if end == markers.end else self._given] * len(end)
        return tokens, weights


def _fit(
    system: Spoken | None,
    turns: list[_Turn],
    max_tokens: int | None,
    least: int,
    encode: Callable[[Any, Sequence[_Turn]], tuple[list[int], list[int]]],
) -> _Fitted:
    """Drops and cuts turns as `render` describes; the caller cuts off the right end of what is still too long.

    The released code drops the oldest messages one by one, so that half a turn can stay.
    """
    if max_tokens is None:
        return _Fitted(system, turns, *encode(system, turns))
    if max_tokens < least:
        raise UserError(f"max_tokens={max_tokens}: a dialogue needs at least {least}")

    def fits(system: Spoken | None, turns: Sequence[_Turn]) -> bool:
        return len(encode(system, turns)[0]) <= max_tokens

    def first_that_fits(count: int, is_enough: Callable[[int], bool]) -> int:
        """Returns the least number below count for which is_enough holds, as it does for all above it; else count."""
        return bisect.bisect_left(range(count), True, key=is_enough)

    whole = _Fitted(system, turns, *encode(system, turns))
    if len(whole.tokens) <= max_tokens:
        return whole
    first = first_that_fits(len(turns), lambda n: fits(system, turns[n:]))
    if first < len(turns):
        return _Fitted(system, turns[first:], *encode(system, turns[first:]))
    last = turns[-1]

    def without(n: int) -> _Turn:
        return dataclasses.replace(last, question=last.question[n:])

    length = len(last.question)
    cut = first_that_fits(length, lambda n: fits(system, [without(n)]))
    if cut >= length and length:  # nothing would be left of the question
        system = None
        cut = first_that_fits(length, lambda n: fits(None, [without(n)]))
    return _Fitted(system, [without(cut)], *encode(system, [without(cut)]))
