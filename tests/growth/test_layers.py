"""Which layers are copied, and the distances that choose them, against the residual stream computed by hand."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import growth
from tele_jax.growth import layers
from tests import reference

SIZES = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 4 * n)))


def copies_of(ids, src_layers):
    return np.bincount(ids, minlength=src_layers) - 1


@given(SIZES, st.sampled_from(["uniform", "last", "middle", "distance"]), st.data())
def test_every_copy_comes_right_after_its_source_and_none_is_lost(sizes, how, data):
    src, dst = sizes
    scores = data.draw(st.lists(st.floats(0, 2), min_size=src, max_size=src))
    ids = layers.choose(how, src, dst, scores)
    assert len(ids) == dst
    assert ids == sorted(ids)
    assert set(ids) == set(range(src))


@given(SIZES)
def test_uniform_copies_every_layer_as_often_as_any_other_and_spreads_the_rest(sizes):
    src, dst = sizes
    copies = copies_of(layers.choose("uniform", src, dst, None), src)
    assert copies.max() - copies.min() <= 1
    # Any stretch of layers holds its share of the copies, to within one.
    total = np.concatenate([[0], np.cumsum(copies)])
    for start in range(src):
        for end in range(start + 1, src + 1):
            assert abs(total[end] - total[start] - (end - start) * (dst - src) / src) <= 1


@given(SIZES)
def test_last_copies_the_last_layers(sizes):
    src, dst = sizes
    copies = copies_of(layers.choose("last", src, dst, None), src)
    assert (np.diff(copies) >= 0).all() and copies.max() - copies.min() <= 1


@given(SIZES)
def test_middle_copies_the_layers_nearest_to_the_middle(sizes):
    src, dst = sizes
    copies = copies_of(layers.choose("middle", src, dst, None), src)
    distance = np.abs(np.arange(src) - (src - 1) / 2)
    for i in range(src):
        for j in range(src):
            if distance[i] < distance[j]:
                assert copies[i] >= copies[j]
    assert copies.max() - copies.min() <= 1


@given(st.integers(3, 12), st.data())
def test_distance_copies_the_inner_layers_that_change_least(src, data):
    scores = data.draw(st.lists(st.floats(0, 2), min_size=src, max_size=src, unique=True))
    extra = data.draw(st.integers(1, src - 2))
    ids = layers.choose("distance", src, src + extra, scores)
    copied = {i for i, n in enumerate(copies_of(ids, src)) if n}
    inner = sorted(range(1, src - 1), key=lambda i: scores[i])
    assert copied == set(inner[:extra])


def test_distance_leaves_out_the_first_and_the_last_layer_even_when_they_change_least():
    assert layers.choose("distance", 4, 6, [0.0, 0.5, 0.6, 0.0]) == [0, 1, 1, 2, 2, 3]
    assert layers.choose("distance", 4, 9, [0.0, 0.5, 0.6, 0.0]) == [0, 1, 1, 1, 1, 2, 2, 2, 3]
    # With two layers there are no inner ones.
    assert layers.choose("distance", 2, 3, [0.5, 0.1]) == [0, 1, 1]


def test_ids_are_taken_as_they_are():
    assert layers.choose([0, 1, 0, 1, 2], 3, 5, None) == [0, 1, 0, 1, 2]
    assert layers.choose(np.array([0, 0, 1]), 2, 3, None) == [0, 0, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([0, 2, 1], 3, 3, None), "first occurrences in order"),
        (([0, 1], 3, 2, None), "has to name each of the 3 source layers"),
        (([0, 1, 2, 3], 3, 4, None), "has to name each of the 3 source layers"),
        (([0, 1], 2, 3, None), "2 ids given for 3 destination layers"),
        (("nearest", 2, 3, None), "'nearest' is not one of uniform, last, middle, distance, or a list of ids"),
        (("distance", 2, 3, None), "needs scores, one per source layer; see growth.layers.distances"),
        (("distance", 2, 3, [1.0, 2.0, 3.0]), "3 scores given for 2 source layers"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(args, message):
    with pytest.raises(tele.UserError, match=message):
        layers.choose(*args)


def residual_stream(cfg, params, tokens):
    """What enters the first layer and leaves every one: L + 1 arrays [B, S, D], by the formulas of the reference."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    x = params["embed"]["table"][tokens] * cfg.input_mult
    if cfg.embed_norm:
        x = reference.rms_norm(x, params["embed_norm"]["scale"], cfg.rms_eps)
    stream = [x]
    for i in range(cfg.num_layers):
        w = jax.tree.map(lambda leaf: leaf[i], params["layers"])  # noqa: B023
        y = reference.rms_norm(x, w["attn_norm"]["scale"], cfg.rms_eps)
        ones = np.ones_like(tokens)
        x = x + reference.attention(cfg, w["attn"], y, positions, ones, np.ones(cfg.num_heads))
        x = x + reference.mlp(w["mlp"], reference.rms_norm(x, w["mlp_norm"]["scale"], cfg.rms_eps), 1.0)
        stream.append(x)
    return stream


