"""A stage with LoRA trains adapters alone; what comes after it reads the merged model."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh
from tele_jax.stages import run_config
from tele_jax.train import metrics
from tele_jax.train.optimizer import optimizer
from tests.inference.test_chat import tokenizer_bytes
from tests.model.test_adapters import merged_in_float64

pytestmark = pytest.mark.usefixtures("quick_compilation")

LORA = {"rank": 4, "alpha": 6.0, "targets": ("attn", "mlp")}
MODEL = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 24}
MODEL |= {"vocab_size": 600, "dtype": "float32", "mup_base_width": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    lines = [json.dumps({"text": f"{i} and {i + 1} are not {2 * i}"}) + "\n" for i in range(200)]
    (directory / "text.jsonl").write_text("".join(lines[20:]))
    (directory / "held_out.jsonl").write_text("".join(lines[:20]))
    (directory / "tokenizer.model").write_bytes(tokenizer_bytes())
    return directory


def stage(place, steps, **fields):
    files, held_out = [str(place / "text.jsonl")], [str(place / "held_out.jsonl")]
    sources = {"en": {"files": files, "validation_files": held_out, "format": "jsonl"}}
    data = {"tokenizer": str(place / "tokenizer.model"), "sources": sources, "eval_bytes": 1000}
    shape = {"steps": steps, "batch_size": 8, "seq_len": 16, "log_every": 1, "checkpoint_every": 1000}
    return {"kind": "pretrain", "data": data, "optimizer": {"learning_rate": 1e-2}} | shape | fields


@pytest.fixture(scope="module")
def finished(place):
    """Pretraining, 50 steps of adapters, one step of nothing on the merged model, adapters of that, and a growth."""
    page = {
        "run": ["first", "adapt", "rest", "again", "grow"],
        "first": stage(place, 3, model=MODEL),
        "adapt": stage(place, 50, lora=LORA, checkpoint_every=20, keep_checkpoints=9),
        "rest": stage(place, 1, optimizer={"learning_rate": 1e-30}),
        "again": stage(place, 2, lora=LORA | {"targets": ("q",), "rank_stabilized": True}),
        "grow": {"kind": "grow", "model": {"mlp_dim": 32}, "policy": "exact"},
    }
    summaries = tele.run(page, place / "w")
    return page, place / "w", {summary["stage"]: summary for summary in summaries}


def same_bits(found, expected, names):
    found, expected = flatten(found), flatten(expected)
    for name in names:
        assert np.asarray(found[name]).tobytes() == np.asarray(expected[name]).tobytes(), name


def test_only_adapters_are_trained_and_saved(finished):
    _, workdir, summaries = finished
    lazy = checkpoint.open_lazy(workdir / "adapt")
    base = checkpoint.load(workdir / "first")
    lora = tele.lora.LoraConfig(**LORA)
    expected = flatten(tele.lora.spec(base.cfg, lora))
    assert {name: array.leaf.spec for name, array in lazy.items["adapters"].items()} == expected
    count = sum(leaf.size for leaf in expected.values())
    by_hand = 2 * 4 * (4 * (16 + 2 * 8) + 3 * (16 + 24))  # layers * rank * (inputs + outputs) of every kernel
    assert count == by_hand == summaries["adapt"]["trained_parameters"]
    # Two moments of every entry of the adapters, the counters of steps, and the births of units: vectors.
    moments = [a for name, a in lazy.items["opt_state"].items() if ".mu." in name or ".nu." in name]
    assert sum(a.leaf.spec.size for a in moments) == 2 * count
    others = sum(a.leaf.spec.size for a in lazy.items["opt_state"].values()) - 2 * count
    assert others < 100
    loaded = checkpoint.load(workdir / "adapt", items=("params", "adapters"))
    untouched = [name for name in flatten(base.params) if f"{name}.a" not in expected]
    assert len(untouched) == len(flatten(base.params)) - 7
    same_bits(loaded.params, base.params, untouched)
    for name, values in merged_in_float64(base.params, loaded.adapters, 6.0 / 4).items():
        np.testing.assert_allclose(flatten(loaded.params)[f"layers.{name}"], values, atol=1e-6)
        assert np.abs(flatten(loaded.params)[f"layers.{name}"] - flatten(base.params)[f"layers.{name}"]).max() > 1e-3
    assert summaries["adapt"]["bits_per_byte_after"]["en"] < summaries["adapt"]["bits_per_byte_before"]["en"]
    assert summaries["adapt"]["bits_per_byte_before"] == summaries["first"]["bits_per_byte_after"]


def test_fifty_steps_leave_the_frozen_arrays_as_they_are_and_move_every_adapter(finished):
    _, workdir, _ = finished
    adapters = [
        checkpoint.load(workdir / "adapt/checkpoints" / step, items=("adapters",)).adapters for step in ("20", "50")
    ]
    for name, leaf in flatten(adapters[1]).items():
        assert np.abs(leaf - flatten(adapters[0])[name]).max() > 0, name
    base, cfg = checkpoint.load(workdir / "first").params, checkpoint.open_lazy(workdir / "first").cfg
    before = {name: np.asarray(leaf).tobytes() for name, leaf in flatten(base).items()}
    from tele_jax.sharding import put_batch
    from tele_jax.train.frozen import Frozen
    from tele_jax.train.step import _next_token, make_step

    mesh, lora = make_mesh(MeshConfig(), jax.devices()[:1]), tele.lora.LoraConfig(**LORA)
    frozen = Frozen(cfg, lora, workdir / "first", mesh)
    tx = optimizer(cfg, OptimizerConfig(learning_rate=1e-2), lambda step: 1.0, frozen.spec)
    step = make_step(cfg, tx, mesh, batch_size=2, loss=frozen.loss(_next_token), trained=frozen.spec)
    trained = tele.lora.init(cfg, lora, jax.random.key(0))
    state = tx.init(trained)
    tokens = np.random.default_rng(0).integers(0, 600, (2, 8), np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": np.ones((2, 8), np.float32)}
    for _ in range(50):
        trained, state, figures = step(trained, state, put_batch(batch, mesh, 2), None, (frozen.params, None))
    assert {name: np.asarray(leaf).tobytes() for name, leaf in flatten(frozen.params).items()} == before
    # The norm of the gradient is that of the adapters: a loss that they do not move has none.
    assert float(figures["grad_norm"]) > 0


def test_later_stages_go_on_from_the_merged_model(finished):
    _, workdir, summaries = finished
    merged = checkpoint.load(workdir / "adapt").params
    rest = checkpoint.load(workdir / "rest")
    same_bits(rest.params, merged, flatten(merged))
    assert [entry["stage"] for entry in rest.provenance] == ["first", "adapt", "rest"]
    again = checkpoint.load(workdir / "again")
    changed = [n for n, x in flatten(again.params).items() if (x != flatten(merged)[n]).any()]
    assert changed == ["layers.attn.q"]
    assert summaries["grow"]["receipt"]["ok"]
    grown = checkpoint.load(workdir / "grow")
    tokens = np.arange(12).reshape(1, 12)
    logits = [tele.forward(model.cfg, model.params, tokens) for model in (again, grown)]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_a_stopped_stage_goes_on_to_the_same_bits(finished, place):
    page, workdir, _ = finished
    again = place / "resumed"
    shutil.copytree(workdir, again)
    for name in ("rest", "again", "grow"):
        shutil.rmtree(again / name)
    for path in (again / "adapt/checkpoints").iterdir():
        if int(path.name) > 20:
            shutil.rmtree(path)
    (again / "adapt/summary.json").unlink()
    tele.run({name: page[name] for name in ("first", "adapt")} | {"run": ["first", "adapt"]}, again)
    items = ("adapters", "opt_state", "data")
    found, expected = (checkpoint.load(w / "adapt", items=items) for w in (again, workdir))
    same_bits(found.adapters, expected.adapters, flatten(expected.adapters))
    same_bits(found.opt_state, expected.opt_state, flatten(expected.opt_state))
    assert found.data_state == expected.data_state
    # The copy found its base in its own directory.
    shutil.rmtree(again / "first")
    original = checkpoint.load(again / "adapt", base=workdir / "first")
    same_bits(original.params, checkpoint.load(workdir / "adapt").params, flatten(original.params))


def test_eight_devices_train_as_one(finished, place):
    page, workdir, _ = finished
    page = {"run": ["adapt"], "adapt": page["adapt"] | {"steps": 4}, "start": str(workdir / "first")}
    losses = []
    for shape in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        to = place / f"mesh{len(shape)}"
        tele.run(page | {"mesh": shape}, to)
        lines = metrics.read(to / "adapt/metrics/metrics.jsonl")
        losses.append([[line["loss"], line["grad_norm"]] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    found = checkpoint.load(place / "mesh0", mesh, items=("params", "adapters"))
    a = found.adapters["layers"]["attn"]["q"]["a"]
    assert a.addressable_shards[0].data.shape == (2, 4, 4)
    whole = checkpoint.load(place / "mesh0").params
    for name, leaf in flatten(whole).items():
        np.testing.assert_allclose(flatten(found.params)[name], leaf, atol=1e-6)


def test_the_learning_rate_and_decay_of_adapters_follow_from_their_axes():
    """Adapters touch one width axis each: vector-like in muP, and they decay as kernels do."""
    cfg = tele.ModelConfig(**MODEL)
    spec = tele.lora.spec(cfg, tele.lora.LoraConfig(**LORA))
    config = OptimizerConfig(learning_rate=1e-2, matrix_learning_rate=7.0, weight_decay=0.5, clip_norm=1e9)
    ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), spec)
    tx = optimizer(cfg, config, lambda step: 1.0, spec)
    updates, _ = jax.jit(lambda tree: tx.update(tree, tx.init(tree), tree))(ones)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -1e-2 * (1 + 0.5), rtol=1e-5)
    assert optax.tree.norm(updates) > 0


def test_inspect_shows_adapters_and_their_base(finished, tmp_path, capsys):
    _, workdir, _ = finished
    assert main(["inspect", str(workdir / "adapt"), "--verify", "--json", str(tmp_path / "i.json")]) == 0
    shown = capsys.readouterr().out
    assert "adapters         rank 4, alpha 6, of attn, mlp" in shown and "first/checkpoints/3" in shown
    figures = json.loads((tmp_path / "i.json").read_text())
    assert figures["adapter"]["lora"]["alpha"] == 6.0 and figures["parameters"] == 1984


def test_generation_reads_the_merged_model(finished, place, tmp_path):
    _, workdir, _ = finished
    merged = checkpoint.load(workdir / "adapt")
    checkpoint.save(tmp_path / "whole", merged.cfg, merged.params, provenance=merged.provenance)
    texts = []
    for path in (workdir / "adapt", tmp_path / "whole"):
        flags = ["--prompt", "3 and 4", "--max-new-tokens", "6", "--tokenizer", str(place / "tokenizer.model")]
        assert main(["generate", str(path), *flags, "--json", str(tmp_path / "g.json")]) == 0
        found = json.loads((tmp_path / "g.json").read_text())
        texts.append({key: value for key, value in found.items() if "second" not in key})
    assert texts[0] == texts[1]


def test_what_cannot_be_is_named_in_one_line(finished, place, tmp_path):
    page, workdir, _ = finished
    with pytest.raises(UserError, match=r"config\.first\.lora: there is nothing to adapt before the first stage"):
        run_config({"run": ["first"], "first": page["first"] | {"lora": LORA}})
    after = stage(place, 1, optimizer={"learning_rate": 1e-3, "new_warmup_steps": 2})
    with pytest.raises(UserError, match=r"config\.after\.optimizer\.new_warmup_steps .* config\.adapt trains adapters"):
        grow = {"adapt": page["adapt"], "grow": page["grow"]}
        run_config({"run": ["adapt", "grow", "after"], **grow, "after": after, "start": "somewhere"})
    with pytest.raises(UserError, match=r"config\.adapt.*lora and mask_ramp: lora freezes the parameters"):
        run_config(page | {"adapt": page["adapt"] | {"mask_ramp": 3}})
    with pytest.raises(
        UserError, match=r"config\.adapt\.lora\.targets: 'query' names none of the kernels layers.attn.k"
    ):
        tele.run(page | {"adapt": stage(place, 1, lora={"targets": ("query",)})}, tmp_path / "w")
    other = tmp_path / "other"
    shutil.copytree(workdir / "first", other / "first")
    chunk = next(p for p in (other / "first/checkpoints/3/params/layers.attn.q/c").rglob("*") if p.is_file())
    data = bytearray(chunk.read_bytes())
    at = checkpoint.open_lazy(other / "first").params["layers"]["attn"]["q"].leaf.chunk_bytes - 1
    data[at] ^= 1  # another checksum is another content
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=r"holds adapters for another base than .*other/first/checkpoints/3"):
        checkpoint.load(workdir / "adapt", base=other / "first")
    with pytest.raises(UserError, match=r"adapt/checkpoints/50: holds adapters of .*first/checkpoints/3, which is not"):
        checkpoint.load(workdir / "adapt", base=tmp_path / "nothing")
    with pytest.raises(
        UserError, match=r"holds adapters \(LoRA\) and no parameters; tele.checkpoint.load\(path\) merges"
    ):
        _ = checkpoint.open_lazy(workdir / "adapt").params
    plan = tele.growth.widen_mlp(checkpoint.open_lazy(workdir / "adapt").cfg, 32)
    with pytest.raises(UserError, match=r"adapt/checkpoints/50: holds adapters \(LoRA\) and no parameters"):
        tele.growth.stream(plan, workdir / "adapt", tmp_path / "g")
    cfg, lora = checkpoint.open_lazy(workdir / "first").cfg, tele.lora.LoraConfig(**LORA)
    adapter = checkpoint.adapter_for(workdir / "first", lora)
    with pytest.raises(UserError, match=r"adapters: not what the config describes: layers.attn.k.a: given"):
        wrong = tele.lora.init(cfg, tele.lora.LoraConfig(**LORA | {"rank": 3}), jax.random.key(0))
        checkpoint.save(tmp_path / "s", cfg, wrong, adapter=adapter)


def test_a_bfloat16_base_stays_as_it_is_and_its_adapters_are_float32(finished, place, tmp_path):
    _, workdir, _ = finished
    base = checkpoint.load(workdir / "first")
    cfg = base.cfg.replace(param_dtype="bfloat16")
    narrow = jax.tree.map(lambda x: x.astype("bfloat16"), base.params)
    checkpoint.save(tmp_path / "narrow", cfg, narrow)
    adapt = stage(place, 2, lora=LORA | {"targets": ("q",)}, eval_every=1, keep_best="bits_per_byte/en")
    tele.run({"run": ["adapt"], "adapt": adapt, "start": str(tmp_path / "narrow")}, tmp_path / "w")
    loaded = checkpoint.load(tmp_path / "w", items=("params", "adapters"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.adapters)} == {"float32"}
    same_bits(loaded.params, narrow, [name for name in flatten(narrow) if name != "layers.attn.q"])
    best = checkpoint.load(tmp_path / "w/adapt/best")
    assert best.adapter.lora == tele.lora.LoraConfig(**LORA | {"targets": ("q",)})
