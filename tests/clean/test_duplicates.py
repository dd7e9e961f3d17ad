"""Near duplicates against exact Jaccard similarity and Hamming distance, by Python sets and integers."""

import itertools
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tele_jax.clean import duplicates, hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import DuplicatesConfig, ParagraphsConfig

pytest.importorskip("rensa", reason="rensa is not installed: extra [clean]")

CONFIG = DuplicatesConfig()


def documents(texts, **fields):
    return [Document(uid, text, "s", "d", f"o{uid}", **fields) for uid, text in enumerate(texts)]


def dropped(texts, config=CONFIG, **fields):
    """{uid: (kept, kind)} with every document in a batch of its own."""
    groups = {}
    for document in documents(texts, **fields):
        for group, parts in duplicates.keys([document], document.uid, config).items():
            groups.setdefault(group, []).append(parts)
    edges = [
        duplicates.pairs(group[0], np.concatenate([t for t, _ in parts]), np.concatenate([p for _, p in parts]), config)
        for group, parts in groups.items()
    ]
    rows = duplicates.components(np.concatenate(edges))
    assert (rows["uid"] == rows["batch"]).all()
    return {int(r["uid"]): (int(r["kept"]), duplicates.KINDS[r["kind"]]) for r in rows}


def words(rng, count, vocabulary=5_000):
    return [f"w{rng.randrange(vocabulary)}" for _ in range(count)]


def similarity(a, b, n=5):
    a, b = ({tuple(t[i : i + n]) for i in range(len(t) - n + 1)} for t in (a.split(), b.split()))
    return len(a & b) / len(a | b)


def test_agreement_of_signatures_estimates_the_jaccard_similarity():
    rng = np.random.default_rng(0)
    errors = []
    for overlap in np.linspace(0, 1, 60):
        union = hashing.mix(rng.integers(0, 1 << 62, 2_000).astype(np.uint64))
        shared = int(overlap * len(union))
        half = (len(union) - shared) // 2
        sets = [np.unique(union[: shared + half]), np.unique(np.concatenate([union[:shared], union[shared + half :]]))]
        exact = len(np.intersect1d(*sets)) / len(np.union1d(*sets))
        a, b = duplicates.signatures(sets, CONFIG).astype(np.uint8)
        errors.append(float(duplicates.agreement(a, b)) - exact)
    # The estimate is a mean of 125 Bernoulli trials: a standard deviation of at most 0.045, and no bias.
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.05, (np.mean(errors), np.std(errors))


def test_simhash_counts_bits_as_charikar_defines_them():
    grams = hashing.mix(np.arange(101, dtype=np.uint64))
    words64 = [[int(g) for g in grams], [int(g) for g in hashing.mix(grams + np.uint64(1))]]
    expected = [sum(1 << bit for bit in range(64) if sum((w >> bit & 1) * 2 - 1 for w in half) > 0) for half in words64]
    assert [int(x) for x in duplicates.simhash(grams)] == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 127), st.integers(0, 127)), min_size=1, max_size=8))
