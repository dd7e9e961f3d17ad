"""`tele grow` as a user runs it: a checkpoint grown, verified and named; kills, wrong input, and a second look."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from crc32c import crc32c

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.axes import flatten, unflatten
from tele_jax.cli.main import main
from tele_jax.growth import receipt as receipts
from tests import reference
from tests.checkpoint.trees import assert_same, chunk_files
from tests.growth.checkpoints import random_state
from tests.growth.strategies import without_compiling
from tests.inference.test_chat import TEXTS, tokenizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    **dict(num_layers=3, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=12, vocab_size=460),
    **dict(output_biases=True, mup_base_width=4, dtype="float32", remat="none"),
)
LARGER = dict(num_layers=4, embed_dim=12, num_heads=6, mlp_dim=17)
PAGE = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(grow=dict(kind="grow", {})))
"""


def params_of(cfg, seed=0):
    return jax.tree.map(np.float32, reference.random_params(cfg, np.random.default_rng(seed), 1.0))


def plain_state(cfg):
    """Without numbers that numpy and XLA treat differently."""
    return jax.tree.map(lambda x: np.where(np.isfinite(x) & (abs(x) > 1e-30), x, 1).astype(x.dtype), random_state(cfg))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with checkpoints to grow from, and a page."""
    directory = tmp_path_factory.mktemp("grow")
    checkpoint.save(directory / "src", CFG, params_of(CFG), opt_state=plain_state(CFG), step=7)
    (directory / "src" / "tokenizer.model").write_bytes(tokenizer_bytes())
    checkpoint.save(directory / "other", CFG, params_of(CFG, 1), step=7)
    (directory / "page.py").write_text(PAGE.format(f"model={LARGER!r}"))
    return directory


@pytest.fixture
def by_parts(monkeypatch):
    """As for models that are larger than memory: no logits, and so nothing to compile."""
    monkeypatch.setattr(receipts, "_LARGE_TREES", 10**9)


@pytest.fixture(scope="module")
def grown(place):
    """(DST of a growth verified by parts, its plan)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receipts, "_LARGE_TREES", 10**9)
        assert main(["grow", str(place / "src"), str(place / "dst"), "--config", str(place / "page.py")]) == 0
    return place / "dst", growth.Plan.from_json(json.loads((place / "dst" / "plan.json").read_text()))


def grow(place, dst, *more, src="src", page="page.py", code=0, capsys=None):
    """Runs the command; returns what it printed, or its one line where it fails."""
    page = ["--config", str(place / page)] if page else []
    assert main(["grow", str(place / src), str(dst), *page, *map(str, more)]) == code
    if capsys is not None:
        out, err = capsys.readouterr()
        assert (not err) if code == 0 else (err.startswith("tele: ") and err.count("\n") == 1), err
        return out if code == 0 else err
    return None


def receipt_of(dst):
    return json.loads((dst / "growth_receipt.json").read_text())


