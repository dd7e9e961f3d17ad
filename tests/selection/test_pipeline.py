"""`tele sft select` from files to files: the same bytes whatever disturbs it; every sample accounted for."""

import json
import os
import shutil
import sys

import pytest

from tele_jax.cli.main import main
from tele_jax.data import sources
from tele_jax.errors import UserError
from tele_jax.selection import chunks, pipeline, samples
from tele_jax.selection.settings import select_config
from tests.selection import pools

FILES = ("selected.jsonl", "manifest.jsonl", "report.html", "summary.json")
CLUSTERS = {"count": 6, "dims": 8}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """200 samples in two files, with defects that are known."""
    folder = tmp_path_factory.mktemp("pool")
    records, defects = pools.planted(200)
    pools.write(folder / "a.jsonl", [*records[:120], ""])
    pools.write(folder / "b.jsonl", records[120:])
    return folder, records, defects


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 32)


def page(folder, **values):
    table = {"sources": {"pool": {"files": (f"{folder}/*.jsonl",)}}, "count": 40, "clusters": CLUSTERS}
    return select_config(table | values)


def contents(out):
    assert sorted(os.listdir(out)) == sorted(FILES)
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def once(pool, tmp_path_factory):
    """The files of a selection that nothing disturbs."""
    out = tmp_path_factory.mktemp("once") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CHUNK", 32)
        pipeline.select(page(pool[0]), out)
    return contents(out)


def test_every_sample_has_a_line_with_its_fate(pool, once):
    folder, records, defects = pool
    lines = [json.loads(line) for line in once["manifest.jsonl"].splitlines()]
    assert [line["id"] for line in lines] == list(range(200))
    places = [(f"{folder}/{'ab'[i >= 120]}.jsonl", i + 1 if i < 120 else i - 119) for i in range(200)]
    assert [(line["file"], line["line"]) for line in lines] == places
    assert [line["category"] for line in lines] == [record["category"] for record in records]
    fates = [line["fate"] for line in lines]
    summary = json.loads(once["summary.json"])
    assert fates.count("selected") == summary["selected"] == 40
    assert fates.count("dropped") == sum(drop["samples"] for drop in summary["dropped"])
    selected = [json.loads(line) for line in once["selected.jsonl"].splitlines()]
    assert [record.pop("id") for record in selected] == [i for i in range(200) if fates[i] == "selected"]
    assert selected == [records[i] for i in range(200) if fates[i] == "selected"]
    reasons = {"truncated": "truncated", "language": "another language", "copy": "duplicate"}
    assert set(defects.values()) == reasons.keys()
    assert all(reasons[kind] in lines[i].get("reason", "") for i, kind in defects.items())
    for i, kind in defects.items():
        if kind == "copy" and "copy_of" in lines[i]:
            original = records[lines[i]["copy_of"]]["messages"]
            assert original[0] == records[i]["messages"][0] and lines[lines[i]["copy_of"]]["fate"] != "dropped"
    assert all(("cluster" in line) == (line["fate"] != "dropped") for line in lines)


def test_what_is_selected_can_be_trained_on(once, tmp_path):
    (tmp_path / "selected.jsonl").write_bytes(once["selected.jsonl"])
    corpus = sources.index("x", "few", [f"{tmp_path}/selected.jsonl"], "dialogues")
    assert len(corpus) == 40 and corpus.num_rejected == 0


def test_the_number_of_workers_changes_no_byte(pool, once, tmp_path, monkeypatch):
    started = []
    real = chunks.ProcessPoolExecutor
    monkeypatch.setattr(chunks, "ProcessPoolExecutor", lambda *how: started.append(how[0]) or real(*how))
    for workers in (2, 3):
        pipeline.select(page(pool[0]), tmp_path / f"{workers}", workers=workers)
        assert contents(tmp_path / f"{workers}") == once
    assert started == [2, 3]


