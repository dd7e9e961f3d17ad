"""What is held out is not what is trained on: files are told apart by content, documents are counted."""

import json

import pytest

from tele_jax.data import domains
from tele_jax.errors import UserError
from tele_jax.settings import DataConfig, SourceConfig


def data_of(model_file, **domains):
    return DataConfig(tokenizer=str(model_file), sources={n: SourceConfig(**fields) for n, fields in domains.items()})


def test_documents_that_are_trained_on_and_held_out_are_counted_in_every_domain(model_file, tmp_path):
    lines = [json.dumps({"text": f"document {i} of many"}).encode() for i in range(60)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[:40]))  # no end after the last
    (tmp_path / "b.jsonl").write_bytes(b"".join(line + b"\r\n" for line in lines[40:]))
    held = [lines[39], lines[0], *lines[55:], json.dumps({"text": "document"}).encode()]
    (tmp_path / "held.jsonl").write_bytes(b"".join(line + b"\n" for line in held))
    page = {name: dict(files=(str(tmp_path / f"{name}.jsonl"),), format="jsonl") for name in ("a", "b")}
    page["a"]["validation_files"] = (str(tmp_path / "held.jsonl"),)
    said = domains.OpenData(data_of(model_file, **page), kind="pretrain", seq_len=32).shared()
    assert said == [
        "sources.a.files: 2 documents are held out as well",
        "sources.b.files: 5 documents are held out as well",
    ]


def test_the_same_text_is_refused_under_another_name_and_in_another_domain(model_file, tmp_path):
    for name, text in (("a", "one text"), ("b", "two text"), ("copy", "two text"), ("other", "new text")):
        (tmp_path / f"{name}.txt").write_text(text)
    file = {name: (str(tmp_path / f"{name}.txt"),) for name in ("a", "b", "copy", "other")}
    data = data_of(model_file, a=dict(files=file["a"], validation_files=file["copy"]), b=dict(files=file["b"]))
    with pytest.raises(
        UserError, match=r"sources\.a\.validation_files: .*copy\.txt is trained on as well \(sources\.b"
    ):
        domains.check(data, kind="pretrain", seq_len=16)
    data = data_of(model_file, a=dict(files=file["a"], validation_files=file["other"]), b=dict(files=file["b"]))
    domains.check(data, kind="pretrain", seq_len=16)
