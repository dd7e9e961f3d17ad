"""Dialogues as tokens, for training and for chat, in the template of a family (templates.py). TeleChat's (FACTS section
5, arXiv 2401.03804):

    <_system> system text <_user> question <_bot> answer <_end> <_user> question <_bot> answer <_end> ...

`<_system>` is there only if the dialogue has a system message. There is no BOS: the first marker is where a dialogue
begins, in training as in chat. Text is encoded apart from markers, also where those are text themselves (ours: the
released code of TeleChat-52B encodes a whole prompt at once).

What is learned, exactly: a token has weight 1 when it belongs to an answer or is the `<_end>` after it, and weight 0
otherwise. So the position that holds `<_bot>` learns the first token of the answer, and the last token of the answer
learns `<_end>`; `<_bot>` itself is given by the prompt and has weight 0, and so has the `<_user>` that follows
`<_end>`, which the released trainer counts. Where an answer inside a dialogue does not end as the last one does
(TeleChat-52B, Tele-FLM Instruct), that end is not learned: a reply has to end as the last one.

A message is {"role": "system" | "user" | "assistant", "content": str}; "bot" is another name for "assistant". The
system message comes first, if at all; then user and assistant take turns, and the user begins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tele_jax.data import templates
from tele_jax.data.templates import Markers, Template
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import UserError

Message = Mapping[str, str]
_Turn = tuple[list[int], list[int] | None]  # ids of the question, and of the answer if there is one


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
    template = template or templates.choose(vocabulary)
    markers = templates.marker_ids(template, vocabulary)
    system, turns = _encode(messages, vocabulary, template, markers)
    system, turns = _fit(system, turns, max_tokens, markers)
    tokens = list(system)
    weights = [0] * len(tokens)
    for number, (question, answer) in enumerate(turns, start=1):
        end = markers.end if number == len(turns) else markers.between
        prompt = [*markers.user, *question, *markers.bot]
        tokens += [*prompt, *answer, *end]
        weights += [0] * len(prompt) + [1] * len(answer) + [int(end == markers.end)] * len(end)
    return tokens[:max_tokens], weights[:max_tokens]


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
    check(messages, complete=False)
    template = template or templates.choose(vocabulary)
    markers = templates.marker_ids(template, vocabulary)
    system, turns = _encode(messages, vocabulary, template, markers)
    system, turns = _fit(system, turns, max_tokens, markers)
    tokens = list(system)
    for question, answer in turns:
        tokens += [*markers.user, *question, *markers.bot]
        tokens += [] if answer is None else [*answer, *markers.between]
    return tokens


def shortest(vocabulary: Vocabulary, template: Template | None = None) -> int:
    """The least max_tokens that `render` and `render_prompt` take: markers, end, and one token of an answer."""
    return _shortest(templates.marker_ids(template or templates.choose(vocabulary), vocabulary))


def _shortest(markers: Markers) -> int:
    return len(markers.user) + len(markers.bot) + len(markers.end) + 1


def _encode(
    messages: Sequence[Message], vocabulary: Vocabulary, template: Template, markers: Markers
) -> tuple[list[int], list[_Turn]]:
    """The system message with its marker, and the turns."""

    def encode(text: str) -> list[int]:
        return templates.encode_content(template, vocabulary, text)

    has_system = messages[0]["role"] == "system"
    if has_system and markers.system is None:
        raise UserError(
            f"the template {template.name} has no place for a system message"
            if template.system is None
            else f"tokenizer {vocabulary.path}: it has no piece {template.system!r} for the system message"
        )
    system = [*markers.system, *encode(messages[0]["content"])] if has_system else []
    spoken = [message["content"] for message in messages[int(has_system) :]]
    questions = [question.strip() if template.strips else question for question in spoken[0::2]]
    answers = [*map(encode, spoken[1::2]), None]  # the None stays unused when the last question has its answer
    return system, list(zip(map(encode, questions), answers, strict=False))


def _fit(
    system: list[int], turns: list[_Turn], max_tokens: int | None, markers: Markers
) -> tuple[list[int], list[_Turn]]:
    """Drops and cuts what `render` says; only the right end of the last answer is left for the caller to cut."""
    if max_tokens is None:
        return system, turns
    if max_tokens < _shortest(markers):
        raise UserError(f"max_tokens={max_tokens}: a dialogue needs at least {_shortest(markers)}")

    def size(turn: _Turn, end: list[int]) -> int:
        question, answer = turn
        asked = len(markers.user) + len(question) + len(markers.bot)
        return asked + (0 if answer is None else len(answer) + len(end))

    def excess() -> int:
        return (
            len(system) + sum(size(t, markers.between) for t in turns[:-1]) + size(turns[-1], markers.end) - max_tokens
        )

    while excess() > 0 and len(turns) > 1:
        turns = turns[1:]
    question, answer = turns[0] if len(turns) == 1 else ([], None)
    if excess() >= len(question) > 0:
        system = []
    if excess() > 0:
        turns = [(question[excess() :], answer)]
    return system, turns
