"""Shares, quotas, clusters and the choice within them, against their definitions and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.metrics import pairwise_distances, pairwise_distances_argmin_min

from tele_jax.errors import UserError
from tele_jax.selection import choice, features
from tele_jax.selection.choice import Candidates, allot, choose, k_centre, shares, shuffled
from tele_jax.selection.settings import select_config

SOURCES = {"a": {"files": ("x",)}}
SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=8)


def config(**values):
    return select_config({"sources": SOURCES, **values})


@given(SIZES, st.data())
def test_shares_are_whole_and_as_near_to_equal_as_sizes_allow(sizes, data):
    count = data.draw(st.integers(0, sum(sizes)))
    found = shares(count, sizes, equal=True)
    assert sum(found) == count and all(0 <= part <= size for part, size in zip(found, sizes, strict=True))
    most = max(found)
    assert all(part >= most - 1 or part == size for part, size in zip(found, sizes, strict=True))


@given(SIZES, st.data())
def test_shares_in_proportion_are_off_by_less_than_one(sizes, data):
    count = data.draw(st.integers(0, sum(sizes)))
    found = shares(count, sizes, equal=False)
    assert sum(found) == count and all(0 <= part <= size for part, size in zip(found, sizes, strict=True))
    assert all(abs(part - count * size / max(sum(sizes), 1)) < 1 for part, size in zip(found, sizes, strict=True))


def test_quotas_are_exact_and_the_rest_is_shared():
    sizes = {"a": 100, "b": 50, "c": 10}
    assert allot(config(count=40, quotas={"c": 10}), sizes, list(sizes)) == {"a": 20, "b": 10, "c": 10}
    assert allot(config(count=40, quotas={"a": 1}, balance="equal"), sizes, list(sizes)) == {"a": 1, "b": 29, "c": 10}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"quotas": {"mathz": 1}}, "quotas.mathz: the pool has no such category; did you mean 'maths'?"),
        ({"quotas": {"maths": 6}}, "quotas.maths=6: 5 samples are left of this category"),
        ({"quotas": {"gone": 1}}, "quotas.gone=1: 0 samples are left of this category"),
        ({"count": 30}, "count=30: 30 are to be selected, but 25 are left"),
        (
            {"count": 26, "quotas": {"maths": 1}},
            "count=26: 25 are to be selected, but 20 are left of the categories without a quota",
        ),
    ],
)
def test_what_cannot_be_met_is_named(values, message):
    with pytest.raises(UserError, match="^" + message.replace("?", r"\?") + "$"):
        allot(config(**({"count": 10} | values)), {"maths": 5, "zh": 20}, ["maths", "zh", "gone"])


def test_a_random_order_is_uniform_and_does_not_depend_on_who_else_is_there():
    ids = np.arange(20_000)
    order = shuffled(ids, 3)
    assert (shuffled(ids[::7], 3) == order[::7]).all() and len(set(order.tolist())) == len(ids)
    chosen = np.sort(ids[np.argsort(order)[:5000]])
    counts = np.bincount(chosen // 2000, minlength=10)  # 500 expected of each, standard deviation 19
    assert abs(counts - 500).max() < 100
    assert abs(np.corrcoef(order.astype(float), shuffled(ids, 4).astype(float))[0, 1]) < 0.03


def brute_force(points, first, count):
    """Farthest-first traversal from all pairs of distances."""
    distances = pairwise_distances(points.astype(np.float64))
    chosen = [first]
    for _ in range(count - 1):
        gap = distances[:, chosen].min(1)
        gap[chosen] = -1
        chosen.append(int(np.argmax(gap)))
    return chosen


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.data())
@settings(max_examples=40)
def test_k_centre_is_the_farthest_first_traversal(seed, count, data):
    points = np.random.default_rng(seed).standard_normal((30, 3)).round(3)
    first = data.draw(st.integers(0, 29))
    assert k_centre(points, first, count) == brute_force(points, first, count)


def test_equal_points_are_chosen_once_each():
    assert k_centre(np.zeros((4, 2)), 2, 4) == [2, 0, 1, 3]


def candidates(n=240, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, 4)) + 6 * rng.integers(0, 5, n)[:, None]
    made = choice.centres(points, config(count=1, clusters={"count": 5}).clusters, 0)
    cluster, distance = choice.assign(points, made)
    ids = np.arange(n) * 3
    return Candidates(
        ids, rng.choice(["maths", "zh", "en"], n), rng.integers(1, 500, n), cluster, distance, rng.random(n), points
    ), made


def test_samples_belong_to_the_nearest_centre():
    left, centres = candidates()
    expected, distance = pairwise_distances_argmin_min(left.features, centres)
    assert (left.cluster == expected).all() and np.allclose(left.distance, distance, rtol=1e-6)
    means = np.stack([left.features[left.cluster == i].mean(0) for i in range(len(centres))])
    assert np.allclose(means, centres, atol=1e-3)  # what k-means converges to


@pytest.mark.parametrize("within", ["random", "nearest", "hardest", "k_centre"])
def test_the_choice_within_a_cluster_is_its_definition(within):
    left, _ = candidates()
    page = config(count=60, quotas={"maths": 11}, clusters={"within": within}, model={"checkpoint": "x"}, seed=4)
    chosen = choose(page, left, ["en", "maths", "zh"])
    assert len(chosen) == len(set(chosen.tolist())) == 60 and (left.category[chosen] == "maths").sum() == 11
    order = shuffled(left.ids, 4)
    for category in ("en", "maths", "zh"):
        rows = np.flatnonzero(left.category == category)
        sizes = [int((left.cluster[rows] == i).sum()) for i in range(5)]
        parts = shares(int((left.category[chosen] == category).sum()), [s for s in sizes if s], equal=True)
        for cluster, part in zip([i for i in range(5) if sizes[i]], parts, strict=True):
            members = [r for r in rows.tolist() if left.cluster[r] == cluster]
            picked = [r for r in chosen.tolist() if left.cluster[r] == cluster and left.category[r] == category]
            key = {
                "random": lambda r: order[r],
                "nearest": lambda r: left.distance[r],
                "hardest": lambda r: -left.difficulty[r],
            }.get(within)
            if key is not None:
                assert picked == sorted(sorted(members, key=key)[:part])
            elif part:
                first = min(range(len(members)), key=lambda i: left.distance[members[i]])
                expected = brute_force(left.features[members], first, part)
                assert picked == sorted(members[i] for i in expected)


def test_baselines():
    left, _ = candidates()
    known = ["en", "maths", "zh"]
    longest = choose(config(count=20, method="longest"), left, known)
    assert left.answer_tokens[longest].min() >= np.sort(left.answer_tokens)[-20]
    everyone = choose(config(count=20, method="random"), left, known)
    assert sorted(left.ids[everyone]) == sorted(left.ids[np.argsort(shuffled(left.ids, 0))[:20]])
    stratified = choose(config(count=24, method="stratified"), left, known)
    counts = [(left.category[stratified] == name).sum() for name in known]
    assert counts == shares(24, [(left.category == name).sum() for name in known], equal=False)
    with_quota = choose(config(count=24, method="random", quotas={"zh": 20}), left, known)
    assert (left.category[with_quota] == "zh").sum() == 20


def test_hashed_features_are_tf_idf_in_the_axes_of_an_svd():
    texts = [f"number {i} of many words {i * i}" for i in range(40)] + ["画蛇添足", ""]
    hashed = features.fit(texts, 8, 0)
    counts = features._counts(texts)
    weights = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    dense = (weights @ hashed.axes.T)[:41]
    found = hashed.transform(texts)
    assert found.shape == (42, 8) and not found[41].any()
    assert np.allclose(found[:41], dense / np.linalg.norm(dense, axis=1, keepdims=True), atol=1e-6)
    squares, left = np.linalg.eigh((weights @ weights.T).toarray())
    first = weights.T @ left[:, -1] / np.sqrt(squares[-1])  # of the singular value decomposition
    assert np.isclose(abs(first @ hashed.axes[0]), 1, atol=1e-3)
    assert (hashed.transform(texts[3:9]) == found[3:9]).all()
