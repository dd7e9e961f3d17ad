"""Stages that read the same data go on where the earlier one ended, whatever kills the run in between.

A run is a few stages, each with a feed of its own. What one leaves to the next is JSON, as in the provenance of a
checkpoint.
"""

import collections
import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tele_jax.data import cache, domains, order, sources
from tele_jax.errors import DamageError, UserError
from tele_jax.settings import DataConfig, SourceConfig
from tests.data import caches


@pytest.fixture(scope="module")
def place(model_file, tmp_path_factory):
    """Two domains of lines, one of dialogues, and a cache of the lines."""
    directory = tmp_path_factory.mktemp("going_on")
    for name, count in (("a", 37), ("b", 11)):
        lines = [
            {"text": f"{name}{i}: " + " ".join(f"{name}{i * 37 + k}" for k in range(1 + 5 * i % 17))}
            for i in range(count)
        ]
        caches.write_lines(directory / f"{name}.jsonl", lines)
    talks = [caches.talk(f"question {i}?", f"answer {i} " * (1 + i % 9)) for i in range(23)]
    caches.write_lines(directory / "talks.jsonl", talks)
    made = {name: (directory / f"{name}.jsonl", "jsonl", rate) for name, rate in (("a", 3), ("b", 1))}
    caches.make(caches.config(model_file, made, seq_len=16, shard_bytes=900), directory / "rows")
    return directory


def data_of(place, model_file, cached=False, rates=(("a", 3), ("b", 1))):
    sources = {n: SourceConfig(files=(str(place / f"{n}.jsonl"),), format="jsonl", rate=rate) for n, rate in rates}
    return DataConfig(tokenizer=str(model_file), sources=sources, cache=str(place / "rows") if cached else None)


@dataclasses.dataclass(frozen=True)
class Stage:
    data: DataConfig
    steps: int
    batch_size: int
    seed: int
    seq_len: int = 16
    kind: str = "pretrain"


def provenance_of(feeds_positions):
    """What a checkpoint would hold of them, read again."""
    entry = {"data": {"positions": {name: at.to_json() for name, at in feeds_positions.items()}}}
    return json.loads(json.dumps(entry))


