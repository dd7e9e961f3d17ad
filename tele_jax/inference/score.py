"""Log-probabilities of given continuations of prompts, with every shared beginning computed once.

Requests are sorted by their token ids and laid into rows as trees, depth first: a request adds only the tokens in which
it differs from the one before. A token stands at the position of its depth and sees its ancestors alone
(`visible_until` of model/attention.py), so four answers to a question, or a hundred questions after the same examples,
share what they have in common. Rows have one of a dozen lengths, and logits are made at scored positions only.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tele_jax.axes import Params
from tele_jax.config import ModelConfig, given, require, require_config
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import FailedError, UserError
from tele_jax.inference.generate import checked_ids, mesh_of, rope_length_of
from tele_jax.model import decoder
from tele_jax.model.heads import head_kernel
from tele_jax.model.inputs import check_params
from tele_jax.model.loss import score_targets
from tele_jax.model.spec import spec
from tele_jax.sharding import BATCH, mesh_of_step, platform, put_batch, whole_rows

# Lengths of rows, in tokens; a longer request gets a row of its own, in whole blocks of LENGTHS[-1].
LENGTHS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
CPU_BATCH, BATCH_TOKENS = 4096, 16384  # tokens of all rows that one device computes at once
SCORED = (32, 8, 2, 1)  # a batch has room for as many scored positions a row as its length divided by one of these


class Score(NamedTuple):
    """The score of one continuation."""

    logprob: float  # natural logarithm of the probability of the whole continuation after its prompt
    num_tokens: int
    is_greedy: bool  # every token is the likeliest at its place


class TokenScores(NamedTuple):
    """The scores of the tokens of one continuation."""

    request: int  # index of the request
    logprobs: np.ndarray  # float32[n], or float64 where cfg.dtype is
    is_likeliest: np.ndarray  # bool[n]


def score(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    continuations: Sequence[Sequence[int]] | Sequence[str],
    *,
    vocabulary: Vocabulary | None = None,
) -> list[Score]:
    """Scores each continuation after its prompt: [(log-probability, number of tokens, whether greedy), ...].

        tele.score(cfg, params, [[5, 6, 7]] * 2, [[8], [9, 10]])      # [Score(-4.1, 1, False), Score(-8.0, 2, False)]

    Args:
      params: nested dict of arrays; where they are sharded over a mesh of data, fsdp and tensor, rows are cut over data
        and fsdp, and the vocabulary over tensor.
      prompts: token ids of each prompt, at least one; or texts, with `vocabulary`. data.templates.document_start gives
        the id that a model trained here has seen before every document.
      continuations: token ids or text of each continuation, at least one token. A prompt that has several
        continuations is named with each, and computed once.
      vocabulary: turns texts into ids. A prompt and its continuation are encoded as one text, which is cut after as
        many tokens as the prompt alone has, as lm-evaluation-harness does: a token that spans both counts as the
        prompt's. White space, newlines included, at the end of a prompt is scored with its continuation.

    Raises:
      UserError: parameters that are not those of cfg, not as many prompts as continuations, an empty one, an id beyond
        the vocabulary, a text without a vocabulary, more tokens than the model has positions.
      FailedError: log-probabilities that are not finite numbers.
    """
    require_config(cfg, "score: cfg")
    check_params(params, spec(cfg), "score")
    for name, rows in (("prompts", prompts), ("continuations", continuations)):
        is_list = hasattr(rows, "__len__") and not isinstance(rows, (str, bytes, Mapping))
        require(is_list, f"score: {name} is {rows!r}, not a list of texts or of lists of token ids")
    known = vocabulary is None or isinstance(vocabulary, Vocabulary)
    require(known, f"score: vocabulary: expected what load_vocabulary returns, got {type(vocabulary).__name__}")
    require(
        len(prompts) == len(continuations),
        f"score: {len(prompts)} prompts, but {len(continuations)} continuations; name a prompt with each of its own",
    )
    pairs = [_ids(cfg, vocabulary, p, c, i) for i, (p, c) in enumerate(zip(prompts, continuations, strict=True))]
    found: list[Score | None] = [None] * len(pairs)
    for request, logprobs, is_likeliest in score_tokens(cfg, params, pairs):
        found[request] = Score(float(logprobs.sum(dtype=np.float64)), len(logprobs), bool(is_likeliest.all()))
    return [given(value, "score: a request without a score") for value in found]


def encode_pair(vocabulary: Vocabulary, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of its continuation: both encoded as one text and cut where the prompt alone ends.

    Spaces at the end of the prompt go to the continuation first: most vocabularies join a space to the word after it.
    """
    kept = prompt.rstrip()
    whole_text = vocabulary.encode(prompt + continuation)
    length = len(vocabulary.encode(kept))
    return whole_text[:length], whole_text[length:]


