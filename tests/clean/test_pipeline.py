"""Whole runs through Beam, in process and by the command."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

beam = pytest.importorskip("apache_beam", reason="apache_beam is not installed: extra [clean]")

from tele_jax.clean import pipeline  # noqa: E402
from tele_jax.clean.settings import clean_config  # noqa: E402
from tele_jax.cli.main import main  # noqa: E402
from tele_jax.errors import FailedError, UserError  # noqa: E402
from tele_jax.files import held_alone  # noqa: E402

IN_MEMORY = ("--runner=DirectRunner", "--direct_running_mode=in_memory")
STAGES = ("extract", "language", "normalise", "rules", "urls", "duplicates", "paragraphs", "safety", "privacy")


def outputs(out):
    """{file below out: bytes}."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()}


def records(out, pattern="*/*-of-*.jsonl*"):
    found = []
    for path in sorted(Path(out).glob(pattern)):
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        found += [json.loads(line) for line in data.decode().splitlines()]
    return found


@pytest.fixture
def page(jsonl, tmp_path, prose, chinese):
    """A page whose sources hold something for every stage."""
    good = [{"text": text, "url": f"https://a.org/{i}"} for i, text in enumerate(prose[:50])]
    zh = [{"text": text} for text in chinese[:30]]
    jsonl("en.jsonl", good)
    jsonl("zh.jsonl", zh)
    near = prose[3].replace("The ", "A ", 1) + " The end."
    mixed = [
        {"text": prose[0].upper()},
        {"text": near},
        {"text": "Der Stadtrat beriet am Dienstag, ob die Brücke noch vor dem Winter repariert werden soll. " * 2},
        {"text": "too short"},
        {
            "text": "Another page of the same address. " + " ".join(prose[50].split()[:70]),
            "url": "https://www.a.org/9/#x",
        },
        {"text": chinese[35] + "请发邮件到 wang.wu@mail.cn，电话13912345678。"},
        {"text": prose[54].replace(".", ". casino casino", 3)},
        '{"text": "中文"}'.encode("gbk"),
        b"{not json",
    ]
    jsonl("mixed.jsonl", mixed)
    (tmp_path / "page.html").write_text(
        f"<html><nav>Menu</nav><article><p>{' '.join(prose[5].split()[::-1])}</p></article>"
    )
    sources = {
        "en": dict(files=(str(tmp_path / "en.jsonl"),), format="jsonl", domain="web"),
        "zh": dict(files=(str(tmp_path / "zh.jsonl"),), format="jsonl", domain="web"),
        "mixed": dict(files=(str(tmp_path / "mixed.jsonl"),), format="jsonl", domain="mixed", rank=1),
        "html": dict(files=(str(tmp_path / "*.html"),), format="html", domain="html", rank=2),
    }
    return dict(
        sources=sources,
        stages=STAGES,
        safety=dict(words=("casino",)),
        output=dict(shard_bytes=20_000, compression="gz"),
    )


def clean(page, out, *, options=IN_MEMORY):
    return pipeline.clean(clean_config(page), str(out), options=options)


def test_every_stage_does_its_part_and_says_so(page, tmp_path, prose, chinese):
    report = clean(page, tmp_path / "out")
    dropped = {s["stage"]: {e["reason"]: e["documents"] for e in s["dropped"]} for s in report["stages"]}
    assert dropped["read"] == {"not UTF-8": 1, "not JSON": 1}
    assert dropped["language"] == {"language de": 1}
    assert dropped["rules"]["short"] == 1
    assert dropped["urls"] == {"repeated URL": 1}
    assert dropped["duplicates"]["exact duplicate"] == 1
    assert sum(n for r, n in dropped["duplicates"].items() if r.startswith("near")) >= 1
    assert dropped["safety"] == {"word list": 1}
    changed = {e["reason"]: e["documents"] for e in report["stages"][-1]["changed"]}
    assert changed == {"masked email": 1, "masked phone": 1}
    # What goes in comes out or is counted.
    for before, after in zip(report["stages"], report["stages"][1:]):
        assert before["out"] == after["in"]
    for stage in report["stages"]:
        gone = sum(e["documents"] for e in stage["dropped"])
        assert stage["in"]["documents"] == stage["out"]["documents"] + gone
    kept = records(tmp_path / "out")
    assert len(kept) == report["stages"][-1]["out"]["documents"]
    assert sum(len(r["text"].encode()) for r in kept) == report["stages"][-1]["out"]["bytes"]
    # Sources named first keep their copies; the texts are those that came.
    web = {r["text"] for r in records(tmp_path / "out", "web/*.gz")}
    assert web <= {*prose, *chinese} and len(web & set(prose)) == 50
    masked = [r["text"] for r in records(tmp_path / "out", "mixed/*.gz") if "<email>" in r["text"]]
    assert masked and "13912345678" not in masked[0] and "<phone>" in masked[0]
    rejects = records(tmp_path / "out", "rejects/*.gz")
    assert sorted(r["reason"] for r in rejects) == ["not JSON", "not UTF-8"]


