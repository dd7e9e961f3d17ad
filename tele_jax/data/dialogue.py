"""TeleChat's dialogue template (FACTS section 5, arXiv 2401.03804), as plain functions.

    <_system> system text <_user> question <_bot> answer <_end> <_user> question <_bot> answer <_end> ...

`<_system>` is there only if the dialogue has a system message. There is no BOS: the first marker is where a dialogue
begins, in training as in chat. Markers are single ids, and text is encoded apart from them.

What is learned, exactly: a token has weight 1 when it belongs to an answer or is the `<_end>` after it, and weight 0
otherwise. So the position that holds `<_bot>` learns the first token of the answer, and the last token of the answer
learns `<_end>`; `<_bot>` itself is given by the prompt and has weight 0, and so has the `<_user>` that follows
`<_end>`, which the released trainer counts.

A message is {"role": "system" | "user" | "assistant", "content": str}; "bot" is another name for "assistant". The
system message comes first, if at all; then user and assistant take turns, and the user begins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
    messages: Sequence[Message], vocabulary: Vocabulary, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """A whole dialogue as (tokens, weights), two lists of one length; weights are 0 or 1, see above.

    >>> tokens, weights = render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], v)
    [v.user_id, *v.encode("Hi"), v.bot_id, *v.encode("Hello"), v.end_id], [0, 0, 0, 1, 1]     # one token a word

    Args:
      messages: the dialogue; the last one is an answer.
      vocabulary: has user_id, bot_id, end_id, system_id.
      max_tokens: if the dialogue is longer, the oldest turns go, then the left end of the question; then, which the
        released code does not have to face, the system message, and at last the right end of the answer with `<_end>`.

    Raises:
      UserError: messages that are not such a dialogue; a vocabulary without the markers; max_tokens below 4.
    """
    check(messages)
    system, turns = _encode(messages, vocabulary)
    system, turns = _fit(system, turns, max_tokens)
    tokens = [vocabulary.system_id, *system] if system else []
    weights = [0] * len(tokens)
    for question, answer in turns:
        prompt = [vocabulary.user_id, *question, vocabulary.bot_id]
        tokens += [*prompt, *answer, vocabulary.end_id]
        weights += [0] * len(prompt) + [1] * (len(answer) + 1)
    return tokens[:max_tokens], weights[:max_tokens]


def render_prompt(messages: Sequence[Message], vocabulary: Vocabulary, max_tokens: int | None = None) -> list[int]:
    """A dialogue whose last message is a question, as the tokens after which the model answers: they end in `<_bot>`.

    Args:
      messages: the dialogue so far.
      vocabulary: has user_id, bot_id, end_id, system_id.
      max_tokens: if the prompt is longer, the oldest turns go, then the left end of the question, then the system
        message.

    Raises:
      UserError: messages that are not such a dialogue; a vocabulary without the markers; max_tokens below 4.
    """
    check(messages, complete=False)
    system, turns = _encode(messages, vocabulary)
    system, turns = _fit(system, turns, max_tokens)
    tokens = [vocabulary.system_id, *system] if system else []
    for question, answer in turns:
        tokens += [vocabulary.user_id, *question, vocabulary.bot_id]
        tokens += [] if answer is None else [*answer, vocabulary.end_id]
    return tokens


def _encode(messages: Sequence[Message], vocabulary: Vocabulary) -> tuple[list[int], list[_Turn]]:
    has_system = messages[0]["role"] == "system"
    system = vocabulary.encode(messages[0]["content"]) if has_system else []
    spoken = [vocabulary.encode(message["content"]) for message in messages[int(has_system) :]]
    answers = [*spoken[1::2], None]  # the None stays unused when the last question has its answer
    return system, list(zip(spoken[0::2], answers, strict=False))


def _fit(system: list[int], turns: list[_Turn], max_tokens: int | None) -> tuple[list[int], list[_Turn]]:
    """Drops and cuts what `render` says; only the right end of the last answer is left for the caller to cut."""
    if max_tokens is None:
        return system, turns
    if max_tokens < 4:
        raise UserError(f"max_tokens={max_tokens}: a dialogue needs at least 4")

    def size(turn: _Turn) -> int:
        question, answer = turn
        return 2 + len(question) + (0 if answer is None else len(answer) + 1)

    def excess() -> int:
        return (1 + len(system) if system else 0) + sum(map(size, turns)) - max_tokens

    while excess() > 0 and len(turns) > 1:
        turns = turns[1:]
    question, answer = turns[0] if len(turns) == 1 else ([], None)
    if excess() >= len(question) > 0:
        system = []
    if excess() > 0:
        turns = [(question[excess() :], answer)]
    return system, turns
