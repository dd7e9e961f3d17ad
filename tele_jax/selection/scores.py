"""A model's judgement of samples: losses of the answers with and without their questions, and states.

Difficulty is the ratio of the two losses (instruction-following difficulty, arXiv 2308.12032): above 1 the question
does not help to predict the answer. States are means over a dialogue's tokens of the hidden state after a layer and the
last norm, weighted by position (arXiv 2202.08904): later tokens have seen more.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import Params
from tele_jax.checkpoint import adapted
from tele_jax.config import ModelConfig as Decoder
from tele_jax.config import require, to_dict
from tele_jax.data.messages import weight_of
from tele_jax.errors import FailedError
from tele_jax.eval import model as models
from tele_jax.inference.generate import rope_length_of
from tele_jax.inference.score import LENGTHS
from tele_jax.model import decoder
from tele_jax.selection.samples import Sample
from tele_jax.selection.settings import ModelConfig

BATCH_TOKENS = 4096
SHORT = (32, 64)  # lengths of rows beside those of inference/score.py


def examine(config: ModelConfig) -> str:
    """Returns the SHA-256 of all that decides the scores, reading no array: parameters, tokenizer and template.

    Raises UserError for a model that cannot be used.
    """
    lazy, vocabulary = models.examine(config.checkpoint, config.tokenizer)
    adapted.unfold(lazy)  # of adapters: their base is there, and is theirs
    model = models.of_params(config.checkpoint, lazy.cfg, {}, vocabulary, lazy.provenance, template=config.template)
    _check_form(config, model)
    layers = lazy.cfg.num_layers
    require(config.layer is None or config.layer <= layers, f"model.layer={config.layer}: the model has {layers}")
    most, limit = config.max_tokens or 0, lazy.cfg.max_seq_len
    require(
        most <= limit or lazy.cfg.rope.ntk is not None, f"model.max_tokens={most}: the model's max_seq_len is {limit}"
    )
    form = repr(model.template) if config.form == "template" else "plain"
    parts = (adapted.fingerprint(lazy), to_dict(lazy.cfg), vocabulary.sha256, model.prefix, form)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_form(config: ModelConfig, model: models.EvalModel) -> None:
    written = config.form == "plain" or model.template is not None
    require(written, f"{config.checkpoint}: nothing says how its dialogues are written; give model.template")


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The scores of n samples.

    Attributes:
      tokens: int32[n], of the dialogue; a sample with more than the limit has no scores.
      loss, alone: float32[n], mean loss of the learned answers' tokens, in nats, after all that came before them, and
        after nothing; NaN without a score.
      states: float32[n, D], zeros without a score.
    """

    tokens: np.ndarray
    loss: np.ndarray
    alone: np.ndarray
    states: np.ndarray


class Scorer:
    """A loaded model; raises UserError as eval.model.load."""

    def __init__(self, config: ModelConfig):
        self.model = models.load(config.checkpoint, tokenizer=config.tokenizer, template=config.template)
        self.config = config
        _check_form(config, self.model)
        cfg, params = self.model.cfg, self.model.params
        self.limit = config.max_tokens or cfg.max_seq_len
        layers = config.layer or cfg.num_layers
        self._cfg = cfg.replace(num_layers=layers, remat="none")
        self._params = {**params, "layers": jax.tree.map(lambda leaf: leaf[:layers], params["layers"])}

    def encode(self, sample: Sample) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Returns the ids of the dialogue, and (what comes before, answer) of every learned answer, in ids."""
        model, messages = self.model, list(sample.messages or ())
        whole, pairs = [model.prefix], []
        for i, message in enumerate(messages):
            ids = model.vocabulary.encode(message["content"])
            if message["role"] in ("assistant", "bot"):
                before = whole if self.config.form == "plain" else model.prompt(messages[:i])
                if weight_of(message):
                    pairs.append((list(before), ids))
                whole = [*before, *ids]
            elif self.config.form == "plain":
                whole = [*whole, *ids]
            if self.config.form == "plain":
                whole = [*whole, *model.vocabulary.encode_continuation("\n")]
        return whole, [(before, ids) for before, ids in pairs if ids]

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Scores samples; raises FailedError for a model whose numbers are not finite."""
        encoded = [self.encode(sample) for sample in samples]
        tokens = np.array([len(whole) for whole, _ in encoded], np.int32)
        rows = [i for i, (whole, pairs) in enumerate(encoded) if pairs and len(whole) <= self.limit]
        owners = [i for i in rows for _ in encoded[i][1]]
        after = [pair for i in rows for pair in encoded[i][1]]
        alone = [([self.model.prefix], answer) for _, answer in after]
        sums = np.zeros((2, len(samples)))
        places = np.array(owners, np.int64)
        counts = np.bincount(places, [len(answer) for _, answer in after], len(samples))
        for which, requests in enumerate((after, alone)):
            found = np.zeros(len(requests))
            for result in self.model.score(requests):
                found[result.request] = -result.logprobs.sum(dtype=np.float64)
            sums[which] = np.bincount(places, found, len(samples))  # in the order of the samples, not of the batches
        with np.errstate(divide="ignore", invalid="ignore"):
            loss, without = (np.where(counts > 0, total / counts, np.nan).astype(np.float32) for total in sums)
        return Scores(tokens, loss, without, self._states([encoded[i][0] for i in rows], rows, len(samples)))

    def _states(self, dialogues: list[list[int]], rows: list[int], count: int) -> np.ndarray:
        states = np.zeros((count, self._cfg.embed_dim), np.float32)
        groups: dict[tuple[int, int], list[int]] = {}
        for i in sorted(range(len(dialogues)), key=lambda i: (len(dialogues[i]), i)):
            size = len(dialogues[i])
            length = next((n for n in (*SHORT, *LENGTHS) if n >= size), -(-size // LENGTHS[-1]) * LENGTHS[-1])
            groups.setdefault((length, rope_length_of(self._cfg, size)), []).append(i)
        for (length, rope_length), members in groups.items():
            room = max(1, BATCH_TOKENS // length)
            for start in range(0, len(members), room):
                batch = members[start : start + room]
                tokens, sizes = np.zeros((room, length), np.int32), np.ones(room, np.int32)
                for r, i in enumerate(batch):
                    tokens[r, : len(dialogues[i])], sizes[r] = dialogues[i], len(dialogues[i])
                found = np.asarray(_pooled(self._cfg, rope_length, self._params, tokens, sizes))[: len(batch)]
                if not np.isfinite(found).all():
                    raise FailedError(f"{self.config.checkpoint}: its states are not finite numbers")
                states[[rows[i] for i in batch]] = found
        return states


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(cfg: Decoder, rope_length: int, params: Params, tokens: jax.Array, sizes: jax.Array) -> jax.Array:
    """Position-weighted means of the final states, float32[B, D], of tokens [B, S], of which `sizes` [B] count."""
    # Padding stands behind the tokens, which do not see it.
    x = decoder.hidden(cfg, params, tokens, rope_length=rope_length).astype(jnp.float32)
    place = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)
    weight = jnp.where(place <= sizes[:, None], place, 0)
    return jnp.einsum("BS,BSD->BD", weight / weight.sum(1, keepdims=True), x)