def drive(stages, *, every=1000, kills=(), hosts=(1,)):
    """The batches of a run by stage, the provenance that it leaves.

    every: steps between checkpoints. kills: counts of steps that are done, by whatever start of the run, after which it
    is killed. hosts: in how many parts the batches are read, by start, the last one from then on.
    """
    provenance, found, done, starts = [], [], 0, 0
    for stage in stages:
        saved, entry, batches = None, None, {}
        while True:
            count = hosts[min(starts, len(hosts) - 1)]
            starts += 1
            rows = [range(h * stage.batch_size // count, (h + 1) * stage.batch_size // count) for h in range(count)]
            shape = {"kind": stage.kind, "seq_len": stage.seq_len, "batch_size": stage.batch_size, "seed": stage.seed}
            known = order.positions_in(provenance)
            opened = [caches.open_feed(stage.data, **shape, rows=part, known=known) for part in rows]
            if saved is not None:
                for each in opened:
                    each.restore(saved)
            killed = False
            while opened[0].batches < stage.steps and not killed:
                step = opened[0].batches
                parts = [next(each) for each in opened]
                if len(parts[0]["tokens"]) == stage.batch_size:  # a live feed gives all rows to every host
                    assert all(caches.same(parts[0], part) for part in parts)
                    parts = parts[:1]
                batches[step] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                done += 1
                if (step + 1) % every == 0 or step + 1 == stage.steps:
                    saved, entry = opened[0].state(), provenance_of(opened[0].positions())
                killed = done in kills
            finished = opened[0].batches == stage.steps
            for each in opened:
                each.close()
            if finished and saved is not None and json.loads(saved)["batches"] == stage.steps:
                break
        provenance.append(entry)
        found.append([batches[step] for step in range(stage.steps)])
    return found, provenance


@pytest.mark.parametrize("how", ["live", "cached", "fine-tuning"])
@settings(max_examples=20)
@given(drawn=st.data())
def test_a_run_that_is_killed_sees_what_an_undisturbed_one_sees(place, model_file, how, drawn):
    """Over seeds, batch sizes, epochs, checkpoints, kills and numbers of hosts; three stages, the rates change."""
    draw = drawn.draw
    kind, lengths = ("sft", [40, 64]) if how == "fine-tuning" else ("pretrain", [16] if how == "cached" else [16, 24])
    stages = [
        Stage(
            talks_of(place, model_file) if kind == "sft" else data_of(place, model_file, how == "cached", rates),
            steps=draw(st.integers(1, 14)),
            batch_size=draw(st.sampled_from([4, 8])),
            seed=draw(st.integers(0, 99)),
            seq_len=draw(st.sampled_from(lengths)),
            kind=kind,
        )
        for rates in ((("a", 3), ("b", 1)), (("a", 1), ("b", 1)), (("b", 2), ("a", 3)))
    ]
    total = sum(stage.steps for stage in stages)
    boundaries = np.cumsum([stage.steps for stage in stages]).tolist()
    kills = {*draw(st.lists(st.integers(1, 2 * total), max_size=4)), *boundaries}
    hosts = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=6))
    undisturbed, provenance = drive(stages)
    disturbed, again = drive(stages, every=draw(st.integers(1, 5)), kills=kills, hosts=hosts)
    for ours, theirs in zip(disturbed, undisturbed, strict=True):
        assert all(caches.same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert again == provenance


def test_live_every_token_comes_once_an_epoch_through_all_stages(counting, tmp_path, monkeypatch):
    """With other batches, other row lengths, other rates and other seeds in every stage."""
    monkeypatch.setattr(domains, "open_vocabulary", lambda data, kind: counting)
    lengths = {"a": [3 + 7 * i % 31 for i in range(37)], "b": [2 + 5 * i % 23 for i in range(11)]}
    for name, each in lengths.items():
        first = 1 if name == "a" else 101
        caches.write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{first + i}:{n}"} for i, n in enumerate(each)])
    stages = [
        Stage(data_of(tmp_path, "counting"), 9, 4, seed=0, seq_len=16),
        Stage(data_of(tmp_path, "counting", rates=(("a", 1), ("b", 1))), 7, 6, seed=1, seq_len=40),
        Stage(data_of(tmp_path, "counting", rates=(("b", 1), ("a", 5))), 40, 4, seed=2, seq_len=24),
    ]
    found, provenance = drive(stages)
    tokens = collections.Counter()
    begun = {"a": [], "b": []}
    for batch in [batch for stage in found for batch in stage]:
        for segment in caches.segments(batch):
            targets = segment["targets"][segment["targets"] != counting.eos_id]
            tokens.update(targets.tolist())
            if len(targets) and targets[0] % 1000 == 0:
                number = int(targets[0]) // 1000
                begun["a" if number < 101 else "b"].append(number)
    for name, each in lengths.items():
        numbers = list(range(1, 38)) if name == "a" else list(range(101, 112))
        epochs = [begun[name][i : i + len(each)] for i in range(0, len(begun[name]) - len(each) + 1, len(each))]
        assert len(epochs) >= 2 and all(sorted(epoch) == numbers for epoch in epochs)
        assert len(begun[name]) == provenance[-1]["data"]["positions"][name]["next"]
        # Nothing is lost where the row length changes: what is not given out is in the rows that are filled in turn.
        waiting = [number for row in provenance[-1]["data"]["positions"][name]["open"] for number, _ in row]
        for number, length in zip(numbers, each, strict=True):
            times = begun[name].count(number)
            counts = [tokens[1000 * number + k] for k in range(length)]
            assert times - len(waiting) <= min(counts) and max(counts) == times
        whole = [1000 * number + k for number, length in zip(numbers, each, strict=True) for k in range(length)]
        missing = sum(begun[name].count(token // 1000) - tokens[token] for token in whole)
        assert missing <= len(waiting) * max(each)


def test_cached_every_row_comes_once_an_epoch_through_all_stages(place, model_file):
    stages = [
        Stage(data_of(place, model_file, True), 5, 4, seed=0),
        Stage(data_of(place, model_file, True, rates=(("a", 1), ("b", 1))), 3, 8, seed=1),
        Stage(data_of(place, model_file, True, rates=(("b", 1), ("a", 5))), 60, 4, seed=2),
    ]
    found, provenance = drive(stages)
    opened = cache.RowCache(place / "rows")
    row_of = {}
    for name in ("a", "b"):
        rows = caches.whole_domain(opened, name)
        row_of |= {
            rows["targets"][i].tobytes() + rows["tokens"][i].tobytes(): (name, i) for i in range(len(rows["tokens"]))
        }
    assert len(row_of) == sum(opened.rows.values()), "every row is another one"
    seen = [row_of[t.tobytes() + x.tobytes()] for s in found for b in s for t, x in zip(b["targets"], b["tokens"])]
    for name, count in opened.rows.items():
        mine = [row for domain, row in seen if domain == name]
        epochs = [mine[i : i + count] for i in range(0, len(mine) - count + 1, count)]
        assert len(epochs) >= 1 and all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len(mine) == provenance[-1]["data"]["positions"][name]["next"]


def first_batch(stage, provenance, vocabulary=None):
    shape = {"kind": stage.kind, "seq_len": stage.seq_len, "batch_size": stage.batch_size, "seed": stage.seed}
    opened = caches.open_feed(stage.data, **shape, known=order.positions_in(provenance))
    batch = next(opened)
    opened.close()
    return batch, opened.taken_over


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_the_same_data_is_known_by_its_content_and_other_data_begins(place, model_file, tmp_path, cached):
    """Elsewhere, under another name, after a stage with other data and a growth; and not where the content differs."""
    _, provenance = drive([Stage(data_of(place, model_file, cached), 6, 4, seed=3)])
    _, other = drive([Stage(talks_of(place, model_file), 2, 2, seed=0, kind="sft", seq_len=32)])
    later = [*provenance, {"stage": "grow", "kind": "grow"}, *other]
    stage = Stage(data_of(place, model_file, cached), 1, 4, seed=9)
    expected, taken = first_batch(stage, provenance)
    assert taken.keys() == {"a", "b"}
    assert caches.same(first_batch(stage, later)[0], expected), "a later stage goes back to what an earlier one read"
    fresh, taken = first_batch(stage, other)
    assert not taken and not caches.same(fresh, expected)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes((place / f"{name}.jsonl").read_bytes())
    if cached:
        made = {name: (tmp_path / f"{name}.jsonl", "jsonl", rate) for name, rate in (("a", 3), ("b", 1))}
        caches.make(caches.config(model_file, made, seq_len=16, shard_bytes=900), tmp_path / "rows")
    moved = dataclasses.replace(stage, data=data_of(tmp_path, model_file, cached))
    assert caches.same(first_batch(moved, provenance)[0], expected)
    if not cached:
        only = SourceConfig(files=(str(tmp_path / "a.jsonl"),), format="jsonl", rate=3)
        renamed = dataclasses.replace(moved.data, sources={"zz": only})
        alone = dataclasses.replace(moved.data, sources={"a": only})
        batches = [first_batch(dataclasses.replace(stage, data=d), provenance)[0] for d in (renamed, alone)]
        assert caches.same(*batches)
        (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("a0:", "a9:"))
        _, taken = first_batch(dataclasses.replace(stage, data=alone), provenance)
        assert not taken, "another content of the same size in the same place"


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_what_is_read_may_lie_elsewhere_when_a_stage_goes_on(place, model_file, tmp_path, cached):
    shape = {"kind": "pretrain", "seq_len": 16, "batch_size": 4, "seed": 0}
    opened = caches.open_feed(data_of(place, model_file, cached), **shape)
    for _ in range(5):
        next(opened)
    state, expected = opened.state(), [next(opened) for _ in range(20)]
    opened.close()
    shutil.copytree(place, tmp_path / "moved")
    shutil.copyfile(model_file, tmp_path / "moved.model")
    again = caches.open_feed(data_of(tmp_path / "moved", tmp_path / "moved.model", cached), **shape)
    again.restore(state)
    assert all(caches.same(next(again), batch) for batch in expected)
    again.close()


def talks_of(place, model_file):
    source = SourceConfig(files=(str(place / "talks.jsonl"),), format="dialogues")
    return DataConfig(tokenizer=str(model_file), sources={"talks": source})


@pytest.mark.parametrize("lengths", [(48, 48, 48), (48, 96, 40)], ids=str)
def test_no_dialogue_that_waits_for_a_row_is_lost_between_stages(place, model_file, vocabulary, lengths):
    talks = talks_of(place, model_file)
    stages = [Stage(talks, 2 + i, 3, seed=i, kind="sft", seq_len=length) for i, length in enumerate(lengths)]
    found, provenance = drive(stages)
    seen = collections.Counter()
    for stage in found:
        for batch in stage:
            for segment in caches.segments(batch):
                seen[vocabulary.decode(segment["targets"][segment["loss_weights"] > 0]).split()[1]] += 1
    at = provenance[-1]["data"]["positions"]["talks"]
    waiting = [number for row in at["open"] for number, _ in row] + at.get("first", [])
    assert sum(seen.values()) + len(waiting) == at["next"], "each is given out, or waits"
    assert max(seen.values()) - min(seen[str(i)] for i in range(23)) <= 1 + len(waiting)


def test_text_that_is_cut_at_other_places_begins_its_next_epoch(model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SPAN_BYTES", 200)
    monkeypatch.setattr(sources, "SPAN_BYTES_PER_TOKEN", 10)
    (tmp_path / "long.txt").write_text("".join(f"line {i} of a long text\n" for i in range(200)))
    data = DataConfig(tokenizer=str(model_file), sources={"x": SourceConfig(files=(f"{tmp_path}/*.txt",))})
    _, provenance = drive([Stage(data, 3, 2, seed=0, seq_len=16)])
    before = order.positions_in(provenance)[0]
    _, later = drive([Stage(data, 1, 2, seed=0, seq_len=16), Stage(data, 1, 2, seed=0, seq_len=60)])
    after = order.positions_in(later)[0]
    assert 0 < before.epochs < 1 and before.cut == 200
    assert 1 < after.epochs < 2 and after.cut == 600 and after.total < before.total


def test_two_domains_with_the_same_content_do_not_take_each_others_place(place, model_file):
    source = SourceConfig(files=(str(place / "a.jsonl"),), format="jsonl")
    both = DataConfig(tokenizer=str(model_file), sources={"x": source, "y": dataclasses.replace(source, rate=3.0)})
    _, provenance = drive([Stage(both, 8, 4, seed=0)])
    (_, taken), (_, none) = (
        first_batch(Stage(data, 1, 4, seed=0), provenance)
        for data in (both, dataclasses.replace(both, sources={"v": source, "w": source}))
    )
    assert taken["y"].next > 2 * taken["x"].next and not none


@pytest.mark.parametrize("field", [("next", -1), ("total", 0), ("open", [[[1]]]), ("checksum", 5), ("first", "x")])
def test_a_damaged_position_in_a_provenance_is_named(place, model_file, field):
    _, provenance = drive([Stage(data_of(place, model_file), 1, 2, seed=0)])
    provenance[0]["data"]["positions"]["a"][field[0]] = field[1]
    with pytest.raises(DamageError, match=r"provenance\[0\]\.data\.positions\.a"):
        order.positions_in(provenance)
    provenance[0]["data"]["positions"] = 5
    with pytest.raises(DamageError, match=r"provenance\[0\]\.data\.positions"):
        order.positions_in(provenance)


def test_a_state_of_a_stage_is_not_for_another_data(place, model_file):
    stage = Stage(data_of(place, model_file), 1, 2, seed=0)
    live = caches.open_feed(stage.data, kind="pretrain", seq_len=16, batch_size=2, seed=0)
    cached = caches.open_feed(data_of(place, model_file, True), kind="pretrain", seq_len=16, batch_size=2, seed=0)
    with pytest.raises(UserError, match="saved for a feed without a cache"):
        cached.restore(live.state())
    with pytest.raises(UserError, match="saved for a feed from a cache"):
        live.restore(cached.state())
