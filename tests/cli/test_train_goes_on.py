"""`tele train` started again: what may change, what has to be asked for, what is refused; what a run says and leaves.

Runs of a few steps of a tiny model, in this process.
"""

import json
import math
import os
import random
import shutil

import numpy as np
import pytest

from tele_jax import checkpoint
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.data import vocabulary_training
from tele_jax.train import metrics
from tele_jax.train.workdir import require_own

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Its neighbour has what two pages share; it has no table for the mesh, the schedule or sources' rates.
NEIGHBOUR = """
from pathlib import Path
from ml_collections import ConfigDict

HERE = Path(__file__).parent

def stage(**fields):
    model = dict(num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=400, max_seq_len=64)
    model |= dict(dtype="float32", remat="none", mup_base_width=8)
    sources = dict(text=dict(files=(str(HERE / "text.jsonl"),), format="jsonl"))
    data = dict(tokenizer=str(HERE / "tokenizer.model"), sources=sources)
    optimizer = dict(learning_rate=1e-3, matrix_learning_rate=4e-3)
    every = dict(log_every=1, checkpoint_every=4, keep_checkpoints=10)
    shape = dict(steps=12, batch_size=4, seq_len=16)
    return dict(kind="pretrain", model=model, data=data, optimizer=optimizer) | shape | every | fields
"""
PAGE = """
from ml_collections import ConfigDict
from shared_by_pages import stage

def get_config():
    return ConfigDict(dict(run=("only",), only=stage()))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("goes_on")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(60)]
    texts = [f"{i} {' '.join(rng.choices(words, k=rng.randint(2, 12)))}" for i in range(60)]
    trained = vocabulary_training.train_vocabulary(texts, preset="tele_flm", vocab_size=400)
    vocabulary_training.write_vocabulary(trained, directory / "tokenizer.model", preset="tele_flm")
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:15]))
    (directory / "shared_by_pages.py").write_text(NEIGHBOUR)
    (directory / "page.py").write_text(PAGE)
    return directory


def train(place, workdir, *flags, page="page.py"):
    return main(["train", "--config", str(place / page), "--workdir", str(workdir), *flags])


@pytest.fixture(scope="module")
def finished(place):
    assert train(place, place / "finished") == 0
    return place / "finished"


def copy(finished, tmp_path, *, last=12):
    """The work directory as a kill after the checkpoint of step `last` leaves it."""
    workdir = tmp_path / "w"
    shutil.copytree(finished, workdir)
    for path in (workdir / "only/checkpoints").iterdir():
        if int(path.name) > last:
            shutil.rmtree(path)
    if last < 12:
        (workdir / "only/summary.json").unlink()
    return workdir


def fails(capsys, code, *arguments, **how):
    capsys.readouterr()
    assert train(*arguments, **how) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def lines_of(workdir, stage="only"):
    return metrics.read(workdir / stage / "metrics" / "metrics.jsonl")


def same_parameters(workdir, other, atol):
    ours, theirs = (flatten(checkpoint.load(w).params) for w in (workdir, other))
    for name, value in theirs.items():
        np.testing.assert_allclose(np.asarray(ours[name]), np.asarray(value), rtol=0, atol=atol, err_msg=name)


def test_what_a_kill_leaves_goes_on_to_the_same_bits_in_any_epoch(place, finished, tmp_path):
    workdir = copy(finished, tmp_path, last=4)
    assert train(place, workdir) == 0
    ours, theirs = (checkpoint.load(w) for w in (workdir, finished))
    assert json.loads(theirs.data_state)["positions"]["text"]["next"] > 30, "more than two epochs of 15 documents"
    assert ours.data_state == theirs.data_state
    same_parameters(workdir, finished, 0)
    figures = [[(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(w)] for w in (workdir, finished)]
    assert figures[0] == figures[1]


def test_it_goes_on_with_all_that_is_not_part_of_what_is_computed(place, finished, tmp_path, capsys):
    """Text and tokenizer elsewhere, parts of the batch, mesh, remat, attention, cadence and evaluation."""
    workdir = copy(finished, tmp_path, last=8)
    for name in ("text.jsonl", "tokenizer.model", "page.py", "shared_by_pages.py"):
        shutil.copyfile(place / name, tmp_path / name)
    flags = ["--config.mesh.fsdp=2", "--config.only.microbatches=2", "--config.only.model.remat=full"]
    flags += ["--config.only.model.attention=reference", "--config.only.log_every=2", "--config.only.eval_every=3"]
    (tmp_path / "held_out.jsonl").write_text('{"text": "0 abc def"}\n' * 9)
    flags += [f"--config.only.data.sources.text.validation_files=({str(tmp_path / 'held_out.jsonl')!r},)"]
    flags += ["--config.only.data.eval_bytes=500", "--config.only.keep_checkpoints=3"]
    assert train(tmp_path, workdir, *flags) == 0
    assert "goes on at step 8 of 12: parameters, optimizer and data as they were" in capsys.readouterr().out
    same_parameters(workdir, finished, 1e-5)
    assert checkpoint.open_lazy(workdir).data_state() == checkpoint.open_lazy(finished).data_state()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (
            "optimizer.learning_rate=2e-3",
            "optimizer.learning_rate was 0.001, is 0.002; --from STEP (from_step) changes it",
        ),
        (
            "steps=16",
            "steps was 12, is 16; the schedule follows the length of the stage; --config.only.schedule.total=12 keeps",
        ),
        ("batch_size=8", "batch_size was 4, is 8; use another work directory"),
        ("model.mlp_dim=32", "model.mlp_dim was 24, is 32; use another work directory"),
        ("model.dtype=bfloat16", "model.dtype was 'float32', is 'bfloat16'"),
        ("data.sources.text.rate=2", "data.sources.text.rate was 1.0, is 2.0"),
        ("seed=1", "seed was 0, is 1"),
    ],
)
def test_what_changes_the_mathematics_unasked_is_refused(place, finished, tmp_path, capsys, flag, expected):
    workdir = copy(finished, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}
    assert expected in fails(capsys, 2, place, workdir, f"--config.only.{flag}")
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}


def test_other_text_under_the_same_path_is_refused(place, finished, tmp_path, capsys):
    workdir = copy(finished, tmp_path, last=8)
    other = tmp_path / "text.jsonl"
    other.write_text((place / "text.jsonl").read_text().replace("a", "b", 1))
    line = fails(capsys, 2, place, workdir, f"--config.only.data.sources.text.files=({str(other)!r},)")
    assert "saved for another feed: sources.text.checksum was" in line


def test_more_steps_where_the_schedule_stays_as_it_is(place, finished, tmp_path):
    workdir = copy(finished, tmp_path)
    flags = ["--config.only.steps=14", "--config.only.schedule.total=12"]
    assert train(place, workdir, *flags) == 0
    assert [line["step"] for line in lines_of(workdir)] == list(range(1, 15))
    assert lines_of(workdir)[:12] == lines_of(finished)
    lazy = checkpoint.open_lazy(workdir)
    assert lazy.step == 14 and json.loads((workdir / "only/summary.json").read_text())["steps"] == 14
    assert lazy.provenance[-1]["changes"] == [{"from": 12, "config": {"steps": [12, 14]}}]
    assert train(place, workdir, *flags) == 0, "and started again it is done"


def test_a_lower_rate_from_an_earlier_checkpoint_on(place, finished, tmp_path, capsys):
    workdir = copy(finished, tmp_path)
    lower = ("--config.only.optimizer.learning_rate=1e-4", "--config.only.optimizer.matrix_learning_rate=1e-4")
    missing = fails(capsys, 2, place, workdir, *lower, "--from", "5")
    assert "--from 5 (from_step): no such checkpoint; the last stage that has begun, only, has 4, 8, 12" in missing
    assert "batch_size was 4, is 8" in fails(capsys, 2, place, workdir, "--config.only.batch_size=8", "--from", "8")
    assert train(place, workdir, *lower, "--from", "8") == 0
    out = capsys.readouterr().out
    assert "stage only goes on from step 8: config.only.optimizer.learning_rate was 0.001, is 0.0001;" in out
    assert sorted(path.name for path in (workdir / "only/set_aside/1").iterdir()) == ["12", "metrics.jsonl"]
    set_aside = checkpoint.load(workdir / "only/set_aside/1/12").params
    np.testing.assert_array_equal(
        flatten(set_aside)["embed.table"], flatten(checkpoint.load(finished).params)["embed.table"]
    )
    ours, theirs = lines_of(workdir), lines_of(finished)
    assert ours[:8] == theirs[:8] and [line["step"] for line in ours] == list(range(1, 13))
    for mine, other in zip(ours[8:], theirs[8:], strict=True):
        assert mine["learning_rate"] == pytest.approx(0.1 * other["learning_rate"])
        assert mine["matrix_learning_rate"] == pytest.approx(1e-4 / 4e-3 * other["matrix_learning_rate"])
    assert ours[8]["loss"] == theirs[8]["loss"] and ours[11]["loss"] != theirs[11]["loss"]
    entry = checkpoint.open_lazy(workdir).provenance[-1]
    assert entry["changes"][0]["from"] == 8
    assert entry["changes"][0]["config"]["optimizer.learning_rate"] == [1e-3, 1e-4]
    # A launcher repeats the command that it was given: what is done is not done again, whatever is left of it.
    shutil.rmtree(workdir / "only/checkpoints/8")
    stamp = (workdir / "only/checkpoints/12/meta/meta.json").stat().st_mtime_ns
    assert train(place, workdir, *lower, "--from", "8") == 0
    assert "--from 8 (from_step) was done by an earlier start" in capsys.readouterr().out
    assert stamp == (workdir / "only/checkpoints/12/meta/meta.json").stat().st_mtime_ns
    assert "no run yet" in fails(capsys, 2, place, tmp_path / "new", "--from", "8") and not (tmp_path / "new").exists()


def test_a_run_from_a_checkpoint_goes_on_in_its_data(place, finished, tmp_path, capsys):
    """And says what it takes over; data.restart says otherwise."""
    page = (place / "page.py").read_text().replace("stage()", "stage(model=None, steps=2, batch_size=6, seed=5)")
    (place / "from.py").write_text(page)
    start = f"--config.start={str(finished)!r}"
    position = checkpoint.open_lazy(finished).provenance[-1]["data"]["positions"]["text"]
    assert position["next"] > 30, "more than two epochs of 15 documents"
    assert train(place, tmp_path / "a", start, page="from.py") == 0
    out = capsys.readouterr().out
    assert f"takes over parameters and optimizer state from {finished}; begins at step 0, as its schedule" in out
    assert f"data: goes on with text at document {position['next']:,} (" in out
    now = checkpoint.open_lazy(tmp_path / "a").provenance[-1]["data"]["positions"]["text"]
    assert now["next"] > position["next"] and now["seed"] == 0
    shutil.copytree(finished, tmp_path / "moved")
    moved, other = (f"--config.start={str(tmp_path / 'moved' / end)!r}" for end in ("", "only/checkpoints/8"))
    assert train(place, tmp_path / "a", moved, page="from.py") == 0, "the same checkpoint in another place"
    assert "config.start was" in fails(capsys, 2, place, tmp_path / "a", other, page="from.py")
    (tmp_path / "text.jsonl").write_text((place / "text.jsonl").read_text() * 2)
    longer = f"--config.only.data.sources.text.files=({str(tmp_path / 'text.jsonl')!r},)"
    assert train(place, tmp_path / "c", start, longer, page="from.py") == 0
    assert "data: begins text (an earlier stage read other content under this name)" in capsys.readouterr().out
    assert train(place, tmp_path / "b", start, "--config.only.data.restart=True", page="from.py") == 0
    assert "data: begins text" in capsys.readouterr().out
    again = checkpoint.open_lazy(tmp_path / "b").provenance[-1]["data"]["positions"]["text"]
    assert again["next"] < position["next"] and again["seed"] == 5


def test_a_stage_without_a_model_says_how_it_is_computed(place, finished, tmp_path, capsys):
    page = (place / "page.py").read_text().replace("stage()", "stage(model=None, steps=2)")
    (place / "computed.py").write_text(page)
    start = f"--config.start={str(finished)!r}"
    assert train(place, tmp_path / "a", start, page="computed.py") == 0
    how = ["--config.only.remat=full", "--config.only.attention=reference"]
    assert train(place, tmp_path / "b", start, *how, page="computed.py") == 0
    as_before, otherwise = (checkpoint.load(tmp_path / name) for name in "ab")
    assert (as_before.cfg.remat, otherwise.cfg.remat, otherwise.cfg.attention) == ("none", "full", "reference")
    for name, leaf in flatten(as_before.params).items():
        np.testing.assert_allclose(leaf, flatten(otherwise.params)[name], rtol=1e-5, atol=1e-6)
    assert train(place, tmp_path / "b", start, "--config.only.remat=products", page="computed.py") == 0, (
        "free to change"
    )
    assert "remat" in fails(capsys, 2, place, tmp_path / "c", start, "--config.only.remat=half", page="computed.py")


def test_a_line_has_the_mean_since_the_last_one_and_both_rates(place, finished, tmp_path, capsys):
    flags = ["--config.only.log_every=3", "--config.only.checkpoint_every=12"]
    assert train(place, tmp_path / "w", *flags) == 0
    every, some = lines_of(finished), lines_of(tmp_path / "w")
    assert [line["step"] for line in some] == [3, 6, 9, 12]
    for line in some:
        part = [other for other in every if line["step"] - 3 < other["step"] <= line["step"]]
        weights = np.diff([0, *(other["tokens"] for other in every)])[line["step"] - 3 : line["step"]]
        mean = sum(other["loss"] * w for other, w in zip(part, weights, strict=True)) / weights.sum()
        assert line["loss"] == pytest.approx(mean, rel=1e-6)
        assert line["tokens"] == part[-1]["tokens"] and line["grad_norm"] == pytest.approx(
            part[-1]["grad_norm"], rel=1e-5
        )
        factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (line["step"] - 1) / 12))  # cosine to a tenth
        assert line["learning_rate"] == pytest.approx(1e-3 * factor, rel=1e-5)
        assert line["matrix_learning_rate"] == pytest.approx(4e-3 / 2 * factor, rel=1e-5)  # width 16 at base 8
        assert line["model_flops_per_second"] > 0 and "mfu" not in line, "nobody publishes the peak of this CPU"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  step 12/12: loss ")]
    assert len(said) == 1
    for word in ("gradient norm", "rates 1.", " and 2.", "tokens/s", "model FLOP/s", "ends in 0:00:00"):
        assert word in said[0]


@pytest.mark.parametrize("saved", [False, True], ids=["before any checkpoint", "after one"])
def test_a_loss_that_is_not_finite_ends_the_run_at_the_first_line(place, finished, tmp_path, capsys, saved):
    workdir = copy(finished, tmp_path, last=4) if saved else tmp_path / "w"
    flags = ["--config.only.log_every=2", "--config.only.checkpoint_every=1000"]
    flags += ["--config.only.optimizer.learning_rate=1e30", "--config.only.optimizer.matrix_learning_rate=1e30"]
    line = fails(capsys, 1, place, workdir, *flags, *(["--from", "4"] if saved else []))
    first = 6 if saved else 2
    assert f"at step {first}; " in line or f"at step {first + 1}; " in line
    expected = f"the last checkpoint is that of step 4, in {workdir}/only/checkpoints" if saved else "no checkpoint yet"
    assert expected in line
    text = (workdir / "only/metrics/metrics.jsonl").read_text().splitlines()
    values = [json.loads(each, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for each in text]
    bad = [value["step"] for value in values if None in value.values()]
    assert len(bad) == 1 and bad[0] == values[-1]["step"] <= first + 2
    assert math.isnan(lines_of(workdir)[-1]["grad_norm"]) or math.isnan(lines_of(workdir)[-1]["loss"])
    assert checkpoint.locate.list_steps(workdir / "only/checkpoints") == ([4] if saved else [])


@pytest.mark.parametrize("below", ["new", "only/new", "only/checkpoints/13", "only/checkpoints/12/params/new"])
def test_a_directory_inside_another_run_or_a_checkpoint_is_refused(place, finished, capsys, below):
    before = sorted(finished.rglob("*"))
    assert train(place, finished / below) == 2
    error = capsys.readouterr().err
    assert f"{finished / below}: lies inside" in error and "give a directory elsewhere" in error
    assert sorted(finished.rglob("*")) == before


def test_a_schedule_that_cannot_be_names_its_stage(place, tmp_path, capsys):
    assert train(place, tmp_path / "w", "--config.only.schedule.warmup=12") == 2
    assert "config.only.schedule: warmup 12 is not below the total of 12 steps" in capsys.readouterr().err


@pytest.mark.parametrize("holds", ["files", "a checkpoint", "a config of something else", "a file"])
def test_a_directory_that_holds_anything_else_is_refused(place, finished, tmp_path, capsys, holds):
    workdir = tmp_path / "mine"
    if holds == "a file":
        workdir.write_text("mine")
    elif holds == "a checkpoint":
        shutil.copytree(finished / "only/checkpoints/12", workdir)
    else:
        workdir.mkdir()
        for name in ("summary.txt", "loss.png"):
            (workdir / name).write_text("mine")
        if holds == "a config of something else":
            (workdir / "config.json").write_text('{"model_type": "llama", "run": 5}')
    before = {p: p.read_bytes() for p in [workdir, *workdir.rglob("*")] if p.is_file()}
    line = fails(capsys, 2, place, workdir)
    assert str(workdir) in line and ("give a new or an empty directory" in line or "is not a directory" in line)
    assert before == {p: p.read_bytes() for p in [workdir, *workdir.rglob("*")] if p.is_file()}


@pytest.mark.parametrize(
    "left", ["config.tmp", ".config.json.tele_jax.tmp"], ids=["by the version before", "by this one"]
)
def test_a_directory_whose_first_start_was_killed_is_taken(tmp_path, left):
    (tmp_path / left).write_text("{")
    require_own(tmp_path, None)


def test_a_damaged_document_of_a_run_is_named(place, finished, tmp_path, capsys):
    workdir = copy(finished, tmp_path)
    for name, text in (("only/changes.json", '{"changes": [5]}'), ("config.json", '{"run": ["on')):
        (workdir / name).write_text(text)
        line = fails(capsys, 1, place, workdir, *(["--from", "8"] if name != "config.json" else []))
        assert f"{workdir}/{name}: " in line and "damaged" in line


def test_a_config_that_cannot_be_leaves_an_empty_directory_empty(place, tmp_path, capsys):
    for workdir in (tmp_path / "new", tmp_path / "there"):
        if workdir.name == "there":
            workdir.mkdir()
        fails(capsys, 2, place, workdir, "--config.only.steps=0")
        fails(capsys, 2, place, workdir, "--config.only.seq_len=9999")
        assert not workdir.exists() or os.listdir(workdir) == []


def test_an_empty_name_is_no_work_directory(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "an empty name is no directory" in fails(capsys, 2, place, "")
    assert os.listdir(tmp_path) == []


def test_pages_may_have_neighbours_of_one_name(tmp_path):
    from tele_jax.cli.pages import load_page

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.py").write_text(
            "from ml_collections import ConfigDict\nimport tele_test_values\n"
            "def get_config():\n    import tele_test_later\n"
            "    return ConfigDict(dict(a=tele_test_values.A, b=tele_test_later.B))\n"
        )
        (tmp_path / name / "tele_test_values.py").write_text(f"A = {name!r}")
        (tmp_path / name / "tele_test_later.py").write_text(f"B = {name!r}")
    for name in ("one", "two", "two", "one"):
        page = load_page(str(tmp_path / name / "page.py"))
        assert (page.a, page.b) == (name, name)


def test_a_flag_makes_the_tables_that_lead_to_it(tmp_path, capsys):
    from tele_jax.cli.pages import load_page
    from tele_jax.errors import UserError

    page = tmp_path / "page.py"
    page.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict(dict(a=1, b=None))\n")
    made = load_page(str(page), ["--config.mesh.fsdp=8", "--config.b.c.d='x'", "--config.b.c.e=2"])
    assert made.to_dict() == {"a": 1, "b": {"c": {"d": "x", "e": 2}}, "mesh": {"fsdp": 8}}
    with pytest.raises(UserError, match=r"config\.a is a value, not a table"):
        load_page(str(page), ["--config.a.b=1"])
    # The page of a run has stages: a mistyped one would be a table that nobody reads.
    page.write_text(page.read_text().replace("a=1, b=None", "run=('only',), only=dict(steps=1)"))
    assert load_page(str(page), ["--config.mesh.fsdp=8"]).mesh.fsdp == 8
    with pytest.raises(UserError, match=r"the page has no table config\.onyl; did you mean 'only'\?"):
        load_page(str(page), ["--config.onyl.steps=2"])


def test_a_stage_that_has_not_begun_may_change_and_one_that_has_may_not_go(place, finished, tmp_path, capsys):
    workdir = copy(finished, tmp_path)
    (place / "two.py").write_text(
        PAGE.replace('("only",)', '("only", "then")').replace(
            "only=stage()", "only=stage(), then=stage(model=None, steps=2)"
        )
    )
    flags = ["--config.then.steps=1", "--config.then.schedule.kind=constant"]
    assert train(place, workdir, *flags, page="two.py") == 0  # a stage is added
    assert [entry["stage"] for entry in checkpoint.open_lazy(workdir).provenance] == ["only", "then"]
    assert "config.run was ['only', 'then'], is ['only'], and only, then have begun" in fails(capsys, 2, place, workdir)
    line = fails(capsys, 2, place, workdir, *flags, "--config.only.steps=13", page="two.py")
    assert "config.only.steps was 12, is 13" in line and "--from" not in line, "another stage was made from it"
    shutil.rmtree(workdir / "then")
    assert train(place, workdir, "--config.then.steps=3", page="two.py") == 0
    out = capsys.readouterr().out
    assert "stage then has not begun, and changes: config.then.schedule.kind was 'constant', is 'cosine'; " in out
    assert checkpoint.open_lazy(workdir).step == 3


# ---- from a growth behind masks ----------------------------------------------------------------------------------

GROWTH = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(policy="msg", model=dict(mlp_dim=40, num_layers=2)))
"""
FROM_START = """
from ml_collections import ConfigDict
from shared_by_pages import stage

def get_config():
    only = stage(mask_ramp=8)
    del only["model"]
    return ConfigDict(dict(run=("only",), only=only, start="nowhere"))
"""


