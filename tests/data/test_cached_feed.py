"""Batches from a cache: the same for any number of hosts, after any kill, at any step; every document once an epoch."""

import collections
import subprocess
import sys
import threading

import numpy as np
import pytest

from tele_jax.data import cache, domains, feed
from tele_jax.errors import DamageError, UserError
from tele_jax.settings import DataConfig, SourceConfig
from tests.data import caches


@pytest.fixture(scope="module")
def place(model_file, texts, tmp_path_factory):
    """A directory with the cache `rows` of two domains, and their text."""
    directory = tmp_path_factory.mktemp("feed")
    documents = [line for text in texts for line in text.splitlines() if len(line) > 20]
    for name, part in (("en", documents[:300]), ("zhonghua", [f"第{i}句：天地玄黄，宇宙洪荒。" for i in range(80)])):
        caches.write_lines(directory / f"{name}.jsonl", [{"text": line} for line in part])
    sources = {name: (directory / f"{name}.jsonl", "jsonl", rate) for name, rate in (("en", 3), ("zhonghua", 1))}
    caches.make(caches.config(model_file, sources, seq_len=32, shard_bytes=9000), directory / "rows")
    return directory


@pytest.fixture
def data(place, model_file):
    return DataConfig(tokenizer=str(model_file), cache=str(place / "rows"))