def _ids(
    cfg: ModelConfig, vocabulary: Vocabulary | None, prompt: Any, continuation: Any, i: int
) -> tuple[list[int], list[int]]:
    if isinstance(prompt, str) and isinstance(continuation, str):
        if vocabulary is None:
            raise UserError(f"score: prompts[{i}] is a text; hand over vocabulary=, or token ids")
        require(bool(continuation), f"score: continuations[{i}] is empty")
        prompt, continuation = encode_pair(vocabulary, prompt, continuation)
        merged = f"score: prompts[{i}] and continuations[{i}] are one token together; hand over token ids"
        require(bool(continuation), merged)
    return checked_ids(cfg, prompt, f"score: prompts[{i}]"), checked_ids(
        cfg, continuation, f"score: continuations[{i}]"
    )


def score_tokens(
    cfg: ModelConfig,
    params: Params,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    tokens_per_batch: int | None = None,
    masks: decoder.Masks | None = None,
) -> Iterator[TokenScores]:
    """Yields the scores of each request (prompt ids, continuation ids), as soon as its batch is computed.

    The order is not that of the requests. tokens_per_batch: how many tokens go through the model at once, over all
    devices; results do not depend on it but for the rounding of products of another shape. masks: growth masks, see
    growth/masks.py.

    Raises:
      UserError: an empty prompt or continuation, or one beyond the model's positions.
      FailedError: log-probabilities that are not finite numbers.
    """
    for i, (prompt, continuation) in enumerate(requests):
        require(len(prompt) > 0, f"score: prompts[{i}] has no tokens; a continuation needs at least one before it")
        require(len(continuation) > 0, f"score: continuations[{i}] has no tokens")
        total = len(prompt) + len(continuation) - 1  # the last token is not read
        require(
            cfg.rope.ntk is not None or total <= cfg.max_seq_len,
            f"score: prompts[{i}] and its continuation read {total} tokens, but the model's max_seq_len is "
            f"{cfg.max_seq_len}",
        )
    groups: dict[int, list[int]] = {}
    for i, (prompt, continuation) in enumerate(requests):
        groups.setdefault(rope_length_of(cfg, len(prompt) + len(continuation) - 1), []).append(i)
    for rope_length, members in groups.items():
        yield from _score_group(cfg, params, masks, requests, members, rope_length, tokens_per_batch)