@pytest.fixture(scope="module")
def behind_masks(place, finished):
    """A checkpoint that `tele grow --policy msg` made."""
    (place / "growth.py").write_text(GROWTH)
    (place / "from_start.py").write_text(FROM_START)
    dst = place / "behind_masks"
    assert main(["grow", str(finished), str(dst), "--config", str(place / "growth.py"), "--opt"]) == 0
    return dst


def test_a_run_opens_the_masks_of_the_growth_that_it_starts_from(place, behind_masks, tmp_path, capsys):
    start = f"--config.start={behind_masks}"
    assert train(place, tmp_path / "w", start, page="from_start.py") == 0
    steps = tmp_path / "w" / "only" / "checkpoints"
    stand = {int(p.name): checkpoint.open_lazy(p).provenance[-1]["mask"] for p in steps.iterdir()}
    assert stand == {4: 0.5, 8: None, 12: None}
    # What a kill in the middle of the ramp leaves.
    workdir = tmp_path / "killed"
    shutil.copytree(tmp_path / "w", workdir)
    for step in (8, 12):
        shutil.rmtree(workdir / "only" / "checkpoints" / str(step))
    (workdir / "only" / "summary.json").unlink()
    capsys.readouterr()
    assert train(place, workdir, start, page="from_start.py") == 0
    assert "goes on at step 4 of 12" in capsys.readouterr().out
    ours, theirs = (checkpoint.load(w / "only") for w in (workdir, tmp_path / "w"))
    for tree in ("params", "opt_state"):
        ours_flat, theirs_flat = flatten(getattr(ours, tree)), flatten(getattr(theirs, tree))
        assert ours_flat.keys() == theirs_flat.keys()
        for name in ours_flat:
            np.testing.assert_array_equal(np.asarray(ours_flat[name]), np.asarray(theirs_flat[name]), err_msg=name)
    # New units have counted their own steps: the masks left those of step 0 without gradient.
    assert np.asarray(theirs.opt_state["1"]["born"]["mlp"]).max() == 13


