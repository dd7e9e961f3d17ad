"""With a tokenizer that puts a space before every text, as the released ones do, a document has that one space alone.

Long documents are encoded in parts, live and for a cache: no part but the first may begin with a space of its own.
"""

import io

import numpy as np
import pytest
import sentencepiece

from tele_jax.data import cache, encode, sources
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.settings import DataConfig, SourceConfig
from tests.data import caches

IDENTITY = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
DOCUMENTS = [f"def f{i}(x):\n\treturn  {i}\n画蛇添足。" * (1 if i % 3 else 800) for i in range(7)]


def train(path, **options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS[1:3] * 50), model_writer=out, model_type="bpe", vocab_size=320, pad_id=3,
        byte_fallback=True, hard_vocab_limit=False, allow_whitespace_only_pieces=True, minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("prefixed") / "tokenizer.model", **IDENTITY)


def documents_of(ids, vocabulary):
    """The texts between the separators, by the bytes of the pieces: with every space that is there."""
    parts = np.split(ids, np.flatnonzero(ids == vocabulary.eos_id) + 1)
    return [b"".join(vocabulary.piece_bytes[i] for i in part).decode() for part in parts if len(part)]


@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_a_cache_has_one_space_a_document(prefixed, format, tmp_path):
    vocabulary = load_vocabulary(prefixed)
    assert vocabulary.adds_dummy_prefix
    if format == "jsonl":
        path = caches.write_lines(tmp_path / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    else:
        path = tmp_path / "*.txt"
        for i, text in enumerate(DOCUMENTS):
            (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    manifest = caches.make(caches.config(prefixed, {"a": (path, format, 1)}, shard_bytes=20_000), tmp_path / "cache")
    assert len(manifest.domains["a"].shards) > 1
    batch = caches.whole_domain(cache.RowCache(tmp_path / "cache"), "a")
    line = np.concatenate([segment["targets"] for segment in caches.segments(batch)])
    assert sorted(documents_of(line, vocabulary)) == sorted(" " + text for text in DOCUMENTS)
    assert manifest.domains["a"].counts.text_bytes == sum(len(text.encode()) for text in DOCUMENTS)


@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_a_live_feed_and_evaluation_too(prefixed, format, tmp_path):
    vocabulary = load_vocabulary(prefixed)
    text = DOCUMENTS[3]
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    if format == "jsonl":
        path = caches.write_lines(tmp_path / "a.jsonl", [{"text": text}])
    corpus = sources.index("a", "a", [str(path)], format, span_bytes=4096)
    assert len(corpus) > 3
    spans = list(corpus.documents(range(len(corpus))))
    made = [encode.encode([span], vocabulary, "pretrain", 64).columns[1] for span in spans]
    assert encode.encode(spans, vocabulary, "pretrain", 64).columns[1].tolist() == np.concatenate(made).tolist()
    assert documents_of(np.concatenate(made), vocabulary) == [" " + text]
    source = SourceConfig(files=(str(path),), validation_files=(str(path),), format=format)
    data = DataConfig(tokenizer=str(prefixed), sources={"a": source}, eval_bytes=10**9)
    held = caches.held_out(data, kind="pretrain", seq_len=64, batch_size=1)["a"]
    assert held.num_bytes == len(text.encode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "its normalizer 'nmt_nfkc' changes characters; it joins repeated spaces"),
        (dict(normalization_rule_name="nfkc", remove_extra_whitespaces=False), "its normalizer 'nfkc' changes"),
        (dict(normalization_rule_name="identity"), r"it joins repeated spaces \(remove_extra_whitespaces\), so that"),
        (IDENTITY | dict(treat_whitespace_as_suffix=True), "it moves spaces behind words"),
    ],
    ids=str,
)
def test_a_tokenizer_that_changes_text_is_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=rf"tokenizer .*t.model: {message}"):
        load_vocabulary(train(tmp_path / "t.model", **options))


def test_ids_and_texts_that_are_none_are_refused(prefixed):
    vocabulary = load_vocabulary(prefixed)
    for ids in ([-1], ["1"], [1.5], [None]):
        with pytest.raises(UserError, match=r"tokenizer .*: (-1 is no id|the ids are no whole numbers)"):
            vocabulary.decode(ids)
    for text in ("a\ud800", 5, None, b"a"):
        for encoded in (vocabulary.encode, vocabulary.encode_continuation):
            with pytest.raises(UserError, match=r"is not a text|character 1 of the text is half a surrogate pair"):
                encoded(text)
    assert vocabulary.decode(np.array(vocabulary.encode("a  b"), np.int32)) == "a  b"