@pytest.fixture(scope="module")
def model():
    cfg = tele.ModelConfig(
        **dict(num_layers=4, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=10, vocab_size=16),
        **dict(dtype="float32", embed_norm=True, output_biases=True, input_mult=1.7),
    )
    params = reference.random_params(cfg, np.random.default_rng(0), 0.8)
    # Layers of visibly different effect.
    params["layers"]["attn"]["o"] *= np.array([1.0, 0.1, 0.01, 2.0])[:, None, None, None]
    params["layers"]["mlp"]["down"] *= np.array([1.0, 0.1, 0.01, 2.0])[:, None, None]
    for name in ("o_bias", "down_bias"):
        part = params["layers"]["attn" if name == "o_bias" else "mlp"]
        part[name] *= np.array([1.0, 0.1, 0.01, 2.0])[:, None]
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    return cfg, params, np.random.default_rng(1).integers(0, 16, (2, 9))


def by_hand(metric, before, after):
    norms = np.sqrt((before**2).sum(-1)), np.sqrt((after**2).sum(-1))
    cosine = (before * after).sum(-1) / (norms[0] * norms[1])
    if metric == "cosine":
        return (1 - cosine).mean()
    if metric == "angular":
        return (np.arccos(np.clip(cosine, -1, 1)) / np.pi).mean()
    return (np.sqrt(((after - before) ** 2).sum(-1)) / norms[0]).mean()


@pytest.mark.parametrize("metric", layers.METRICS)
def test_distances_are_those_of_the_residual_stream(model, metric):
    cfg, params, tokens = model
    stream = residual_stream(cfg, params, tokens)
    expected = [by_hand(metric, stream[i], stream[i + 1]) for i in range(cfg.num_layers)]
    scores = layers.distances(cfg, params, tokens, metric)
    assert all(isinstance(score, float) for score in scores)
    # An angle near 0 loses half of the digits of its cosine.
    np.testing.assert_allclose(scores, expected, rtol=2e-4, atol=1e-4 if metric == "angular" else 1e-6)


def test_the_stream_by_hand_is_the_one_of_the_reference(model):
    cfg, params, tokens = model
    last = residual_stream(cfg, params, tokens)[-1]
    final = reference.rms_norm(last, np.asarray(params["final_norm"]["scale"], np.float64), cfg.rms_eps)
    logits = final @ np.asarray(params["lm_head"]["kernel"], np.float64)
    np.testing.assert_allclose(logits, reference.forward(cfg, params, tokens), rtol=1e-12)


def test_the_layer_that_changes_least_is_the_one_that_is_copied(model):
    cfg, params, tokens = model
    scores = layers.distances(cfg, params, tokens)
    assert np.argmin(scores) == 2
    plan = growth.plan(cfg, cfg.replace(num_layers=5), layers="distance", scores=scores)
    assert plan.maps["layers"].index.tolist() == [0, 1, 2, 2, 3]
    assert plan.maps["layers"].fresh.tolist() == [False, False, False, True, False]


def test_an_unknown_metric_is_refused(model):
    with pytest.raises(tele.UserError, match="metric 'l2' is not one of cosine, relative_l2, angular"):
        layers.distances(*model, "l2")
