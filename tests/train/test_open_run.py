"""A run opens everything once: how often it reads the training text, in the first start and in the next."""

import io
import json
import os
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.data import documents, sources
from tele_jax.errors import UserError
from tele_jax.settings import GrowStage, MeshConfig
from tele_jax.sharding import make_mesh
from tele_jax.stages import grow
from tele_jax.train.trainer import Stopped, Trainer
from tests.inference.test_chat import tokenizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def page(tmp_path):
    """Two stages on the same text, with rows of two lengths and a growth between them."""
    for name in ("train", "held_out"):
        lines = (json.dumps({"text": f"{name} {i} and {i + 1} are not {2 * i}"}) + "\n" for i in range(500))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    source = {"files": [str(tmp_path / "train.jsonl")], "validation_files": [str(tmp_path / "held_out.jsonl")]}
    data = {"tokenizer": str(tmp_path / "tokenizer.model"), "sources": {"en": source | {"format": "jsonl"}}}
    shared = {"kind": "pretrain", "data": data, "steps": 2, "batch_size": 4, "optimizer": {"learning_rate": 1e-3}}
    model = {"num_layers": 1, "embed_dim": 8, "num_heads": 1, "head_dim": 8, "mlp_dim": 8, "vocab_size": 600}
    first = {**shared, "seq_len": 16, "model": {**model, "dtype": "float32"}}
    grow = {"kind": "grow", "model": {"mlp_dim": 12}}
    return {"run": ["first", "grow", "second"], "first": first, "grow": grow, "second": {**shared, "seq_len": 32}}


@pytest.fixture
def reads(monkeypatch):
    """Bytes that were read of every jsonl file, by its name."""
    counted = Counter()

    class Counting(io.FileIO):
        def readinto(self, buffer):
            size = super().readinto(buffer)
            counted[os.path.basename(self.name)] += size
            return size

    def opened(path, *how):
        return io.BufferedReader(Counting(path), 512) if str(path).endswith(".jsonl") else open(path, *how)

    for module in (sources, documents):
        monkeypatch.setattr(module, "open", opened, raising=False)
    return counted


def test_training_text_is_read_at_most_twice_before_the_first_step_and_not_again_by_the_next_start(
    page, reads, tmp_path, monkeypatch
):
    size = (tmp_path / "train.jsonl").stat().st_size
    at_first_step = []
    monkeypatch.setattr(Trainer, "_train", lambda self, stop: at_first_step.append(reads["train.jsonl"]) or stop_here())
    for _ in range(2):
        with pytest.raises(Stopped):
            tele.run(page, tmp_path / "w")
    first, second = at_first_step
    assert size <= first <= 2 * size, "of all stages together"
    assert second - first < size / 4, "the batches that are read ahead"
    assert list((tmp_path / "w" / "indexes").glob("*.npz"))


def stop_here():
    raise Stopped("before the first step")


def test_a_growth_stage_carries_out_the_plan_that_the_opening_made(tmp_path, monkeypatch):
    cfg = tele.ModelConfig(num_layers=1, embed_dim=8, num_heads=1, mlp_dim=8, vocab_size=16, dtype="float32")
    tele.checkpoint.save(tmp_path / "0", cfg, tele.init(cfg, jax.random.key(0)))
    stage = GrowStage(kind="grow", model={"mlp_dim": 12})
    larger, plan = grow.outline(stage, cfg, "config.grow")
    monkeypatch.setattr(tele.growth, "plan", lambda *args, **how: pytest.fail("planned a second time"))
    text = SimpleNamespace(sample=lambda rows, length: np.arange(8).reshape(2, 4))
    how = {"plan": plan, "previous": tmp_path / "0", "mesh": make_mesh(MeshConfig(), jax.devices()[:1]), "text": text}
    (tmp_path / "grow").mkdir()
    grow.carry_out(stage, tmp_path / "grow", **how, where="config.grow", say=print)
    assert grow.read_plan(tmp_path / "grow") == plan
    assert tele.checkpoint.open_lazy(tmp_path / "grow").cfg == larger


def test_a_config_that_cannot_be_leaves_no_index(page, tmp_path):
    page["second"]["data"] = page["second"]["data"] | {"tokenizer": str(tmp_path / "none.model")}
    with pytest.raises(UserError, match=r"none\.model"):
        tele.run(page, tmp_path / "w")
    assert not (tmp_path / "w").exists()
