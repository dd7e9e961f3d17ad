"""tele import and tele export: from a release to a chat and back, and how they fail."""

import json
import subprocess
import sys

import pytest

from tele_jax import checkpoint
from tele_jax.cli.main import main
from tests.convert import releases
from tests.inference.test_chat import tokenizer_bytes


def tele(capsys, *arguments, code=0):
    """Runs the command and returns what it printed; where it fails, its one line."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == code
    printed = capsys.readouterr()
    if code == 0:
        return printed.out
    assert printed.err.startswith("tele: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    """A Tele-FLM with a real tokenizer, and more rows than that has ids."""
    from tele_jax.data.vocabulary import load_vocabulary

    directory = tmp_path_factory.mktemp("cli") / "Tele-FLM-tiny"
    config, tensors = releases.tele_flm()
    generator = releases.Random(0, tensors["lm_head.weight"].dtype)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = generator.matrix(512, releases.D, releases.D)
    config["vocab_size"] = 512
    releases.save(directory, config, tensors, shards=2)
    (directory / "tokenizer.model").write_bytes(tokenizer_bytes())
    assert load_vocabulary(directory / "tokenizer.model").vocab_size < 512
    return directory


def test_import_then_generate_then_export(src, capsys, tmp_path):
    from tele_jax.data.vocabulary import load_vocabulary

    ids = load_vocabulary(src / "tokenizer.model").vocab_size
    printed = tele(capsys, "import", "--format", "tele_flm", src, tmp_path / "ck", "--json", tmp_path / "in.json")
    lines = printed.splitlines()
    assert lines[0].startswith("tele_flm: 3 layers, embed 24, 6 heads of 4 (6 of keys), mlp 40, vocabulary")
    assert lines[0].endswith("parameters in float32")
    assert lines[1] == f"vocabulary: {ids} tokens (that many ids are in tokenizer.model); rows {ids} to 511 are padding"
    assert lines[2] == "beside the weights: tokenizer.model"
    assert lines[3].startswith(f"wrote {tmp_path / 'ck'}: ")
    figures = json.loads((tmp_path / "in.json").read_text())
    assert figures["format"] == "tele_flm" and figures["files"] == ["tokenizer.model"]
    assert figures["config"]["vocab_size"] == ids and figures["config"]["padded_vocab_size"] == 512

    assert tele(capsys, "generate", tmp_path / "ck", "--prompt", "The cat", "--max-new-tokens", 4)
    assert "import" in tele(capsys, "inspect", tmp_path / "ck")

    printed = tele(capsys, "export", "--format", "tele_flm", tmp_path / "ck", tmp_path / "out")
    assert printed.startswith(f"wrote {tmp_path / 'out'}: 30 tensors, ") and "in 1 file" in printed
    found, expected = releases.read_weights(tmp_path / "out"), releases.read_weights(src)
    assert {name: values.tobytes() for name, values in found.items()} == {
        name: values.tobytes() for name, values in expected.items()
    }
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (src / "tokenizer.model").read_bytes()

    printed = tele(capsys, "export", "--format", "llama", tmp_path / "ck", tmp_path / "llama", "--shard-gb", "0.00001")
    assert "folded: embed.table is multiplied by 1.5" in printed
    assert f"left out: rows {ids} to 511 of the vocabulary, padding" in printed
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["vocab_size"] == ids
    assert (tmp_path / "llama" / "model.safetensors.index.json").is_file()


def test_the_list_of_an_export_writes_nothing(src, capsys, tmp_path):
    tele(capsys, "import", src, tmp_path / "ck")
    printed = tele(capsys, "export", "--format", "llama", "--list", tmp_path / "ck", "--json", tmp_path / "list.json")
    figures = json.loads((tmp_path / "list.json").read_text())
    assert printed.splitlines()[-1] == f"30 tensors, {figures['bytes']:,} bytes"
    assert len(figures["tensors"]) == 30 and figures["config"]["model_type"] == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "list.json"]
    printed = tele(capsys, "export", "--format", "telechat", "--list", "telechat_7b", "--dtype", "bfloat16")
    assert printed.splitlines()[-1] == "302 tensors, 14,400,036,864 bytes"


def test_a_trained_checkpoint_finds_its_tokenizer_in_the_work_directory(src, capsys, tmp_path):
    tele(capsys, "import", src, tmp_path / "ck")
    loaded = checkpoint.load(tmp_path / "ck")
    checkpoint.save(tmp_path / "W" / "pretrain" / "checkpoints" / "7", loaded.cfg, loaded.params)
    (tmp_path / "W" / "tokenizer.model").write_bytes(b"the one of the work directory")
    (tmp_path / "W" / "config.json").write_text('{"run": ["pretrain"]}')
    tele(capsys, "export", "--format", "llama", tmp_path / "W", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"the one of the work directory"


@pytest.mark.parametrize(
    "words, match",
    [
        (["import", "--format", "telechat", "{src}", "{tmp}/ck"], "config.json: is of format tele_flm, not telechat"),
        (["import", "--format", "onnx", "{src}", "{tmp}/ck"], "invalid choice: 'onnx'"),
        (["import", "--format", "gguf", "{src}", "{tmp}/ck"], "0 GGUF files (*.gguf) there; name one"),
        (["import", "{tmp}/none", "{tmp}/ck"], "none: no such directory; expected a released checkpoint"),
        (["import", "{src}", "{src}"], "exists already, and checkpoints are never overwritten"),
        (["export", "--format", "llama", "{src}", "{tmp}/out"], "no complete checkpoint here"),
        (["export", "--format", "llama", "{src}"], "DST is missing"),
        (["export", "{src}", "{tmp}/out"], "--format"),
        (["export", "--format", "telechat", "--list", "tele_flm_52b"], "format telechat: has biases"),
    ],
)
def test_a_mistake_is_one_line(words, match, src, capsys, tmp_path):
    words = [word.format(src=src, tmp=tmp_path) for word in words]
    assert match in tele(capsys, *words, code=2)
    assert not list(tmp_path.iterdir())


def test_a_bad_release_is_exit_2_from_a_process_of_its_own(src, tmp_path):
    config, tensors = releases.tele_flm()
    tensors["model.norm.weight"][3] = float("nan")
    bad = releases.save(tmp_path / "bad", config, tensors)
    command = [sys.executable, "-m", "tele_jax.cli.main", "import", str(bad), str(tmp_path / "ck")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    expected = f"tele: {bad}/model.safetensors: model.norm.weight: has numbers that are not finite (NaN or infinity)\n"
    assert done.stderr == expected
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
