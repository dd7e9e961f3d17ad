"""The model under evaluation: what conditions its texts, and how it scores and continues them."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from tele_jax import checkpoint
from tele_jax.axes import Params
from tele_jax.checkpoint import adapted
from tele_jax.config import ModelConfig, given, require
from tele_jax.data import dialogue, templates
from tele_jax.data.templates import Template
from tele_jax.data.vocabulary import Vocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.files import PathLike, Table
from tele_jax.growth.masks import require_unmasked
from tele_jax.inference.chat import check_vocabulary, find_tokenizer
from tele_jax.inference.generate import prepare
from tele_jax.inference.score import TokenScores, score_tokens
from tele_jax.inference.texts import continue_texts
from tele_jax.model.decoder import Masks
from tele_jax.processes import from_first, is_first

PIECE = 500_000  # characters of a message between processes
ROWS = 16  # prompts that are continued at the same time


@dataclasses.dataclass
class EvalModel:
    """A loaded model. Several processes each have one, over the same mesh, and call the same methods in order.

    Attributes:
      path: where the checkpoint was found.
      params: nested dict of arrays, as checkpoint.load returns it.
      template: form of dialogues; None where nothing says which it is.
      document_start: id before every text, as in training and in `tele generate`; None: nothing is.
      prefix: id that conditions the first token of a text to score: document_start, or else the release's BOS, or EOS.
      stop_ids: ids that end a text or a reply: a model that goes on with the next question has finished its answer.
      masks: growth masks while they rise, in training; None for a plain model.
      identity: SHA-256 of the stored parameters; "" for parameters that no file holds.
      greedy: keywords of sampling.sampling with which dialogues are answered, see templates.greedy_options.
    """

    path: str
    cfg: ModelConfig
    params: Params
    vocabulary: Vocabulary
    template: Template | None
    document_start: int | None
    prefix: int
    stop_ids: list[int]
    masks: Masks | None = None
    identity: str = ""
    greedy: Table = dataclasses.field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        """The ids of a text from its beginning: document_start, where there is one, and those of the text."""
        return ([] if self.document_start is None else [self.document_start]) + self.vocabulary.encode(text)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a dialogue that ends in a question; raises UserError where the model has no template."""
        template = given(self.template, f"{self.path}: nothing says how its dialogues are written; give --template")
        return dialogue.render_prompt(list(messages), self.vocabulary, template=template)  # pyright: ignore[reportArgumentType]

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[TokenScores]:
        """Yields the scores of (prompt, continuation), in ids, as they are ready; see inference/score.py."""
        return score_tokens(self.cfg, self.params, requests, masks=self.masks)

    def continue_texts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Continues each prompt until an end of text, a stop string (which is left out) or max_new_tokens.

        on_text: called with the number of a prompt and its continuation as soon as the rows with it are done.
        options: see sampling.sampling, and `seed`: draws depend on it and on the number of the prompt; by default the
          likeliest token is taken.
        """
        require(self.masks is None, f"{self.path}: no text is generated while the masks of a growth rise")
        ready = prepare(self.cfg, self.params)
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of a batch are of like length
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            how: Table = {"max_new_tokens": max_new_tokens, "stop": stop, "stop_ids": self.stop_ids, "numbers": rows}
            batch = [prompts[i] for i in rows]
            found = continue_texts(self.cfg, ready, self.vocabulary, batch, **how, **options)
            for i, continuation in zip(rows, found, strict=True):
                texts[i] = continuation.text
                if on_text is not None:
                    on_text(i, texts[i])
        return texts


def examine(path: PathLike, tokenizer: PathLike | None = None) -> tuple[checkpoint.Lazy, Vocabulary]:
    """Opens a checkpoint and its tokenizer, reading no array, and raises UserError where `load` would refuse them."""
    lazy = checkpoint.open_lazy(path)
    vocabulary = load_vocabulary(find_tokenizer(path, tokenizer))
    check_vocabulary(lazy.cfg, vocabulary)
    require_unmasked(lazy.provenance, str(path))
    return lazy, vocabulary


def load(
    path: PathLike,
    *,
    tokenizer: PathLike | None = None,
    template: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> EvalModel:
    """Loads a checkpoint, with the tokenizer in or above it, for evaluation.

    Raises:
      UserError: no checkpoint, no tokenizer or one that does not fit, a model whose masks are still rising after a
        growth, an unknown template.
    """
    lazy, vocabulary = examine(path, tokenizer)
    params: Params = {}  # loaded last, after what is quick to find wrong
    model = of_params(str(path), lazy.cfg, params, vocabulary, lazy.provenance, template=template)
    model.params = checkpoint.load(path, mesh, items=("params",)).params
    model.identity = adapted.fingerprint(lazy)
    return model


def of_params(
    path: str,
    cfg: ModelConfig,
    params: Params,
    vocabulary: Vocabulary,
    provenance: Sequence[Table],
    *,
    template: str | None = None,
    masks: Masks | None = None,
) -> EvalModel:
    """The model of parameters that are there. path: names it in messages; provenance: of its checkpoint.

    Raises:
      UserError: an unknown template; a vocabulary with neither BOS nor EOS.
    """
    try:
        form = templates.choose(vocabulary, template, provenance)
    except UserError:
        if template is not None:
            raise
        form = None
    release = templates.release_of(provenance)
    released: Table = {} if release is None else release["generation"]
    start = templates.document_start(vocabulary, provenance)
    bos = ({} if release is None else release.get("config", {})).get("bos_token_id")
    ends = {i for i in released.get("eos_token_ids", ()) if 0 <= i < cfg.vocab_size}
    if form is not None:
        ends |= set(templates.stop_ids(form, vocabulary))
    ends |= {vocabulary.eos_id} - {-1}
    prefixes = (start, bos, vocabulary.bos_id, vocabulary.eos_id)
    prefix = next((i for i in prefixes if isinstance(i, int) and 0 <= i < cfg.vocab_size), None)
    prefix = given(prefix, f"{path}: no id conditions the first token of a text; its tokenizer has neither BOS nor EOS")
    greedy = templates.greedy_options(form, released)
    return EvalModel(path, cfg, params, vocabulary, form, start, prefix, sorted(ends), masks, greedy=greedy)


# ------------------------------------------------------------------------------------------------- several processes


class Leader:
    """Process 0 as the others see it: what it asks of the model, all of them compute.

    with Leader(model) as leader:
        if leader.leads:
            leader.score(requests)
    """

    def __init__(self, model: EvalModel):
        self.model, self.leads = model, is_first()

    def __enter__(self) -> "Leader":
        if not self.leads:
            self._follow()
        return self

    def __exit__(self, *error: object) -> None:
        if self.leads:
            _share(["end", None])

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[TokenScores]:
        """Does what EvalModel.score does, in all processes; to be read to its end."""
        _share(["score", [[list(map(int, ids)) for ids in request] for request in requests]])
        return self.model.score(requests)

    def continue_texts(self, prompts: Sequence[Sequence[int]], *, on_text=None, **options: Any) -> list[str]:
        """Does what EvalModel.continue_texts does, in all processes."""
        _share(["continue", [[list(map(int, prompt)) for prompt in prompts], options]])
        return self.model.continue_texts(prompts, on_text=on_text, **options)

    def _follow(self) -> None:
        while True:
            kind, what = _share(None)
            if kind == "end":
                return
            if kind == "score":
                for _ in self.model.score(what):
                    pass
            else:
                self.model.continue_texts(what[0], **what[1])


def _share(value: Any) -> Any:
    """The value of process 0, JSON of any size, in every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value) if is_first() else ""
    count = from_first(lambda: -(-len(text) // PIECE))
    return json.loads("".join(from_first(lambda i=i: text[i * PIECE : (i + 1) * PIECE]) for i in range(count)))
