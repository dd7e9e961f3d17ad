"""Adapters in PEFT's layout: PEFT computes what ours do, and ours what PEFT's do; merged exports equal the merge."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint, convert
from tele_jax.axes import flatten, unflatten
from tele_jax.cli.main import main
from tele_jax.convert.files import DTYPES, read_directory, read_header
from tele_jax.errors import UserError
from tests.checkpoint.trees import params as random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")
NTK = tele.Rope(ntk=tele.Ntk())
CFG = tele.ModelConfig(
    num_layers=2, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=40, vocab_size=50, max_seq_len=64,
    dtype="float32", output_biases=True,
)  # fmt: skip
FORMATS = {
    "llama": CFG,
    "tele_flm": CFG.replace(output_biases=False, input_mult=2.0),
    "telechat": CFG.replace(rope=NTK),
    "telechat_52b": CFG.replace(output_biases=False, num_kv_heads=4),
}
TOKENS = np.random.default_rng(6).integers(0, 50, (2, 21), np.int32)


def lora_of(**fields):
    return tele.lora.LoraConfig(**{"rank": 4, "alpha": 6.0, "targets": ("attn", "mlp")} | fields)


def made(cfg, lora):
    """Small random parameters and adapters."""
    tree = jax.tree.map(lambda x: 0.3 * x, random_params(cfg))
    spec, rng = tele.lora.spec(cfg, lora), np.random.default_rng(2)
    return tree, jax.tree.map(lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape), s.dtype), spec)


def saved(tmp_path, cfg=CFG, lora=None, **how):
    """Checkpoints of a base and of adapters upon it, and the merged parameters."""
    lora = lora or lora_of()
    params, adapters = made(cfg, lora)
    checkpoint.save(tmp_path / "base", cfg, params)
    adapter = checkpoint.adapter_for(tmp_path / "base", lora)
    checkpoint.save(tmp_path / "adapter", cfg, adapters, adapter=adapter)
    return params, adapters, tele.lora.merge(cfg, params, adapters, lora)


def read(directory):
    found = {}
    for name, stored in read_directory(directory).items():
        raw = np.fromfile(stored.file, np.uint8, stored.nbytes, offset=stored.offset)
        found[name] = raw.view(DTYPES[stored.dtype]).reshape(stored.shape)
    return found


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tele_jax[hf]'")
    pytest.importorskip("peft", reason="peft is missing: pip install peft")
    torch.set_num_threads(1)
    return torch


@pytest.mark.parametrize("fields", [{}, {"rank_stabilized": True}, {"targets": ("q", "mlp.down")}])
def test_peft_loads_ours_on_an_exported_llama_and_gives_our_logits(fields, tmp_path, torch):
    import peft
    import transformers

    params, adapters, merged = saved(tmp_path, lora=lora_of(**fields))
    convert.save_hf(tmp_path / "llama", CFG, params, format="llama")
    convert.export_peft(tmp_path / "adapter", tmp_path / "peft", format="llama")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    expected = tele.forward(CFG, merged, TOKENS)
    assert np.abs(expected - tele.forward(CFG, params, TOKENS)).max() > 0.02
    np.testing.assert_allclose(found, expected, atol=1e-4)
    lora, back = convert.load_peft(tmp_path / "peft", CFG)
    assert lora.scale == lora_of(**fields).scale
    for name, leaf in flatten(back).items():
        np.testing.assert_array_equal(leaf, flatten(adapters)[name], err_msg=name)


@pytest.mark.parametrize("stabilized", [False, True])
def test_ours_loads_what_peft_made_and_gives_its_logits(stabilized, tmp_path, torch, capsys):
    import peft
    import transformers

    params, *_ = saved(tmp_path)
    convert.save_hf(tmp_path / "llama", CFG, params, format="llama")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj"]
    how = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=stabilized, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(plain, how)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
        found = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    model.save_pretrained(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--base", str(tmp_path / "base")]) == 0
    assert "adapters of rank 3" in capsys.readouterr().out
    loaded = checkpoint.load(tmp_path / "ours", items=("params", "adapters"))
    assert loaded.adapter.lora.targets == ("layers.attn.o", "layers.attn.q", "layers.attn.v", "layers.mlp.up")
    assert loaded.adapter.lora.scale == pytest.approx(7 / (math.sqrt(3) if stabilized else 3))
    np.testing.assert_allclose(tele.forward(CFG, loaded.params, TOKENS), found, atol=1e-4)
    # And out again, to the bit.
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "--format", "llama", "--peft"]) == 0
    ours, theirs = read(tmp_path / "again"), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("targets", [("attn", "mlp"), ("v", "gate")])
@pytest.mark.parametrize("format", FORMATS)
def test_in_every_format_b_a_is_what_the_merged_export_has_more_than_its_base(format, targets, tmp_path):
    """Also where a tensor of theirs holds several kernels of ours: one adapter with the sum of their ranks."""
    cfg, lora = FORMATS[format], lora_of(targets=targets, rank_stabilized=format == "telechat")
    params, adapters, merged = saved(tmp_path, cfg, lora)
    convert.save_hf(tmp_path / "base_hf", cfg, params, format=format)
    convert.save_hf(tmp_path / "merged_hf", cfg, merged, format=format)
    convert.save_peft(tmp_path / "peft", cfg, adapters, lora, format=format)
    before, after = read(tmp_path / "base_hf"), read(tmp_path / "merged_hf")
    config, matrices = json.loads((tmp_path / "peft/adapter_config.json").read_text()), read(tmp_path / "peft")
    changed = {name.removesuffix(".weight") for name in before if (before[name] != after[name]).any()}
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in matrices}
    assert modules == changed
    for module in modules:
        a, b = (matrices[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        suffix = next(s for s in config["target_modules"] if module.endswith(f".{s}"))
        alpha = config["alpha_pattern"].get(suffix, config["lora_alpha"])
        rank = config["rank_pattern"].get(suffix, config["r"])
        assert a.shape[0] == b.shape[1] == rank
        delta = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * b @ a
        more = after[f"{module}.weight"].astype(np.float64) - before[f"{module}.weight"]
        np.testing.assert_allclose(more, delta.T if config["fan_in_fan_out"] else delta, atol=1e-6, err_msg=module)


def test_an_adapter_of_a_fused_module_is_split_exactly(tmp_path):
    """PEFT's adapter of key_value has one A for keys and values."""
    cfg, rng = FORMATS["telechat"], np.random.default_rng(0)
    lora = lora_of(targets=("k",))
    params, adapters, _ = saved(tmp_path, cfg, lora)
    convert.save_peft(tmp_path / "peft", cfg, adapters, lora, format="telechat")
    file = tmp_path / "peft/adapter_model.safetensors"
    values = {
        name: 0.2 * rng.standard_normal(x.shape).astype(np.float32) for name, x in read(tmp_path / "peft").items()
    }
    data = bytearray(file.read_bytes())
    for name, stored in read_header(file).items():
        data[stored.offset : stored.offset + stored.nbytes] = values[name].tobytes()
    file.write_bytes(data)
    found, split = convert.load_peft(tmp_path / "peft", cfg, "telechat")
    assert found.targets == ("layers.attn.k", "layers.attn.v")
    for tree, name in ((params, "base_hf"), (tele.lora.merge(cfg, params, split, found), "merged_hf")):
        convert.save_hf(tmp_path / name, cfg, tree, format="telechat")
    before, after = read(tmp_path / "base_hf"), read(tmp_path / "merged_hf")
    for layer in (0, 1):
        module = f"transformer.h.{layer}.self_attention.key_value"
        a, b = (values[f"base_model.model.{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        np.testing.assert_allclose(after[f"{module}.weight"] - before[f"{module}.weight"], 1.5 * b @ a, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_of_adapters_is_that_of_the_merged_model(tied, tmp_path, capsys):
    cfg = CFG.replace(tie_embeddings=tied, param_dtype="bfloat16")
    *_, merged = saved(tmp_path, cfg)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", "llama"]) == 0
    found_cfg, found = convert.load_hf(tmp_path / "out")
    assert found_cfg.tie_embeddings == tied
    assert ("lm_head.weight" in read(tmp_path / "out")) is not tied
    for name, leaf in flatten(merged).items():
        differs = np.asarray(flatten(found)[name] != leaf)
        assert differs.mean() < 1e-3, name  # a tie of the rounding, where a sum ran in another order
        np.testing.assert_allclose(flatten(found)[name].astype(jnp.float32), leaf.astype(jnp.float32), rtol=2**-7)
    # Adapters upon adapters are merged in their order.
    second = lora_of(targets=("o",))
    more = made(cfg, second)[1]
    checkpoint.save(tmp_path / "two", cfg, more, adapter=checkpoint.adapter_for(tmp_path / "adapter", second))
    convert.export_checkpoint(tmp_path / "two", tmp_path / "out2", format="llama")
    expected = flatten(tele.lora.merge(cfg, merged, more, second))["layers.attn.o"]
    both = flatten(convert.load_hf(tmp_path / "out2")[1])["layers.attn.o"]
    assert np.mean(np.asarray(both != expected)) < 1e-3
    assert np.mean(np.asarray(both != flatten(found)["layers.attn.o"])) > 0.5


def changed(directory, **keys):
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern is \{'q_proj': 2\}, which"),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern is \{'q_proj': 2\}, which"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\], which"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which"),
        ({"something_new": 1}, "something_new is 1, which"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA is read"),
        ({"r": 5}, r"layers.0.mlp.down_proj.lora_A.weight: has shape \[4, 40\], expected \[5, 40\]"),
        ({"r": None}, "r is missing"),
        ({"r": 0}, "rank=0 must be above 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected float"),
    ],
)
def test_an_adapter_that_ours_cannot_be_is_refused_by_its_key(keys, named, tmp_path):
    lora = lora_of()
    convert.save_peft(tmp_path / "peft", CFG, made(CFG, lora)[1], lora, format="llama")
    changed(tmp_path / "peft", **keys)
    with pytest.raises(UserError, match=named):
        convert.load_peft(tmp_path / "peft", CFG)