# ---- what it writes ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_grown_with_its_optimizer_state_and_verified_on_text(place, tmp_path, capsys):
    (tmp_path / "text").write_text("".join(TEXTS), encoding="utf-8")
    dst = tmp_path / "a" / "dst"
    asked = (place, dst, "--opt", "--seed", 3, "--text", tmp_path / "text", "--json", tmp_path / "figures.json")
    err = grow(*asked, "--config.grow.tolerance=1e-12", code=1, capsys=capsys)
    assert "config.grow: the logits moved by" in err and "more than tolerance=1e-12; it is left at" in err
    assert [path.name for path in dst.parent.iterdir()] == ["dst.unverified"]
    assert not (tmp_path / "figures.json").exists()

    out = grow(*asked, capsys=capsys)  # what was written is as it was planned: it is looked at again
    assert "wrote 0" not in out and " bytes in " not in out
    with without_compiling():
        plan = growth.plan(CFG, CFG.replace(**LARGER), seed=3)
        loaded = checkpoint.load(dst)
        assert_same(jax.tree.map(np.asarray, loaded.params), growth.apply(plan, params_of(CFG)))
        mu = flatten(growth.apply_opt(plan, checkpoint.load(place / "src").opt_state)["1"]["mu"])
    assert_same(jax.tree.map(np.asarray, flatten(loaded.opt_state["1"]["mu"])), jax.tree.map(np.asarray, mu))
    assert (loaded.cfg, loaded.step) == (plan.dst_cfg, 7)
    assert growth.Plan.from_json(json.loads((dst / "plan.json").read_text())) == plan
    receipt = receipt_of(dst)
    assert json.loads((tmp_path / "figures.json").read_text()) == receipt
    assert receipt["ok"] and receipt["preserving"] and receipt["optimizer_state"]
    assert 0 < receipt["max_abs"] <= 1e-4 and receipt["max_rel"] <= receipt["tolerance"] == 2e-5
    assert receipt["dead"] == receipt["locked"] == receipt["altered"] == []
    assert (receipt["policy"], receipt["seed"], receipt["plan"]) == ("exact", 3, plan.digest)
    assert receipt["layers"] == [0, 1, 2, 2] and receipt["layer_scores"] is None
    assert receipt["verified_on"] == str(tmp_path / "text") and len(receipt["tokens"]) == 64
    assert receipt["source"]["path"] == str(place / "src") and receipt["source"]["step"] == 7
    assert receipt["source"].keys() >= {"params", "opt_state"} == receipt["destination"].keys()
    made = dict(stage="dst", kind="grow", policy="exact", seed=3, plan=plan.digest, mask=None)
    assert loaded.provenance[-1] == made
    assert (dst / "tokenizer.model").read_bytes() == tokenizer_bytes()
    for line in str(plan).splitlines():
        assert line in out.splitlines()
    assert f"verified on {tmp_path / 'text'}: logits moved by {receipt['max_abs']:.3g} at most; wrote {dst}" in out
    assert [path.name for path in dst.parent.iterdir()] == ["dst"]


def test_models_larger_than_memory_are_verified_part_by_part(tmp_path, capsys):
    """42 MB grown in 150: that is enough to stream and to look at every part, but not for gradients."""
    sizes = dict(num_layers=1, embed_dim=256, num_heads=4, head_dim=64, mlp_dim=2048, vocab_size=6000, dtype="float32")
    cfg = tele.ModelConfig(**sizes)
    checkpoint.save(tmp_path / "src", cfg, params_of(cfg))
    (tmp_path / "page.py").write_text(
        PAGE.format("tolerance=1e-3, model=dict(embed_dim=384, num_layers=2, num_heads=6)")
    )
    out = grow(tmp_path, tmp_path / "dst", "--memory-gb", 0.15, capsys=capsys)
    receipt = receipt_of(tmp_path / "dst")
    assert receipt["ok"] and receipt["max_abs"] is receipt["tokens"] is receipt["dead"] is None
    assert list(receipt["parts"]) == ["embed", "layers[0]", "layers[1]", "head"]
    assert max(receipt["parts"].values()) <= receipt["parts_tolerance"] == 1e-11
    assert "verified part by part: 4 parts differ by" in out
    assert "logits were not compared, which needs more --memory-gb, so that tolerance=0.001 was not applied" in out
    err = grow(tmp_path, tmp_path / "b", "--memory-gb", 0.1, code=2, capsys=capsys)
    assert "memory_gb=0.1 is too little for params/" in err and "need memory_gb=0.1" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "page.py", "src"]


def test_layers_are_chosen_by_what_they_change(place, by_parts, tmp_path, capsys):
    out = grow(place, tmp_path / "dst", "--layers", "distance", "--policy", "msg", capsys=capsys)
    assert "note: layers are chosen by what they do to random tokens; --text FILE gives better scores" in out
    receipt = receipt_of(tmp_path / "dst")
    assert receipt["layers"] == [0, 1, 1, 2] and receipt["layer_metric"] == "cosine"
    # By hand: the cosine between what enters and what leaves, in the model without the layers above.
    tokens = np.random.default_rng(0).integers(0, 460, (4, 128), np.int32)
    expected, before = [], None
    params = reference.random_params(CFG, np.random.default_rng(0), 1.0)
    for count in range(4):
        x = _stream(params, tokens, count)
        if count:
            cosine = (before * x).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(x, axis=-1)
            expected.append(float(np.mean(1 - cosine)))
        before = x
    assert receipt["layer_scores"] == pytest.approx(expected, rel=1e-5)


