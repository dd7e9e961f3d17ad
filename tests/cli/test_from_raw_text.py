"""The path that launch/README.md prints, with small text: raw -> clean -> cache -> train."""

import json
import pydoc_data.topics
import shutil
import sysconfig
from pathlib import Path

import pytest

from tele_jax.cli.main import main
from tele_jax.data.cache import read_manifest

pytestmark = pytest.mark.usefixtures("quick_compilation")
pytest.importorskip("apache_beam", reason="apache_beam is not installed: extra [clean]")
pytest.importorskip("pycld2", reason="pycld2 is not installed: extra [clean]")

DATA_PAGE = Path(__file__).parents[2] / "configs" / "data" / "tele_flm.py"
CLEAN_PAGE = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.sources = dict(
        web=dict(files=("raw/web.jsonl",), format="jsonl", domain="WebText"),
        code=dict(files=("raw/*.py",), format="text", domain="Code", language="code"),
    )
    config.stages = ("language", "normalise", "rules", "duplicates", "privacy")
    config.rules = dict(en=dict(min_tokens=20))
    config.output = dict(validation_share=0.1, shard_bytes=200_000)
    return config
"""
TRAIN_PAGE = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.run = ("pretrain",)
    config.pretrain = dict(
        kind="pretrain", data=dict(tokenizer="tokenizer.model", cache="CACHE", eval_bytes=2_000),
        model=dict(num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=600, dtype="float32",
                   remat="none"),
        steps=4, batch_size=4, seq_len=64, log_every=2, checkpoint_every=4, optimizer=dict(learning_rate=3e-3),
    )
    return config
"""


def texts(pattern):
    return [json.loads(line)["text"] for path in sorted(Path().glob(pattern)) for line in path.open(encoding="utf-8")]


def test_raw_text_is_cleaned_cached_and_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("raw").mkdir()
    prose = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    with Path("raw/web.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*prose, prose[0]])
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        shutil.copy(path, "raw")
    Path("clean.py").write_text(CLEAN_PAGE)
    Path("train.py").write_text(TRAIN_PAGE)

    assert main(["data", "clean", "--config", "clean.py", "--out", "corpora"]) == 0
    files = {"train": "[0-9]*.jsonl", "validation": "validation-*.jsonl"}
    split = {(d, s): texts(f"corpora/{d}/{files[s]}") for d in ("WebText", "Code") for s in files}
    for domain in ("WebText", "Code"):
        train, held_out = (set(split[domain, name]) for name in ("train", "validation"))
        assert len(train) > 5 * len(held_out) > 0 and not train & held_out
    sizes = ["--preset", "tele_flm", "--vocab-size", "600"]
    assert main(["tokenizer", "train", *sizes, "--out", "tokenizer.model", "corpora/*/[0-9]*.jsonl"]) == 0

    cache = ["data", "cache", "--out", "CACHE", "--config.seq_len=64", "--config.shard_bytes=100000"]
    assert main([*cache, "--config", f"{DATA_PAGE}:WebText,Poetry"]) == 2
    assert "Poetry: not one of the published domains" in capsys.readouterr().err
    assert main([*cache, "--config", str(DATA_PAGE)]) == 2
    missing = "sources.AcademicPaper.files: no file matches corpora/AcademicPaper/[0-9]*.jsonl; rate=0 leaves"
    assert missing in capsys.readouterr().err
    assert main([*cache, "--config", f"{DATA_PAGE}:WebText,Code,Book", "--config.data.sources.Book.rate=0"]) == 0
    manifest = read_manifest(Path("CACHE"))
    assert set(manifest.domains) == {"WebText", "Code"}
    for domain in ("WebText", "Code"):
        assert manifest.domains[domain].counts.documents == len(split[domain, "train"])

    assert main(["train", "--config", "train.py", "--workdir", "W"]) == 0
    summary = json.loads(Path("W/pretrain/summary.json").read_text())
    assert set(summary["bits_per_byte_after"]) == {"WebText", "Code"}
