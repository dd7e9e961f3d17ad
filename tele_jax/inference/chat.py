"""Conversations with a fine-tuned model: history, replies as a stream of text, and the tokenizer of a checkpoint."""

import codecs
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tele_jax.axes import Params
from tele_jax.checkpoint import locate
from tele_jax.config import ModelConfig, check_seed, require, whole
from tele_jax.data import dialogue, templates
from tele_jax.data.dialogue import Prompt
from tele_jax.data.templates import Template
from tele_jax.data.vocabulary import TOKENIZER_FILES, Vocabulary, tokenizer_in
from tele_jax.errors import UserError
from tele_jax.files import PathLike
from tele_jax.inference.generate import generate, prepare, sampling

MAX_NEW_TOKENS = 1024  # not published: ours, an answer of about two pages


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer, with the prompt before it and the reason of its end.

    Attributes:
      text: the answer.
      prompt: the prompt that the answer continues, as fitted into the context.
      tokens: the tokens of the answer, without the one that ended it.
      ended: "eos" (the model ended it), "length" (it has max_new_tokens), "context" (it has them, and prompt and answer
        fill the model's context).
      remembered: True where question and answer are in the history now. An empty answer is not: no template writes one.
    """

    text: str
    prompt: Prompt
    tokens: list[int]
    ended: Literal["eos", "length", "context"]
    remembered: bool


class Chat:
    """A conversation. Each reply continues the whole history, as far as the model's context holds it.

        chat = Chat(cfg, params, vocabulary, system="Answer in one word.")
        chat.reply("What is the capital of France?")     # 'Paris'
        chat.messages[-1]                                # {'role': 'assistant', 'content': 'Paris'}
        chat.last.ended                                  # 'eos'

    A prompt that does not fit into cfg.max_seq_len beside max_new_tokens is trimmed: the oldest turns go, then the left
    end of the question; `last.prompt` says so. `messages` keeps everything. Answers stand in later prompts by the ids
    that were drawn.

    Attributes:
      messages: {"role", "content"} of the system message, if any, and of every exchange.
      template: the form in which the dialogue is written.
      last: the last reply; None before the first.
      max_new_tokens, max_seq_len: the longest reply, and the longest prompt and reply together, in tokens.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        vocabulary: Vocabulary,
        *,
        template: Template | None = None,
        system: str | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        **options: Any,
    ):
        """Prepares the model; by default the likeliest token is always taken.

        template: default: that of the vocabulary.
        max_new_tokens: longest reply; default: 1,024, or half of cfg.max_seq_len where that is less.
        seed: the n-th reply is drawn with seed + n.
        stop_ids: more ids that end a reply, beside those of the template.
        options: temperature, top_k, top_p and repetition_penalty as in sampling.sampling; template.sampling and
          template.greedy hold the values that a family was released with.

        Raises:
          UserError: an option out of its range; a vocabulary without the template's markers, or larger than the
            model's; a system message where the template has no place for one.
        """
        sampling(**options)
        check_seed(seed)
        check_vocabulary(cfg, vocabulary)
        self.template = template or templates.choose(vocabulary)
        shortest = dialogue.shortest(vocabulary, self.template)
        if max_new_tokens is None:
            max_new_tokens = min(MAX_NEW_TOKENS, cfg.max_seq_len // 2)
        require(whole(max_new_tokens, "max_new_tokens") >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
        self._max_prompt = cfg.max_seq_len - max_new_tokens
        require(
            self._max_prompt >= shortest,
            f"max_new_tokens={max_new_tokens} leaves {max(self._max_prompt, 0)} of the model's max_seq_len="
            f"{cfg.max_seq_len} tokens to the question, which needs {shortest}; give less",
        )
        stop_ids = sorted({*templates.stop_ids(self.template, vocabulary), *stop_ids})
        self.max_new_tokens, self.max_seq_len = max_new_tokens, cfg.max_seq_len
        self._options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids, **options)
        self._cfg, self._params, self._vocabulary = cfg, prepare(cfg, params), vocabulary
        self._seed, self._replies = seed, 0
        self.messages: list[dict[str, str]] = []
        self.last: Reply | None = None
        self._drawn: dict[int, tuple[str, list[int]]] = {}  # by index in messages: an answer and its ids
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets the conversation; the next one has this system message, or none.

        Raises:
          UserError: the template has no place for a system message; nothing is forgotten then.
        """
        messages = [{"role": "system", "content": system}] if system else []
        if messages:  # raises where the template has no place for it
            asked = [*messages, {"role": "user", "content": "?"}]
            dialogue.render_prompt(asked, self._vocabulary, template=self.template)
        self.messages, self._drawn = messages, {}

    def reply(self, question: str, on_text: Callable[[str], None] | None = None) -> str:
        """Answers, and takes question and answer into the history, unless the answer is empty or interrupted.

        on_text: called after every token with the text that is certain now and was not before, which may be none;
          together the texts are the answer.

        Raises:
          UserError: the question is empty.
        """
        require(bool(question), "the question is empty")
        asked = [*self.messages, {"role": "user", "content": question}]
        # A caller may have put another text in the place of an answer: then the ids are no longer those of it.
        drawn = {i: ids for i, (said, ids) in self._drawn.items() if i < len(asked) and asked[i]["content"] == said}
        prompt = dialogue.fit_prompt(asked, self._vocabulary, self._max_prompt, self.template, drawn)
        text = TextStream(self._vocabulary)
        parts: list[str] = []

        def take(part: str) -> None:
            parts.append(part)
            if on_text is not None:
                on_text(part)

        (tokens,) = generate(
            self._cfg,
            self._params,
            [prompt.tokens],
            seed=(self._seed + self._replies) % 2**32,
            on_token=lambda _, token: take(text.add(token)),
            **self._options,
        )
        if rest := text.end():
            take(rest)
        self._replies += 1
        answer = "".join(parts)
        ended = why_ended(self._cfg, prompt.tokens, tokens, self.max_new_tokens)
        self.last = Reply(answer, prompt, tokens, ended, remembered=bool(answer))
        if answer:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            self._drawn[len(asked)] = answer, tokens
        return answer


def why_ended(
    cfg: ModelConfig, prompt: Sequence[int], drawn: Sequence[int], max_new_tokens: int
) -> Literal["eos", "length", "context"]:
    """The reason why no more tokens were drawn: a stop id, the length, or both fill the model's context."""
    if len(drawn) < max_new_tokens:
        return "eos"
    return "context" if cfg.rope.ntk is None and len(prompt) + len(drawn) >= cfg.max_seq_len else "length"


class TextStream:
    """A decoder of tokens to text, one by one. A character of many byte tokens comes out whole, with its last byte.

    stream = TextStream(vocabulary)
    [stream.add(token) for token in three_byte_tokens]     # ['', '', '中']

    Attributes:
      stopped: True once a stop string has come, the first that is complete. The text ends before it, however it is
        divided into tokens; what may be the beginning of one is held back until more of the text is there.
    """

    def __init__(self, vocabulary: Vocabulary, *, continues: bool = False, stop: Sequence[str] = ()):
        """Begins a text, or continues one: then a space of the first token is no dummy prefix. stop: stop strings."""
        self._vocabulary, self._at_start = vocabulary, not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._held, self.stopped = [text for text in stop if text], "", False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before. Control tokens, and ids beyond the vocabulary, have none."""
        spelled = self._vocabulary.spelled(token, first=self._at_start)
        self._at_start = self._at_start and not spelled
        return self._until_stop(self._decoder.decode(spelled), final=False)

    def end(self) -> str:
        """Returns the rest of the text, with U+FFFD where the last character was never completed."""
        return self._until_stop(self._decoder.decode(b"", final=True), final=True)

    def _until_stop(self, new: str, *, final: bool) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else new
        text, self._held = self._held + new, ""
        places = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)[1]]
        if final:
            return text
        longest = min(len(text), max(map(len, self._stop)) - 1)
        begins = (n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop))
        certain = len(text) - next(begins, 0)
        self._held = text[certain:]
        return text[:certain]


def check_vocabulary(cfg: ModelConfig, vocabulary: Vocabulary) -> None:
    """Raises UserError where the vocabulary has ids that the model does not have."""
    require(
        vocabulary.vocab_size <= cfg.vocab_size,
        f"tokenizer {vocabulary.path}: it has {vocabulary.vocab_size} ids, but the model's vocab_size is "
        f"{cfg.vocab_size}; name the tokenizer that the model was trained with by --tokenizer",
    )


def find_tokenizer(ckpt_path: PathLike, explicit: PathLike | None = None) -> str:
    """Path of the tokenizer of a checkpoint: the one named explicitly, or one in or above the checkpoint's directory.

    The file is called tokenizer.model (SentencePiece) or tokenizer.json (of the `tokenizers` library). Where both lie,
    the model is taken, from which the JSON was made.

    ckpt_path: path as checkpoint.load takes it. The step directory is searched, and those above it up to the work
      directory: W/pretrain/checkpoints/100, W/pretrain/checkpoints, W/pretrain, W.

    Raises:
      UserError: there is no checkpoint, or no tokenizer in any of these directories.
    """
    if explicit is not None:
        return str(explicit)
    step = locate.find_step(ckpt_path)
    for directory in (step, *list(step.parents)[:3]):
        if found := tokenizer_in(directory):
            return str(found)
        if (directory / "config.json").is_file():
            break  # the work directory
    raise UserError(
        f"{step}: no {' or '.join(TOKENIZER_FILES)} in or above it, up to {directory}; name one with --tokenizer FILE"
    )
