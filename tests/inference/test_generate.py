"""Generation against the numpy reference and an independent sampler; no shape, batch or chunk may change a result."""

import functools
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax.axes import flatten
from tele_jax.config import Ntk, Rope
from tele_jax.errors import UserError
from tele_jax.inference.generate import draw, generate, generate_scored, prepare, sampling
from tele_jax.model import attention
from tele_jax.model.loss import token_losses
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

# The package offers the function under the name of its module.
module = __import__("sys").modules["tele_jax.inference.generate"]

BASE = dict(
    num_layers=2,
    embed_dim=24,
    num_heads=4,
    head_dim=8,
    mlp_dim=37,
    vocab_size=61,
    padded_vocab_size=64,
    max_seq_len=64,
    dtype="float32",
)
NTK = Rope(ntk=Ntk(original_length=4, trained_length=8))
CASES = {
    "plain": {},
    "grouped_queries": {"num_kv_heads": 2},
    "biases_tied_mup": {
        "output_biases": True,
        "tie_embeddings": True,
        "mup_base_width": 16,
        "input_mult": 0.1,  # small: a tied model whose embedding dominates only repeats itself
        "output_mult": 3.0,
    },
    "everything": {"num_kv_heads": 1, "output_biases": True, "embed_norm": True, "rope": NTK},
    "ntk_linear": {"rope": Rope(ntk=Ntk(original_length=8, trained_length=8, base="linear", attention_slope=0.0))},
}
PROMPTS = [[5, 3, 60, 0, 17, 9, 9], [0], [33, 2, 48, 7, 7, 11, 5, 21, 30, 58, 1, 12, 40]]


@functools.cache
def model(case="plain", **overrides):
    cfg = tele.ModelConfig(**(BASE | CASES[case] | overrides))
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    return cfg, jax.tree.map(lambda leaf: jnp.asarray(leaf, cfg.param_dtype), params)