def make(data, *, batch_size=8, seed=3, **options):
    return caches.open_feed(data, kind="pretrain", seq_len=32, batch_size=batch_size, seed=seed, **options)


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_batch_is_what_training_takes(data):
    made = make(data)
    batch = next(made)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((8, 32), "int32"),
        "targets": ((8, 32), "int32"),
        "loss_weights": ((8, 32), "float32"),
        "segment_ids": ((8, 32), "int32"),
        "positions": ((8, 32), "int32"),
    }
    assert iter(made) is made and made.batches == 1
    made.close()


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_the_global_batches_do_not_depend_on_the_number_of_hosts(data, hosts):
    whole = make(data)
    feeds = [make(data, rows=range(host * 8 // hosts, (host + 1) * 8 // hosts)) for host in range(hosts)]
    for _ in range(30):
        assert caches.same(joined([next(each) for each in feeds]), next(whole))


def test_rows_and_steps_that_are_in_no_batch_are_refused(data):
    for rows in ([8], [-1, 0]):
        with pytest.raises(ValueError, match="are not all in a batch of 8"):
            make(data, rows=rows)
    for step in (-1, 10**12):
        with pytest.raises(ValueError, match="rows of a run"):
            make(data).read(step)


def test_every_document_is_seen_once_an_epoch(place, data, vocabulary):
    only = DataConfig(tokenizer=data.tokenizer, cache=data.cache, sources={"en": SourceConfig()})
    rows = cache.RowCache(place / "rows").rows["en"]
    made = make(only, batch_size=1)
    on_disk = caches.whole_domain(cache.RowCache(place / "rows"), "en")
    orders = []
    for _ in range(3):
        batches = [next(made) for _ in range(rows)]
        # A document cut by the end of a row is put together again in the order of the disk.
        found = [int((on_disk["targets"] == batch["targets"][0]).all(axis=1).argmax()) for batch in batches]
        assert sorted(found) == list(range(rows))
        again = joined([batches[found.index(i)] for i in range(rows)])
        texts = collections.Counter(vocabulary.decode(ids) for ids in caches.documents(again, vocabulary.eos_id))
        assert texts == collections.Counter(lines_of(place / "en.jsonl"))
        orders.append(found)
    assert orders[0] != orders[1] != orders[2] != orders[0], "every epoch has an order of its own"


def lines_of(path):
    import json

    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_rates_are_shares_of_the_rows(data):
    made = make(data, batch_size=100)
    index = np.arange(40_000)
    domain, _, _ = made.order.locate(index)
    assert (domain == made.order.domains.index("en")).mean() == pytest.approx(0.75, abs=1e-3)
    named = DataConfig(
        tokenizer=data.tokenizer,
        cache=data.cache,
        sources={"zhonghua": SourceConfig(rate=9), "en": SourceConfig(rate=1)},
    )
    domain, _, _ = make(named).order.locate(index)
    assert (domain == make(named).order.domains.index("zhonghua")).mean() == pytest.approx(0.9, abs=1e-3)


def test_resume_is_exact_at_any_step_and_with_another_number_of_hosts(data):
    made = make(data)
    batches, states = [], {}
    for i in range(60):
        states[i] = made.state()
        batches.append(next(made))
    again = make(data)
    for at in (59, 0, 17, 18):
        again.restore(states[at])
        assert again.batches == at
        assert all(caches.same(next(again), batch) for batch in batches[at : at + 5])
    halves = [make(data, rows=range(4)), make(data, rows=range(4, 8))]
    for half in halves:
        half.restore(states[41])
    for batch in batches[41:50]:
        assert caches.same(joined([next(half) for half in halves]), batch)


RESUMED = """
import hashlib, pickle, sys
from tests.data import caches
data, state = pickle.load(sys.stdin.buffer)
made = caches.open_feed(data, kind="pretrain", seq_len=32, batch_size=8, seed=3)
made.restore(state)
batches = [next(made) for _ in range(10)]
print(hashlib.sha256(b"".join(batch[n].tobytes() for batch in batches for n in sorted(batch))).hexdigest())
"""


def test_resume_is_exact_in_another_process(data):
    import hashlib
    import pickle

    made = make(data)
    for _ in range(7):
        next(made)
    state = made.state()
    expected = [next(made) for _ in range(10)]
    done = subprocess.run([sys.executable, "-c", RESUMED], input=pickle.dumps((data, state)), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    digest = hashlib.sha256(b"".join(b[n].tobytes() for b in expected for n in sorted(b))).hexdigest()
    assert done.stdout.decode().split() == [digest]


class Counted(cache.RowCache):
    """Notes every row that is read."""

    def __init__(self, path):
        super().__init__(path)
        self.seen = []

    def _records(self, shard, rows):
        self.seen.append(len(rows))
        return super()._records(shard, rows)


@pytest.mark.parametrize("step", [10, 1_000_000, 10**9])
def test_to_go_to_a_step_reads_that_batch_and_nothing_else(place, step):
    """The structure behind O(1): as many rows are touched for step one million as for step ten, and the state is small.

    benchmarks/read_rows.py has the times.
    """
    opened = Counted(place / "rows")
    made = feed.RowFeed(opened, {"en": 3.0, "zhonghua": 1.0}, batch_size=8, seed=3)
    state = made.state().replace(b'"batches": 0', b'"batches": %d' % step)
    made.restore(state)
    assert sum(opened.seen) == 0, "nothing is read to get there"
    made.read(step)
    assert sum(opened.seen) == 8
    assert made.batches == step and len(made.state()) < 1200
    assert len(opened.manifest.domains["en"].shards) > 1


def test_a_state_is_for_one_feed_only(data):
    state = make(data).state()
    for other, message in (
        (make(data, seed=4), "seed was 3, now 4"),
        (make(data, batch_size=16), "batch_size was 8, now 16"),
        (
            make(DataConfig(tokenizer=data.tokenizer, cache=data.cache, sources={"en": SourceConfig()})),
            r"sources\.en\.rate was 3\.0, now 1\.0; sources\.zhonghua was .*, now None",
        ),
    ):
        with pytest.raises(UserError, match=f"saved for another feed: {message}"):
            other.restore(state)
    odd = [
        state.replace(b'"batches": 0', b'"batches": ' + value) for value in (b"-3", b'"7"', b"null", b"1.5", b"true")
    ]
    for damaged in (b"", state[:-5], b"[1]", b"\xff\xfe", *odd):
        with pytest.raises(DamageError, match=r"the saved position in the data(:| is) damaged"):
            make(data).restore(damaged)
    with pytest.raises(UserError, match="was saved by an earlier version, in another form"):
        make(data).restore(b'{"batches": 7, "feed": "cache", "cache": "0123"}')
    with pytest.raises(UserError, match="was saved for a feed without a cache"):
        make(data).restore(b'{"batches": 1, "feed": "live", "positions": {}}')


def test_batches_are_placed_ahead_of_time_in_another_thread(data):
    placed = []
    made = make(data, place=lambda batch: placed.append(threading.get_ident()) or batch["tokens"])
    first = next(made)
    assert isinstance(first, np.ndarray) and made.batches == 1
    made.close()
    assert placed and threading.get_ident() not in placed


def test_damage_is_raised_where_the_batch_is_asked_for(data, place, tmp_path):
    import shutil

    shutil.copytree(place / "rows", tmp_path / "rows")
    for shard in (tmp_path / "rows").glob("*/*.array_record"):
        content = bytearray(shard.read_bytes())
        content[200:-65_536:200] = bytes(byte ^ 1 for byte in content[200:-65_536:200])
        shard.write_bytes(content)
    made = make(DataConfig(tokenizer=data.tokenizer, cache=str(tmp_path / "rows")))
    with pytest.raises(DamageError, match=r"array_record: damaged \("):
        next(made)


def other_tokenizer(model_file, tmp_path):
    """The same tokenizer in a file with other bytes: a field that protobuf does not know is skipped."""
    path = tmp_path / "other.model"
    path.write_bytes(model_file.read_bytes() + b"\xfa\xff\x7f\x01x")
    return path


def test_what_does_not_fit_a_cache_is_one_clear_line(data, place, model_file, tmp_path):
    def check(kind="pretrain", seq_len=32, **changes):
        fields = {"tokenizer": data.tokenizer, "cache": data.cache, **changes}
        domains.check(DataConfig(**fields), kind=kind, seq_len=seq_len)

    check()
    check(sources={"en": SourceConfig(files=(str(place / "en.jsonl"),))})
    (tmp_path / "moved.jsonl").write_bytes((place / "en.jsonl").read_bytes())
    check(sources={"en": SourceConfig(files=(str(tmp_path / "moved.jsonl"),))})
    for changes, message in (
        (dict(seq_len=64), "its rows have seq_len=32, the stage asks for seq_len=64"),
        (dict(kind="sft"), "its rows have kind=pretrain, the stage asks for kind=sft"),
        (dict(tokenizer=str(other_tokenizer(model_file, tmp_path))), r"another tokenizer than .*other\.model"),
        (dict(cache=str(tmp_path / "absent")), "not a row cache"),
        (
            dict(sources={"zhongua": SourceConfig()}),
            r"sources\.zhongua: the cache .* no such domain; did you mean 'zhong",
        ),
        (
            dict(sources={"en": SourceConfig(files=("else",))}),
            r"sources\.en\.files: the cache .* was made from .*en\.js",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check(**changes)


def test_held_out_text_is_read_from_the_files_that_the_cache_was_made_with(model_file, texts, tmp_path):
    for name, part in (("train", texts[0]), ("validation", texts[1])):
        caches.write_lines(tmp_path / f"{name}.jsonl", [{"text": part}])
    made = caches.config(model_file, {"a": (tmp_path / "train.jsonl", "jsonl", 1)}, seq_len=32)
    made.data.sources["a"] = SourceConfig(
        files=made.data.sources["a"].files,
        format="jsonl",
        validation_files=(str(tmp_path / "validation.jsonl"),),
    )
    caches.make(made, tmp_path / "rows")
    cached = DataConfig(tokenizer=str(model_file), cache=str(tmp_path / "rows"))
    shape = {"kind": "pretrain", "seq_len": 32, "batch_size": 4}
    from_cache, from_files = (caches.held_out(each, **shape)["a"] for each in (cached, made.data))
    assert from_cache.num_bytes == from_files.num_bytes == len(texts[1].encode())
    assert all(caches.same(a, b) for a, b in zip(from_cache.batches, from_files.batches, strict=True))
