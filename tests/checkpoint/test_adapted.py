"""Checkpoints of adapters upon adapters find bases that were moved; what does not fit is refused in one line."""

from typing import Any

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint, report
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.stages import run_config
from tests.checkpoint.trees import params as random_params

CFG = tele.ModelConfig(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=16, dtype="float32")
LORA = tele.lora.LoraConfig(rank=2, targets=("q",))
NOTHING: Any = None
ANY: Any = LORA


def adapters_of(cfg, seed):
    noise = np.random.default_rng(seed)
    spec = tele.lora.spec(cfg, LORA)
    return jax.tree.map(lambda s: noise.standard_normal(s.shape, np.float32), spec)


@pytest.fixture
def chain(tmp_path):
    """A base, adapters of it and adapters of these, in directories of their own; W of the first kernel in float64."""
    params = random_params(CFG)
    checkpoint.save(tmp_path / "here/base", CFG, params)
    below, expected = "here/base", np.asarray(flatten(params)["layers.attn.q"], np.float64)
    for name, seed in (("one", 1), ("two", 2)):
        made = adapters_of(CFG, seed)
        parts = flatten(made)
        expected = expected + LORA.scale * np.einsum("lir,lrnh->linh", *(parts[f"layers.attn.q.{x}"] for x in "ab"))
        checkpoint.save(tmp_path / name, CFG, made, adapter=checkpoint.adapter_for(tmp_path / below, LORA))
        below = name
    return tmp_path, expected


def test_a_moved_base_below_a_chain_of_adapters_is_found(chain):
    place, expected = chain
    (place / "here").rename(place / "there")
    with pytest.raises(
        UserError, match=r"one: holds adapters of .*here/base, which is not there; move it back or leave"
    ):
        checkpoint.load(place / "two")
    found = checkpoint.load(place / "two", base=place / "there/base").params
    np.testing.assert_allclose(flatten(found)["layers.attn.q"], expected, atol=1e-5)
    # A base in the middle of the chain; it finds its own.
    (place / "one").rename(place / "there/one")
    (place / "here").symlink_to(place / "there")
    found = checkpoint.load(place / "two", base=place / "there/one").params
    np.testing.assert_allclose(flatten(found)["layers.attn.q"], expected, atol=1e-5)
    # A link is enough for the commands.
    (place / "one").symlink_to(place / "there/one")
    assert main(["export", str(place / "two"), str(place / "out"), "--format", "llama"]) == 0
    with pytest.raises(
        UserError, match=r"two: holds adapters for another base than .*two, whose parameters differ from"
    ):
        checkpoint.load(place / "two", base=place / "two")


def test_what_does_not_fit_its_base_is_refused_before_it_is_written(chain):
    place, _ = chain
    base = place / "here/base"
    with pytest.raises(UserError, match=r"adapter: expected what checkpoint.adapter_for.* returns, got LoraConfig"):
        checkpoint.save(place / "x", CFG, adapters_of(CFG, 0), adapter=ANY)
    with pytest.raises(UserError, match="lora: expected a LoraConfig, got NoneType"):
        checkpoint.adapter_for(base, NOTHING)
    with pytest.raises(UserError, match=r"lora.targets: 'bias' names none of the kernels"):
        checkpoint.adapter_for(base, tele.lora.LoraConfig(rank=2, targets=("bias",)))
    other = CFG.replace(embed_dim=16)
    with pytest.raises(UserError, match=r"of another model than their base .*base: config.embed_dim"):
        checkpoint.save(place / "x", other, adapters_of(other, 0), adapter=checkpoint.adapter_for(base, LORA))
    for path, items in ((base, ("params",)), (place / "one", ("adapters",))):
        with pytest.raises(UserError, match=r"base=/nope: only for a checkpoint of adapters \(LoRA\) whose params"):
            checkpoint.load(path, base="/nope", items=items)
    assert not (place / "x").exists()


def test_trees_and_configs_that_are_none_are_named():
    params, adapters = random_params(CFG), adapters_of(CFG, 0)
    whole = jax.tree.map(lambda x: x.astype(np.int32), adapters)
    for use, named in (
        (lambda: tele.lora.init(NOTHING, LORA, jax.random.key(0)), "lora: cfg: expected a ModelConfig, got NoneType"),
        (lambda: tele.lora.spec(NOTHING, LORA), "lora: cfg: expected a ModelConfig, got NoneType"),
        (
            lambda: tele.lora.merge(CFG, NOTHING, adapters, LORA),
            "lora: params: expected a nested dict .*, got NoneType",
        ),
        (
            lambda: tele.lora.merge(CFG, params, NOTHING, LORA),
            "lora: adapters: expected a nested dict .*, got NoneType",
        ),
        (lambda: tele.lora.merge(CFG, params, whole, LORA), "lora: adapters: layers.attn.q.a is int32, and has to be"),
    ):
        with pytest.raises(UserError, match=named):
            use()


def test_the_table_of_a_run_tells_what_a_stage_with_lora_trained():
    stages = [{"stage": "pretrain", "parameters": 1984, "trained_parameters": 1984}]
    stages += [{"stage": "sft", "parameters": 1984, "trained_parameters": 1216}]
    lines = report.table(stages).splitlines()
    assert "1,984 (1,216 trained)" in lines[-1] and "trained" not in lines[-2]


def test_a_first_stage_with_lora_and_no_start_has_nothing_to_adapt():
    data = {"tokenizer": "t", "sources": {"en": {"files": ["f"], "format": "jsonl"}}}
    stage = {"kind": "pretrain", "data": data, "steps": 1, "batch_size": 1, "seq_len": 8}
    stage |= {"optimizer": {"learning_rate": 1e-3}, "lora": {"rank": 2}}
    with pytest.raises(UserError, match=r"config\.sft\.lora: there is nothing to adapt before the first stage"):
        run_config({"run": ["sft"], "sft": stage, "start": None})
