"""The live feed: every token once an epoch, shares as asked, exact resume; and held-out text, byte for byte."""

import collections
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tele_jax.data import dialogue, domains, sources
from tele_jax.errors import DamageError, UserError
from tele_jax.files import expand
from tele_jax.settings import DataConfig, SourceConfig
from tests.data import caches

pytest.importorskip("seqio")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def segments(batches):
    """(tokens, targets, loss_weights) of every segment, in the order of the rows."""
    for batch in batches:
        for i, ids in enumerate(batch["segment_ids"]):
            for segment in range(1, ids.max() + 1):
                part = ids == segment
                assert (batch["positions"][i, part] == np.arange(part.sum())).all()
                yield tuple(batch[name][i, part] for name in ("tokens", "targets", "loss_weights"))


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() and a[name].dtype == b[name].dtype for name in a)


def digest(batches):
    return hashlib.sha256(b"".join(batch[name].tobytes() for batch in batches for name in sorted(batch))).hexdigest()


@pytest.fixture
def real(model_file, texts, tmp_path):
    """Three domains: code as text files, prose as JSON lines, dialogues."""
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    lines = [line for text in texts for line in text.splitlines() if len(line) > 30]
    prose = write_lines(tmp_path / "prose.jsonl", [{"text": line} for line in lines])
    talks = write_lines(tmp_path / "talks.jsonl", [talk(a, b) for a, b in zip(lines[::2], lines[1::2], strict=False)])
    return DataConfig(
        tokenizer=str(model_file),
        sources={
            "code": SourceConfig(files=(f"{tmp_path}/*.txt",), rate=2),
            "prose": SourceConfig(files=(prose,), format="jsonl", rate=1),
            "talks": SourceConfig(files=(talks,), format="dialogues", rate=1),
        },
    )


@pytest.fixture
def counted(counting, monkeypatch):
    """LiveFeeds in whose corpora every token is another one."""
    monkeypatch.setattr(domains, "open_vocabulary", lambda data, kind: counting)

    def data(**domains):
        return DataConfig(tokenizer="counting", sources=domains)

    return data


def test_a_batch_is_what_training_takes(real):
    live = caches.open_feed(real, kind="pretrain", seq_len=64, batch_size=3, seed=0)
    batch = next(live)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((3, 64), "int32"),
        "targets": ((3, 64), "int32"),
        "loss_weights": ((3, 64), "float32"),
        "segment_ids": ((3, 64), "int32"),
        "positions": ((3, 64), "int32"),
    }
    assert (batch["segment_ids"] > 0).all() and (batch["loss_weights"] == 1).all(), "pretraining wastes nothing"
    assert iter(live) is live and live.batches == 1
    live.close()