def test_a_killed_selection_goes_on_to_the_same_bytes(pool, once, tmp_path, monkeypatch):
    out, made = tmp_path / "out", []
    work = dict(chunks.WORK)

    def counted(what, dies_at):
        def one(config, directory, chunk):
            if len(made) == dies_at:
                raise KeyboardInterrupt
            made.append((what, chunk.number))
            return work[what](config, directory, chunk)

        return one

    for dies_at in (3, 9, None):  # while reading, while features are made, never
        for what in work:
            monkeypatch.setitem(chunks.WORK, what, counted(what, dies_at))
        if dies_at is not None:
            with pytest.raises(KeyboardInterrupt):
                pipeline.select(page(pool[0]), out)
            assert os.listdir(out) == ["unfinished"]
    monkeypatch.setattr(pipeline.output, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipeline.select(page(pool[0]), out)
    monkeypatch.undo()
    monkeypatch.setattr(samples, "CHUNK", 32)
    assert sorted(made) == sorted({*made}) and len(made) == 2 * 7  # each chunk once
    pipeline.select(page(pool[0]), out)
    assert contents(out) == once


def test_other_numbers_and_methods_go_on_from_the_same_chunks(pool, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"^count=4,000: 4,000 are to be selected, but "):
        pipeline.select(page(pool[0], count=4000), out)
    with pytest.raises(UserError, match="holds an unfinished selection of another page, other files or another model"):
        pipeline.select(page(pool[0], seed=1), out)
    summary = pipeline.select(page(pool[0], method="stratified", quotas={"maths": 11}), out)
    assert summary["categories"]["maths"]["selected"] == 11 and summary["selected"] == 40


def test_what_is_there_is_never_overwritten(pool, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UserError, match="is there already and holds something else"):
        pipeline.select(page(pool[0]), out)
    (out / "mine").unlink()
    pipeline.select(page(pool[0], method="random", stages=()), out)
    with pytest.raises(UserError, match="holds a complete selection, and is not overwritten"):
        pipeline.select(page(pool[0]), out)


def test_samples_of_benchmarks_are_dropped(pool, tmp_path):
    folder, records, _ = pool
    asked = records[3]["messages"][0]["content"]
    pools.write(tmp_path / "benchmark.jsonl", [{"question": asked}])
    overlap = {"files": (f"{tmp_path}/benchmark.jsonl",), "ngram": 13}
    pipeline.select(page(folder, stages=("overlap",), overlap=overlap), tmp_path / "out")
    lines = pools.read(tmp_path / "out" / "manifest.jsonl")
    assert lines[3]["reason"] == "benchmark overlap" and lines[3]["stage"] == "overlap"
    gone = [i for i, line in enumerate(lines) if line["fate"] == "dropped"]
    assert all(records[i]["messages"][0]["content"] == asked for i in gone)


def test_other_benchmarks_under_the_same_path_are_another_selection(pool, tmp_path):
    folder, records, _ = pool
    overlap = {"files": (f"{tmp_path}/benchmark.jsonl",), "ngram": 13}
    config = page(folder, stages=("overlap",), overlap=overlap, count=4000)
    for i, message in ((0, "are to be selected"), (3, "unfinished selection of another page, other files")):
        pools.write(tmp_path / "benchmark.jsonl", [{"question": records[i]["messages"][0]["content"]}])
        with pytest.raises(UserError, match=message):
            pipeline.select(config, tmp_path / "out")


def test_only_the_packages_of_the_stages_are_asked_for(pool, tmp_path, monkeypatch):
    for name in ("rensa", "pycld2"):
        monkeypatch.setitem(sys.modules, name, None)
    exact = {"methods": ("exact",)}
    assert pipeline.select(page(pool[0], stages=("duplicates",), duplicates=exact), tmp_path / "out")["selected"] == 40
    for stage, name in (("duplicates", "rensa"), ("rules", "pycld2")):
        with pytest.raises(UserError, match=rf"'{name}', which is not installed: pip install tele_jax\[select\]"):
            pipeline.select(page(pool[0], stages=(stage,)), tmp_path / "other")


def test_lines_that_are_no_dialogues_are_counted_up_to_a_limit(pool, tmp_path):
    records = [*pool[1][:97], "{", {"messages": []}, {**pool[1][0], "category": 3}]
    pools.write(tmp_path / "x.jsonl", records)
    summary = pipeline.select(page(tmp_path, max_unreadable=0.03), tmp_path / "out")
    assert {"stage": "read", "reason": "unreadable", "samples": 3} in summary["dropped"]
    lines = pools.read(tmp_path / "out" / "manifest.jsonl")
    assert [line["detail"][:8] for line in lines[97:]] == ["not JSON", "the last", "its cate"]
    message = (
        r"^3 of 100 records are no dialogues, above max_unreadable=0.02; the first is .*x.jsonl, line 98: not JSON"
    )
    with pytest.raises(UserError, match=message):
        pipeline.select(page(tmp_path, max_unreadable=0.02), tmp_path / "other")


def test_formats_of_others_are_read_from_lines_and_arrays(pool, tmp_path):
    asked = [[message["content"] for message in record["messages"]] for record in pool[1][:50]]
    alpaca = [{"instruction": question, "input": "", "output": answer} for question, answer in asked]
    (tmp_path / "array.jsonl").write_text(json.dumps(alpaca, ensure_ascii=False, indent=1), encoding="utf-8")
    talks = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in asked]
    pools.write(tmp_path / "lines.jsonl", talks)
    said = []
    pipeline.select(page(tmp_path, stages=(), method="random", count=100), tmp_path / "out", say=said.append)
    assert said == ["100 samples in 2 files"]
    selected = pools.read(tmp_path / "out" / "selected.jsonl")
    assert [[message["content"] for message in record["messages"]] for record in selected] == asked * 2
    lines = pools.read(tmp_path / "out" / "manifest.jsonl")
    assert [line.get("element") for line in lines] == [*range(1, 51), *[None] * 50]
    assert [line.get("line") for line in lines] == [*[None] * 50, *range(1, 51)]


