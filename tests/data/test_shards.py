"""Files to shards: every document once, every token and weight where it belongs, whatever cannot be used kept aside."""

import collections
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tele_jax.data import cache, dialogue, shards, sources
from tele_jax.errors import UserError
from tests.data import caches


@pytest.fixture(scope="module")
def lines(texts):
    """Documents of many lengths, one longer than a span, with what tokenizers like to lose."""
    odd = ["\u2581 a\u2581b", "  two  spaces\n\n", "\t", "天地玄黄 👍🏽", "<_bot> is text here", "x" * 40_000]
    return [*odd, *[line for text in texts for line in text.splitlines() if line]][:600]


@pytest.fixture
def prose(lines, tmp_path):
    return caches.write_lines(tmp_path / "prose.jsonl", [{"text": line} for line in lines])


def test_a_document_is_in_the_rows_once_and_whole(lines, prose, model_file, vocabulary, tmp_path):
    made = caches.config(model_file, {"prose": (prose, "jsonl", 1)}, shard_bytes=20_000)
    manifest = caches.make(made, tmp_path / "cache")
    counts = manifest.domains["prose"].counts
    opened = cache.RowCache(tmp_path / "cache")
    assert len(manifest.domains["prose"].shards) >= 3
    batch = caches.whole_domain(opened, "prose")
    found = collections.Counter(vocabulary.decode(ids) for ids in caches.documents(batch, vocabulary.eos_id))
    assert found == collections.Counter(lines)
    assert counts.documents == len(lines) and counts.text_bytes == sum(len(line.encode()) for line in lines)
    used = batch["segment_ids"] > 0
    assert counts.tokens == used.sum() == counts.text_tokens + counts.documents
    assert counts.learned_tokens == batch["loss_weights"].sum() == counts.tokens
    assert (counts.rows, counts.segments) == (len(used), batch["segment_ids"].max(axis=1).sum())
    assert sum(counts.lengths) == len(lines)
    for segment in caches.segments(batch):
        assert segment["tokens"][0] == vocabulary.eos_id, "a document does not see the one before it"
        assert (segment["tokens"][1:] == segment["targets"][:-1]).all()
        assert (segment["positions"] == np.arange(len(segment["positions"]))).all()
    # Only the last row of a shard may have padding.
    assert (~used).any(axis=1).sum() <= len(manifest.domains["prose"].shards)


def test_a_text_file_is_one_document(texts, model_file, vocabulary, tmp_path):
    for i, text in enumerate(texts[:5]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    made = caches.config(model_file, {"code": (tmp_path / "*.txt", "text", 1)}, shard_bytes=30_000)
    caches.make(made, tmp_path / "cache")
    batch = caches.whole_domain(cache.RowCache(tmp_path / "cache"), "code")
    found = [vocabulary.decode(ids) for ids in caches.documents(batch, vocabulary.eos_id)]
    assert sorted(found) == sorted(texts[:5])


def test_a_dialogue_stays_whole_with_its_weights(lines, model_file, vocabulary, tmp_path):
    talks = [caches.talk(*lines[i : i + 2 * (1 + i % 3)]) for i in range(6, 300, 6)]
    path = caches.write_lines(tmp_path / "talks.jsonl", talks)
    made = caches.config(model_file, {"talks": (path, "dialogues", 1)}, kind="sft", seq_len=48, shard_bytes=6000)
    counts = caches.make(made, tmp_path / "cache").domains["talks"].counts
    batch = caches.whole_domain(cache.RowCache(tmp_path / "cache"), "talks")
    expected, shortened = [], 0
    for each in talks:
        tokens, weights = dialogue.render(each["messages"], vocabulary, max_tokens=49)
        shortened += len(dialogue.render(each["messages"], vocabulary)[0]) > 49
        expected.append((tuple(tokens[:-1]), tuple(tokens[1:]), tuple(weights[1:])))
    found = [
        tuple(tuple(segment[name].tolist()) for name in ("tokens", "targets", "loss_weights"))
        for segment in caches.segments(batch)
    ]
    assert collections.Counter(found) == collections.Counter(expected)
    assert (counts.documents, counts.shortened) == (len(talks), shortened) and shortened > 0
    spelled = sum(len(vocabulary.piece_bytes[i]) for _, targets, _ in expected for i in targets)
    assert counts.text_bytes == spelled and counts.learned_tokens == sum(sum(weights) for *_, weights in expected)


def test_dialogues_for_pretraining_count_whole(lines, model_file, vocabulary, tmp_path):
    talks = [caches.talk(a, b) for a, b in zip(lines[6:40:2], lines[7:40:2])]
    path = caches.write_lines(tmp_path / "talks.jsonl", talks)
    caches.make(caches.config(model_file, {"talks": (path, "dialogues", 1)}), tmp_path / "cache")
    batch = caches.whole_domain(cache.RowCache(tmp_path / "cache"), "talks")
    expected = [[*dialogue.render(each["messages"], vocabulary)[0], vocabulary.eos_id] for each in talks]
    assert sorted(caches.documents(batch, vocabulary.eos_id)) == sorted(expected)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from(["", "a", "bb", "第三"]), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 60),
)
def test_units_share_out_every_line_whatever_their_size(tmp_path_factory, files, shard_bytes):
    directory = tmp_path_factory.mktemp("files")
    names = []
    for number, texts in enumerate(files):
        names += [f"{number}:{i}:{text}" for i, text in enumerate(texts)]
        lines = [json.dumps({"text": f"{number}:{i}:{text}"}) + "\n" for i, text in enumerate(texts)]
        joined = "".join(lines)
        (directory / f"{number}.jsonl").write_text(joined[:-1] if number % 2 else joined)
    made = caches.config("t.model", {"x": (directory / "*.jsonl", "jsonl", 1)}, shard_bytes=shard_bytes)
    units = shards.plan(made)
    readers = [shards._Reader(unit, seed=0) for unit in units]
    found = [document.content for reader in readers for document in reader.documents()]
    assert sorted(found) == sorted(names)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert not any(reader.rejected for reader in readers)