def test_every_token_is_predicted_once_an_epoch(counted, counting, tmp_path):
    lengths = [(7 * i) % 97 for i in range(1, 32)]
    lengths.append(1600 - 32 - sum(lengths))  # with their ends 1,600 tokens: 100 rows of 16
    assert min(lengths) > 0
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"{i + 1}:{n}"} for i, n in enumerate(lengths)])
    live = caches.open_feed(
        counted(a=SourceConfig(files=(path,), format="jsonl")), kind="pretrain", seq_len=16, batch_size=10, seed=3
    )
    begun, said, ends, rows = [], {i + 1: [] for i in range(32)}, 0, 300
    for tokens, targets, weights in segments(next(live) for _ in range(rows // 10)):
        assert (weights == 1).all()
        assert tokens[0] == counting.eos_id and (tokens[1:] == targets[:-1]).all()
        ends += targets[-1] == counting.eos_id
        text = targets[targets != counting.eos_id]
        if len(text):  # or else it was cut off before its last target
            number, place = divmod(int(text[0]), 1000)
            begun += [number] if place == 0 else []
            said[number] += text.tolist()
            assert text.tolist() == counting.encode(f"{number}:{lengths[number - 1]}")[place : place + len(text)]
    # Every document comes once an epoch, whole, in an order of each epoch's own.
    orders = [begun[i : i + 32] for i in range(0, 96, 32)]
    assert all(sorted(epoch) == list(range(1, 33)) for epoch in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    for number, tokens in said.items():
        times = begun.count(number)
        assert all(times - 2 <= count <= times for count in collections.Counter(tokens).values())
    # Nothing is left out: what is not given out yet is in the rows that are filled in turn.
    assert 16 * rows == sum(map(len, said.values())) + ends
    assert len(begun) - 16 <= ends <= len(begun)


def test_a_dialogue_stays_whole_and_only_its_answer_counts(counted, counting, tmp_path):
    talks = [talk(f"{2 * i + 1}:{1 + i % 5}", f"{2 * i + 2}:{1 + i % 7}") for i in range(48)]
    path = write_lines(tmp_path / "a.jsonl", talks)
    live = caches.open_feed(
        counted(a=SourceConfig(files=(path,), format="dialogues")), kind="sft", seq_len=24, batch_size=4, seed=0
    )
    expected = {}
    for i, each in enumerate(talks):
        tokens, weights = dialogue.render(each["messages"], counting)
        expected[2000 * i + 1000] = (tokens[:-1], tokens[1:], weights[1:])
    seen = collections.Counter()
    filled = []
    for _ in range(40):
        batch = next(live)
        filled.append((batch["segment_ids"] > 0).mean())
        for tokens, targets, weights in segments([batch]):
            first = int(targets[0])
            assert tokens[0] == counting.user_id
            assert (tokens.tolist(), targets.tolist(), weights.tolist()) == expected[first]
            seen[first] += 1
    assert seen.keys() == expected.keys()
    # The rows that are still open, and the block that is being given out, may lag.
    assert max(seen.values()) - min(seen.values()) <= 2
    assert np.mean(filled) > 0.85


def test_a_long_dialogue_is_cut_as_the_template_says(counted, counting, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [talk("1:50", "2:5")])
    live = caches.open_feed(
        counted(a=SourceConfig(files=(path,), format="dialogues")), kind="sft", seq_len=20, batch_size=1, seed=0
    )
    batch = next(live)
    assert batch["targets"][0, -6:].tolist() == [2000, 2001, 2002, 2003, 2004, counting.end_id]
    assert batch["loss_weights"][0].tolist() == [0] * 14 + [1] * 6
    assert batch["tokens"][0, :2].tolist() == [counting.user_id, 1000 + 50 - 13]


def test_a_rate_is_a_share_of_the_tokens_whatever_the_length_of_documents(counted, tmp_path):
    long = write_lines(tmp_path / "long.jsonl", [{"text": f"{i + 1}:900"} for i in range(5)])
    short = write_lines(tmp_path / "short.jsonl", [{"text": f"{i + 100}:3"} for i in range(50)])
    data = counted(
        long=SourceConfig(files=(long,), format="jsonl", rate=1),
        short=SourceConfig(files=(short,), format="jsonl", rate=3),
    )
    live = caches.open_feed(data, kind="pretrain", seq_len=32, batch_size=50, seed=0)
    targets = np.stack([next(live)["targets"] for _ in range(20)])
    share = ((targets >= 1000) & (targets < 100_000)).any(-1).mean()
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1000)


def test_a_single_document_makes_a_feed(counted, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1:7"}])
    live = caches.open_feed(
        counted(a=SourceConfig(files=(path,), format="jsonl")), kind="pretrain", seq_len=8, batch_size=2, seed=0
    )
    assert next(live)["targets"].tolist() == [[*range(1000, 1007), 2]] * 2


def test_resume_is_exact_and_seeds_matter(real, tmp_path):
    """At the start, in the middle of an epoch, after several; going back too; and in a new process."""
    for name in ("prose", "talks"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:300]))

    def make(seed=5):
        return caches.open_feed(real, kind="pretrain", seq_len=128, batch_size=16, seed=seed)

    live = make()
    batches, states = [], {}
    for i in range(130):  # four epochs of the prose
        if i in (0, 7, 100):
            states[i] = live.state()
        batches.append(next(live))
    assert live.positions()["prose"].epochs > 4
    assert not any(same(batches[0], batch) for batch in batches[1:])
    other = make(seed=6)
    assert not same(next(other), batches[0])
    again = make()
    assert all(same(next(again), batch) for batch in batches[:5]), "the same seed gives the same batches"
    for at in (100, 0, 7):
        again.restore(states[at])
        assert again.batches == at
        assert all(same(next(again), batch) for batch in batches[at : at + 20]), f"restored at {at}"
    code = (
        "import hashlib, pickle, sys\n"
        "from tests.data import caches\n"
        "data, state = pickle.load(sys.stdin.buffer)\n"
        "live = caches.open_feed(data, kind='pretrain', seq_len=128, batch_size=16, seed=5)\n"
        "live.restore(state)\n"
        "batches = [next(live) for _ in range(20)]\n"
        "parts = [batch[name].tobytes() for batch in batches for name in sorted(batch)]\n"
        "print(hashlib.sha256(b''.join(parts)).hexdigest())\n"
        "print(*({'tensorflow', 'seqio', 'matplotlib'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((real, states[100])), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == [digest(batches[100:120])], "and TensorFlow is not needed for it"
    assert done.stderr == b""


def test_resume_of_fine_tuning_is_exact(real):
    data = DataConfig(tokenizer=real.tokenizer, sources={"talks": real.sources["talks"]})
    live = caches.open_feed(data, kind="sft", seq_len=96, batch_size=8, seed=0)
    for _ in range(9):
        next(live)
    state = live.state()
    expected = [next(live) for _ in range(20)]
    again = caches.open_feed(data, kind="sft", seq_len=96, batch_size=8, seed=0)
    again.restore(state)
    assert all(same(next(again), batch) for batch in expected)


def test_a_state_is_for_one_feed_only(counted, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "1:7"}, {"text": "2:9"}])

    def make(seq_len=8, rate=1.0):
        data = counted(a=SourceConfig(files=(path,), format="jsonl", rate=rate))
        return caches.open_feed(data, kind="pretrain", seq_len=seq_len, batch_size=2, seed=0)

    state = make().state()
    with pytest.raises(
        UserError, match=r"saved for another feed: seq_len was 8, now 16; sources\.a\.rate was 1\.0, now"
    ):
        make(seq_len=16, rate=2.0).restore(state)
    live = make()
    spoiled = [b"", state[:200], b"x" * 500, b"[" * 100_000, b"[]", b"5"]
    for key, value in (("batches", -1), ("positions", []), ("positions", {}), ("positions", {"a": 5})):
        spoiled.append(json.dumps({**json.loads(state), key: value}).encode())
    for key, value in (("next", -1), ("next", "x"), ("total", 0), ("open", [[[1, 2, 3]]]), ("open", [[[1, 2]]])):
        changed = json.loads(state)
        changed["positions"]["a"][key] = value
        spoiled.append(json.dumps(changed).encode())
    for damaged in spoiled:
        with pytest.raises(DamageError, match=r"the saved position in the data(:| is) damaged"):
            live.restore(damaged)
    with pytest.raises(UserError, match="was saved for a feed from a cache"):
        live.restore(b'{"batches": 1, "feed": "cache", "positions": {}}')
    with pytest.raises(UserError, match="was saved by an earlier version"):
        live.restore(b"PK\x03\x04")
    write_lines(tmp_path / "a.jsonl", [{"text": "1:7"}, {"text": "2:8"}])
    with pytest.raises(UserError, match=r"sources\.a\.checksum was"):
        make().restore(state)


