"""bfloat16 parameters are trained in float32: nothing that training gains is rounded away on the way."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = """
from pathlib import Path
from ml_collections import ConfigDict

HERE = Path(__file__).parent

def get_config():
    files = (str(HERE / "text.jsonl"),)
    data = dict(tokenizer=str(HERE / "tokenizer.model"), sources={"text": dict(files=files, format="jsonl")})
    config = ConfigDict()
    config.run = ("more",)
    config.start = "set by a flag"
    # Small steps, most of them below what bfloat16 resolves of a weight.
    config.more = dict(kind="pretrain", data=data, steps=200, batch_size=4, seq_len=32, log_every=100,
                       checkpoint_every=200, optimizer=dict(learning_rate=1e-4))
    return config
"""
CFG = tele.ModelConfig(
    num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, vocab_size=480, max_seq_len=64,
    dtype="float32", param_dtype="bfloat16", remat="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A released model in bfloat16, a page that trains on from an import of it, its text and its tokenizer."""
    directory = tmp_path_factory.mktemp("narrow")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 8))) for _ in range(100)]
    texts = [" ".join(rng.choices(words, k=30)) for _ in range(400)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "page.py").write_text(PAGE)
    trained = ["tokenizer", "train", "--preset", "tele_flm", "--vocab-size", "480", "--out"]
    assert main([*trained, str(directory / "tokenizer.model"), str(directory / "text.jsonl")]) == 0
    params = tele.init(CFG, jax.random.key(0))
    tele.convert.save_hf(directory / "release", CFG, params, format="llama")
    return directory


def trained(place, name, *dtype):
    """(parameters before, parameters after 200 steps, what the console said of an import of the release)."""
    assert main(["import", str(place / "release"), str(place / name), *dtype]) == 0
    workdir = place / f"{name}_run"
    start = f"--config.start={place / name}"
    assert main(["train", "--config", str(place / "page.py"), start, "--workdir", str(workdir)]) == 0
    return checkpoint.load(place / name).params, checkpoint.load(workdir)


def loss(place, params):
    ids = load_vocabulary(str(place / "tokenizer.model")).encode((place / "text.jsonl").read_text()[:8000])
    rows = np.asarray(ids[: len(ids) // 33 * 33], np.int32).reshape(-1, 33)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_weights": np.ones(rows[:, 1:].shape, np.float32)}
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    total, weight = jax.jit(lambda p: next_token_loss(CFG.replace(param_dtype="float32"), p, batch, None))(wide)
    return float(total / weight)


def test_importing_training_and_exporting_in_bfloat16_gains_what_float32_gains(place, capsys):
    before, narrow = trained(place, "narrow")
    assert "trained and saved in float32" in capsys.readouterr().out
    _, wide = trained(place, "wide", "--dtype", "float32")
    assert {leaf.dtype.name for leaf in flatten(before).values()} == {"bfloat16"}
    assert narrow.cfg.param_dtype == "float32"
    assert {leaf.dtype.name for leaf in flatten(narrow.params).values()} == {"float32"}
    tele.convert.save_hf(place / "out", narrow.cfg, narrow.params, format="llama", dtype="bfloat16")
    cfg, exported = tele.convert.load_hf(place / "out")
    assert cfg.param_dtype == "bfloat16"
    start = loss(place, before)
    gained, reference = start - loss(place, exported), start - loss(place, wide.params)
    print(f"gained {gained:.4f} of {reference:.4f} nats: {gained / reference:.4f}")
    assert reference > 0.05 and gained / reference >= 0.98


def test_a_step_on_bfloat16_parameters_warns():
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-4), lambda step: 1.0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.warns(UserWarning, match="bfloat16"):
        make_step(CFG, tx, mesh, batch_size=2)