def reference_greedy(cfg, params, prompt, count, penalty=1.0):
    """Token by token with the whole sequence recomputed, at the rotary factors of the total length."""
    total = len(prompt) + count
    row = list(prompt)
    while len(row) < total:
        padded = np.array([row + [0] * (total - len(row))])
        logits = reference.forward(cfg, params, padded)[0, len(row) - 1]
        for i in set(row):
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
        row.append(int(np.argmax(logits)))
    return row[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_greedy_is_the_argmax_of_the_full_forward(case):
    cfg, params = model(case)
    prompts = PROMPTS[:2] if case == "everything" else PROMPTS  # there each row is compiled apart
    outputs = generate(cfg, params, prompts, max_new_tokens=9)
    assert outputs == [reference_greedy(cfg, params, prompt, 9) for prompt in prompts]
    assert len({tuple(output) for output in outputs}) == len(prompts)  # prompts matter


def test_greedy_is_the_argmax_of_forward_in_bfloat16():
    cfg, params = model("grouped_queries", dtype="bfloat16")
    outputs = generate(cfg, params, PROMPTS, max_new_tokens=9)
    rows = np.zeros((3, 22), np.int32)
    for row, prompt, output in zip(rows, PROMPTS, outputs, strict=True):
        row[: len(prompt) + 9] = prompt + output
    logits = np.asarray(tele.forward(cfg, params, rows))
    for scores, prompt, output in zip(logits, PROMPTS, outputs, strict=True):
        scores = scores[len(prompt) - 1 :][:9]
        # The cached and the full pass may round differently; what was taken is the largest to within that.
        np.testing.assert_allclose(scores[range(9), output], scores.max(axis=1), atol=0.1)


def test_each_prompt_alone_gives_what_it_gives_in_the_batch():
    cfg, params = model()
    batch = generate(cfg, params, PROMPTS, max_new_tokens=9)
    assert [generate(cfg, params, [prompt], max_new_tokens=9)[0] for prompt in PROMPTS[1:]] == batch[1:]


def test_rows_with_other_ntk_factors_may_share_a_call():
    cfg, params = model(rope=NTK)
    prompts = [list(range(30)), [3], [8, 9]]  # total 36 beyond the trained length, 7 and 8 within
    expected = [reference_greedy(cfg, params, prompt, 6) for prompt in prompts]
    heard = [[], [], []]
    assert (
        generate(cfg, params, prompts, max_new_tokens=6, on_token=lambda i, token: heard[i].append(token)) == expected
    )
    assert heard == expected


def test_neither_room_nor_chunks_change_the_tokens(monkeypatch):
    cfg, params = model()
    prompts = [list(range(1, 24)), [4, 4], list(range(40, 24, -1))]
    expected = generate(cfg, params, prompts, max_new_tokens=9)  # 32 slots
    longer = generate(cfg, params, prompts, max_new_tokens=40)  # 64
    assert [row[:9] for row in longer] == expected
    monkeypatch.setattr(module, "CHUNK", 8)  # rows end in different chunks, and at the end of one
    assert generate(cfg, params, prompts, max_new_tokens=9) == expected


def test_the_whole_context_can_be_used():
    cfg, params = model(max_seq_len=21)  # not a power of two
    prompt = list(range(18))
    assert generate(cfg, params, [prompt], max_new_tokens=3) == [reference_greedy(cfg, params, prompt, 3)]
    with pytest.raises(
        tele.UserError, match=r"prompts\[0\]: 18 tokens and max_new_tokens=4 are 22 .* max_seq_len is 21"
    ):
        generate(cfg, params, [prompt], max_new_tokens=4)


def test_lengths_in_one_bucket_compile_once():
    cfg, params = model()
    generate(cfg, params, [[1, 2]], max_new_tokens=20, temperature=1.0, top_p=0.5)
    programs = module._prefill._cache_size(), module._begin._cache_size(), module._decode._cache_size()
    for length, count, temperature in ((3, 29, 0.1), (16, 16, 2.0), (9, 10, 0.7)):
        generate(cfg, params, [[7] * length], max_new_tokens=count, temperature=temperature, top_p=0.9, seed=length)
    assert (module._prefill._cache_size(), module._begin._cache_size(), module._decode._cache_size()) == programs


@given(
    original=st.integers(1, 5000),
    trained=st.integers(1, 5000),
    total=st.integers(1, 100_000),
    slope=st.sampled_from([0.0, 0.1]),
)
def test_the_rope_length_that_programs_are_keyed_on_has_the_factors_of_the_total(original, trained, total, slope):
    ntk = Ntk(original_length=original, trained_length=trained, attention_slope=slope)
    cfg = tele.ModelConfig(**BASE | dict(rope=Rope(ntk=ntk)))
    length = module.rope_length_of(cfg, total)
    assert cfg.rope_length_factors(length) == cfg.rope_length_factors(total)
    if total <= trained:
        assert length == trained


def test_a_stop_id_ends_its_row_and_no_other():
    cfg, params = model()
    free = generate(cfg, params, PROMPTS, max_new_tokens=9)
    stop_ids = {free[0][0], free[2][4]}
    cut = [next((i for i, token in enumerate(row) if token in stop_ids), 9) for row in free]
    assert cut[0] == 0 and max(cut) > 0
    expected = [row[:end] for row, end in zip(free, cut, strict=True)]
    assert generate(cfg, params, PROMPTS, max_new_tokens=9, stop_ids=sorted(stop_ids)) == expected
    streamed = [[] for _ in PROMPTS]
    generate(
        cfg,
        params,
        PROMPTS,
        max_new_tokens=9,
        stop_ids=stop_ids,
        on_token=lambda row, token: streamed[row].append(token),
    )
    assert streamed == expected


@pytest.mark.parametrize("options", [{}, dict(temperature=1.5, top_k=30, seed=7)], ids=["greedy", "sampled"])
def test_what_is_streamed_is_what_is_returned(options):
    cfg, params = model()
    heard = []
    outputs = generate(
        cfg, params, PROMPTS, max_new_tokens=9, on_token=lambda row, token: heard.append((row, token)), **options
    )
    assert heard == [(row, outputs[row][step]) for step in range(9) for row in range(3)]
    assert outputs == generate(cfg, params, PROMPTS, max_new_tokens=9, **options)


def test_an_error_of_the_listener_comes_through():
    cfg, params = model()

    def listener(row, token):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        generate(cfg, params, PROMPTS, max_new_tokens=9, on_token=listener)


@pytest.mark.parametrize("penalty", [1.4, 0.8])
def test_the_repetition_penalty_sees_prompt_and_continuation(penalty):
    cfg, params = model()
    outputs = generate(cfg, params, PROMPTS, max_new_tokens=9, repetition_penalty=penalty)
    assert outputs == [reference_greedy(cfg, params, prompt, 9, penalty) for prompt in PROMPTS]
    assert outputs != generate(cfg, params, PROMPTS, max_new_tokens=9)


def test_a_draw_depends_on_the_seed_and_its_row_only():
    cfg, params = model()
    options = dict(max_new_tokens=9, temperature=1.5, top_k=30)
    batch = generate(cfg, params, PROMPTS, seed=7, **options)
    assert generate(cfg, params, [[50, 51], PROMPTS[1], PROMPTS[2]], seed=7, **options)[1] == batch[1]
    assert generate(cfg, params, PROMPTS, seed=7, **options) == batch
    assert generate(cfg, params, PROMPTS, seed=8, **options)[1] != batch[1]
    same = generate(cfg, params, [PROMPTS[2]] * 3, seed=7, **options)
    assert len({tuple(row) for row in same}) == 3  # rows draw apart from each other


def probabilities(logits, seen, *, temperature, top_k=None, top_p=None, repetition_penalty=1.0):
    """Of every token, by the definitions: one token at a time, in float64."""
    scores = {}
    for token, value in enumerate(np.asarray(logits, np.float64)):
        if seen[token]:
            value = value / repetition_penalty if value > 0 else value * repetition_penalty
        scores[token] = value / temperature
    kept = sorted(scores, key=lambda token: -scores[token])[: top_k or len(scores)]
    weight = {token: np.exp(scores[token]) for token in kept}
    total = sum(weight.values())
    if top_p is not None:
        nucleus, mass = [], 0.0
        for token in kept:
            nucleus.append(token)
            mass += weight[token] / total
            if mass >= top_p:
                break
        kept = nucleus
    result = np.zeros(len(logits))
    for token in kept:
        result[token] = weight[token]
    return result / result.sum()


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=2.5, repetition_penalty=1.7),
        dict(temperature=0.7, top_k=3),
        dict(temperature=1.3, top_p=0.6),
        dict(temperature=1.0, top_p=0.05),
        dict(temperature=1.0, top_k=1),
        dict(temperature=1.0, top_k=1000, top_p=1.0),
        dict(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.03),
        dict(temperature=1.9, top_k=6, top_p=0.8, repetition_penalty=0.6),
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_the_definitions(options):
    rng = np.random.default_rng(5)
    logits = (1.5 * rng.standard_normal(12)).astype(np.float32)
    seen = rng.random(12) < 0.5
    expected = probabilities(logits, seen, **options)
    count = 20_000
    how = sampling(**options)
    keys = jax.random.split(jax.random.key(1), count)
    tokens = jax.jit(draw)(np.tile(logits, (count, 1)), np.tile(seen, (count, 1)), keys, how)
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert (counts[expected == 0] == 0).all()
    deviation = np.sqrt(count * expected * (1 - expected))
    assert (np.abs(counts - count * expected) <= 5 * deviation + 1e-9).all(), (counts, count * expected)