def test_documents_are_shuffled_by_the_seed(prose, model_file, vocabulary, tmp_path):
    first = {}
    for seed in (0, 1):
        made = caches.config(model_file, {"prose": (prose, "jsonl", 1)}, seed=seed)
        caches.make(made, tmp_path / str(seed))
        opened = cache.RowCache(tmp_path / str(seed))
        first[seed] = caches.documents(caches.whole_domain(opened, "prose"), vocabulary.eos_id)
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1])


def test_threads_do_not_change_a_byte(prose, model_file, vocabulary, tmp_path):
    made = caches.config(model_file, {"prose": (prose, "jsonl", 1)})
    (unit,) = shards.plan(made)
    done = [shards.write_unit(unit, made, vocabulary, tmp_path / str(n), threads=n) for n in (1, 3)]
    assert done[0] == done[1]
    files = [(tmp_path / str(n) / done[0].shard.file).read_bytes() for n in (1, 3)]
    assert files[0] == files[1]


BAD = [
    (b'{"text": "good \xff"}', "not UTF-8 at byte"),
    (b'{"text": ', "not JSON"),
    (b"[" * 100_000, "not JSON: maximum recursion depth"),
    (b'{"texts": "x"}', 'not a table with the key "text"'),
    (b'{"text": 5}', '"text" is not a string'),
    (b'{"text": ""}', "the text is empty"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
]


def test_documents_that_cannot_be_used_are_counted_and_kept_aside(model_file, tmp_path):
    good = [b'{"text": "one"}', b"", b'{"text": "two"}']
    content = [line for pair in zip(BAD, good * 3) for line in (pair[0][0], pair[1])]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content))
    counts = (
        caches.make(caches.config(model_file, {"a": (tmp_path / "a.jsonl", "jsonl", 1)}), tmp_path / "cache")
        .domains["a"]
        .counts
    )
    used = sum(len(line) > 0 for line in content) - len(BAD)
    assert (counts.documents, counts.rejected) == (used, len(BAD)) and used > 3
    kept = [json.loads(line) for line in (tmp_path / "cache/a/00000.rejected.jsonl").read_text().splitlines()]
    for entry in kept:
        line = (tmp_path / "a.jsonl").read_bytes()[entry["byte"] :].split(b"\n")[0]
        (reason,) = [reason for bad, reason in BAD if bad == line]
        assert reason in entry["reason"] and entry["file"].endswith("a.jsonl") and entry["sample"]
    assert len(kept) == len(BAD)
    live = sources.index("x", "a", [str(tmp_path / "a.jsonl")], "jsonl")
    lines = {entry["byte"]: entry.pop("line") for entry in live.rejected}
    assert [lines[entry["byte"]] for entry in sorted(kept, key=lambda entry: entry["byte"])] == [1, 3, 5, 7, 9, 11, 13]
    assert sorted(kept, key=lambda entry: entry["byte"]) == list(live.rejected), "the live feed says the same"


