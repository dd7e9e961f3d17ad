"""Scores against the float64 reference; trees of tokens in a row against their definition; nothing else may matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax.config import Ntk, Rope
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.data.vocabulary_training import train_vocabulary
from tele_jax.errors import FailedError, UserError
from tele_jax.inference import score as module
from tele_jax.inference.score import encode_pair, pack_trees, score, score_tokens
from tele_jax.model import attention
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

BASE = dict(
    num_layers=2,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=36,
    vocab_size=61,
    padded_vocab_size=64,
    max_seq_len=64,
    dtype="float32",
)
CASES = {
    "grouped_queries": {},
    "tied_mup": {"tie_embeddings": True, "mup_base_width": 16, "input_mult": 0.1, "output_mult": 3.0},
    # Every length above trained_length has angles, and a program, of its own.
    "ntk": {"rope": Rope(ntk=Ntk(original_length=4, trained_length=24)), "output_biases": True},
}


@functools.cache
def model(case="grouped_queries"):
    cfg = tele.ModelConfig(**(BASE | CASES[case]))
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    return cfg, jax.tree.map(lambda leaf: jnp.asarray(leaf, cfg.param_dtype), params)


def requests(count=40, seed=0):
    """Prompts that share beginnings of all lengths, some of them equal, each with a continuation."""
    rng = np.random.default_rng(seed)
    roots = rng.integers(0, 61, (3, 30)).tolist()
    made = []
    for _ in range(count):
        prompt = roots[rng.integers(3)][: rng.integers(1, 30)] + rng.integers(0, 61, rng.integers(0, 3)).tolist()
        made.append((prompt, rng.integers(0, 61, rng.integers(1, 5)).tolist()))
    return made + made[:2]


def expected(cfg, params, prompt, continuation):
    """(log-probability, every token the likeliest) in float64, of the two by themselves."""
    logits = reference.forward(cfg, params, np.array([(prompt + continuation)[:-1]]))[0][len(prompt) - 1 :]
    logits = logits[:, : cfg.vocab_size]
    normalizer = np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), axis=-1)) + logits.max(-1)
    picked = logits[np.arange(len(continuation)), continuation]
    return float(np.sum(picked - normalizer)), bool(np.all(logits.argmax(-1) == continuation))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_formulas(case):
    cfg, params = model(case)
    made = requests()
    greedy = tele.generate(cfg, params, [p for p, _ in made[:6]], max_new_tokens=3)
    made += [(p, g) for (p, _), g in zip(made[:6], greedy, strict=True)]  # these are greedy
    found = score(cfg, params, *zip(*made, strict=True))
    for (prompt, continuation), got in zip(made, found, strict=True):
        logprob, is_greedy = expected(cfg, params, prompt, continuation)
        assert got.logprob == pytest.approx(logprob, abs=2e-4)
        assert (got.num_tokens, got.is_greedy) == (len(continuation), is_greedy)
    assert sum(got.is_greedy for got in found) >= 6


def by_request(found):
    return {request: (logprobs, likeliest) for request, logprobs, likeliest in found}


@pytest.mark.parametrize("how", ["order", "batch", "alone", "devices"])
def test_scores_do_not_depend_on_order_batch_or_devices(how):
    cfg, params = model()
    made = requests()
    base = by_request(score_tokens(cfg, params, made))
    if how == "order":
        order = np.random.default_rng(1).permutation(len(made))
        other = by_request(score_tokens(cfg, params, [made[i] for i in order]))
        other = {int(order[i]): value for i, value in other.items()}
    elif how == "batch":
        other = by_request(score_tokens(cfg, params, made, tokens_per_batch=128))
    elif how == "alone":
        other = {i: by_request(score_tokens(cfg, params, [request]))[0] for i, request in enumerate(made[:8])}
    else:
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        placed = jax.device_put(params, param_shardings(tele.spec(cfg), mesh))
        other = by_request(score_tokens(cfg, placed, made))
    assert other.keys() <= base.keys()
    for i, (logprobs, likeliest) in other.items():
        np.testing.assert_allclose(logprobs, base[i][0], atol=1e-5)
        np.testing.assert_array_equal(likeliest, base[i][1])


ids = st.lists(st.integers(0, 2), min_size=1, max_size=7)


@settings(max_examples=150)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=12), st.integers(13, 30))
def test_a_token_of_a_tree_sees_the_tokens_before_it_in_its_text_and_no_others(made, length):
    packed = [(i, np.array(p, np.int32), np.array(c, np.int32)) for i, (p, c) in enumerate(made)]
    rows = pack_trees(packed, length)
    done = []
    for row in rows:
        index = np.arange(length)
        visible = (index[None, :] <= index[:, None]) & (index[:, None] < row.visible_until[None, :])
        for request, begin, end in row.requests:
            done.append(request)
            prompt, continuation = made[request]
            text = prompt + continuation
            assert [target for _, target in row.scored[begin:end]] == continuation
            for n, (at, _) in enumerate(row.scored[begin:end]):
                seen = np.flatnonzero(visible[at])
                assert row.tokens[seen].tolist() == text[: len(prompt) + n]
                assert row.positions[seen].tolist() == list(range(len(prompt) + n))
        assert visible.any(axis=1).all(), "every place sees one at least, so that no softmax is over nothing"
    assert sorted(done) == list(range(len(made)))


def test_what_requests_share_is_computed_once():
    shared = list(range(1, 41))
    made = [(i, np.array([*shared, 50 + i // 4], np.int32), np.array([i, i], np.int32)) for i in range(16)]
    (row,) = pack_trees(made, 128)
    # 40 tokens of all, 4 questions of one token, and of each answer the one token that is read
    assert len(np.unique(np.concatenate([[at for at, _ in row.scored]]))) == 4 + 16
    assert int((row.visible_until > np.arange(1, 129)).sum()) == 40 + 4 and int((row.tokens > 0).sum()) <= 40 + 4 + 16


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
def test_forms_of_attention_agree_on_trees(implementation):
    rng = np.random.default_rng(0)
    length = 300
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    until = jnp.asarray(np.minimum(length, np.arange(length) + rng.integers(1, 200, (2, length))), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(length), (2, length))

    def form(name):
        out = lambda q, k, v: attention.attend(name, q, k, v, index, index, None, until)  # noqa: E731
        grad = jax.grad(lambda *x: (out(*x) ** 2).sum(), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (out(*x), *grad(*x)))(q, k, v)

    for ours, formula in zip(form(implementation), form("reference"), strict=True):
        np.testing.assert_allclose(ours, formula, atol=2e-4)


def test_few_shapes_are_compiled():
    cfg, params = model()
    before = module._scores._cache_size()
    for seed in range(6):
        score(cfg, params, *zip(*requests(5 + 13 * seed, seed), strict=True))
    assert module._scores._cache_size() - before <= 6


def test_texts_are_cut_where_the_prompt_ends(tmp_path):
    trained = train_vocabulary(["Question: how many? three 问：多少？三个\n"] * 50, preset="tele_flm", vocab_size=430)
    (tmp_path / "tokenizer.model").write_bytes(trained.model)
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    cfg = tele.ModelConfig(**(BASE | {"vocab_size": vocabulary.vocab_size, "padded_vocab_size": None}))
    params = tele.init(cfg, jax.random.key(0))
    prompts, answers = ["Question: how many? ", "问：多少？"], ["three", "三个"]
    pairs = [encode_pair(vocabulary, p, a) for p, a in zip(prompts, answers, strict=True)]
    assert vocabulary.decode(pairs[0][0]) == "Question: how many?"
    assert vocabulary.decode(pairs[0][0] + pairs[0][1]) == "Question: how many? three"
    assert score(cfg, params, prompts, answers, vocabulary=vocabulary) == score(cfg, params, *zip(*pairs, strict=True))


@pytest.mark.parametrize(
    ("prompts", "continuations", "named"),
    [
        ([[1]], [], "1 prompts, but 0 continuations"),
        ([[]], [[1]], r"prompts\[0\] has no tokens"),
        ([[1]], [[]], r"continuations\[0\] has no tokens"),
        ([[1]], [[61]], r"continuations\[0\]: id 61 is not in the vocabulary of 61 tokens"),
        (["a"], ["b"], r"prompts\[0\] is a text; hand over vocabulary="),
        ([[1] * 60], [[1] * 6], r"prompts\[0\] and its continuation read 65 tokens, but the model's max_seq_len is 64"),
    ],
)
def test_what_cannot_be_scored_is_named(prompts, continuations, named):
    cfg, params = model()
    with pytest.raises(UserError, match=named):
        score(cfg, params, prompts, continuations)


def test_a_text_without_a_token_of_its_own_is_named(tmp_path):
    trained = train_vocabulary(["hello hello world\n"] * 50, preset="tele_flm", vocab_size=400)
    (tmp_path / "tokenizer.model").write_bytes(trained.model)
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    cfg = tele.ModelConfig(**(BASE | {"vocab_size": vocabulary.vocab_size, "padded_vocab_size": None}))
    params = tele.init(cfg, jax.random.key(0))
    with pytest.raises(UserError, match=r"continuations\[0\] is empty"):
        score(cfg, params, ["hello "], [""], vocabulary=vocabulary)
    with pytest.raises(UserError, match=r"prompts\[0\] and continuations\[0\] are one token together"):
        score(cfg, params, ["hel"], ["lo"], vocabulary=vocabulary)


def test_scores_of_a_model_behind_rising_masks():
    cfg, params = model()
    rng = np.random.default_rng(3)
    masks = {"mlp": rng.uniform(0, 1, cfg.mlp_dim), "embed": rng.uniform(0.5, 1, cfg.embed_dim)}
    prompt, continuation = requests(1)[0]
    ((_, logprobs, _),) = score_tokens(cfg, params, [(prompt, continuation)], masks=masks)
    logits = reference.forward(cfg, params, np.array([(prompt + continuation)[:-1]]), masks=masks)[0]
    logits = logits[len(prompt) - 1 :, : cfg.vocab_size]
    expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(len(continuation)), continuation], atol=1e-4)


def test_nothing_to_score_gives_nothing():
    assert score(*model(), [], []) == []


def test_log_probabilities_that_are_no_numbers_are_an_error():
    cfg, params = model()
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(FailedError, match="not finite numbers"):
        score(cfg, broken, [[1]], [[2]])