def _stream(params, tokens, count):
    """The residual stream after `count` layers: the logits of a model whose head passes it on, unnormalised."""
    shallow = CFG.replace(num_layers=max(count, 1), mup_base_width=None, vocab_size=460)
    tree = {
        name: leaf[: max(count, 1)] if name.startswith("layers.") else leaf for name, leaf in flatten(params).items()
    }
    x = tree["embed.table"][tokens]
    for i in range(count):
        layer = {name.removeprefix("layers."): leaf[i] for name, leaf in tree.items() if name.startswith("layers.")}
        layer = unflatten(layer)
        positions, segments = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.ones_like(tokens)
        normed = reference.rms_norm(x, layer["attn_norm"]["scale"], CFG.rms_eps)
        x = x + reference.attention(shallow, layer["attn"], normed, positions, segments, np.ones(CFG.num_heads))
        normed = reference.rms_norm(x, layer["mlp_norm"]["scale"], CFG.rms_eps)
        x = x + reference.mlp(layer["mlp"], normed, np.ones(CFG.mlp_dim))
    return x


@pytest.mark.parametrize(("policy", "preserving"), [("copy", True), ("random", False), ("stack", False)])
def test_other_policies_and_ids(place, by_parts, tmp_path, policy, preserving, capsys):
    more = ["--layers", "0,1,1,2"] if policy == "copy" else []
    out = grow(place, tmp_path / "dst", "--policy", policy, "--config.grow.model.num_kv_heads=3", *more, capsys=capsys)
    receipt = receipt_of(tmp_path / "dst")
    assert (receipt["policy"], receipt["preserving"], receipt["ok"]) == (policy, preserving, True)
    assert receipt["layers"] == {"copy": [0, 1, 1, 2], "stack": [0, 1, 2, 0], "random": [0, 1, 2, -1]}[policy]
    assert (max(receipt["parts"].values()) <= 1e-11) is preserving
    assert checkpoint.open_lazy(tmp_path / "dst").cfg.num_kv_heads == 3
    assert f"policy {policy}: " + ("preserves" if preserving else "does not preserve") in out


def test_a_page_of_several_growths_and_a_page_that_is_one(place, by_parts, tmp_path, capsys):
    (tmp_path / "two.py").write_text(
        PAGE.format("model=dict(mlp_dim=15)").replace("))\n", ", then=dict(kind='grow', model=dict(mlp_dim=16))))\n")
    )
    (tmp_path / "one.py").write_text(PAGE.format("").replace('grow=dict(kind="grow", )', "model=dict(mlp_dim=17)"))
    grow(place, tmp_path / "b", "--config", tmp_path / "two.py", "--stage", "then", page=None, capsys=capsys)
    assert checkpoint.open_lazy(tmp_path / "b").cfg.mlp_dim == 16
    grow(place, tmp_path / "c", "--config", tmp_path / "one.py", page=None, capsys=capsys)
    assert checkpoint.open_lazy(tmp_path / "c").cfg.mlp_dim == 17
    for more, message in (
        ([], "several growth stages (grow, then); choose with --stage"),
        (["--stage", "thn"], "--stage thn: not a growth stage of"),
    ):
        err = grow(place, tmp_path / "d", "--config", tmp_path / "two.py", *more, page=None, code=2, capsys=capsys)
        assert message in err


