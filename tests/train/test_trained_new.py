"""Training of what growth added alone, as LLaMA-Pro trains its new blocks: all else stays as it is, to the bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.axes import flatten, unflatten
from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.growth import receipt
from tele_jax.settings import OptimizerConfig
from tele_jax.stages import read_stage, run_config
from tele_jax.train.optimizer import optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = """
from pathlib import Path
from ml_collections import ConfigDict

HERE = Path(__file__).parent

def get_config():
    files = (str(HERE / "text.jsonl"),)
    data = dict(tokenizer=str(HERE / "t.model"), sources={"text": dict(files=files, format="jsonl")})
    config = ConfigDict()
    config.run = ("grow", "blocks")
    config.start = str(HERE / "start")
    config.grow = dict(kind="grow", layers=(0, 0, 1, 1), model=dict(num_layers=4))
    config.blocks = dict(kind="pretrain", data=data, steps=4, batch_size=4, seq_len=16, log_every=4, checkpoint_every=2,
                         optimizer=dict(learning_rate=1e-2, weight_decay=0.1, trained="new"))
    return config
"""
CFG = tele.ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=400, max_seq_len=32, dtype="float32", remat="none"
)


def test_old_entries_are_still_and_new_ones_move_as_if_they_were_alone():
    small = CFG.replace(vocab_size=11)
    plan = growth.plan(small, small.replace(num_layers=3, mlp_dim=30), layers=[0, 1, 1])
    cfg, new = plan.dst_cfg, {axis: axis_map.fresh for axis, axis_map in plan.maps.items()}
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tele.spec(cfg))
    fresh = {}
    for name, leaf in flatten(tele.spec(cfg)).items():
        grid = np.meshgrid(*[new[axis] for axis in leaf.axes], indexing="ij")
        fresh[name] = np.any(grid, axis=0)
    ours = optimizer(cfg, config, lambda step: jnp.float32(1.0), new=new)
    theirs = optimizer(cfg, config, lambda step: jnp.float32(1.0))
    states, trees = [ours.init(params), theirs.init(params)], [params, params]
    for _ in range(3):
        gradients = {n: jnp.asarray(rng.normal(size=mask.shape), jnp.float32) for n, mask in fresh.items()}
        alone = {n: gradient * fresh[n] for n, gradient in gradients.items()}
        for i, (tx, given) in enumerate(((ours, gradients), (theirs, alone))):
            updates, states[i] = tx.update(unflatten(given), states[i], trees[i])
            trees[i] = optax.apply_updates(trees[i], updates)
    for name, leaf in flatten(trees[0]).items():
        before, alone = flatten(params)[name], flatten(trees[1])[name]
        np.testing.assert_array_equal(leaf, np.where(fresh[name], alone, before), err_msg=name)
        assert not fresh[name].any() or (np.asarray(leaf != before)[fresh[name]]).all()


def test_a_run_trains_only_the_new_blocks(tmp_path, capsys):
    text = [" ".join(f"{word:x}" for word in np.random.default_rng(i).integers(0, 4096, 40)) for i in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    (tmp_path / "page.py").write_text(PAGE)
    trained = ["tokenizer", "train", "--preset", "tele_flm", "--vocab-size", "400", "--out"]
    assert main([*trained, str(tmp_path / "t.model"), str(tmp_path / "text.jsonl")]) == 0
    checkpoint.save(tmp_path / "start", CFG, tele.init(CFG, jax.random.key(0)))
    command = ["train", "--config", str(tmp_path / "page.py"), "--workdir"]
    assert main([*command, str(tmp_path / "w")]) == 0
    before, after = (flatten(checkpoint.load(tmp_path / "w" / stage).params) for stage in ("grow", "blocks"))
    for name, leaf in after.items():
        moved = np.asarray(leaf != before[name])
        if name.startswith("layers."):
            assert not moved[[0, 2]].any(), name
            moves = {"layers.attn.o", "layers.mlp.down"}
            assert moved[[1, 3]].any() or name not in moves, name
        else:
            assert not moved.any(), name
    capsys.readouterr()
    alone = PAGE.replace('("grow", "blocks")', '("blocks",)').replace("config.grow = ", "_ = ")
    (tmp_path / "page.py").write_text(alone)
    assert main([*command, str(tmp_path / "v")]) == 2
    printed = capsys.readouterr().err
    assert "tele: config.blocks: optimizer.trained='new' has to follow a growth" in printed


def test_adapters_and_new_units_are_one_or_the_other():
    from tele_jax.settings import DataConfig, LoraConfig, SourceConfig, TrainStage

    data = DataConfig(tokenizer="t", sources={"a": SourceConfig(files=("a",))})
    new = OptimizerConfig(learning_rate=1e-3, trained="new")
    with pytest.raises(UserError, match="leave one out"):
        TrainStage(kind="pretrain", data=data, optimizer=new, batch_size=1, seq_len=4, steps=1, lora=LoraConfig())


@pytest.mark.parametrize("kind", ["reward", "ppo"])
def test_heads_that_growth_did_not_add_are_trained(kind):
    data = {"tokenizer": "t", "sources": {"a": {"files": ["a"], "format": "pairs" if kind == "reward" else "prompts"}}}
    table = {"kind": kind, "data": data, "batch_size": 4, "seq_len": 16, "steps": 1}
    table |= {"optimizer": {"learning_rate": 1e-3, "trained": "new"}}
    if kind == "ppo":
        table |= {"reward": {"function": "a:b"}, "rollout_prompts": 2, "answers": 2, "max_new_tokens": 4}
    with pytest.raises(UserError, match=r"growth did not add the .* head"):
        read_stage(table, "config.align")


def test_a_stage_that_no_growth_precedes_is_refused_before_anything_runs():
    stage = {"kind": "pretrain", "steps": 1, "batch_size": 4, "seq_len": 16, "optimizer": {"learning_rate": 1e-3}}
    stage |= {"data": {"tokenizer": "t", "sources": {"a": {"files": ["a"]}}}}
    new = stage | {"optimizer": {"learning_rate": 1e-3, "trained": "new"}}
    first = {"model": {"num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8, "vocab_size": 16}}
    message = r"config\.more\.optimizer\.trained='new' has to follow a growth, and the stage before is not one"
    with pytest.raises(UserError, match=message):
        run_config({"run": ["base", "more"], "base": stage | first, "more": new})
    with pytest.raises(UserError, match=message):
        run_config({"run": ["more"], "more": new | first})


def test_a_growth_of_copies_leaves_nothing_to_train(tmp_path):
    checkpoint.save(tmp_path / "small", CFG, tele.init(CFG, jax.random.key(0)))
    table = dict(policy="copy", model=dict(mlp_dim=36))
    page = f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({table!r})\n"
    (tmp_path / "page.py").write_text(page)
    assert main(["grow", str(tmp_path / "small"), str(tmp_path / "big"), "--config", str(tmp_path / "page.py")]) == 0
    with pytest.raises(UserError, match=r"config\.more: optimizer\.trained='new', and the growth added no unit"):
        receipt.new_units(checkpoint.open_lazy(tmp_path / "big"), "config.more")