def _score_group(cfg, params, masks, requests, members, rope_length, tokens_per_batch) -> Iterator[TokenScores]:
    mesh = mesh_of(params)
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
    room = tokens_per_batch or ways * (CPU_BATCH if platform() == "cpu" else BATCH_TOKENS)
    length, rows = _best_rows(cfg, [(i, _array(requests[i][0]), _array(requests[i][1])) for i in members])
    full = max(1, room // length // ways) * ways
    for start in range(0, len(rows), full):
        batch = rows[start : start + full]
        size = min(full, ways * (1 << (-(-len(batch) // ways) - 1).bit_length()))  # the last may be smaller
        most = max(len(row.scored) for row in batch)
        places = next(length // part for part in SCORED if length // part >= most)
        arrays = _batch_arrays(batch, size, length, places)
        logprobs, is_likeliest = jax.device_get(_on_mesh(cfg, rope_length, params, masks, arrays, mesh))
        if not np.isfinite(logprobs).all():
            raise FailedError("score: log-probabilities are not finite numbers; look at the checkpoint, or its dtype")
        for r, row in enumerate(batch):
            for request, begin, end in row.requests:
                yield TokenScores(request, logprobs[r, begin:end], is_likeliest[r, begin:end])


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


# ------------------------------------------------------------------------------------------------------ rows of trees


@dataclasses.dataclass
class Row:
    """A row of trees of tokens, depth first.

    Attributes:
      tokens, positions, visible_until: int32[n]; see `visible_until` in model/attention.py.
      scored: (index in the row, target) of every scored token.
      requests: (request, begin, end): where in `scored` its tokens stand.
    """

    tokens: np.ndarray
    positions: np.ndarray
    visible_until: np.ndarray
    scored: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    requests: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


def pack_trees(requests: Sequence[tuple[int, np.ndarray, np.ndarray]], length: int) -> list[Row]:
    """Lays (request, prompt, continuation) into as few rows of `length` tokens as a walk in sorted order gives.

    Every request has at most `length` tokens besides its last, which is not read.
    """
    ordered = sorted((_sort_key(p, c), i, np.concatenate([p, c])[:-1], len(p), c) for i, p, c in requests)
    rows: list[Row] = []
    path = np.zeros(0, np.int32)  # where in the row the tokens of the request before stand
    before, used = np.zeros(0, np.int32), length
    for _, request, inputs, prompt, targets in ordered:
        shared = _common(before, inputs)
        if used + len(inputs) - shared > length or (rows and len(rows[-1].scored) + len(targets) > length):
            rows.append(Row(np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros(length, np.int32)))
            shared, used, path = 0, 0, path[:0]
        row, end = rows[-1], used + len(inputs) - shared
        row.tokens[used:end] = inputs[shared:]
        row.positions[used:end] = np.arange(shared, len(inputs))
        path = np.concatenate([path[:shared], np.arange(used, end, dtype=np.int32)])
        row.visible_until[path] = end
        begin = len(row.scored)
        row.scored += zip(path[prompt - 1 :].tolist(), targets.tolist(), strict=True)
        row.requests.append((request, begin, len(row.scored)))
        before, used = inputs, end
    for row in rows:  # padding sees itself
        empty = row.visible_until == 0
        row.visible_until[empty] = np.flatnonzero(empty) + 1
    return rows


def _sort_key(prompt: np.ndarray, continuation: np.ndarray) -> bytes:
    return np.concatenate([prompt, continuation]).astype(">u4").tobytes()


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of equal tokens at the beginning of both."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def _best_rows(cfg: ModelConfig, requests: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[int, list[Row]]:
    """The length of rows, and the rows, that cost least: longer ones share more, and attend over more."""
    longest = max(len(p) + len(c) - 1 for _, p, c in requests)
    lengths = [length for length in LENGTHS if length >= longest] or [-(-longest // LENGTHS[-1]) * LENGTHS[-1]]
    layer = cfg.embed_dim * cfg.head_dim * 2 * (cfg.num_heads + cfg.num_kv_heads) + 3 * cfg.embed_dim * cfg.mlp_dim
    best: tuple[float, int, list[Row]] | None = None
    for length in lengths[:6]:
        rows = pack_trees(requests, length)
        # multiply-adds of a token in the kernels of a layer, and with the half of the row that it may see
        cost = len(rows) * length * (layer + cfg.num_heads * cfg.head_dim * length)
        if best is None or cost < best[0]:
            best = cost, length, rows
        if len(rows) == 1:
            break
    assert best is not None  # there is at least one length
    return best[1:]


def _batch_arrays(batch: list[Row], size: int, length: int, places: int) -> dict[str, np.ndarray]:
    """Arrays of `size` rows, the last of them empty where the batch has fewer."""
    arrays = {name: np.zeros((size, length), np.int32) for name in ("tokens", "positions")}
    arrays["visible_until"] = np.tile(np.arange(1, length + 1, dtype=np.int32), (size, 1))
    arrays |= {name: np.zeros((size, places), np.int32) for name in ("at", "targets")}
    for r, row in enumerate(batch):
        for name in ("tokens", "positions", "visible_until"):
            arrays[name][r] = getattr(row, name)
        scored = np.array(row.scored, np.int32)
        arrays["at"][r, : len(scored)], arrays["targets"][r, : len(scored)] = scored.T
    return arrays


# --------------------------------------------------------------------------------------------------------- on devices


def _on_mesh(cfg, rope_length, params, masks, arrays, mesh: Mesh | None):
    if mesh is None:
        return _scores(cfg, rope_length, params, masks, arrays)
    with jax.set_mesh(mesh):
        return _scores(cfg, rope_length, params, masks, put_batch(arrays, mesh, len(arrays["tokens"])))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
    cfg: ModelConfig, rope_length: int, params: Params, masks: decoder.Masks | None, batch: dict[str, jax.Array]
):
    """Log-probabilities [B, P] and whether the target is the likeliest, bool[B, P]."""
    x = decoder.hidden(
        cfg,
        params,
        batch["tokens"],
        batch["positions"],
        masks=masks,
        rope_length=rope_length,
        visible_until=batch["visible_until"],
    )
    x = jnp.take_along_axis(x, batch["at"][:, :, None], axis=1)
    kernel = head_kernel(cfg, params)
    found = score_targets(whole_rows(x), kernel, batch["targets"], cfg.logit_mult, cfg.vocab_size)
    if mesh_of_step() is None:
        return found
    return jax.lax.with_sharding_constraint(found, P())  # every process reads all of them