# ---- kills and processes -----------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_is_finished_by_the_same_command_with_the_same_bytes(place, tmp_path):
    for name in ("src", "page.py"):
        (tmp_path / name).symlink_to(place / name)
    run = [sys.executable, "-m", "tests.cli.killed_growth", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert codes == {"all": [0], "again": [None] * 5 + [0], "late": [None], "shards": [0, None, 0]}
    whole = contents(tmp_path / "all" / "dst")
    assert len(whole) > 40
    for name in ("again", "late", "shards"):
        assert contents(tmp_path / name / "dst") == whole, name
    for name in ("all", "again", "shards"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["dst"]
    printed = (tmp_path / "shards.txt").read_text()
    assert printed.count("shard 0 of 2 is done; the last to finish verifies") == 1
    assert printed.count("verified part by part") == 1


def contents(path):
    """{file: bytes} of a checkpoint, but for what Orbax notes of time and place."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in files
        if file.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }


# ---- a growth that fails, and a second look ----------------------------------------------------------------------


def test_a_source_with_a_number_that_is_none_fails_and_stays_unverified(place, by_parts, tmp_path, capsys):
    params = params_of(CFG)
    params["layers"]["mlp"]["up"][1, 2, 3] = np.nan
    checkpoint.save(tmp_path / "src", CFG, params)
    for _ in range(2):  # the second time, what was written is looked at again
        err = grow(tmp_path, tmp_path / "dst", "--config", place / "page.py", page=None, code=1, capsys=capsys)
        assert "config.grow: the growth failed its verification; it is left at" in err
        assert "layers.mlp.up: nan at [1, 2, 3]" in err and "NOT ok" in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dst.unverified", "src"]
    receipt = receipt_of(tmp_path / "dst.unverified")
    assert not receipt["ok"] and receipt["altered"] == ["layers.mlp.up"]


def test_a_second_look_at_a_good_growth(place, grown, by_parts, capsys):
    dst, _ = grown
    before = contents(dst)
    out = grow(place, dst, "--check", page=None, capsys=capsys)
    assert (
        "altered leaves: none" in out and "parts: 6 looked at" in out and out.rstrip().endswith("random tokens, seed 0")
    )
    assert contents(dst) == before


@pytest.mark.parametrize(
    "flags",
    [
        *(["--config", "page.py", "--config.grow.seed=3"], ["--seed", 3], ["--policy", "copy"], ["--layers", "0,1,1"]),
        *(["--stage", "grow"], ["--dry-run"], ["--opt"], ["--workers", 2], ["--shard", "0/2"]),
    ],
)
def test_a_second_look_refuses_the_flags_of_a_growth(place, grown, flags, capsys):
    err = grow(place, grown[0], "--check", *flags, page=None, code=2, capsys=capsys)
    given = ", ".join(str(flag) for flag in flags if str(flag).startswith("--"))
    assert err.rstrip().endswith(f"and grows nothing: leave out {given}") and len(err.splitlines()) == 1


@pytest.fixture
def copied(place, grown, tmp_path):
    """A copy of a growth that may be spoilt."""
    return shutil.copytree(grown[0], tmp_path / "dst")


def test_a_second_look_with_another_source(place, copied, capsys):
    err = grow(place, copied, "--check", src="other", page=None, code=2, capsys=capsys)
    assert f"{place / 'other'}: its params are not those of the source in {copied / 'growth_receipt.json'}" in err


def test_a_second_look_at_the_receipt_of_another_growth(place, copied, by_parts, tmp_path, capsys):
    grow(place, tmp_path / "b", "--seed", 9, capsys=capsys)
    shutil.copy(tmp_path / "b" / "growth_receipt.json", copied)
    err = grow(place, copied, "--check", page=None, code=2, capsys=capsys)
    assert f"{copied}: growth_receipt.json is of the plan " in err and ", plan.json is " in err
    shutil.copy(tmp_path / "b" / "plan.json", copied)
    err = grow(place, copied, "--check", page=None, code=2, capsys=capsys)
    assert f"{copied}: was made by another plan than that of {copied / 'growth_receipt.json'}" in err


def test_a_second_look_at_a_chunk_that_was_rewritten(place, copied, by_parts, capsys):
    (file,) = chunk_files(copied, "params/layers.attn.q")
    content = file.read_bytes()
    size = checkpoint.open_lazy(copied).params["layers"]["attn"]["q"].leaf.chunk_bytes
    data = np.frombuffer(content[: size - 4], np.uint8).copy()
    data[5] ^= 1
    file.write_bytes(data.tobytes() + content[size - 4 :])
    err = grow(place, copied, "--check", page=None, code=1, capsys=capsys)
    assert "params/layers.attn.q" in err and "damaged" in err
    file.write_bytes(data.tobytes() + crc32c(data).to_bytes(4, "little") + content[size:])
    err = grow(place, copied, "--check", page=None, code=2, capsys=capsys)
    assert f"{copied}: its params are not those of the destination in {copied / 'growth_receipt.json'}" in err


def test_a_second_look_where_papers_are_missing_or_spoilt(place, copied, capsys):
    (copied / "plan.json").write_text("{")
    assert "plan.json: damaged, not JSON" in grow(place, copied, "--check", page=None, code=1, capsys=capsys)
    (copied / "plan.json").unlink()
    assert "plan.json: missing" in grow(place, copied, "--check", page=None, code=2, capsys=capsys)
    (copied / "growth_receipt.json").unlink()
    assert "growth_receipt.json: missing" in grow(place, copied, "--check", page=None, code=2, capsys=capsys)
    assert "no such directory" in grow(place, copied / "x", "--check", page=None, code=2, capsys=capsys)


def test_a_second_look_at_a_checkpoint_that_no_growth_made(place, grown, tmp_path, capsys):
    dst, plan = grown
    checkpoint.save(tmp_path / "dst", plan.dst_cfg, params_of(plan.dst_cfg))
    for name in ("plan.json", "growth_receipt.json"):
        shutil.copy(dst / name, tmp_path / "dst")
    err = grow(place, tmp_path / "dst", "--check", page=None, code=2, capsys=capsys)
    assert "was made by another plan than that of" in err


# ---- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "exakt"], "policy 'exakt' is not one of exact, msg, copy, stack, interleave, random"),
        (["--layers", "first"], "layers: 'first' is not one of uniform, last, middle, distance"),
        (["--layers", "0,1,2"], "layers: 3 ids given for 4 destination layers"),
        (["--policy", "stack", "--layers", "last"], "policy stack places the layers itself"),
        (["--config.grow.model.num_layers=2"], "num_layers would shrink, 3 -> 2: growth only adds"),
        (["--config.grow.model.embed_dim=7"], "embed_dim would shrink, 8 -> 7: growth only adds"),
        (["--config.grow.model.head_dim=8"], "head_dim differs, 4 -> 8: growth cannot change it"),
        (["--config.grow.model.num_heads=5"], "num_heads=5 does not divide into num_kv_heads=2 equal groups"),
        (["--config.grow.model.mlp=40"], "config.grow.model.mlp: unknown key of ModelConfig; did you mean 'mlp_dim'?"),
        (["--config.grow.epsilon=drop"], "config.grow.epsilon: 'drop' is not one of 'scale', 'keep'"),
        (["--config.grow.layer=last"], "config.grow.layer: unknown key of GrowStage; did you mean 'layers'?"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--shard", "2/2"], "--shard 2/2: expected I/N with I from 0 to N - 1"),
        (["--shard", "1"], "--shard 1: expected I/N"),
        (["--memory-gb", "0"], "--memory-gb 0: must be above 0"),
        (["--memory-gb", "0.01"], "memory_gb=0.01 is too little for params/"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--json", "nowhere/a.json"], "there is no directory nowhere"),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_written(place, tmp_path, more, message, capsys):
    assert message in grow(place, tmp_path / "dst", *more, code=2, capsys=capsys)
    assert not list(tmp_path.iterdir())


def chunk_bytes(path):
    """Of all files with chunks of the arrays in a checkpoint."""
    arrays = [path / item for item in ("params", "opt_state")]
    files = [f for directory in arrays for f in directory.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files if "c" in f.relative_to(path).parts[2:])


def test_a_dry_run_says_what_the_growth_then_does(place, tmp_path, capsys):
    asked = ("--opt", "--memory-gb", "0.15", "--json", tmp_path / "outline.json")
    before = sorted(place.rglob("*"))
    out = grow(place, tmp_path / "dst", *asked, "--dry-run", capsys=capsys)
    said = json.loads((tmp_path / "outline.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["outline.json"] and sorted(place.rglob("*")) == before
    with without_compiling():
        plan = growth.plan(CFG, CFG.replace(**LARGER))
    assert growth.Plan.from_json(said["plan"]) == plan and str(plan) in out and "nothing was written" in out
    assert f"disk             {said['disk_bytes']:,} bytes needed, {said['free_bytes']:,} free" in out

    done = grow(place, tmp_path / "dst", "--opt", "--memory-gb", "0.15", capsys=capsys)
    assert f"wrote {said['bytes_to_write']:,} bytes" in done
    assert said["bytes_to_write"] == chunk_bytes(tmp_path / "dst")
    # Counts and births are computed from what the plan was made with.
    assert 0.95 * chunk_bytes(place / "src") < said["bytes_to_read"] <= chunk_bytes(place / "src")
    assert receipt_of(tmp_path / "dst")["levels"] == said["verified"]
    assert said["verified"][:3] == ["configs", "parameters", "optimizer state"]


def test_a_growth_of_nothing_is_refused(place, tmp_path, capsys):
    (tmp_path / "page.py").write_text(PAGE.format("model=dict(mlp_dim=12)"))
    err = grow(place, tmp_path / "dst", "--config", tmp_path / "page.py", page=None, code=2, capsys=capsys)
    assert "config.grow.model: nothing grows" in err and not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("model", "flags", "note"),
    [
        (dict(mlp_dim=24), ["--policy", "copy", "--seed", "3"], "--seed 3 has no effect: policy copy draws nothing"),
        (dict(mlp_dim=17), ["--seed", "3"], None),
        (dict(mlp_dim=17), ["--layers", "last"], "--layers last has no effect: the number of layers stays 3"),
        (dict(num_layers=4), ["--layers", "last"], None),
        (dict(mlp_dim=17), ["--text"], "--text has no effect: logits are not compared"),
    ],
)
def test_a_flag_without_effect_is_named(place, by_parts, tmp_path, capsys, model, flags, note):
    (tmp_path / "page.py").write_text(PAGE.format(f"model={model!r}"))
    if flags == ["--text"]:
        (tmp_path / "text").write_text("".join(TEXTS), encoding="utf-8")
        flags = ["--text", tmp_path / "text"]
    flags = ["--config", tmp_path / "page.py", "--dry-run", *flags]
    out = grow(place, tmp_path / "dst", *flags, page=None, capsys=capsys)
    assert ("has no effect" in out) == (note is not None) and (note is None or f"note: {note}" in out)


@pytest.mark.parametrize(
    ("dst", "message"),
    [
        ("/", "'/': names no new directory"),
        ("", "'': names no new directory"),
        (".", "'.': names no new directory"),
        ("{place}/src/params/grown", "lies inside the source {place}/src, which stays as it is"),
        ("{place}/src", "{place}/src: exists already"),
        ("{place}/other/grown", "lies inside the checkpoint {place}/other"),
        ("{place}", "the source {place}/src lies inside this directory"),
        ("{place}/page.py/grown", "{place}/page.py is a file, not a directory"),
    ],
)
def test_a_destination_that_cannot_be_one(place, dst, message, capsys):
    before = sorted(str(path) for path in place.rglob("*"))
    dst, message = (text.replace("{place}", str(place)) for text in (dst, message))
    assert message in grow(place, dst, code=2, capsys=capsys)
    if dst:
        plan = growth.plan(CFG, CFG.replace(**LARGER))
        with pytest.raises(tele.UserError, match=r"exists already|names no new|lies inside|is a file"):
            growth.stream(plan, place / "src", dst)
        assert main(["export", str(place / "src"), dst, "--format", "llama"]) == 2
        assert message in capsys.readouterr().err
    assert sorted(str(path) for path in place.rglob("*")) == before


def test_a_destination_that_exists(place, tmp_path, capsys):
    (tmp_path / "dst").mkdir()
    assert "dst: exists already, and checkpoints are never overwritten" in grow(
        place, tmp_path / "dst", code=2, capsys=capsys
    )
    assert not list((tmp_path / "dst").iterdir()) and len(list(tmp_path.iterdir())) == 1
    err = grow(place, "gs://bucket/dst", code=2, capsys=capsys)
    assert "gs://bucket/dst: growth from checkpoint to checkpoint needs a file system" in err


def test_sources_that_cannot_be_grown(place, tmp_path, capsys):
    page = ["--config", place / "page.py"]
    err = grow(tmp_path, tmp_path / "dst", *page, src="nowhere", page=None, code=2, capsys=capsys)
    assert "nowhere: no such directory; expected a checkpoint or a work directory" in err
    err = grow(place, tmp_path / "dst", "--opt", src="other", code=2, capsys=capsys)
    assert "other: holds no optimizer state to grow; leave out --opt" in err
    masked = {"stage": "grow", "kind": "grow", "mask": 0.25}
    checkpoint.save(tmp_path / "masked", CFG, params_of(CFG), provenance=[masked])
    err = grow(tmp_path, tmp_path / "dst", *page, src="masked", page=None, code=2, capsys=capsys)
    assert "masked: grown behind masks that stand at 0.25; train on until they are 1" in err
    leaves, specs = flatten(params_of(CFG)), flatten(tele.spec(CFG))
    for name in ("final_norm.scale", "layers.attn.q"):
        del leaves[name], specs[name]
    checkpoint.save(tmp_path / "partial", CFG, unflatten(leaves), spec=unflatten(specs))
    for more in ([], ["--layers", "distance"]):
        err = grow(tmp_path, tmp_path / "dst", *page, *more, src="partial", page=None, code=2, capsys=capsys)
        assert "final_norm.scale: missing" in err and "layers.attn.q: missing" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masked", "partial"]


def test_pages_that_say_nothing_of_growth(place, tmp_path, capsys):
    assert "--config FILE is needed: it says what to grow SRC into" in grow(
        place, tmp_path / "dst", page=None, code=2, capsys=capsys
    )
    (tmp_path / "page.py").write_text(PAGE.format("").replace('grow=dict(kind="grow", )', "run=('a',)"))
    err = grow(place, tmp_path / "dst", "--config", tmp_path / "page.py", page=None, code=2, capsys=capsys)
    assert err.rstrip().endswith("page.py: no growth stage")


def test_text_that_cannot_be_verified_on(place, tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "latin: not UTF-8 at byte 3" in grow(
        place, tmp_path / "d", "--text", tmp_path / "latin", code=2, capsys=capsys
    )
    (tmp_path / "short").write_text("a")
    err = grow(place, tmp_path / "d", "--text", tmp_path / "short", code=2, capsys=capsys)
    assert "short: too short to verify on" in err
    err = grow(place, tmp_path / "d", "--text", tmp_path / "short", src="other", code=2, capsys=capsys)
    assert "no tokenizer.model or tokenizer.json in or above it" in err


def test_too_little_disk(place, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    err = grow(place, tmp_path / "dst", code=2, capsys=capsys)
    assert "bytes are to be written, but the disk has only 20,000 free" in err
    assert not list(tmp_path.iterdir())


def test_what_was_begun_otherwise_is_not_finished_as_if_it_was_the_same(place, by_parts, tmp_path, capsys, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(receipts, "_verify_and_name", stop)
        grow(place, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["dst.unverified"]
    err = grow(place, tmp_path / "dst", "--seed", 4, code=2, capsys=capsys)
    assert "dst.unverified: was made by another plan; remove it, or finish it as it was begun" in err
    err = grow(place, tmp_path / "dst", "--opt", code=2, capsys=capsys)
    assert "dst.unverified: was made without --opt; remove it, or finish it as it was begun" in err
    grow(place, tmp_path / "dst", capsys=capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