def test_the_manifest_describes_the_shards(page, tmp_path):
    import hashlib

    clean(page, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    entries = [entry for shards in manifest["shards"].values() for entry in shards]
    files = {name for name in outputs(tmp_path / "out") if name.endswith(".gz")}
    assert files == {entry["file"] for entry in [*entries, *manifest["rejects"].values()]}
    assert len(manifest["shards"]["web"]) > 1  # shard_bytes cuts it
    for entry in entries:
        data = (tmp_path / "out" / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        lines = gzip.decompress(data).decode().splitlines()
        assert len(lines) == entry["documents"]
        assert sum(len(json.loads(line)["text"].encode()) for line in lines) == entry["text_bytes"]
    assert manifest["config"]["stages"] == list(STAGES)
    assert set(os.listdir(tmp_path / "out")) == {
        "web",
        "mixed",
        "html",
        "rejects",
        "manifest.json",
        "report.json",
        "report.html",
    }


def test_uncompressed_shards_are_read_by_what_training_reads(tmp_path, jsonl, prose):
    from tele_jax.data import sources

    jsonl("a.jsonl", [{"text": text} for text in prose[:6]])
    clean(only(tmp_path), tmp_path / "out")
    corpus = sources.index("sources.a.files", "a", [str(tmp_path / "out/d/*.jsonl")], "jsonl")
    assert [corpus.document(i).content for i in range(len(corpus))] == prose[:6]


@pytest.mark.parametrize("share", [0.3, 1.0, 0.0])
def test_documents_are_held_out_by_their_text_alone(tmp_path, jsonl, prose, share):
    def split(name, documents):
        jsonl("a.jsonl", [{"text": text} for text in documents])
        page = {**only(tmp_path), "output": dict(validation_share=share)}  # no duplicates are dropped
        clean(page, tmp_path / name)
        files = {"train": "d/[0-9]*", "validation": "d/validation-*"}
        return {key: {r["text"] for r in records(tmp_path / name, pattern)} for key, pattern in files.items()}

    few = split("few", [*prose[:20], prose[0], prose[1]])
    assert few["train"] | few["validation"] == set(prose[:20]) and not few["train"] & few["validation"]
    # 20 draws at 0.3: fewer than 1 or more than 13 come up once in a thousand, and the hashes do not change.
    assert {0.3: 1 <= len(few["validation"]) <= 13, 1.0: not few["train"], 0.0: not few["validation"]}[share]
    more = split("more", reversed(prose[:50]))
    assert few["validation"] <= more["validation"] and few["train"] <= more["train"]


def test_the_report_is_a_page_that_needs_nothing_else(page, tmp_path):
    clean(page, tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<script" not in text and not re.search(r"(src|href)=[\"']?(?![#\"'])", text)
    for stage in STAGES:
        assert f"id='{stage}'" in text
    assert "exact duplicate" in text and "wang.wu@mail.cn" not in text and "&lt;email&gt;" in text
    assert f"{tmp_path}/en.jsonl@" in text  # of which document the dropped one is a copy


def test_one_process_and_two_give_the_same_bytes(page, tmp_path):
    """In another process, since Beam's workers are started from the command's own."""
    text = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({page!r})\n"
    (tmp_path / "page.py").write_text(text, encoding="utf-8")
    clean(page, tmp_path / "one")
    command = [sys.executable, "-m", "tele_jax.cli.main", "data", "clean", "--config", str(tmp_path / "page.py")]
    done = subprocess.run([*command, "--out", str(tmp_path / "two"), "--workers", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exact duplicate" in done.stdout
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def refused(page, tmp_path, match, error=UserError):
    with pytest.raises(error, match=match):
        clean(page, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def only(tmp_path, **source):
    source = {"files": (str(tmp_path / "a.jsonl"),), "format": "jsonl", "domain": "d", **source}
    return dict(sources={"a": source}, stages=("language", "rules"))


def test_nothing_to_read_is_an_error(tmp_path, jsonl):
    refused(only(tmp_path), tmp_path, r"sources\.a\.files: no file matches")
    jsonl("a.jsonl", [])
    refused(only(tmp_path), tmp_path, r"sources\.a: its 1 files are empty")
    jsonl("a.jsonl", [b"\xff\xfe", b"{"])
    refused(only(tmp_path), tmp_path, "none of 2 documents could be read: not JSON 1, not UTF-8 1", FailedError)
    jsonl("a.jsonl", [{"text": "short"}, {"text": "shorter"}])
    refused(
        only(tmp_path, language="en"), tmp_path, "no document is left of 2; most went for rules: short 2", FailedError
    )


def test_a_source_of_which_nothing_can_be_read_is_named_but_does_not_stop_the_others(tmp_path, jsonl, prose):
    jsonl("a.jsonl", [{"text": prose[0]}])
    jsonl("b.jsonl", [b"\xff"])
    page = only(tmp_path)
    page["sources"]["b"] = dict(files=(str(tmp_path / "b.jsonl"),), format="jsonl", domain="d")
    said = []
    pipeline.clean(clean_config(page), str(tmp_path / "out"), options=IN_MEMORY, say=said.append)
    assert any("sources.b: none of its documents could be read" in line for line in said)
    assert [r["text"] for r in records(tmp_path / "out")] == [prose[0]]


def test_a_file_by_two_paths_is_one(tmp_path, jsonl, prose, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl("a.jsonl", [{"text": prose[0]}])
    page = only(tmp_path, files=("a.jsonl", "./*.jsonl", f"{tmp_path}/a.jsonl"))
    assert len(pipeline.inputs(clean_config(page))) == 1
    page["sources"]["b"] = dict(files=("./a.jsonl",), format="jsonl", domain="d")
    with pytest.raises(UserError, match=r"sources\.b: \./a\.jsonl is a file of sources\.a already"):
        pipeline.inputs(clean_config(page))


def test_what_is_there_is_never_written_over(page, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already, and is not overwritten"):
        clean(page, tmp_path / "out")
    assert not os.listdir(tmp_path / "out")


def test_what_a_killed_run_left_is_cleared_and_a_running_one_is_not(tmp_path, jsonl, prose):
    jsonl("a.jsonl", [{"text": prose[0]}])
    partial = tmp_path / "out.partial"
    (partial / "d").mkdir(parents=True)
    (partial / "d/00000-of-00001.jsonl").write_bytes(b"half")
    with held_alone(partial / ".lock", "held"), pytest.raises(UserError, match="is being written by another process"):
        clean(only(tmp_path), tmp_path / "out")
    assert (partial / "d/00000-of-00001.jsonl").exists()
    clean(only(tmp_path), tmp_path / "out")
    assert [r["text"] for r in records(tmp_path / "out")] == [prose[0]] and not partial.exists()


FULL = """
import resource, signal, sys
from tele_jax.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(page, tmp_path):
    """The kernel refuses to let files grow: as a full disk, but for the number of the error."""
    (tmp_path / "page.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({page!r})\n"
    )
    command = [sys.executable, "-c", FULL, "data", "clean", "--config", str(tmp_path / "page.py"), "--out"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1
    message = r"tele: .*/out\.partial/\S+: could not be written \(File too large\); make room and start again"
    assert re.fullmatch(message, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stages=("language", "languages")), r"config\.stages\[1\]: 'languages' is not one of"),
        (dict(stages=("rules", "rules")), "named twice"),
        (dict(sources=dict(a=dict(files=("x",), format="text", domain="rejects"))), "directory is for what could not"),
        (dict(sources=dict(a=dict(files=("x",), format="text", domain="d", encodings=()))), "give at least one"),
        (dict(stages=("quality",)), "no table quality"),
        (dict(stages=("rules", "language")), "'rules' needs 'language' before it"),
        (dict(stages=("language",), language=dict(keep=("english",))), "'english' is not one of"),
        (dict(duplicates=dict(threshold=1.5)), r"config\.duplicates: threshold=1.5 must be in \[0, 1\]"),
        (dict(rules=dict(en=dict(min_words=3))), r"rules\.en\.min_words: unknown key"),
        (dict(stages=("language", "quality"), quality=dict(model="none.npz")), "no such file; tele data clean-train"),
    ],
)  # fmt: skip
def test_a_wrong_page_is_one_clear_line(page, tmp_path, change, message):
    page["sources"].pop("html")
    with pytest.raises(UserError, match=message):
        clean({**page, **change}, tmp_path / "out")


def test_a_runner_that_beam_does_not_know_is_one_clear_line(page, tmp_path):
    with pytest.raises(UserError, match="Unexpected pipeline runner: FooRunner"):
        clean(page, tmp_path / "out", options=("--runner=FooRunner",))
    assert not (tmp_path / "out.partial").exists()


def test_the_command_trains_models_and_uses_them(tmp_path, jsonl, prose, capsys):
    spam = [{"text": f"buy cheap pills {i} with free bonus to the {i} casino and of " * 4} for i in range(40)]
    good = jsonl("good.jsonl", [{"text": text} for text in prose[:40]])
    bad = jsonl("bad.jsonl", spam)
    jsonl("a.jsonl", [{"text": prose[50]}, spam[7]])
    assert main(["data", "clean-train", "quality", "--good", good, "--bad", bad, "--out", f"{tmp_path}/q.npz"]) == 0
    assert main(["data", "clean-train", "ngrams", good, "--out", f"{tmp_path}/n.npz"]) == 0
    assert "accuracy" in capsys.readouterr().out
    page = only(tmp_path, language="en")
    page["stages"] = ("quality", "perplexity")
    page["quality"] = dict(model=f"{tmp_path}/q.npz")
    page["perplexity"] = dict(models={"en": f"{tmp_path}/n.npz"}, max_perplexity={"en": 1000.0})
    report = clean(page, tmp_path / "out")
    assert [(e["reason"], e["documents"]) for e in report["stages"][1]["dropped"]] == [("low quality", 1)]
    assert main(["data", "clean-train", "ngrams", bad, "--field", "body", "--out", f"{tmp_path}/x"]) == 2
    assert "bad.jsonl:1: no JSON record with a field 'body'" in capsys.readouterr().err
