"""Dialogues as tokens, for training and for chat, in the template of a family (templates.py). TeleChat's template
(arXiv 2401.03804) is

    <_system> system text <_user> question <_bot> answer <_end> <_user> question <_bot> answer <_end> ...

`<_system>` is there only if the dialogue has a system message. Only TeleChat2 has a BOS, `<_start>`: the first
marker is where a dialogue begins, in training as in chat.

The ids are those of the released code, of which there are two kinds. Where markers are ids, every text is encoded
apart from them, and from each other. Where they are text (TeleChat-52B, Tele-FLM Instruct), a prompt is encoded
as one string, markers, questions and answers together; in training the string of a turn is its question with its
markers, then the answer is a string of its own. Tokenizers with a dummy prefix, as the released ones, begin every
such string with a space.

The answers are learned: a token has the weight of its message (1 by default) when it belongs to an answer or is the
`<_end>` after it, and weight 0 otherwise. So the position that holds `<_bot>` learns the first token of the answer, and
the last token of the answer learns `<_end>`; `<_bot>` itself is given by the prompt and has weight 0, and so has the
`<_user>` that follows `<_end>`, unless `next_user` asks for it, as the released trainer does. Where an answer inside a
dialogue does not end as the last one does (TeleChat-52B, Tele-FLM Instruct), that end is not learned: a reply has to
end as the last one.

A message is {"role": "system" | "user" | "assistant", "content": str}; "bot" is another name for "assistant". The
system message comes first, if at all; then user and assistant take turns, and the user begins. An answer may have a
"weight", a number of at least 0 by which its tokens count; one that says "weight": 0, "train": false or "loss": false
is not learned, and neither is the end after it. dialogue_formats.py reads records of other forms as such messages.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from tele_jax.data.dialogue_encoder import Encoder, Fitted, fit
from tele_jax.data.messages import Message, check
from tele_jax.data.templates import Template, choose, marker_ids
from tele_jax.data.vocabulary_base import Vocabulary


def render(
    messages: Sequence[Message],
    vocabulary: Vocabulary,
    max_tokens: int | None = None,
    template: Template | None = None,
    *,
    given: int = 0,
    next_user: bool = False,
) -> tuple[list[int], list[int | float]]:
    """Encodes a whole dialogue as (tokens, weights), two lists of one length; weights are those of the answers, or 0.

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
      next_user: learns the `<_user>` that follows an answer, with the weight of that answer.

    Raises:
      UserError: messages that are not such a dialogue; a vocabulary without the markers; a system message where the
        template has no place for one; next_user where the marker is text; max_tokens too small for the markers and a
        token of the answer.
    """
    check(messages)
    fitted = _fitted(Encoder(vocabulary, template, given, next_user=next_user), messages, max_tokens)
    return fitted.tokens, fitted.weights


def _fitted(encoder: Encoder, messages: Sequence[Message], max_tokens: int | None) -> Fitted:
    fitted = fit(*encoder.open(messages), max_tokens, encoder.shortest, encoder.sample)
    return dataclasses.replace(fitted, tokens=fitted.tokens[:max_tokens], weights=fitted.weights[:max_tokens])


TooLong = Literal["split", "cut", "drop"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dialogue, or some of its turns, as tokens for fine-tuning.

    Attributes:
      first, end: its turns are those from `first` on and before `end`; turn 0 is the first question and answer.
      tokens, weights: as `render` gives them; at least one weight is not 0.
      is_part: whether the dialogue has other turns, which are in other samples or learn nothing.
      is_cut: whether text of these turns, or the system message, did not fit and is missing.
    """

    first: int
    end: int
    tokens: list[int]
    weights: list[int | float]
    is_part: bool
    is_cut: bool


