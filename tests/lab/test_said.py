"""What the laboratory says and refuses: rounding, extrapolation, settings that a study makes itself, flags."""

import math
from pathlib import Path

import numpy as np
import pytest

from tele_jax import files
from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.lab import forgetting, read_study
from tele_jax.lab.mup.transfer import write_page
from tele_jax.lab.verdict import Estimate, figures, shown
from tests.lab.test_forgetting import branch

ROOT = Path(__file__).parents[2]


def study_of(name, budget, *changes):
    return read_study(load_page(f"{ROOT}/configs/lab/{name}.py:{budget}", [f"--config.{change}" for change in changes]))


def test_rounding_is_shown_as_0_and_small_figures_as_they_are():
    third = 100 * (0.1 + 0.2 - 0.3)  # 5.6e-15
    assert shown(figures(Estimate([1.0, -1.0 + 1e-16], "nats"))) == "0 [-12.71, 12.71]"
    assert shown(figures(Estimate([-0.0], "nats"))) == "0, one seed"
    assert shown(figures(Estimate([third], "percent", size=100.0))) == "0, one seed"
    assert shown(figures(Estimate([third, third], "of the largest logit"))) == "5.551e-15 [5.551e-15, 5.551e-15]"


@pytest.mark.parametrize("share", [-1.0, float("nan"), float("inf")])
def test_an_equal_compute_that_is_no_share_is_refused(share):
    page = load_page(f"{ROOT}/configs/lab/E5.py:smoke")
    page.equal_compute = share
    with pytest.raises(UserError, match=r"config: equal_compute=.*: has to be a share of 0 or more, such as 0\.02"):
        read_study(page)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data=3", "data: leave it out; settings.new names the domains"),
        ("seed=1", "seed: leave it out; config.seeds gives those of the jobs"),
        ("after='end_1'", "after: leave it out; every branch of an arm is fine-tuned"),
        (
            "optimizer={'learning_rate': 0.1}",
            "optimizer.learning_rate: leave it out; settings.learning_rates lists those that are tried",
        ),
    ],
)
def test_what_a_study_sets_in_fine_tuning_is_refused_in_its_settings(change, message):
    with pytest.raises(UserError) as raised:
        study_of("E9", "smoke", f"settings.tuning.{change}")
    assert f"config.settings.tuning.{message}" in str(raised.value) and "\n" not in str(raised.value)


def test_a_loss_beyond_all_branches_from_scratch_is_said_to_be_extrapolated():
    study = study_of("E9", "cpu", "seeds=(0, 1)")
    gained = np.array([0.5, 1.0, 2.0, 1.5])
    first, last = branch(3.5, 6.0, [0.2] * 4, gained), branch(3.0, 5.8, [0.1] * 4, gained)
    losses = {"grown on all axes": (3.25, 3.0), "stacked": (2.5, 3.6), "from scratch, rate of grown": (3.5, 2.9)}
    results = {"from scratch": {seed: {"branches": [first, last]} for seed in (0, 1)}}
    for arm, at in losses.items():
        results[arm] = {seed: {"branches": [branch(at[seed], 5.9, [0.1] * 4, gained)]} for seed in (0, 1)}
    found = forgetting.estimates(study, {arm: results[arm] for arm in study.arms})
    beyond = {arm: list(found[f"forgetting at equal loss: {arm}"].extrapolated) for arm in losses}
    assert list(beyond.values()) == [[False, False], [True, True], [False, True]]
    assert not any(found[f"forgetting at equal gain: {arm}"].extrapolated for arm in losses)
    _, rows = forgetting.rows(study, {arm: results[arm] for arm in study.arms})
    said = {row[0]: row[-1].partition("extrapolated in ")[2] for row in rows}
    assert said == {
        "from scratch": "", "grown on all axes": "", "stacked": "2 of 2 seeds",
        "from scratch, rate of grown": "1 of 2 seeds",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depths", "0"], "--depths 0: depths=(0,): a coordinate check needs at least four"),
        (["--depths", "0,2,4,8"], "--depths 0,2,4,8: layers=0 must be above 0"),
        (["--widths", "64,100,128,256"], "--widths 64,100,128,256: width=100: num_heads=4 at width 64 would be no"),
    ],
)
def test_sizes_of_a_coordinate_check_that_cannot_be_are_named_with_their_flag(words, message, capsys):
    assert main(["mup", "coords", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_page_of_a_transferred_setting_says_its_depth(tmp_path):
    source = {"files": ["text"]}
    stage = {"kind": "pretrain", "steps": 2, "batch_size": 1, "seq_len": 8, "optimizer": {"learning_rate": 0.01}}
    stage |= {"model": dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=432, mup_base_width=16)}
    stage |= {"data": {"tokenizer": "t", "sources": {"a": source}}}
    run, trial = {"run": ["proxy"], "proxy": stage}, tmp_path / "search" / "trials" / "0"
    trial.mkdir(parents=True)
    files.write_json(tmp_path / "search" / "search.json", {"search": {}, "run": run})
    files.write_json(trial / "result.json", {"number": 0, "values": {"output_mult": 2.0}, "value": 1.0})
    write_page(tmp_path / "search", 32, tmp_path / "wide.py")
    write_page(tmp_path / "search", 32, tmp_path / "deep.py", layers=6)
    lines = [(tmp_path / name).read_text().splitlines()[0] for name in ("wide.py", "deep.py")]
    assert "at width 32: output_mult 2" in lines[0] and "at width 32 and 6 layers: output_mult 2" in lines[1]


def test_a_value_that_is_not_finite_is_not_shown_as_rounding():
    assert figures(Estimate([math.inf], "percent"))["mean"] == math.inf
    assert figures(Estimate([math.inf, 1.0, 2.0], "percent"))["mean"] == math.inf
    assert figures(Estimate([1e-18, -2e-18], "percent", size=1.0))["mean"] == 0
