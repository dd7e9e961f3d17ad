"""Dialogues as tokens, for training and for chat, in the template of a family (templates.py). TeleChat's
(arXiv 2401.03804):

    <_system> system text <_user> question <_bot> answer <_end> <_user> question <_bot> answer <_end> ...

`<_system>` is there only if the dialogue has a system message. There is no BOS but TeleChat2's `<_start>`: the first
marker is where a dialogue begins, in training as in chat.

Ids are those of the released code, of which there are two kinds. Where markers are ids, every text is
encoded apart from them, and from each other. Where they are text (TeleChat-52B, Tele-FLM Instruct), a prompt is encoded
as one string, markers, questions and answers together; in training the string of a turn is its question with its
markers, then the answer is a string of its own. Tokenizers with a dummy prefix, as the released ones, begin every
such string with a space.

What is learned, exactly: a token has weight 1 when it belongs to an answer or is the `<_end>` after it, and weight 0
otherwise. So the position that holds `<_bot>` learns the first token of the answer, and the last token of the answer
learns `<_end>`; `<_bot>` itself is given by the prompt and has weight 0, and so has the `<_user>` that follows
`<_end>`, which the released trainer counts. Where an answer inside a dialogue does not end as the last one does
(TeleChat-52B, Tele-FLM Instruct), that end is not learned: a reply has to end as the last one.

A message is {"role": "system" | "user" | "assistant", "content": str}; "bot" is another name for "assistant". The
system message comes first, if at all; then user and assistant take turns, and the user begins.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tele_jax.data import templates
from tele_jax.data.templates import Said, Template
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import UserError

Message = Mapping[str, str]


def check(messages: Any, *, complete: bool = True) -> None:
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
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    skipped = len(messages) - len(spoken)
    for i, message in enumerate(spoken):
        expected = "user" if i % 2 == 0 else "assistant"
        if (message["role"] == "user") != (expected == "user"):
            raise UserError(f"messages[{i + skipped}].role is {message['role']!r}, but it is the turn of {expected}")
    if len(spoken) % 2 != (0 if complete else 1) or not spoken:
        raise UserError(f"the last message has to be {'an answer' if complete else 'a question'}")


def render(
    messages: Sequence[Message], vocabulary: Vocabulary, max_tokens: int | None = None, template: Template | None = None
) -> tuple[list[int], list[int]]:
    """A whole dialogue as (tokens, weights), two lists of one length; weights are 0 or 1, see above.

    >>> tokens, weights = render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], v)
    [v.user_id, *v.encode("Hi"), v.bot_id, *v.encode("Hello"), v.end_id], [0, 0, 0, 1, 1]     # one token a word

    Args:
      messages: the dialogue; the last one is an answer.
      vocabulary: has the template's markers.
      max_tokens: if the dialogue is longer, the oldest turns go, then the left end of the question; then, which the
        released code does not have to face, the system message, and at last the right end of the answer with its end.
      template: that of the vocabulary by default.

    Raises:
      UserError: messages that are not such a dialogue; a vocabulary without the markers; a system message where the
        template has no place for one; max_tokens too small for the markers and a token of the answer.
    """
    check(messages)
    encoder = _Encoder(vocabulary, template)
    fitted = _fit(*encoder.open(messages), max_tokens, encoder.shortest, encoder.sample)
    return fitted.tokens[:max_tokens], fitted.weights[:max_tokens]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A dialogue as the tokens after which the model answers, and what of it did not fit.

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
    """A dialogue whose last message is a question, as the tokens after which the model answers: they end in `<_bot>`.

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
    """`render_prompt`, and what had to be left out.

    drawn: by the index of an answer in messages, the ids that the model drew for it, without what ended it. They stand
      in the prompt as they are; text that is encoded again can have other ids.
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
    """The least max_tokens that `render` and `render_prompt` take: markers, end, and one token of an answer."""
    return _Encoder(vocabulary, template).shortest


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A question and its answer, as ids or as text: what can be cut. The answer is None where it is asked for."""

    question: str | list[int]
    answer: str | list[int] | None


@dataclasses.dataclass(frozen=True)
class _Fitted:
    system: str | list[int] | None
    turns: list[_Turn]
    tokens: list[int]
    weights: list[int]