def test_files_that_do_not_fit_are_named_in_one_line(tmp_path, capsys):
    lora = lora_of()
    adapters = made(CFG, lora)[1]
    convert.save_peft(tmp_path / "peft", CFG, adapters, lora, format="llama")
    with pytest.raises(UserError, match=r"down_proj.lora_B.weight: has shape \[24, 4\], expected \[26, 4\]"):
        convert.load_peft(tmp_path / "peft", CFG.replace(embed_dim=26))
    with pytest.raises(UserError, match=r"layers.attn.k has no adapter in layers \[2\]; ours are in all or none"):
        convert.load_peft(tmp_path / "peft", CFG.replace(num_layers=3))
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj is no kernel inside the layers of this model"):
        convert.load_peft(tmp_path / "peft", CFG.replace(num_layers=1))
    with pytest.raises(UserError, match="is no kernel inside the layers of this model"):
        convert.load_peft(tmp_path / "peft", CFG.replace(rope=NTK), "telechat")
    bad = unflatten({n: x.at[0].set(jnp.nan) if n.endswith("o.a") else x for n, x in flatten(adapters).items()})
    convert.save_peft(tmp_path / "bad", CFG, bad, lora, format="llama")
    with pytest.raises(UserError, match=r"self_attn.o_proj.lora_A.weight: has numbers that are not finite"):
        convert.load_peft(tmp_path / "bad", CFG)
    with pytest.raises(UserError, match="lora: adapters are not those of the model"):
        convert.save_peft(tmp_path / "x", CFG, adapters, lora_of(rank=3), format="llama")
    with pytest.raises(UserError, match="format 'gguf': not one of"):
        convert.save_peft(tmp_path / "x", CFG, adapters, lora, format="gguf")
    saved(tmp_path)
    commands = {
        "export base x --format llama --peft": "base: holds parameters and no adapters",
        "export adapter x --format llama --peft --dtype float32": "--dtype: adapters are written as they are",
        "export adapter x --format telechat_52b --peft": "has no biases",
        "import peft x --base nowhere": "nowhere: no such directory",
        "import base x --base base": "adapter_config.json: missing; is this a directory that PEFT wrote?",
        "import peft x --base base --dtype float32": "--dtype: that of --base; leave it out",
        "import peft adapter --base base": "exists already",
    }
    for command, named in commands.items():
        verb, src, dst, *flags = command.split()
        flags = [str(tmp_path / flag) if flag in ("base", "nowhere") else flag for flag in flags]
        assert main([verb, str(tmp_path / src), str(tmp_path / dst), *flags]) == 2, command
        said = capsys.readouterr().err
        assert named in said and said.count("\n") == 1, said
    assert not (tmp_path / "x").exists()
    shutil.rmtree(tmp_path / "base")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "x"), "--format", "llama"]) == 2
    assert "base, which is not there" in capsys.readouterr().err