def test_a_category_of_the_page_goes_before_that_of_the_record(pool, tmp_path):
    shutil.copy(pool[0] / "a.jsonl", tmp_path / "a.jsonl")
    plain = [{"messages": record["messages"]} for record in pool[1][120:]]
    pools.write(tmp_path / "b.jsonl", plain)
    table = {"one": {"files": (f"{tmp_path}/a.jsonl",), "category": "mine"}, "two": {"files": (f"{tmp_path}/b.jsonl",)}}
    summary = pipeline.select(page(tmp_path, sources=table, stages=(), method="random"), tmp_path / "out")
    assert {name: counts["samples"] for name, counts in summary["categories"].items()} == {"mine": 120, "two": 80}


PAGE = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict(dict({}))\n"


@pytest.mark.parametrize(
    "values, message",
    [
        ("sources=dict(a=dict(files=('no/*.jsonl',))), count=3", "sources.a.files: no file matches no/*.jsonl"),
        ("sources=dict(a=dict(files=FILES)), count=0", "config: count=0 must be above 0"),
        ("sources=dict(a=dict(files=FILES)), count=3, methd='random'", "config.methd: unknown key"),
        ("sources=dict(a=dict(files=FILES)), count=3, stages=('difficulty',)", "the stage 'difficulty' needs a model"),
        (
            "sources=dict(a=dict(files=FILES)), count=3, clusters=dict(within='hardest')",
            "clusters.within='hardest' needs a model",
        ),
        (
            "sources=dict(a=dict(files=FILES)), count=3, clusters=dict(features='states')",
            "clusters.features='states' needs a model",
        ),
        ("sources=dict(a=dict(files=FILES)), count=3, quotas=dict(zh=4)", "quotas: 4 in all, but count=3"),
        ("sources=dict(a=dict(files=FILES)), count=3, quotas=dict(zz=1)", "quotas.zz: the pool has no such category"),
        (
            "sources=dict(a=dict(files=FILES)), count=3, stages=('duplicates', 'rules')",
            "stages: their order is rules, duplicates",
        ),
        ("sources=dict(a=dict(files=FILES)), count=3, stages=('overlap',)", "stages names 'overlap'"),
        ("sources=dict(a=dict(files=FILES), b=dict(files=FILES)), count=3", "is a file of sources.a already"),
        (
            "sources=dict(a=dict(files=FILES)), count=3, model=dict(checkpoint='nowhere')",
            "nowhere: ",
        ),
    ],
)
def test_what_is_wrong_is_one_line(values, message, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(PAGE.format(values.replace("FILES", f"('{pool[0]}/a.jsonl',)")))
    assert main(["sft", "select", "--config", "page.py", "--out", "out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tele: ") and message in error and "rate=0" not in error


def test_the_command_prints_fates_and_categories(pool, tmp_path, capsys):
    (tmp_path / "page.py").write_text(
        PAGE.format(f"sources=dict(a=dict(files=('{pool[0]}/*.jsonl',))), count=30, clusters={CLUSTERS}")
    )
    out = tmp_path / "out"
    assert (
        main(["sft", "select", "--config", f"{tmp_path}/page.py", "--out", str(out), "--json", f"{tmp_path}/f.json"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "1 of 7 chunks read" in printed and "7 of 7 chunks turned into features" in printed
    assert "another language" in printed and "maths" in printed and f"{out}/selected.jsonl: 30 samples" in printed
    assert json.loads((tmp_path / "f.json").read_text())["selected"] == 30
    report = (out / "report.html").read_text()
    assert "http" not in report.replace("http-equiv", "") and report.count("<svg") == 2  # needs nothing else