@pytest.mark.parametrize(
    ("start", "flags", "message"),
    [
        ("behind_masks", ["--config.only.mask_ramp=0"], "config.only.mask_ramp: has to be above 0: config.start="),
        ("finished", [], "config.only.mask_ramp: config.start="),
    ],
)
def test_masks_are_opened_where_they_are_and_nowhere_else(place, behind_masks, tmp_path, capsys, start, flags, message):
    code = train(place, tmp_path / "w", f"--config.start={place / start}", *flags, page="from_start.py")
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_closed_masks_are_said_and_their_plan_is_needed(place, behind_masks, tmp_path, capsys):
    assert main(["inspect", str(behind_masks)]) == 0
    assert "masks            closed: " in capsys.readouterr().out
    moved = shutil.copytree(behind_masks, tmp_path / "moved")
    (moved / "plan.json").unlink()
    assert train(place, tmp_path / "w", f"--config.start={moved}", page="from_start.py") == 2
    assert "its masks are closed, and plan.json" in capsys.readouterr().err
    shutil.copy(place / "behind_masks" / "plan.json", moved)
    plan = json.loads((moved / "plan.json").read_text()) | {"seed": 9}
    (moved / "plan.json").write_text(json.dumps(plan))
    assert train(place, tmp_path / "w", f"--config.start={moved}", page="from_start.py") == 2
    assert "was made by another plan" in capsys.readouterr().err


def test_a_page_with_narrow_parameters_is_told_that_they_are_trained_wider(place, tmp_path, capsys):
    flags = [
        "--config.only.model.param_dtype=bfloat16",
        "--config.only.steps=1",
        "--config.only.schedule.kind=constant",
    ]
    assert train(place, tmp_path / "w", *flags) == 0
    assert "parameters are bfloat16, and are trained and saved in float32" in capsys.readouterr().out
    assert checkpoint.open_lazy(tmp_path / "w").cfg.param_dtype == "float32"