@pytest.mark.parametrize("format", ["jsonl", "text", "dialogues"])
@pytest.mark.parametrize("change", ["same lengths", "shorter", "empty", "gone"])
def test_a_file_that_changes_under_a_feed_is_named(real, tmp_path, format, change):
    def write(word):
        if format == "text":
            for i in range(20):
                (tmp_path / f"{i}.text").write_text(f"{word} {i:03d} text\n" * 20)
            return f"{tmp_path}/*.text"
        texts = [f"{word} {i:04d} {word}" for i in range(500)]
        lines = [talk("q", text) if format == "dialogues" else {"text": text} for text in texts]
        write_lines(tmp_path / "next", lines)
        os.replace(tmp_path / "next", tmp_path / "a.lines")
        return str(tmp_path / "a.lines")

    pattern = write("old")
    data = DataConfig(tokenizer=real.tokenizer, sources={"a": SourceConfig(files=(pattern,), format=format)})
    kind = "sft" if format == "dialogues" else "pretrain"
    live = caches.open_feed(data, kind=kind, seq_len=64, batch_size=2, seed=0)
    next(live)
    state = live.state()
    for path in map(Path, expand([pattern], "x")):
        if change == "same lengths":
            write("new")
        elif change == "gone":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if change == "shorter" else 0)
    match = (
        r"No such file or directory; the file was there" if change == "gone" else r"has changed since this run began"
    )
    with pytest.raises(UserError, match=rf"(\d\.text|a\.lines): {match}"):
        for _ in range(1000):
            next(live)
    if change == "same lengths":  # nor does a later start take the one for the other
        with pytest.raises(UserError, match=r"saved for another feed: sources\.a\.checksum was"):
            caches.open_feed(data, kind=kind, seq_len=64, batch_size=2, seed=0).restore(state)