def test_a_system_message_that_the_template_has_no_place_for_is_named(model_file, tmp_path):
    talks = [caches.talk("a", "b"), caches.talk("c", "d")]
    talks[1]["messages"].insert(0, {"role": "system", "content": "s"})
    path = caches.write_lines(tmp_path / "talks.jsonl", talks)
    made = caches.config(model_file, {"talks": (path, "dialogues", 1)}, kind="sft")
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, template="telechat_7b"))
    second = (tmp_path / "talks.jsonl").read_bytes().index(b"\n") + 1
    match = rf"talks.jsonl: dialogue at byte {second}: the template telechat_7b has no place for a system message"
    with pytest.raises(UserError, match=match):
        caches.make(made, tmp_path / "cache")


def test_a_byte_order_mark_is_no_text(model_file, vocabulary, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    for format, shard_bytes, expected in (
        ("jsonl", 2, ["one", "two"]),
        ("jsonl", 99, ["one", "two"]),
        ("text", 9, ["one"]),
    ):
        name = "txt" if format == "text" else "jsonl"
        made = caches.config("t.model", {"a": (tmp_path / f"a.{name}", format, 1)}, shard_bytes=shard_bytes)
        readers = [shards._Reader(unit, seed=0) for unit in shards.plan(made)]
        assert sorted(document.content for reader in readers for document in reader.documents()) == expected
        assert not any(reader.rejected for reader in readers)


def test_a_domain_of_blank_lines_is_refused(model_file, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    made = caches.config(model_file, {"a": (tmp_path / "a.jsonl", "jsonl", 1)})
    with pytest.raises(UserError, match="not one document can be used; its files hold nothing but blank lines"):
        caches.make(made, tmp_path / "cache")


def test_a_domain_without_one_good_document_is_refused(model_file, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in BAD))
    made = caches.config(model_file, {"a": (tmp_path / "a.jsonl", "jsonl", 1)})
    with pytest.raises(UserError, match=r"sources\.a: not one document can be used; the first is .*a\.jsonl, byte "):
        caches.make(made, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_binary_text_file_is_kept_aside(model_file, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x80\x81")
    (tmp_path / "b.txt").write_text("text")
    counts = caches.make(caches.config(model_file, {"a": (tmp_path / "*.txt", "text", 1)}), tmp_path / "cache")
    assert (counts.domains["a"].counts.documents, counts.domains["a"].counts.rejected) == (1, 1)


def test_an_empty_or_missing_source_is_refused_before_anything_is_written(model_file, tmp_path):
    (tmp_path / "a.txt").touch()
    for pattern, message in (("a.txt", "the file is empty"), ("absent", r"sources\.a\.files: no file matches")):
        with pytest.raises(UserError, match=message):
            caches.make(caches.config(model_file, {"a": (tmp_path / pattern, "text", 1)}), tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_a_file_that_changes_while_a_cache_is_made_is_named(prose, model_file, vocabulary, tmp_path):
    made = caches.config(model_file, {"prose": (prose, "jsonl", 1)})
    (unit,) = shards.plan(made)
    with open(prose, "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"prose\.jsonl: has changed since this cache was begun"):
        shards.write_unit(unit, made, vocabulary, tmp_path / "out")


FULL = """
import json, pickle, resource, signal, sys
from pathlib import Path
from tele_jax.data import shards
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import FailedError
made, out, limit = pickle.load(sys.stdin.buffer)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    shards.write_unit(shards.plan(made)[0], made, load_vocabulary(made.data.tokenizer), Path(out))
except FailedError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 10_000])
def test_a_disk_that_is_full_leaves_no_shard(prose, model_file, tmp_path, limit):
    """A limit on the size of files stands for the disk: the same system calls fail, with another number."""
    import pickle

    made = dataclasses.replace(caches.config(model_file, {"prose": (prose, "jsonl", 1)}))
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL]
    done = subprocess.run(command, input=pickle.dumps((made, str(out), limit)), capture_output=True, check=True)
    assert "File too large; start again to go on" in done.stdout.decode() and done.stdout.count(b"\n") == 1
    assert not [path for path in out.rglob("*") if path.is_file()]
