"""How often text is opened before the first step: once for all stages, and not at all where indexes were kept."""

import collections
import contextlib
import json
import os
import sys

import numpy as np
import pytest

from tele_jax.data import sources
from tele_jax.data.batches import Batches
from tele_jax.errors import UserError
from tele_jax.settings import DataConfig, OptimizerConfig, SourceConfig
from tele_jax.stages.pretrain import PretrainStage

_opened: list[collections.Counter] = []


def _hook(event, arguments):
    if event == "open" and _opened and isinstance(arguments[0], str):
        _opened[-1][os.path.basename(arguments[0])] += 1


sys.addaudithook(_hook)


@contextlib.contextmanager
def opens():
    """Counts by name the files that are opened in the body."""
    _opened.append(collections.Counter())
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


@pytest.fixture
def stages(texts, model_file, tmp_path):
    """Two stages with rows of two lengths, whose long documents are cut at different places."""
    lines = [line for text in texts for line in text.splitlines() if len(line) > 30]
    for name, part in (("train.jsonl", [*lines, "\n".join(lines)]), ("held.jsonl", lines[::9])):
        (tmp_path / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    (tmp_path / "code.txt").write_text("\n".join(texts))
    prose = SourceConfig(
        files=(str(tmp_path / "train.jsonl"),), validation_files=(str(tmp_path / "held.jsonl"),), format="jsonl"
    )
    code = SourceConfig(files=(str(tmp_path / "code.txt"),))
    data = DataConfig(tokenizer=str(model_file), sources={"prose": prose, "code": code}, eval_bytes=5000)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    return [
        PretrainStage(kind="pretrain", data=data, seq_len=seq_len, batch_size=4, steps=1, optimizer=optimizer)
        for seq_len in (64, 1024)
    ]


def start(stages, directory):
    """Everything that a run reads before its first step, as the first batch of each stage."""
    index = sources.Indexes(directory, seq_lens=[stage.seq_len for stage in stages])
    batches = []
    for made in [Batches(stage, "pretrain", index) for stage in stages]:
        made.feed().close()
        assert made.held_out and made.shared() and made.sample(2, 16).shape == (2, 16)
        batches.append(made)
    index.keep_in(directory)
    return batches


def first_rows(batches):
    feeds = [each.feed() for each in batches]
    rows = [next(feed)["targets"] for feed in feeds]
    for feed in feeds:
        feed.close()
    return rows


def test_text_is_read_once_for_all_stages_and_not_again_at_the_next_start(stages, tmp_path):
    with opens() as counts:
        batches = start(stages, tmp_path / "indexes")
    assert counts["train.jsonl"] == counts["code.txt"] == 1
    assert counts["held.jsonl"] <= 3, "the index, and what is held out for each row length"
    expected = first_rows(batches)
    with opens() as counts:
        batches = start(stages, tmp_path / "indexes")
    assert counts["train.jsonl"] == counts["code.txt"] == 0
    assert counts["held.jsonl"] <= 2
    for ours, theirs in zip(first_rows(batches), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("change", ["text", "damage"])
def test_an_index_of_other_text_or_with_other_bits_is_not_believed(stages, tmp_path, change):
    start(stages, tmp_path / "indexes")
    if change == "text":
        with open(tmp_path / "train.jsonl", "a") as file:
            file.write('{"text": "one more document of its own"}\n')
    else:
        for kept in (tmp_path / "indexes").iterdir():
            data = bytearray(kept.read_bytes())
            data[len(data) // 2] ^= 1
            kept.write_bytes(data)
    with opens() as counts:
        start(stages, tmp_path / "indexes")
    assert counts["train.jsonl"] == 1
    with opens() as counts:
        start(stages, tmp_path / "indexes")
    assert counts["train.jsonl"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("file", -1),
        ("file", 1),
        ("offset", -1),
        ("offset", 10**12),
        ("offset", 2**63 - 1),
        ("length", 0),
        ("length", 10**12),
        ("begin", -1),
        ("end", 10**12),
        ("num_bytes", 0),
    ],
)
def test_an_index_that_cannot_be_that_of_its_files_is_not_believed(tmp_path, name, value):
    path, kept = tmp_path / "lines.jsonl", tmp_path / "indexes"
    path.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(9)))
    arguments = ("here", "lines", [str(path)], "jsonl")
    index = sources.Indexes(kept)
    expected = index(*arguments).spans
    index.keep_in(kept)
    (file,) = kept.iterdir()
    with np.load(file) as arrays:
        spans, about = arrays["spans"].copy(), json.loads(arrays["about"].tobytes())
    with opens() as counts:
        np.testing.assert_array_equal(sources.Indexes(kept)(*arguments).spans, expected)
    assert counts["lines.jsonl"] == 0
    wrong = spans.copy()
    wrong[name][4] = value
    for other in (wrong, spans[::-1], np.concatenate([spans, spans]), spans[:0]):
        np.savez(file, spans=other, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
        with opens() as counts:
            np.testing.assert_array_equal(sources.Indexes(kept)(*arguments).spans, expected)
        assert counts["lines.jsonl"] == 1


@pytest.mark.parametrize("change", [{"rejected": [3]}, {"num_rejected": "0"}, {"checksum": None}, {"more": 1}, None])
def test_an_index_with_another_account_is_not_believed(tmp_path, change):
    path, kept = tmp_path / "a.txt", tmp_path / "indexes"
    path.write_text("one text")
    index = sources.Indexes(kept)
    expected = index("here", "a", [str(path)], "text")
    index.keep_in(kept)
    (file,) = kept.iterdir()
    with np.load(file) as arrays:
        spans, about = arrays["spans"].copy(), json.loads(arrays["about"].tobytes())
    about = None if change is None else about | change
    np.savez(file, spans=spans, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    with opens() as counts:
        assert sources.Indexes(kept)("here", "a", [str(path)], "text").checksum == expected.checksum
    assert counts["a.txt"] == 1


def test_text_that_changes_behind_a_kept_index_ends_the_run(stages, tmp_path):
    start(stages, tmp_path / "indexes")
    path = tmp_path / "train.jsonl"
    stamp = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"e", b"f"))
    os.utime(path, ns=(stamp, stamp))
    batches = start(stages, tmp_path / "indexes")
    with pytest.raises(UserError, match=r"train\.jsonl: has changed since"):
        first_rows(batches)


def test_nothing_is_written_before_keep_in(stages, tmp_path):
    index = sources.Indexes(tmp_path / "indexes")
    Batches(stages[0], "pretrain", index)
    assert not (tmp_path / "indexes").exists()
