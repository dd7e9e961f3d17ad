"""Generation with a KV cache: prompts go in chunk by chunk, then one token per row and step on the device.

All rows fill the slots of the cache in step. Prompts start in slot 0 and are padded on the right; drawn tokens follow
in the slots after the longest prompt. Padding has no position, so no query sees it: shapes are rounded up for few
compilations, which changes results by rounding at most. On a mesh, rows lie along data and fsdp, keys and values along
tensor.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tele_jax.axes import Leaf, Params, flatten, unflatten
from tele_jax.config import ModelConfig, check_seed, require, require_config, whole
from tele_jax.errors import FailedError, UserError
from tele_jax.files import Table
from tele_jax.inference.sampling import Sampling, draw, sampling
from tele_jax.model import decoder, heads
from tele_jax.model.attention import SLOT_BLOCK
from tele_jax.model.spec import check_prepared, flat_spec
from tele_jax.sharding import BATCH, MESH_AXES, RULES, on_host

CHUNK = 256  # tokens of a prompt that go through the model at once


class State(struct.PyTreeNode):
    """The state of rows in the making. The first lengths[b] of tokens[b] are prompt and continuation."""

    tokens: jax.Array  # int32[B, T]
    lengths: jax.Array  # int32[B]
    token: jax.Array  # int32[B], drawn last; without meaning in a row that is done
    done: jax.Array  # bool[B], a stop id was drawn, or nothing could be
    broken: jax.Array  # bool[B], the logits were not finite
    step: jax.Array  # int32[], tokens drawn so far
    slot: jax.Array  # int32[], slot of the cache for the token drawn last
    keys: jax.Array  # random keys [B], one per row
    logprobs: jax.Array  # float32[B, T] or better, of the drawn tokens, at their places in tokens
    seen: jax.Array | None  # bool[B, V], tokens in prompt or continuation; None without repetition penalty


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    on_token: Callable[[int, int], object] | None = None,
) -> list[list[int]]:
    """Continues each prompt until a stop id or max_new_tokens.

        generate(cfg, params, [[5, 6, 7], [8]], max_new_tokens=3)     # [[17, 4, 17], [9, 9, 2]], say

    Args:
      params: nested dict of arrays, or the result of `prepare`. Where they are sharded over a mesh of data, fsdp and
        tensor (checkpoint.load(path, mesh), sharding.param_shardings), the cache is sharded over it too: rows over data
        and fsdp, padded with empty rows where they do not divide, and kv_heads over tensor.
      prompts: token ids, one list per row, of any lengths above 0. A model that was trained here on documents has seen
        a separator before each: data.templates.document_start gives it.
      max_new_tokens: limit for every row. Prompt and new tokens together are the total length that NTK scaling goes by,
        and must not exceed cfg.max_seq_len where the model has no NTK scaling.
      temperature, top_k, top_p, repetition_penalty: see `sampling`; by default the likeliest token is taken.
      stop_ids: ids that end a row; they are not part of its output.
      seed: a row's random keys depend on (seed, its index in prompts) alone. Other rows change its logits by the
        rounding of products of another shape at most.
      on_token: called as on_token(row, token) for every token as soon as it is there; True as result ends the row
        after it (chat.TextStream knows when a stop string has come).

    Returns:
      The new tokens of every row, without prompt and stop id.

    Raises:
      UserError: no prompt, an empty one, an id that is not in the vocabulary, a total length or a sampling option out
        of its range.
      FailedError: logits that are not finite numbers; says whether a parameter is not.
    """
    options: Table = dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    options |= dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed, on_token=on_token)
    return [tokens for tokens, _ in generate_scored(cfg, params, prompts, **options)]


def generate_scored(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    on_token: Callable[[int, int], object] | None = None,
    numbers: Sequence[int] | None = None,
    **options: Any,
) -> list[tuple[list[int], np.ndarray]]:
    """Does what `generate` does, and returns with the tokens of each row their log-probabilities, float32[n] in nats.

    These are the model's own, log softmax(logits), whatever the temperature and the penalty with which they were drawn.
    Drawn at temperature 1 from cfg.replace(output_mult=cfg.output_mult / T), they are those of the distribution at T.
    numbers: one a prompt, which random keys depend on in the place of its index: those of rows of a larger batch.
    options: as `sampling`. With keep_stop=True the stop id that ended a row is its last token, and on_token is refused.
    """
    require_config(cfg, "generate: cfg")
    how = sampling(**options)
    require(on_token is None or not how.keep_stop, "on_token and keep_stop: a stop id is given to no on_token")
    require(isinstance(prompts, Iterable), f"prompts is {prompts!r}, not a list of lists of token ids")
    prompts = [checked_ids(cfg, prompt, f"prompts[{row}]") for row, prompt in enumerate(prompts)]
    stop_ids = checked_ids(cfg, stop_ids, "stop_ids")
    _check(cfg, prompts, max_new_tokens)
    check_seed(seed)
    params = prepare(cfg, params)
    # With NTK scaling rows of different totals may need different rotary tables: those do not share a batch.
    groups = collections.defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[rope_length_of(cfg, len(prompt) + max_new_tokens)].append(row)
    results: list[tuple[list[int], np.ndarray]] = [([], np.zeros(0, np.float32)) for _ in prompts]
    for rope_length, rows in groups.items():
        emit = None if on_token is None else lambda i, token, rows=rows: on_token(rows[i], token)
        batch = [prompts[row] for row in rows]
        drawn_as = np.array(rows if numbers is None else [numbers[row] for row in rows])
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), drawn_as)
        outputs = _generate_batch(cfg, params, batch, keys, how, stop_ids, max_new_tokens, rope_length, emit)
        for row, output in zip(rows, outputs, strict=True):
            results[row] = output
    return results


def prepare(cfg: ModelConfig, params: Params) -> Mapping[str, Any]:
    """Parameters in the form for decoding: every leaf in the dtype of its use, and on CPUs the layers one by one.

    Norm scales are used in float32 and stay; the rest goes to cfg.dtype, so that a step does not cast it again. XLA's
    CPU compiler copies the slice of every stacked weight that a scan over layers hands to a matrix product, which
    doubles the time of a step (docs/decode.md); its TPU compiler reads slices in place, and there layers stay stacked.
    Results change by rounding at most. `generate` calls this itself: a call before saves the work in many generations.
    The result takes its own memory; if nothing else holds params, each leaf goes as soon as it is replaced.
    """
    if check_prepared(cfg, params):
        return params
    spec, leaves, dtype = flat_spec(cfg), flatten(params), jnp.dtype(cfg.dtype)
    unstack = all(_platform(leaf) == "cpu" for leaf in leaves.values())
    del params
    layers: list[Table] = [{} for _ in range(cfg.num_layers)]
    ready: Table = {}
    for name in list(leaves):
        leaf = leaves.pop(name)
        if spec[name].role != "scale" and leaf.dtype != dtype:
            leaf = _cast(leaf, dtype)
        if unstack and name.startswith("layers."):
            for layer, own in zip(layers, _unstack(leaf), strict=True):
                layer[name.removeprefix("layers.")] = own
        else:
            ready[name] = leaf
    return unflatten(ready) | ({"layers": tuple(map(unflatten, layers))} if unstack else {})


@functools.partial(jax.jit, static_argnums=1)
def _cast(leaf, dtype):
    return jax.tree.map(lambda array: array.astype(dtype), leaf)  # a kernel may have an adapter (platforms.Adapted)


@jax.jit
def _unstack(leaf):
    return tuple(jax.tree.map(lambda array: array[layer], leaf) for layer in range(leaf.shape[0]))  # noqa: B023


def _platform(leaf: object) -> str:
    return next(iter(leaf.devices())).platform if isinstance(leaf, jax.Array) else jax.default_backend()


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that the parameters are sharded over; None where there is none, or its axes are not MESH_AXES."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh if set(MESH_AXES) <= set(sharding.mesh.axis_names) else None
    return None


def _generate_batch(cfg, params, prompts, keys, how, stop_ids, max_new_tokens, rope_length, emit):
    mesh = mesh_of(params)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        rows = len(prompts)
        if mesh is not None:  # every device of data x fsdp gets as many rows
            ways = math.prod(mesh.shape[axis] for axis in BATCH)
            prompts = [*prompts, *[[0]] * (-rows % ways)]
            keys = keys[np.minimum(np.arange(len(prompts)), rows - 1)]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        longest = int(lengths.max())
        chunk = min(CHUNK, _bucket(longest))
        slots = cache_slots(max(longest + max_new_tokens, -(-longest // chunk) * chunk), cfg.max_seq_len)
        tokens = np.zeros((len(prompts), slots), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        stop_ids = np.array(stop_ids + [-1] * (_bucket(len(stop_ids)) - len(stop_ids)), np.int32)  # -1 is never drawn
        cache, last = _empty(cfg, mesh, len(prompts), slots)
        for start in range(0, longest, chunk):
            piece = tokens[:, start : start + chunk]
            cache, last = _prefill(cfg, rope_length, params, cache, last, piece, np.int32(start), lengths)
        state = _begin(cfg, params, last, tokens, lengths, np.arange(len(prompts)) >= rows, keys, how, stop_ids)
        state = _draw_all(cfg, rope_length, params, cache, state, how, stop_ids, max_new_tokens, emit)
        tokens, logprobs, ends, broken = on_host((state.tokens, state.logprobs, state.lengths, state.broken))
    if broken[:rows].any():
        _fail(cfg, params, int(ends[:rows][broken[:rows]].min()) - 1)
    drawn = [slice(lengths[row], ends[row]) for row in range(rows)]
    return [(tokens[row, part].tolist(), logprobs[row, part]) for row, part in enumerate(drawn)]


def _fail(cfg: ModelConfig, params: Params, position: int) -> None:
    """Raises FailedError for logits that are not finite; names a parameter that is not finite, if there is one."""
    what = f"the logits at position {position} are not finite numbers"
    for name, leaf in flatten({key: value for key, value in params.items() if key != "layers"}).items():
        _require_finite(what, name, leaf)
    layers = params["layers"]
    for i, layer in enumerate([layers] if isinstance(layers, Mapping) else layers):
        for name, leaf in flatten(layer).items():
            _require_finite(what, f"layers.{name}" + ("" if isinstance(layers, Mapping) else f" of layer {i}"), leaf)
    dtype = jnp.dtype(cfg.dtype).name
    hint = "" if dtype in ("float32", "float64") else f': numbers overflow in {dtype}; try dtype="float32"'
    raise FailedError(f"{what}, though every parameter is one{hint}")


def _require_finite(what: str, name: str, leaf: Leaf) -> None:
    if not bool(jnp.isfinite(leaf).all()):
        raise FailedError(f"{what}: the parameter {name} holds NaN or infinity; the checkpoint is of no use")


def _draw_all(cfg, rope_length, params, cache, state, how, stop_ids, max_new_tokens, emit) -> State:
    """Decodes to the end in one program, or step by step where emit(row, token) is to be called."""
    if emit is None:
        return _decode(cfg, rope_length, params, cache, state, how, stop_ids, np.int32(max_new_tokens))[0]
    # The next step is under way while the host reads this one; after the end a step does nothing.
    lengths = np.subtract(*on_host((state.lengths, ~state.done)))  # before the first draw
    ended = np.zeros(len(lengths), bool)
    for step in range(1, max_new_tokens + 1):
        until = np.int32(min(step + 1, max_new_tokens))
        following, cache = _decode(cfg, rope_length, params, cache, state, how, stop_ids, until)
        token, done = on_host((state.token, state.done))
        for row in np.flatnonzero(~done & ~ended):
            ended[row] = emit(int(row), int(token[row])) is True
            lengths[row] += 1
        state = following.replace(done=following.done | ended) if ended.any() else following
        if (done | ended).all():
            break
    return state.replace(lengths=lengths)  # what came after the end of a row is dropped


def cache_shardings(cfg: ModelConfig, mesh: Mesh) -> decoder.Cache:
    """Shardings of a cache: rows over data and fsdp, kv_heads over tensor."""
    heads = RULES["kv_heads"]
    if cfg.num_kv_heads % mesh.shape[heads]:
        heads = None  # the caller has placed the parameters by other rules than RULES
    keys = NamedSharding(mesh, P(None, BATCH, heads))
    rows = NamedSharding(mesh, P(BATCH))
    return decoder.Cache(keys, keys, rows)  # pyright: ignore[reportArgumentType] - a tree of shardings


def _empty(cfg: ModelConfig, mesh: Mesh | None, batch: int, slots: int) -> tuple[decoder.Cache, jax.Array]:
    """An empty cache, and room for the final hidden state [B, D] of the last token of every prompt."""

    def make() -> tuple[decoder.Cache, jax.Array]:
        return decoder.empty_cache(cfg, batch, slots), jnp.zeros((batch, cfg.embed_dim), cfg.dtype)

    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=(cache_shardings(cfg, mesh), NamedSharding(mesh, P(BATCH))))()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _prefill(cfg, rope_length, params, cache, last, piece, start, lengths):
    """Takes tokens [B, C] of positions start, start + 1, ... into the cache; keeps the states at lengths - 1."""
    positions = jnp.broadcast_to(start + jnp.arange(piece.shape[1], dtype=jnp.int32), piece.shape)
    is_last = positions == lengths[:, None] - 1
    positions = jnp.where(positions < lengths[:, None], positions, decoder.NOWHERE)
    x, cache = decoder.hidden_cached(cfg, params, piece, positions, cache, start, rope_length)
    found = jnp.take_along_axis(x, jnp.argmax(is_last, axis=1)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where(is_last.any(axis=1)[:, None], found, last)


@functools.partial(jax.jit, static_argnums=0)
def _begin(cfg, params, last, tokens, lengths, done, keys, how, stop_ids):
    """The state after the first draw."""
    batch, slots = tokens.shape
    seen = None
    if how.repetition_penalty is not None:
        # Padding goes to an index beyond the vocabulary, which scatter drops.
        ids = jnp.where(jnp.arange(slots) < lengths[:, None], tokens, cfg.vocab_size)
        seen = jnp.zeros((batch, cfg.vocab_size), bool).at[jnp.arange(batch)[:, None], ids].set(True)
    state = State(
        tokens=tokens,
        lengths=lengths,
        token=jnp.zeros(batch, jnp.int32),
        done=done,
        broken=jnp.zeros_like(done),
        logprobs=jnp.zeros(tokens.shape, last.dtype if last.dtype == jnp.float64 else jnp.float32),
        step=jnp.int32(0),
        slot=jnp.max(lengths) - 1,
        keys=keys,
        seen=seen,
    )
    return _append(cfg, params, last, state, how, stop_ids)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(cfg, rope_length, params, cache, state, how, stop_ids, until):
    """Runs the model on the last tokens and draws the next, until `until` are drawn or every row is done."""
    going = lambda carry: (carry[0].step < until) & ~carry[0].done.all()  # noqa: E731
    step = lambda carry: decode_step(cfg, rope_length, params, carry[0], carry[1], how, stop_ids)  # noqa: E731
    return jax.lax.while_loop(going, step, (state, cache))


def decode_step(cfg, rope_length, params, state: State, cache: decoder.Cache, how: Sampling, stop_ids):
    """Runs the model on the last tokens and draws the next ones: (state, cache)."""
    positions = state.lengths[:, None] - 1
    x, cache = decoder.hidden_cached(cfg, params, state.token[:, None], positions, cache, state.slot, rope_length)
    return _append(cfg, params, x[:, 0], state, how, stop_ids), cache


def _append(cfg, params, x, state: State, how: Sampling, stop_ids) -> State:
    """Draws a token for every row from its final hidden state [B, D], and appends it unless the row is done."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
    logits = heads.logits_of(cfg, params, x)
    token = draw(logits, state.seen, keys, how)
    broken = ~state.done & ~jnp.isfinite(jnp.max(logits, axis=-1))  # the largest of numbers and NaN is NaN
    done = state.done | broken | jnp.isin(token, stop_ids)
    rows = jnp.arange(token.shape[0])
    drawn = ~(state.done | broken) if how.keep_stop else ~done
    end = jnp.where(drawn, state.lengths, state.tokens.shape[1])  # beyond the end: dropped
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return State(
        tokens=state.tokens.at[rows, end].set(token),
        logprobs=state.logprobs.at[rows, end].set(logprob),
        lengths=state.lengths + drawn,
        token=token,
        done=done,
        broken=state.broken | broken,
        step=state.step + 1,
        slot=state.slot + 1,
        keys=state.keys,
        seen=None if state.seen is None else state.seen.at[rows, token].set(True),
    )