def test_a_temperature_near_zero_is_greedy():
    logits = np.array([[300.0, 299.9, -1000.0], [-5.0, 7.0, 6.99]], np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    for temperature in (0.0, 1e-300, 1e-40, 1e-37, 1e-6):
        assert draw(logits, None, keys, sampling(temperature=temperature)).tolist() == [0, 1]
        assert draw(logits, None, keys, sampling(temperature=temperature, top_k=2, top_p=0.9)).tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [1e20, 1e38, 1e300])
def test_a_boundless_temperature_is_uniform_over_what_is_left(temperature):
    logits = np.tile(np.array([-3.0, 1.0, 0.9, 5.0], np.float32), (200, 1))
    keys = jax.random.split(jax.random.key(0), 200)
    tokens = np.asarray(draw(logits, None, keys, sampling(temperature=temperature, top_k=2)))
    assert set(tokens.tolist()) == {1, 3}
    assert 60 < (tokens == 1).sum() < 140


def test_prepared_parameters_are_the_same_numbers_layer_by_layer():
    cfg, params = model("everything", dtype="bfloat16")
    ready = prepare(cfg, params)
    assert len(ready["layers"]) == cfg.num_layers  # on a CPU
    assert prepare(cfg, ready) is ready
    stacked = {**ready, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *ready["layers"])}
    for name, leaf in flatten(params).items():
        expected = leaf if name.endswith("scale") else leaf.astype(jnp.bfloat16)
        assert flatten(stacked)[name].dtype == expected.dtype
        assert (flatten(stacked)[name] == expected).all()


