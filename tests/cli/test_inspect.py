"""tele inspect: what it prints, what it returns, and how it fails."""

import json
import shutil

import optax
import pytest

from tele_jax import checkpoint
from tele_jax.cli.main import main
from tele_jax.config import to_dict
from tests.checkpoint.trees import CFG, chunk_files, params, total_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "checkpoints" / "1200"
    provenance = [{"stage": "pretrain", "steps": 1000}, {"stage": "grow", "policy": "msg", "说明": "扩展"}]
    state = optax.adam(1e-3).init(params())
    checkpoint.save(path, CFG, params(), opt_state=state, step=1200, provenance=provenance, data_state=b"x")
    return path


@pytest.fixture
def step(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "1200")


def inspect(*arguments, tmp_path, code=0):
    figures = tmp_path / "figures.json"
    assert main(["inspect", *map(str, arguments), "--json", str(figures)]) == code
    return json.loads(figures.read_text()) if code == 0 else None


def test_the_figures(saved, tmp_path):
    figures = inspect(saved, tmp_path=tmp_path)
    assert figures["path"] == str(saved)
    assert figures["step"] == 1200
    assert figures["config"] == to_dict(CFG)
    # embedding, head, norms; per layer q, k, v, o, three of the mlp, two norms
    assert figures["parameters"] == 2 * 40 * 16 + 16 + 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16)
    assert figures["parameter_bytes"] == 4 * figures["parameters"] == total_bytes(params())
    assert figures["optimizer_bytes"] == 8 * figures["parameters"] + 4
    assert figures["optimizer_leaves"] == 2 * len(figures["leaves"]) + 1
    (gate,) = [leaf for leaf in figures["leaves"] if leaf["name"] == "layers.mlp.gate"]
    assert gate == {
        "name": "layers.mlp.gate",
        "axes": ["layers", "embed", "mlp"],
        "shape": [3, 16, 24],
        "dtype": "float32",
        "bytes": 3 * 16 * 24 * 4,
        "chunks": [1, 16, 24],
    }
    assert figures["provenance"][1] == {"stage": "grow", "policy": "msg", "说明": "扩展"}
    assert "jax" in figures["versions"]
    assert "verified" not in figures


def test_what_is_printed(saved, capsys, tmp_path):
    inspect(saved.parent.parent, tmp_path=tmp_path)  # the directory of the stage
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{saved}    step 1,200"
    words = [line.split() for line in lines]
    assert ["embed_dim", "16"] in words
    assert ["layers.mlp.gate", "layers", "embed", "mlp", "3", "x", "16", "x", "24", "float32", "4,608"] in words
    assert ["parameters", "7,152,", "27.94", "KiB"] in words
    assert '  {"stage": "grow", "policy": "msg", "说明": "扩展"}' in lines


def test_no_array_is_read(step, tmp_path):
    for item in ("params", "opt_state", "data"):
        for leaf in (step / item).iterdir():
            if leaf.is_dir():
                shutil.rmtree(leaf / "c") if (leaf / "c").is_dir() else (leaf / "c").unlink()
    assert inspect(step, tmp_path=tmp_path)["parameters"] == 7152


def test_verify_reads_everything(saved, capsys, tmp_path):
    figures = inspect(saved, "--verify", tmp_path=tmp_path)
    arrays = len(figures["leaves"]) + figures["optimizer_leaves"] + 1
    assert figures["verified"] == {
        "arrays": arrays,
        "bytes": figures["parameter_bytes"] + figures["optimizer_bytes"] + 1,
    }
    assert "every checksum is right" in capsys.readouterr().out


def test_verify_names_every_damaged_chunk_and_exits_1(step, capsys, tmp_path):
    (missing,), (flipped,) = chunk_files(step, "params/layers.attn.q"), chunk_files(step, "params/layers.attn.v")
    missing.unlink()
    flipped.write_bytes(b"?" + flipped.read_bytes()[1:])
    inspect(step, "--verify", tmp_path=tmp_path, code=1)
    out, err = capsys.readouterr()
    assert f"damaged: params/layers.attn.q: {missing}: missing" in out
    assert f"damaged: params/layers.attn.v: {flipped}: the checksum of chunk [0, 0, 0, 0] is not that of its" in out
    assert err == f"tele: {step}: 2 damaged chunks, the first: params/layers.attn.q: {missing}: missing\n"


def test_a_damaged_document_exits_1_in_one_line(step, capsys, tmp_path):
    (step / "meta" / "meta.json").write_text("{")
    inspect(step, tmp_path=tmp_path, code=1)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{step}/meta/meta.json: damaged" in err


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_no_checkpoint_exits_2_in_one_line(capsys, tmp_path, make):
    make(tmp_path / "it")
    inspect(tmp_path / "it", tmp_path=tmp_path, code=2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"tele: {tmp_path}/it: ")
