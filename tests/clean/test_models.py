"""The classifier, the n-gram model, benchmark overlap and word lists."""

import bz2
import gzip
import json
import lzma
import math
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from tele_jax.clean import hashing, models, screening
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import OverlapConfig, PerplexityConfig, QualityConfig, SafetyConfig
from tele_jax.cli.main import main
from tele_jax.errors import UserError

pytest.importorskip("sklearn", reason="sklearn is not installed: extra [clean]")


def document(text, language="en"):
    return Document(1, text, "s", "d", "o", language=language)


class Reference:
    """Interpolated modified Kneser-Ney by dictionaries, from the formulas of Chen and Goodman 1998, section 3."""

    def __init__(self, texts, order):
        self.order, self.counts = order, [None] * (order + 1)
        runs = [["<s>"] * (order - 1) + text.split() for text in texts]
        self.counts[order] = Counter(tuple(r[i - order + 1 : i + 1]) for r in runs for i in range(order - 1, len(r)))
        for n in range(order - 1, 0, -1):
            longer = {tuple(r[i - n : i + 1]) for r in runs for i in range(order - 1, len(r))}
            self.counts[n] = Counter(gram[1:] for gram in longer)
        self.discounts = [None]
        for counts in self.counts[1:]:
            n1, n2, n3, n4 = (max(sum(c == k for c in counts.values()), 1) for k in (1, 2, 3, 4))
            y = n1 / (n1 + 2 * n2)
            d = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            self.discounts.append([min(max(v, 0.05), k - 0.05) for k, v in enumerate(d, start=1)])
        self.vocabulary = {gram[0] for gram in self.counts[1]}
        self.followers = [None] + [defaultdict(Counter) for _ in range(order)]
        for n in range(1, order + 1):
            for gram, count in self.counts[n].items():
                self.followers[n][gram[:-1]][gram[-1]] = count

    def probability(self, context, word):
        n = len(context) + 1
        lower = self.probability(context[1:], word) if n > 1 else 1 / (len(self.vocabulary) + 1)
        followers = self.followers[n].get(context)
        if not followers:
            return lower
        total, discounts = sum(followers.values()), self.discounts[n]
        left = sum(discounts[min(c, 3) - 1] for c in followers.values()) / total
        count = followers[word]
        own = (count - discounts[min(count, 3) - 1]) / total if count else 0
        return own + left * lower


def sentences(seed, count=60):
    rng = random.Random(seed)
    chain = {w: rng.sample("abcdefghij", 3) for w in "abcdefghij"}
    result = []
    for _ in range(count):
        word, out = rng.choice("abcdefghij"), []
        for _ in range(rng.randrange(3, 20)):
            out.append(word)
            word = rng.choice(chain[word])
        result.append(" ".join(out))
    return result


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngram_probabilities_equal_the_formulas(order):
    train, test = sentences(0), [*sentences(1, 8), "a zz b zz zz c d e", *sentences(0)[:3]]
    model, reference = models.train_ngrams(train, order=order), Reference(train, order)
    for text in test:
        padded = ["<s>"] * (order - 1) + text.split()
        expected = [
            math.log(reference.probability(tuple(padded[i - order + 1 : i]), padded[i]))
            for i in range(order - 1, len(padded))
        ]
        np.testing.assert_allclose(model.log_probs(hashing.tokens(text)), expected, atol=2e-6)


def test_ngram_probabilities_of_all_words_add_to_one():
    train = sentences(2)
    model = models.train_ngrams(train, order=4)
    for before in ("", "a b c", "zz a", train[0]):
        total = sum(
            math.exp(model.log_probs(hashing.tokens(f"{before} {word}"))[-1]) for word in [*"abcdefghij", "unseen"]
        )
        assert abs(total - 1) < 1e-5


def test_perplexity_tells_usual_text_from_shuffled_and_survives_a_file(tmp_path):
    model = models.train_ngrams(sentences(3, 200))
    model.save(tmp_path / "m.npz")
    model = models.load_ngrams(str(tmp_path / "m.npz"))
    usual = " ".join(sentences(3, 230)[-1:])
    odd = " ".join(random.Random(0).sample(usual.split(), len(usual.split())))
    config = PerplexityConfig(models={"en": "m"}, max_perplexity={"en": 2 * model.perplexity(usual)})
    assert model.perplexity(odd) > 2 * model.perplexity(usual)
    assert models.perplexity(document(usual), config, {"en": model}).text == usual
    assert models.perplexity(document(odd), config, {"en": model}).reason == "high perplexity"
    assert models.perplexity(document(odd, "zh"), config, {"en": model}).text == odd


