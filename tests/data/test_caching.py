"""Making a cache: whoever does the work, the bytes are the same; what is interrupted goes on, and looks incomplete."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tele_jax.data import cache, caching, shards
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import DamageError, FailedError, UserError
from tele_jax.files import held_alone
from tests.data import caches


@pytest.fixture
def made(model_file, texts, tmp_path):
    lines = [line for text in texts for line in text.splitlines() if line]
    sources = {}
    for name, part, rate in (("en", lines[:400], 2), ("code", lines[400:700], 1)):
        path = caches.write_lines(tmp_path / f"text/{name}.jsonl", [{"text": line} for line in part])
        sources[name] = (path, "jsonl", rate)
    return caches.config(model_file, sources, shard_bytes=5000)


def content(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_cache_holds_what_it_says_and_nothing_else(made, tmp_path, vocabulary):
    manifest = caches.make(made, tmp_path / "rows")
    shard_files = {shard.file for domain in manifest.domains.values() for shard in domain.shards}
    assert content(tmp_path / "rows").keys() == {"manifest.json", "tokenizer.model", *shard_files}
    assert load_vocabulary(tmp_path / "rows/tokenizer.model") == vocabulary
    assert manifest == cache.read_manifest(tmp_path / "rows")
    assert (manifest.kind, manifest.seq_len, manifest.vocab_size) == ("pretrain", 64, vocabulary.vocab_size)
    assert {name: domain.source for name, domain in manifest.domains.items()} == made.data.sources
    assert not (tmp_path / "rows.incomplete").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_beam_gives_the_same_bytes_with_any_number_of_processes(made, tmp_path, workers):
    pytest.importorskip("apache_beam", reason="Beam is not installed: pip install 'tele_jax[beam]'")
    caches.make(made, tmp_path / "serial")
    seen = []
    caching.make(made, tmp_path / "beam", workers=workers, progress=lambda done, total: seen.append((done, total)))
    assert content(tmp_path / "beam") == content(tmp_path / "serial")
    assert seen[-1][0] == seen[-1][1] == len(shards.plan(made))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_goes_wrong_inside_beam_is_one_line(made, tmp_path, workers):
    pytest.importorskip("apache_beam", reason="Beam is not installed: pip install 'tele_jax[beam]'")
    # A directory stands where the account of the first shard has to be written.
    work = tmp_path / "rows.incomplete"
    (work / ".done").mkdir(parents=True)
    (work / ".done" / "en").write_text("in the way")
    with pytest.raises(FailedError) as caught:
        caching.make(made, tmp_path / "rows", workers=workers)
    assert str(caught.value) == f"{work}/.done/en: File exists; start again to go on"
    assert not (tmp_path / "rows").exists()
    (work / ".done" / "en").unlink()
    caching.make(made, tmp_path / "rows")
    caches.make(made, tmp_path / "serial")
    assert content(tmp_path / "rows") == content(tmp_path / "serial")


def test_a_runner_that_is_none_is_a_mistake(made, tmp_path):
    pytest.importorskip("apache_beam", reason="Beam is not installed: pip install 'tele_jax[beam]'")
    with pytest.raises(UserError, match="runner Nobody: Unexpected pipeline runner"):
        caching.make(made, tmp_path / "rows", runner="Nobody")
    assert not list(tmp_path.glob("rows*"))


def test_what_is_finished_is_kept_when_it_is_started_again(made, tmp_path, vocabulary, monkeypatch):
    written = []
    original = shards._write

    def stops_at_the_third(unit, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(unit.name)
        return original(unit, *rest)

    monkeypatch.setattr(shards, "_write", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        caches.make(made, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
    with pytest.raises(UserError, match="it is not complete yet"):
        cache.RowCache(tmp_path / "rows")
    leftover = tmp_path / "rows.incomplete/en/.00002.array_record.123"
    leftover.write_bytes(b"half a shard")
    stamp = (tmp_path / "rows.incomplete/en/00000.array_record").stat().st_mtime_ns
    monkeypatch.setattr(shards, "_write", original)
    said = []
    caching.make(made, tmp_path / "rows", runner="serial", say=said.append)
    assert said == [f"{tmp_path}/rows.incomplete: goes on where it was"]
    assert (tmp_path / "rows/en/00000.array_record").stat().st_mtime_ns == stamp
    caches.make(made, tmp_path / "undisturbed")
    assert content(tmp_path / "rows") == content(tmp_path / "undisturbed")


def test_a_finished_shard_that_is_gone_or_whose_account_is_damaged_is_made_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        caches.make(made, tmp_path / "rows")
    monkeypatch.undo()
    work = tmp_path / "rows.incomplete"
    (work / "en/00000.array_record").unlink()
    (work / "en/00001.array_record").write_bytes(b"half")
    (work / ".done/en/00002.json").write_text('{"shard": ')
    caches.make(made, tmp_path / "rows")
    caches.make(made, tmp_path / "undisturbed")
    assert content(tmp_path / "rows") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_a_build_that_goes_on_never_mixes_two_versions_of_a_text(model_file, texts, tmp_path, monkeypatch, format):
    """Of the same size, and as it may be left by a kill: the shards of what changed are made again, and no others."""
    for name in ("a", "b"):
        lines = [f"{name} old {i:04d} {line}" for i, line in enumerate(texts[0].splitlines())]
        records = [json.dumps({"text": line}) for line in lines] if format == "jsonl" else lines
        (tmp_path / f"{name}.{format}").write_text("\n".join(records))
    sources = {name: (tmp_path / f"{name}.{format}", format, 1) for name in ("a", "b")}
    made = caches.config(model_file, sources, shard_bytes=8000)
    monkeypatch.setattr(caching, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        caches.make(made, tmp_path / "rows")
    monkeypatch.undo()
    changed = tmp_path / f"b.{format}"
    text = changed.read_text()
    changed.write_text(text.replace("old 0000", "new 0000", 1))
    os.utime(tmp_path / f"a.{format}")  # touched, with the same content
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows.incomplete").rglob("*.array_record")}
    said = []
    caching.make(made, tmp_path / "rows", runner="serial", say=said.append)
    assert said[0].startswith(f"{changed}: changed since this cache was begun; 1 finished shards are made again")
    again = [
        path
        for path in kept
        if kept[path] != (tmp_path / "rows" / path.relative_to(path.parents[1])).stat().st_mtime_ns
    ]
    assert [path.parent.name for path in again] == ["b"]
    caches.make(made, tmp_path / "undisturbed")
    assert content(tmp_path / "rows") == content(tmp_path / "undisturbed")


def test_a_text_that_changes_while_its_cache_is_made_is_named(made, tmp_path, monkeypatch):
    file = tmp_path / "text/code.jsonl"
    before = file.read_text()
    original = caching._serial

    def run_and_change(units, work):
        original(units, work)
        file.write_text(before.replace('"text": "', '"text": "#', 1).replace('"}\n', "}\n", 1)[: len(before)])

    monkeypatch.setattr(caching, "_serial", run_and_change)
    with pytest.raises(UserError, match=r"code\.jsonl: changed while this cache was made; start again"):
        caches.make(made, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
    monkeypatch.undo()
    caches.make(made, tmp_path / "rows")
    caches.make(made, tmp_path / "undisturbed")
    assert content(tmp_path / "rows") == content(tmp_path / "undisturbed")


def test_workers_end_with_the_command_that_started_them_whatever_ends_it(tmp_path):
    """Without Beam: its workers import the module with this variable set, and this one would wait for ever."""
    worker = "import tele_jax.processes, signal; print('ready', flush=True)\nwhile True: signal.pause()"
    command = (
        "import subprocess, sys\n"
        "from tele_jax import processes\n"
        "with processes.ending_beam_workers():\n"
        f"    worker = subprocess.Popen([sys.executable, '-c', {worker!r}], stdout=sys.stdout)\n"
        "    print(worker.pid, flush=True)\n"
        "    worker.wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(2)]
    assert "ready\n" in said
    said.remove("ready\n")
    os.kill(int(said[0]), signal.SIGINT)  # Ctrl-C comes to all, and is left to the command
    process.kill()
    process.wait()
    assert process.stdout.read() == "", "which comes when the worker has ended, and not before"


KILLED = """
import pickle, sys
from pathlib import Path
from tele_jax.data import caching
made, out = pickle.load(sys.stdin.buffer)
caching.make(made, Path(out), runner="serial")
"""


def test_a_kill_leaves_nothing_that_looks_complete(made, tmp_path):
    import pickle

    process = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE)
    process.stdin.write(pickle.dumps((made, str(tmp_path / "rows"))))
    process.stdin.close()
    done = tmp_path / "rows.incomplete" / ".done"
    while not list(done.glob("*/*.json")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode == -signal.SIGKILL and not (tmp_path / "rows").exists():
        with pytest.raises(UserError, match="it is not complete yet"):
            cache.RowCache(tmp_path / "rows")
        caches.make(made, tmp_path / "rows")
    caches.make(made, tmp_path / "undisturbed")
    assert content(tmp_path / "rows") == content(tmp_path / "undisturbed")


def test_what_was_begun_for_something_else_is_not_touched(made, tmp_path):
    for changed, message in (
        (dataclasses.replace(made, seed=1), "config.seed was 0, now 1"),
        (dataclasses.replace(made, shard_bytes=5001), r"config\.shard_bytes was 5000, now 5001; units was"),
    ):
        work = cache.incomplete(tmp_path / "rows")
        with held_alone(work / caching.LOCK, "held"):
            vocabulary = load_vocabulary(made.data.tokenizer)
            caching._begun(work, made, vocabulary, shards.plan(made))
        with pytest.raises(UserError, match=rf"rows\.incomplete: was begun for something else \({message}"):
            caches.make(changed, tmp_path / "rows")


def test_a_damaged_plan_and_a_second_maker_are_refused(made, tmp_path):
    work = cache.incomplete(tmp_path / "rows")
    with held_alone(work / caching.LOCK, "held"), pytest.raises(UserError, match="is being made by another process"):
        caches.make(made, tmp_path / "rows")
    (work / "plan.json").write_text("{")
    with pytest.raises(DamageError, match=r"plan\.json: damaged, not JSON .*; remove"):
        caches.make(made, tmp_path / "rows")


def test_a_disk_that_is_full_at_the_last_file_leaves_no_cache(made, tmp_path, monkeypatch):
    original = caching.write_file

    def full(path, text):
        if path.name == "manifest.json":
            with open("/dev/full", "w") as file:
                file.write(text)
        original(path, text)

    monkeypatch.setattr(caching, "write_file", full)
    with pytest.raises(FailedError, match="No space left on device; start again to go on"):
        caches.make(made, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
    monkeypatch.undo()
    caches.make(made, tmp_path / "rows")
    assert cache.RowCache(tmp_path / "rows").rows["en"] > 0


def test_what_is_there_is_never_replaced(made, tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(UserError, match="rows: is there already; choose another --out, or remove it"):
        caches.make(made, tmp_path / "rows")
    with pytest.raises(UserError, match="workers=2 is for the DirectRunner"):
        caching.make(made, tmp_path / "other", runner="serial", workers=2)
    assert os.listdir(tmp_path / "rows") == []