def samples(
    messages: Sequence[Message],
    vocabulary: Vocabulary,
    max_tokens: int,
    template: Template | None = None,
    *,
    too_long: TooLong = "split",
    next_user: bool = False,
) -> list[Sample]:
    """Encodes a dialogue as samples of at most `max_tokens` tokens each. Samples that learn nothing are left out.

    Args:
      messages, vocabulary, template, next_user: as in `render`.
      max_tokens: most tokens of a sample.
      too_long: what becomes of a longer dialogue. split: several samples, each of the system message and as many whole
        turns as fit; a single turn that is still too long is cut as by "cut". cut: as `render` does, one sample of the
        last turns. drop: no sample.

    Raises:
      UserError: as `render`.
    """
    check(messages)
    encoder = Encoder(vocabulary, template, next_user=next_user)
    system, turns = encoder.open(messages)

    def made(first: int, end: int) -> Sample | None:
        fitted = fit(system, turns[first:end], max_tokens, encoder.shortest, encoder.sample)
        tokens, weights = fitted.tokens[:max_tokens], fitted.weights[:max_tokens]
        is_cut = (fitted.system, fitted.turns) != (system, turns[first:end]) or len(tokens) < len(fitted.tokens)
        is_part = end - first < len(turns)
        return Sample(first, end, tokens, weights, is_part, is_cut) if any(weights) else None

    def length(first: int, end: int) -> int:
        return len(encoder.sample(system, turns[first:end])[0])

    whole = length(0, len(turns)) <= max_tokens
    if too_long == "drop" and not whole:
        return []
    bounds = [0]
    while bounds[-1] < len(turns):
        first, end = bounds[-1], len(turns)
        if too_long == "split" and not whole:
            fits = range(first + 2, len(turns) + 1)  # one turn is always taken
            end = first + 1 + bisect.bisect_left(fits, True, key=lambda end: length(first, end) > max_tokens)
        bounds.append(end)
    return [sample for pair in itertools.pairwise(bounds) if (sample := made(*pair)) is not None]


def turns_of(messages: Sequence[Message], first: int, end: int) -> list[Message]:
    """Returns the system message, if there is one, and the messages of the turns `first` to `end` - 1."""
    spoken = int(messages[0]["role"] == "system")
    return [*messages[:spoken], *messages[spoken + 2 * first : spoken + 2 * end]]


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
    encoder = Encoder(vocabulary, template)
    system, turns = encoder.open(messages, drawn or {})
    fitted = fit(system, turns, max_tokens, encoder.shortest, encoder.prompt)
    return Prompt(
        fitted.tokens,
        dropped_turns=len(turns) - len(fitted.turns),
        cut_question=len(fitted.turns[-1].question) < len(turns[-1].question),
        dropped_system=system is not None and fitted.system is None,
    )


def render_answers(
    prompt: Sequence[Message], answers: Sequence[str], vocabulary: Vocabulary, template: Template | None = None
) -> tuple[list[int], list[list[int]]]:
    """Encodes a prompt once, as `render_prompt` does, and answers to it, as the model would draw them.

        prompt, (answer,) = render_answers([{"role": "user", "content": "Hi"}], ["Hello"], v)
        prompt + answer      # [v.user_id, *v.encode("Hi"), v.bot_id, *v.encode("Hello"), v.end_id]

    Raises:
      UserError: as `render`; the last message of the prompt is no question.
    """
    check(prompt, complete=False)
    encoder = Encoder(vocabulary, template)
    return encoder.prompt(*encoder.open(prompt))[0], [encoder.reply(answer) for answer in answers]


def shortest(vocabulary: Vocabulary, template: Template | None = None, *, next_user: bool = False) -> int:
    """Returns the least max_tokens of `render` and `render_prompt`: markers, end, and one token of an answer.

    Raises:
      UserError: a vocabulary without the markers; next_user where the marker is text.
    """
    return Encoder(vocabulary, template, next_user=next_user).shortest


def most_tokens(num_bytes: np.ndarray, num_messages: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Returns a bound of the tokens of dialogues, int64 [n], by the bytes of their texts and their messages, int64 [n].

    A token spells at least a byte of a text, but for the markers and the space that a tokenizer may put before a text.
    """
    template = choose(vocabulary)
    markers = len(f"{template.user}{template.bot}{template.between}".encode())
    if template.markers == "ids":
        ids = marker_ids(template, vocabulary)
        markers = max(len(ids.user + ids.bot), len(ids.between), len((ids.system or []) + ids.after_system))
    return num_bytes + num_messages * (1 + markers) + 2