def test_bad_sources_are_refused_before_training(real, tmp_path):
    def make(**changes):
        fields = {"tokenizer": real.tokenizer, "sources": real.sources, **changes}
        return caches.open_feed(DataConfig(**fields), kind="pretrain", seq_len=8, batch_size=1, seed=0)

    with pytest.raises(UserError, match=r"absent\.model: No such file"):
        make(tokenizer=str(tmp_path / "absent.model"))
    (tmp_path / "empty.txt").touch()
    for pattern, message in (("absent", "sources.x.files: no file matches"), ("empty.txt", "the file is empty")):
        with pytest.raises(UserError, match=message):
            make(sources={"x": SourceConfig(files=(f"{tmp_path}/{pattern}",))})
    with pytest.raises(UserError, match=r"sources\.code: fine-tuning learns answers.*dialogues, not text"):
        caches.open_feed(real, kind="sft", seq_len=8, batch_size=1, seed=0)


def test_with_bad_documents_the_rows_are_those_of_the_good_ones(real, tmp_path):
    """Live and resumed, bit for bit, and held-out text too; who asks is told, and others are warned."""
    bad = [b'{"text": "caf\xe9"}\n', b"{\n", b'{"text": "\\ud800"}\n', json.dumps({"messages": [{}]}).encode() + b"\n"]
    spoiled = {}
    for name in ("prose", "talks"):
        lines = (tmp_path / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        for i, line in enumerate(bad):
            lines.insert(7 * i, line)
        (tmp_path / f"{name}.bad.jsonl").write_bytes(b"".join(lines))
        files = (f"{tmp_path}/{name}.bad.jsonl",)
        spoiled[name] = dataclasses.replace(real.sources[name], files=files, validation_files=files)
    (tmp_path / "1.bad").write_bytes(b"text \xff")
    files = (f"{tmp_path}/*.txt", f"{tmp_path}/*.bad")
    spoiled["code"] = dataclasses.replace(real.sources["code"], files=files, validation_files=files)
    clean = {name: dataclasses.replace(source, validation_files=source.files) for name, source in real.sources.items()}
    told = []
    feeds = []
    for sources_ in (clean, {name: spoiled[name] for name in clean}):
        data = dataclasses.replace(real, sources=sources_, eval_bytes=2000)
        shape = {"kind": "pretrain", "seq_len": 64, "batch_size": 8, "on_rejects": told.append}
        feeds.append((caches.open_feed(data, **shape, seed=3), caches.held_out(data, **shape), data))
    counts = [(corpus.where, len(corpus.rejected)) for corpus in told if corpus.rejected]
    numbers = {"code": 1, "prose": 4, "talks": 4}
    assert counts == [
        (f"sources.{n}.{field}", k) for field in ("files", "validation_files") for n, k in numbers.items()
    ]
    (good, held_good, _), (left, held_left, data) = feeds
    for name, out in held_good.items():
        assert (out.num_bytes, out.num_tokens) == (held_left[name].num_bytes, held_left[name].num_tokens)
        assert all(same(a, b) for a, b in zip(out.batches, held_left[name].batches, strict=True))
    expected = [next(good) for _ in range(30)]
    assert all(same(next(left), batch) for batch in expected[:12])
    with pytest.warns(UserWarning, match="documents cannot be used") as warned:
        again = caches.open_feed(data, kind="pretrain", seq_len=64, batch_size=8, seed=3)
    assert "prose.bad.jsonl, line 1: not UTF-8 at byte 13 (0xe9)" in str(warned[1].message)
    again.restore(left.state())
    assert all(same(next(again), batch) for batch in expected[12:])
    with pytest.raises(UserError, match=r"saved for another feed: sources\.code\.checksum was"):
        good.restore(left.state())


def test_a_system_message_that_the_template_has_no_place_for_is_found_before_training(model_file, tmp_path):
    asked = [talk("a", "b"), talk("c", "d"), talk("e", "f")]
    asked[1]["messages"].insert(0, {"role": "system", "content": "s"})
    path = write_lines(tmp_path / "talks.jsonl", asked)

    def check(template):
        sources = {"x": SourceConfig(files=(path,), format="dialogues")}
        data = DataConfig(tokenizer=str(model_file), sources=sources, template=template)
        domains.check(data, kind="sft", seq_len=8)

    check("telechat")
    second = len((tmp_path / "talks.jsonl").read_bytes().splitlines(keepends=True)[0])
    match = rf"talks.jsonl: dialogue at byte {second}: the template telechat_7b has no place for a system message"
    with pytest.raises(UserError, match=match):
        check("telechat_7b")


def held(path, format, model_file, eval_bytes=10**9, kind="pretrain", seq_len=32, batch_size=4):
    source = SourceConfig(files=(str(path),), format=format, validation_files=(str(path),))
    data = DataConfig(tokenizer=str(model_file), sources={"x": source}, eval_bytes=eval_bytes)
    return caches.held_out(data, kind=kind, seq_len=seq_len, batch_size=batch_size)


def test_held_out_text_is_all_there_and_counted_to_the_byte(vocabulary, model_file, texts, tmp_path):
    documents = [*texts[:3], "天地玄黄 👍\n", "\t"]
    path = write_lines(tmp_path / "v.jsonl", [{"text": text} for text in documents])
    out = held(path, "jsonl", model_file)["x"]
    weights = np.concatenate([batch["loss_weights"] for batch in out.batches])
    targets = np.concatenate([batch["targets"] for batch in out.batches])
    learned = targets[weights > 0]
    assert out.num_tokens == len(learned) == weights.sum()
    assert out.num_bytes == sum(len(text.encode()) for text in documents)
    assert out.num_bytes == sum(len(vocabulary.piece_bytes[i]) for i in learned)
    expected = collections.Counter(token for text in documents for token in vocabulary.encode(text))
    found = collections.Counter(learned.tolist())
    assert sum((expected - found).values()) < 5, "only where a long text was cut may tokens differ"
    assert all(batch["tokens"].shape == (4, 32) for batch in out.batches)
    assert any((batch["targets"][batch["loss_weights"] == 0] == vocabulary.eos_id).any() for batch in out.batches)
    for tokens, targets, _ in segments(out.batches):
        assert tokens[0] == vocabulary.eos_id and (tokens[1:] == targets[:-1]).all()
    assert all(same(a, b) for a, b in zip(out.batches, held(path, "jsonl", model_file)["x"].batches, strict=True))


@pytest.mark.parametrize("eval_bytes", [3, 4, 20, 100])
def test_held_out_text_stops_at_the_limit_inside_a_document(vocabulary, model_file, tmp_path, eval_bytes):
    text = "中文 and English, 混在一起。" * 3
    (tmp_path / "v.txt").write_text(text, encoding="utf-8")
    out = held(tmp_path / "v.txt", "text", model_file, eval_bytes)["x"]
    kept = text.encode()[:eval_bytes].decode(errors="ignore")
    learned = [i for batch in out.batches for i in batch["targets"][batch["loss_weights"] > 0]]
    assert vocabulary.decode(learned) == kept
    assert out.num_bytes == len(kept.encode())


def test_a_limit_below_one_character_is_refused(model_file, tmp_path):
    (tmp_path / "v.txt").write_text("中文", encoding="utf-8")
    with pytest.raises(UserError, match=r"eval_bytes=2 holds no character of sources\.x\.validation_files"):
        held(tmp_path / "v.txt", "text", model_file, eval_bytes=2)


def test_held_out_dialogues_count_the_text_of_the_answers(vocabulary, model_file, tmp_path):
    answers = ["short", "something longer, 中文", "x" * 200]
    path = write_lines(tmp_path / "v.jsonl", [talk("what is it?", answer) for answer in answers])
    out = held(path, "dialogues", model_file, kind="sft", seq_len=400)["x"]
    assert out.num_bytes == sum(len(answer.encode()) for answer in answers)
    assert out.num_tokens == sum(len(vocabulary.encode(answer)) for answer in answers)
    learned = [i for batch in out.batches for i in batch["targets"][batch["loss_weights"] > 0]]
    assert vocabulary.end_id not in learned
    cut = held(path, "dialogues", model_file, kind="sft", seq_len=20)["x"]
    assert 0 < cut.num_bytes < out.num_bytes
    assert held(path, "dialogues", model_file, kind="sft", seq_len=400, eval_bytes=6)["x"].num_bytes == sum(
        len(answer.encode()) for answer in answers[:2]
    )


def test_domains_without_validation_files_are_left_out(real):
    assert caches.held_out(real, kind="pretrain", seq_len=8, batch_size=1) == {}


def test_spans_of_a_long_document_do_not_end_it(counted, counting, tmp_path, monkeypatch):
    """A document cut into spans has one end, and every other token of it is predicted."""
    monkeypatch.setattr(sources, "SPAN_BYTES", 8)
    monkeypatch.setattr(sources, "SPAN_BYTES_PER_TOKEN", 0)
    text = "1:5\n2:5\n3:5\n4:5\n"
    (tmp_path / "a.txt").write_text(text)
    assert len(sources.index("a", "a", [str(tmp_path / "a.txt")], "text", span_bytes=8)) == 2
    monkeypatch.setattr(
        type(counting),
        "encode",
        lambda self, text: [1000 * int(line.split(":")[0]) + k for line in text.split() for k in range(5)],
    )
    live = caches.open_feed(
        counted(a=SourceConfig(files=(str(tmp_path / "a.txt"),))), kind="pretrain", seq_len=7, batch_size=3, seed=0
    )
    # Two spans an epoch, and 16 rows that are filled in turn.
    seen = collections.Counter(token for _ in range(80) for token in next(live)["targets"].ravel().tolist())
    document = [1000 * i + k for i in (1, 2, 3, 4) for k in range(5)] + [counting.eos_id]
    assert seen.keys() == set(document)
    assert max(seen.values()) - min(seen.values()) <= 16