def test_the_classifier_learns_and_survives_a_file(tmp_path):
    from pydoc_data import topics

    good = [p for t in topics.topics.values() for p in t.split("\n\n") if len(p) > 200][:300]
    rng = random.Random(0)
    spam = [
        ["casino", "bonus", "win", "cash", "now", "click", "here", "best", "pills", "cheap", "online", "free", "offer"]
    ] * 300
    bad = [" ".join(rng.choice(words) for _ in range(60)) + f" {rng.randrange(99)}" for words in spam]
    trained = models.train_classifier(good, bad)
    assert trained.accuracy > 0.97 and trained.held_out_documents == 60
    trained.classifier.save(tmp_path / "q.npz")
    classifier = models.load_classifier(str(tmp_path / "q.npz"))
    texts = [document(good[0]), document(bad[0]), document(bad[0], "code")]
    first, second, third = models.quality(texts, QualityConfig(model="q"), classifier)
    assert first is texts[0] and second.reason == "low quality" and third is texts[2]
    np.testing.assert_array_equal(classifier.weights, models.train_classifier(good, bad).classifier.weights)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no model")
    np.savez(tmp_path / "y.npz", format="something else")
    for name, load in (("x.npz", models.load_classifier), ("y.npz", models.load_ngrams)):
        with pytest.raises(UserError, match="clean-train"):
            load(str(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        models.load_classifier(str(tmp_path / "z.npz"))
    with pytest.raises(UserError, match="at least 20"):
        models.train_classifier(["a"] * 30, ["b"] * 3)


def test_documents_with_a_part_of_a_benchmark_go(tmp_path):
    question = "A train leaves the station at nine and another one follows it an hour later; when do they meet?"
    zh = "甲乙两地相距四百八十千米，一列快车从甲地开出，同时一列慢车从乙地开出，几小时后两车相遇？"
    rows = [{"question": question, "answer": "noon"}, {"question": zh, "choices": ["三小时", "四小时"]}]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    config = OverlapConfig(files=(str(path),))
    grams = screening.load_benchmarks(config)

    def judge(text):
        return screening.overlap(document(text), config, grams)

    words = question.upper().split()
    assert judge("He asked: " + " ".join(words[2:16]) + " and went.").reason == "benchmark overlap"
    assert not isinstance(judge("He asked: " + " ".join(words[2:14]) + " and went."), Drop)  # twelve words
    assert judge("题目：" + zh[5:32] + "。").reason == "benchmark overlap"
    assert not isinstance(judge("题目：" + zh[5:24] + "。"), Drop)
    assert not isinstance(judge("noon"), Drop)


def test_benchmarks_that_cannot_be_read_are_refused(tmp_path):
    for name, data, message in (
        ("a.jsonl", b"{bad\n", "a.jsonl:1: not JSON"),
        ("b.txt", b"\xff\xfe", "not UTF-8"),
        ("c.txt", b"short", "no text of at least 13"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=re.escape(message)):
            screening.load_benchmarks(OverlapConfig(files=(str(tmp_path / name),)))


def test_words_count_as_whole_words_and_phrases_in_chinese_anywhere(tmp_path):
    (tmp_path / "list.txt").write_text("# a comment\nCasino\n赌场\nfree money\n", encoding="utf-8")
    words = screening.load_words(SafetyConfig(files=(str(tmp_path / "list.txt"),)))
    assert words.hits("The CASINO gives free money; casinos do not. 澳门赌场欢迎您") == ["casino", "free money", "赌场"]
    config = SafetyConfig(words=("x",), max_hits=2, max_hits_per_1000=50)
    long = "nothing to see " * 30
    assert not isinstance(screening.safety(document(long + "casino casino"), config, words), Drop)
    assert screening.safety(document(long + "casino " * 3), config, words).reason == "word list"
    assert screening.safety(document("casino casino"), config, words).reason == "word list"  # short: the rate decides
    with pytest.raises(UserError, match="no word"):
        screening.load_words(SafetyConfig(words=("#",)))


# Without the time of day, which would give the test another name in every process.
CUT_OFF = gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", CUT_OFF, r"a\.jsonl\.gz: cannot be read: Compressed file"),
        ("a.jsonl.gz", b"hello", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl", b'{"text": 1}', r"a\.jsonl:1: the field 'text' is no string"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: no JSON record with a field 'text'"),
        ("a.txt", b"\xff", r"a\.txt: not UTF-8 at byte 0"),
    ],
)
def test_bad_samples_are_one_line(tmp_path, capsys, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert main(["data", "clean-train", "ngrams", str(tmp_path / name), "--out", str(tmp_path / "n.npz")]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "n.npz").exists()


def test_samples_may_be_compressed_and_begin_with_a_byte_order_mark(tmp_path, capsys):
    text = "the river rises in the hills to the north of the town and flows past the old mill " * 9
    for name, pack in (("a.txt", bytes), ("a.txt.xz", lzma.compress), ("a.jsonl.bz2", bz2.compress)):
        data = json.dumps({"text": text}) if "json" in name else text
        path = tmp_path / name
        path.write_bytes(pack(b"\xef\xbb\xbf" + 30 * f"{data}\n\n".encode()))
        assert main(["data", "clean-train", "ngrams", str(path), "--out", f"{path}.npz"]) == 0
        assert "from 28 documents" in capsys.readouterr().out