class _Encoder:
    """A template in a vocabulary: dialogues to tokens and weights, in the strings that the released code encodes.

    Attributes:
      shortest: tokens of the markers, of what ends a reply, and of one token of an answer.
    """

    def __init__(self, vocabulary: Vocabulary, template: Template | None):
        self._vocabulary, self._template = vocabulary, template or templates.choose(vocabulary)
        self._markers = templates.marker_ids(self._template, vocabulary)
        self._is_text = self._template.markers == "text"
        empty = _Turn("" if self._is_text else [], None)
        self.shortest = len(self.prompt(None, [empty])[0]) + len(self._markers.end) + 1

    def open(
        self, messages: Sequence[Message], drawn: Mapping[int, Sequence[int]] | None = None
    ) -> tuple[str | list[int] | None, list[_Turn]]:
        """The system message, if there is one, and the turns: texts where markers are text, otherwise ids."""
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
            answer = None
            if i + 1 < len(messages):
                ids = (drawn or {}).get(i + 1)
                answer = take(messages[i + 1]["content"]) if ids is None else list(ids)
            turns.append(_Turn(take(question.strip() if template.strips else question), answer))
        system = messages[0]["content"].strip() if self._is_text else messages[0]["content"]
        return (take(system) if first else None), turns

    def prompt(self, system: str | list[int] | None, turns: Sequence[_Turn]) -> tuple[list[int], list[int]]:
        """Tokens, and weights that are all 0, of a dialogue that ends with a question."""
        if not self._is_text:
            return self._of_ids(system, turns)
        parts: list[str | Said | list[int]] = self._opening(system)
        for turn in turns:
            parts += self._asked(turn)
            if turn.answer is not None:
                parts += [Said(turn.answer) if isinstance(turn.answer, str) else turn.answer, self._template.between]
        tokens = templates.encode_parts(self._template, self._vocabulary, parts)
        return tokens, [0] * len(tokens)

    def sample(self, system: str | list[int] | None, turns: Sequence[_Turn]) -> tuple[list[int], list[int]]:
        """Tokens and weights of a dialogue that ends with an answer."""
        if not self._is_text:
            return self._of_ids(system, turns)
        tokens: list[int] = []
        weights: list[int] = []
        opening, end = self._opening(system), self._markers.end
        for number, turn in enumerate(turns, start=1):
            asked = templates.encode_parts(self._template, self._vocabulary, [*opening, *self._asked(turn)])
            opening = []
            between = self._template.between if number < len(turns) else ""
            answer = templates.encode_parts(self._template, self._vocabulary, [Said(turn.answer), between])
            learned = self._before(answer, between)
            tokens += asked + answer
            weights += [0] * len(asked) + [1] * learned + [0] * (len(answer) - learned)
        return tokens + end, weights + [1] * len(end)

    def _opening(self, system: str | None) -> list[str | Said | list[int]]:
        return [] if system is None else [self._template.system, Said(system)]

    def _asked(self, turn: _Turn) -> list[str | Said | list[int]]:
        return [self._template.user, Said(turn.question), self._template.bot]

    def _before(self, tokens: Sequence[int], tail: str) -> int:
        """Count of the tokens before those that the text at their end has a part in."""
        left, count = len(tail.encode()), len(tokens)
        while left > 0:
            count -= 1
            left -= len(self._vocabulary.piece_bytes[tokens[count]])
        return count

    def _of_ids(self, system: list[int] | None, turns: Sequence[_Turn]) -> tuple[list[int], list[int]]:
        markers = self._markers
        tokens = markers.start + ([] if system is None else markers.system + system)
        weights = [0] * len(tokens)
        for number, turn in enumerate(turns, start=1):
            asked = [*markers.user, *turn.question, *markers.bot]
            tokens += asked
            weights += [0] * len(asked)
            if turn.answer is not None:
                end = markers.end if number == len(turns) else markers.between
                tokens += [*turn.answer, *end]
                weights += [1] * len(turn.answer) + [int(end == markers.end)] * len(end)
        return tokens, weights


def _fit(
    system: str | list[int] | None,
    turns: list[_Turn],
    max_tokens: int | None,
    least: int,
    encode: Callable[[Any, Sequence[_Turn]], tuple[list[int], list[int]]],
) -> _Fitted:
    """Drops and cuts what `render` says; only the right end of the last answer is left for the caller to cut.

    The released code also drops the oldest messages, but one by one: there half a turn can stay.
    """
    if max_tokens is None:
        return _Fitted(system, turns, *encode(system, turns))
    if max_tokens < least:
        raise UserError(f"max_tokens={max_tokens}: a dialogue needs at least {least}")

    def fits(system: str | list[int] | None, turns: Sequence[_Turn]) -> bool:
        return len(encode(system, turns)[0]) <= max_tokens

    def first_that_fits(count: int, is_enough: Callable[[int], bool]) -> int:
        """The least number below count that is enough, or count; what is enough for one is for those above."""
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