def test_preparing_lets_go_of_what_nobody_else_holds():
    cfg, params = model(mlp_dim=31)
    copy = jax.tree.map(jnp.copy, params)
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves(copy["layers"])]
    trees = [copy]
    del copy
    ready = prepare(cfg, trees.pop())
    assert len(ready["layers"]) == 2 and not any(reference() for reference in held)


@pytest.mark.parametrize("axes", [dict(tensor=2), dict(fsdp=4, tensor=2)], ids=str)
def test_on_a_mesh_the_tokens_are_the_same_and_the_cache_is_cut(axes, monkeypatch):
    cfg, params = model("grouped_queries", padded_vocab_size=64, mlp_dim=40)
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])
    sharded = jax.device_put(params, param_shardings(tele.spec(cfg), mesh))
    caches = []

    def spy(*args):
        state, cache = decode(*args)
        caches.append(cache)
        return state, cache

    decode = module._decode
    monkeypatch.setattr(module, "_decode", spy)
    expected = generate(cfg, params, PROMPTS, max_new_tokens=5)
    assert generate(cfg, sharded, PROMPTS, max_new_tokens=5) == expected
    assert expected[0] == reference_greedy(cfg, params, PROMPTS[0], 5)
    ways = axes.get("data", 1) * axes.get("fsdp", 1)
    rows = -(-3 // ways) * ways  # three prompts, and rows that nobody asked for
    for leaf in (caches[1].k, caches[1].v):
        assert leaf.shape == (2, rows, 2, 32, 8)
        assert leaf.sharding.shard_shape(leaf.shape) == (2, rows // ways, 2 // axes.get("tensor", 1), 32, 8)


def test_on_a_mesh_rows_are_drawn_and_streamed_as_on_one_device():
    cfg, params = model("grouped_queries", padded_vocab_size=64, mlp_dim=40)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    sharded = jax.device_put(params, param_shardings(tele.spec(cfg), mesh))
    options = dict(max_new_tokens=6, temperature=1.2, top_k=20, repetition_penalty=1.1, seed=5, stop_ids=[3, 7])
    results = []
    for placed in (params, sharded):
        heard = [[], [], []]
        outputs = generate(cfg, placed, PROMPTS, on_token=lambda row, token, to=heard: to[row].append(token), **options)
        assert heard == outputs
        results.append(outputs)
    assert results[0] == results[1]


def test_a_cache_of_several_blocks_gives_the_same_tokens(monkeypatch):
    monkeypatch.setattr(attention, "SLOT_BLOCK", 16)
    monkeypatch.setattr(module, "SLOT_BLOCK", 16)
    cfg, params = model("grouped_queries", vocab_size=60, max_seq_len=63)  # programs of other blocks are not taken
    prompts = [list(range(1, 24)), [4, 4], list(range(40, 24, -1))]
    expected = [reference_greedy(cfg, params, prompt, 14) for prompt in prompts]
    assert generate(cfg, params, prompts, max_new_tokens=14) == expected


def test_beyond_8192_tokens_prompt_and_continuation_agree_with_one_pass():
    """TeleChat-7B's rotary embedding, where the released code gives cached decoding other tables than the prompt."""
    rope = Rope(ntk=Ntk(original_length=4096, trained_length=8192))
    cfg, params = model(
        num_layers=1, embed_dim=16, num_heads=1, mlp_dim=16, max_seq_len=8192, rope=rope, attention="reference"
    )
    assert cfg.rope_length_factors(8196) != cfg.rope_length_factors(8192)
    prompt = np.random.default_rng(2).integers(0, 61, 8190).tolist()
    (output,) = generate(cfg, params, [prompt], max_new_tokens=6)
    row = np.array([prompt + output], np.int32)
    scores = np.asarray(tele.forward(cfg, params, row))[0, len(prompt) - 1 : -1]
    assert output == scores.argmax(axis=1).tolist()
    top = np.sort(scores, axis=1)
    assert (top[:, -1] - top[:, -2]).min() > 1e-3  # no tie that rounding could decide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=[[1], []]), r"prompts\[1\] has no tokens"),
        (dict(prompts=[[1, 61]]), r"prompts\[0\]: id 61 is not in the vocabulary of 61 tokens"),
        (dict(prompts=["12"]), r"prompts\[0\] is '12', not a list of token ids"),
        (dict(prompts=[1, 2]), r"prompts\[0\] is 1, not a list of token ids"),
        (dict(prompts=[[3, 4.0]]), r"prompts\[0\]\[1\]=4.0 must be a whole number"),
        (dict(prompts=[[-1]]), "id -1 is not in the vocabulary"),
        (dict(stop_ids=[61]), "stop_ids: id 61"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5 must be a whole number"),
        (dict(temperature=-0.1), "temperature=-0.1 must be 0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0 must be at least 1"),
        (dict(top_k=2.5), "top_k=2.5 must be a whole number"),
        (dict(top_p=0.0), r"top_p=0.0 must be in \(0, 1\]"),
        (dict(top_p=1.01), "top_p=1.01"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must be above 0"),
        (dict(repetition_penalty=float("inf")), "repetition_penalty=inf"),
        (dict(repetition_penalty=1e39), r"repetition_penalty=1e\+39"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=1.5), "seed=1.5 must be a whole number"),
    ],
    ids=str,
)
def test_what_is_refused(options, message):
    cfg, params = model()
    with pytest.raises(tele.UserError, match=message):
        generate(cfg, params, **dict(prompts=[[1]], max_new_tokens=3) | options)


def test_the_log_probabilities_of_draws_are_those_of_the_trainer():
    """Pad id = eos id = stop id, prompts of several lengths, a temperature: what was drawn, and how probable it was."""
    temperature, stop, count = 1.7, 9, 12
    cfg, params = model("biases_tied_mup")
    cfg = cfg.replace(output_mult=cfg.output_mult / temperature)
    prompts = [[5, stop, 3, stop], [stop], [33, 2, 48, 7, 7, 11]] * 8
    options = dict(max_new_tokens=count, temperature=1.0, seed=3)
    kept = generate_scored(cfg, params, prompts, stop_ids=[stop], keep_stop=True, **options)
    dropped = generate_scored(cfg, params, prompts, stop_ids=[stop], **options)
    stopped = [row for row, (drawn, _) in enumerate(kept) if drawn[-1] == stop]
    assert 4 < len(stopped) < len(prompts), "some rows end by the stop id, and some at the limit"
    for row, ((drawn, _), (without, _)) in enumerate(zip(kept, dropped, strict=True)):
        assert drawn == without + [stop] * (row in stopped) and stop not in without
    rows = np.full((len(prompts), 18), stop, np.int32)
    lengths = [len(prompt) + len(drawn) for prompt, (drawn, _) in zip(prompts, kept, strict=True)]
    for row, prompt, (drawn, _), length in zip(rows, prompts, kept, lengths, strict=True):
        row[:length] = prompt + drawn
    segments = np.arange(18) < np.array(lengths)[:, None]
    losses = token_losses(cfg, params, {"tokens": rows, "targets": np.roll(rows, -1, 1), "segment_ids": segments})
    logits = reference.forward(cfg, params, rows)
    for row, (prompt, (drawn, logprobs)) in enumerate(zip(prompts, kept, strict=True)):
        at = range(len(prompt) - 1, lengths[row] - 1)
        np.testing.assert_allclose(logprobs, -np.asarray(losses)[row, at], atol=1e-5)
        scores = logits[row, at] - np.logaddexp.reduce(logits[row, at], axis=-1, keepdims=True)
        np.testing.assert_allclose(logprobs, scores[range(len(drawn)), drawn], atol=1e-5)
    with pytest.raises(UserError, match=r"on_token and keep_stop: a stop id is given to no on_token"):
        generate_scored(cfg, params, prompts, stop_ids=[stop], keep_stop=True, on_token=print, **options)