def _bucket(length: int, limit: int = 2**31) -> int:
    """Rounds up to a power of two, at least 16, but not beyond limit unless length is."""
    return max(length, min(max(16, 1 << (length - 1).bit_length()), limit))


def cache_slots(length: int, limit: int) -> int:
    """Number of slots of a cache for `length` tokens: rounded up, in whole blocks of the cached attention."""
    slots = _bucket(length, limit)
    return slots if slots <= SLOT_BLOCK else -(-slots // SLOT_BLOCK) * SLOT_BLOCK


def rope_length_of(cfg: ModelConfig, total: int) -> int:
    """A length with the rotary factors of `total`, equal for as many totals as possible: fewer compilations."""
    ntk = cfg.rope.ntk
    if ntk is None:
        return 1
    octave = ntk.original_length * 2 ** math.ceil(math.log2(total / ntk.original_length))
    for length in (ntk.trained_length, octave):
        if length == int(length) and cfg.rope_length_factors(int(length)) == cfg.rope_length_factors(total):
            return int(length)
    return total


def checked_ids(cfg: ModelConfig, ids: Any, what: str) -> list[int]:
    """Token ids as a list of int. Raises UserError, naming `what`, for other things and ids beyond the vocabulary."""
    if isinstance(ids, str) or not hasattr(ids, "__iter__"):
        raise UserError(f"{what} is {ids!r}, not a list of token ids; text becomes ids by vocabulary.encode")
    ids = [whole(i, f"{what}[{n}]") for n, i in enumerate(ids)]
    for i in ids:
        require(0 <= i < cfg.vocab_size, f"{what}: id {i} is not in the vocabulary of {cfg.vocab_size} tokens")
    return ids


def _check(cfg: ModelConfig, prompts: list[list[int]], max_new_tokens: int) -> None:
    require(len(prompts) > 0, "prompts is empty; give at least one")
    require(whole(max_new_tokens, "max_new_tokens") >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    for row, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompts[{row}] has no tokens; a continuation needs at least one")
        total = len(prompt) + max_new_tokens
        require(
            cfg.rope.ntk is not None or total <= cfg.max_seq_len,
            f"prompts[{row}]: {len(prompt)} tokens and max_new_tokens={max_new_tokens} are {total} together, but the "
            f"model's max_seq_len is {cfg.max_seq_len}; shorten the prompt or max_new_tokens",
        )
