"""`tele tokenizer`, from the command line: figures, files, exit codes."""

import json
import random
import sysconfig
from pathlib import Path

import pytest

from tele_jax.cli.main import main
from tele_jax.data import vocabulary_training
from tele_jax.errors import UserError

TEXT = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("json/*.py"))


def train(*inputs, out, vocab_size=600, **options):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return main(
        [
            "tokenizer",
            "train",
            "--preset",
            "tele_flm",
            "--vocab-size",
            str(vocab_size),
            "--out",
            str(out),
            *flags,
            *map(str, inputs),
        ]
    )


@pytest.fixture
def trained(tmp_path):
    assert train(*TEXT, out=tmp_path / "t.model") == 0
    return tmp_path / "t.model"


def test_training_writes_the_file_and_its_figures(tmp_path, capsys):
    assert train(*TEXT, out=tmp_path / "t.model", json=tmp_path / "figures.json") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["vocab_size"] == 600 and figures["character_coverage"] == 1
    assert figures["input_bytes"] == sum(path.stat().st_size for path in TEXT)
    assert "600 ids" in capsys.readouterr().out


def test_training_again_changes_nothing_and_another_needs_force(trained, tmp_path, capsys):
    before = trained.stat().st_mtime_ns
    assert train(*TEXT, out=trained) == 0
    assert trained.stat().st_mtime_ns == before
    assert train(TEXT[-1], out=trained) == 2
    assert "--force" in capsys.readouterr().err and trained.stat().st_mtime_ns == before
    assert train(TEXT[-1], "--force", out=trained) == 0
    assert trained.stat().st_mtime_ns != before
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_json_lines_are_read_as_documents(trained, tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in TEXT))
    assert train(lines, out=tmp_path / "u.model") == 0
    assert (tmp_path / "u.model").read_bytes() == trained.read_bytes(), "the same texts, the same vocabulary"


def test_a_sample_is_capped_and_seeded(tmp_path):
    big = tmp_path / "big.jsonl"
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=150)) for _ in range(500)]
    big.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def sample(seed, name):
        options = {"input_bytes": 8000, "seed": seed, "json": tmp_path / "figures.json"}
        assert train(big, out=tmp_path / name, vocab_size=425, **options) == 0
        return json.loads((tmp_path / "figures.json").read_text())

    first, again, other = sample(0, "a"), sample(0, "b"), sample(1, "c")
    assert 8000 <= first["input_bytes"] < 8300
    assert first["sha256"] == again["sha256"] != other["sha256"]


def test_inspect_prints_special_ids_and_tokens_per_byte(trained, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("_" * 90)
    assert main(["tokenizer", "inspect", str(trained), str(text), "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["special_ids_of"] == ["tele_flm"]
    assert figures["special"] == {
        "unk": 0, "bos": 1, "eos": 2, "pad": 3, "user": 25, "bot": 26, "end": 27, "system": 28
    }  # fmt: skip
    assert figures["inputs"][0]["tokens"] == figures["inputs"][0]["bytes"] == 90, "_ is always a token of its own"
    printed = capsys.readouterr().out
    assert "<_user>" in printed and "1.000" in printed and "0.261" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file matches"),
        (b"", r"bad.txt: the file is empty"),
        (b"good\xffbad", r"bad.txt, byte 0: not UTF-8 at byte 4 (0xff)"),
    ],
)
def test_a_bad_input_is_exit_2_and_writes_nothing(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    assert train(*TEXT, tmp_path / "bad.txt", out=tmp_path / "out" / "t.model") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tele: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_bad_line_is_refused_and_an_empty_text_is_not(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": ""}\n')
    assert list(vocabulary_training.sample_texts([str(file)], max_bytes=None, seed=0)) == ["one"]
    file.write_text('{"text": "one"}\n{"text": ""}\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not JSON: .*; convert or leave out"):
        vocabulary_training.sample_texts([str(file)], max_bytes=None, seed=0)


def test_mistakes_on_the_command_line_are_exit_2(trained, tmp_path, capsys):
    assert main(["tokenizer", "inspect", str(tmp_path / "absent")]) == 2
    assert main(["tokenizer", "inspect", str(TEXT[0])]) == 2
    assert main(["tokenizer"]) == 2
    assert train(*TEXT, out=tmp_path / "u.model", input_bytes=0) == 2
    assert train(*TEXT, out=tmp_path / "u.model", character_coverage=2) == 2
    assert train(*TEXT, out=tmp_path / "u.model", input_bytes=100, seed=-1) == 2
    assert len(capsys.readouterr().err.splitlines()) >= 6
    assert not (tmp_path / "u.model").exists()