@pytest.mark.parametrize("stabilized", [False, True])
def test_an_export_of_fused_modules_comes_back_to_the_bit(stabilized, tmp_path):
    cfg, lora = FORMATS["telechat"], lora_of(rank_stabilized=stabilized)
    _, adapters, _ = saved(tmp_path, cfg, lora)
    convert.export_peft(tmp_path / "adapter", tmp_path / "peft", format="telechat")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["rank_pattern"]
    convert.import_peft(tmp_path / "peft", tmp_path / "back", base=tmp_path / "base")
    back = checkpoint.load(tmp_path / "back", items=("adapters",))
    assert back.adapter is not None and back.adapter.lora.scale == lora.scale
    assert {name: x.tobytes() for name, x in flatten(jax.tree.map(np.asarray, back.adapters)).items()} == {
        name: x.tobytes() for name, x in flatten(jax.tree.map(np.asarray, adapters)).items()
    }
    # Any other pattern, or values outside of the blocks, cannot be split.
    changed(tmp_path / "peft", alpha_pattern={"self_attention.key_value": 5.0})
    with pytest.raises(
        UserError, match=r"alpha_pattern is \{'self_attention.key_value': 5.0\}, which is not supported"
    ):
        convert.load_peft(tmp_path / "peft", cfg)
    convert.save_peft(tmp_path / "full", cfg, adapters, lora, format="telechat")
    file = tmp_path / "full/adapter_model.safetensors"
    stored = next(s for name, s in read_header(file).items() if "key_value.lora_B" in name)
    data = bytearray(file.read_bytes())
    data[stored.offset : stored.offset + stored.nbytes] = np.ones(stored.nbytes // 4, np.float32).tobytes()
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=r"key_value.lora_B.weight: is not made of blocks as `tele export --peft` writes"
    ):
        convert.load_peft(tmp_path / "full", cfg)


def test_flags_that_would_have_no_effect_on_adapters_are_refused(tmp_path, capsys):
    for command, flags in {
        "export a b --format llama --peft": (
            "--shard-gb 1",
            "--memory-gb 2",
            "--workers 3",
            "--list",
            "--dtype float32",
        ),
        "import a b --base c": ("--memory-gb 2", "--workers 3", "--start-over", "--vocab-size 5"),
    }.items():
        for flag in flags:
            assert main([*command.split(), *flag.split()]) == 2
            said = capsys.readouterr().err
            assert f"{flag.split()[0]}: " in said and "leave it out" in said and said.count("\n") == 1, said