def test_prints_within_the_distance_always_meet(flips):
    base = np.random.default_rng(1).integers(0, 256, 16).astype(np.uint8)
    payload = np.stack([base] + [base] * len(flips))
    for row, bits in zip(payload[1:], flips):
        for bit in set(bits):
            row[bit // 8] ^= 1 << (bit % 8)
    edges = np.linspace(0, 16, CONFIG.simhash_bits + 2).astype(int)
    for row in payload[1:]:
        assert any((row[a:b] == base[a:b]).all() for a, b in itertools.pairwise(edges))
        assert duplicates._alike("simhash", base, row[None], CONFIG).all()
    far = base.copy()
    far[:4] ^= 1
    assert not duplicates._alike("simhash", base, far[None], CONFIG).any()


def edited(tokens, rng, rate):
    return " ".join(rng.choice(tokens) if rng.random() < rate else token for token in tokens)


def chinese(rng, count):
    return "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(count))


def test_recall_and_false_positives_on_a_sample():
    """Real code of the standard library and random texts; one in five has an edited copy."""
    rng = random.Random(0)
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    paths = [p for p in paths if not {"site-packages", "dist-packages", "test", "tests"} & set(p.parts)][:600]
    sources = [p.read_text(encoding="utf-8", errors="replace")[:6_000] for p in paths]
    originals = [" ".join(s.split()) for s in sources if len(s.split()) > 60]
    originals += [" ".join(words(rng, 200)) for _ in range(400)] + [" ".join(chinese(rng, 200)) for _ in range(400)]
    chosen = rng.sample(range(len(originals)), len(originals) // 5)
    copies = [edited(originals[i].split(), rng, rng.uniform(0.002, 0.015)) for i in chosen]
    found = dropped(originals + copies)
    near = [j for j, i in enumerate(chosen) if similarity(originals[i], copies[j]) >= 0.8]
    assert len(near) > 150
    recall = sum(len(originals) + j in found for j in near) / len(near)
    assert recall >= 0.95, recall
    wrong = [
        u for u, (kept, _) in found.items() if u < len(originals) and similarity(originals[u], originals[kept]) < 0.5
    ]
    assert len(wrong) / len(originals) < 0.001, wrong


def test_the_first_stays_whatever_the_order_of_arrival():
    rng = random.Random(1)
    base = words(rng, 300)
    texts = [
        " ".join(words(rng, 300)),
        " ".join(base),
        edited(base, rng, 0.005),
        edited(base, rng, 0.005),
        " ".join(base),
    ]
    found = dropped(texts)
    assert {uid: kept for uid, (kept, _) in found.items()} == {2: 1, 3: 1, 4: 1}
    assert found[4][1] == "exact" and found[2][1] in ("minhash", "simhash")


@given(st.text(alphabet=st.sampled_from("aB 1.+-#'/€模\n\u3000"), max_size=8), st.data())
def test_exact_copies_are_equal_up_to_case_and_white_space(text, data):
    other = data.draw(st.one_of(st.just(text.swapcase().replace(" ", "  ")), st.text("aB 1.+-#'/€模", max_size=8)))
    same = text.lower().split() == other.lower().split()
    assert dropped([text, other]) == ({1: (0, "exact")} if same else {})


@pytest.mark.parametrize(
    "texts",
    [
        ("for all x: x > 0", "for all x: x < 0"),
        ("7 + 2 = ?", "7 - 2 = ?"),
        ("it was -8 degrees", "it was 8 degrees"),
        ("the sum is 1.25", "the sum is 1, 25"),
        ("Written in C++.", "Written in C#."),
        ("价格：5元", "价格：-5元"),
    ],
)
def test_an_operator_a_sign_or_a_point_makes_another_text(texts):
    assert dropped(list(texts)) == {}


def test_case_makes_no_difference_but_in_code():
    texts = ["The bridge, it fell.", "the bridge,\nit  fell."]
    assert dropped(texts) == {1: (0, "exact")}
    assert dropped(texts, language="code") == {}
    assert dropped(["x = 1", "x = 1"], language="code") == {1: (0, "exact")}


def test_short_texts_that_share_most_words_stay():
    assert dropped(["第一条 本法自公布之日起施行。", "第二条 本法自公布之日起施行。"]) == {}


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(0, 2)), max_size=25))
def test_components_keep_the_lowest_of_every_component(links):
    links = [(min(a, b), max(a, b), k) for a, b, k in links if a != b]
    edges = np.zeros(len(links), duplicates.EDGE)
    for row, (a, b, kind) in zip(edges, links):
        row["a"], row["b"], row["a_batch"], row["b_batch"], row["kind"] = a, b, a // 4, b // 4, kind
    leader = list(range(16))  # the simplest union: repeat until nothing changes
    for _ in range(16):
        for a, b, _ in links:
            leader[a] = leader[b] = min(leader[a], leader[b])
    rows = duplicates.components(edges)
    expected = {u: leader[u] for u in range(16) if leader[u] != u}
    assert {int(r["uid"]): int(r["kept"]) for r in rows} == expected
    for row in rows:
        assert row["batch"] == row["uid"] // 4
        assert row["kind"] == min(k for a, b, k in links if row["uid"] in (a, b))


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_the_first_of_equal_paragraphs_stays(separator):
    config = ParagraphsConfig(min_chars=10)
    shared, own = "This footer stands below every page.", ["A first paragraph of its own.", "And a second one, other."]
    docs = documents([separator.join([own[0], shared]), separator.join([shared, own[1], "short"]), shared])
    table = np.concatenate([duplicates.paragraph_keys([d], d.uid, config) for d in docs][::-1])
    rows = duplicates.repeated(table)
    assert sorted((int(r["uid"]), int(r["index"])) for r in rows) == [(1, 0), (2, 0)]
    without = lambda d: duplicates.without_paragraphs(d, rows[rows["uid"] == d.uid], config)  # noqa: E731
    assert without(docs[1]).text == separator.join([own[1], "short"])
    assert isinstance(without(docs[2]), Drop)
    assert not len(duplicates.paragraph_keys([docs[0].replace(language="code")], 0, config))
