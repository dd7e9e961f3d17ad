"""`tele lab`: jobs that are done once, reports from their JSON alone, verdicts by rule, and pages that are refused."""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.lab import exactness, read_study, run, runner
from tele_jax.lab.study import Criterion
from tele_jax.lab.verdict import Estimate, interval, judge, together

ROOT = Path(__file__).parents[2]


def test_e0_is_confirmed_resumed_and_reported_from_its_results_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "e0"
    assert main(["lab", "run", "E0", "--budget", "smoke", "--out", str(out)]) == 0
    found = json.loads((out / "report.json").read_text())
    assert found["verdict"] == "confirmed"
    page, results = (out / "page.md").read_text(), sorted(out.glob("*/*/result.json"))
    assert "**Verdict at the budget `smoke`: confirmed.**" in page and (out / "figure.png").stat().st_size > 5_000
    times = [path.stat().st_mtime_ns for path in results]
    assert len(times) == 4
    results[0].unlink()
    capsys.readouterr()
    assert main(["lab", "report", str(out)]) == 2
    assert "1 of 4 jobs are not done" in capsys.readouterr().err
    assert main(["lab", "run", "E0", "--budget", "smoke", "--out", str(out)]) == 0  # one job is left
    assert [path.stat().st_mtime_ns for path in results[1:]] == times[1:]
    copy = tmp_path / "page.md"
    monkeypatch.chdir(tmp_path)  # without any page of a study
    assert main(["lab", "report", str(out), "--page", str(copy)]) == 0
    assert copy.read_text() == (out / "page.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.seeds=()", "seeds is empty"),
        ("--config.seeds=(1, 1)", "one is named twice"),
        ("--config.kind=exact", "'exact' is no kind of study; did you mean 'exactness'?"),
        ("--config.criteria=()", "without one there is no verdict"),
        ("--config.arms={'a': {'policy': 'stack', 'growth': {'num_layers': 3}}}", "policy stack changes the function"),
        ("--config.arms={'a': {'mistake': 'luck'}}", "config.arms.a.mistake='luck' is no known mistake"),
        ("--config.arms={'a': {'dtyp': 'float32'}}", "config.arms.a.dtyp: unknown key; did you mean 'dtype'?"),
    ],
)
def test_a_page_that_cannot_be_is_refused_in_one_line(change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["lab", "run", "E0", "--out", str(tmp_path / "out"), change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_arms_of_unequal_compute_and_unknown_studies_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tele_jax.lab.exactness.compute", lambda study: {"long": 2e9, "short": 1e9})
    out = str(tmp_path / "out")
    assert main(["lab", "run", "E0", "--out", out, "--config.equal_compute=0.01"]) == 2
    assert "long takes 2e+09 FLOPs and short 1e+09" in capsys.readouterr().err
    assert main(["lab", "run", "E00", "--out", out]) == 2
    assert "did you mean 'E0'?" in capsys.readouterr().err


def test_e5_goes_through_three_stages_and_counts_the_same_flops(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "e5"
    # Three steps more of one arm are no equal compute.
    page = load_page("configs/lab/E5.py:smoke")
    page.arms["from scratch"].config.train.steps += 3
    with pytest.raises(UserError, match=r"more than equal_compute=0\.1 allows"):
        read_study(page)
    assert main(["lab", "run", "E5", "--out", str(out), "--config.seeds=(0,)"]) == 0
    found = {p.parent.parent.name: json.loads(p.read_text())["found"] for p in out.glob("*/*/result.json")}
    grown, scratch = found["even split"], found["from scratch"]
    assert [stage["stage"] for stage in grown["stages"]] == ["small", "medium", "large"]
    assert grown["stages"][-1]["parameters"] == scratch["stages"][0]["parameters"]
    assert 0.9 < grown["flops"] / scratch["flops"] < 1.1 and len(grown["growths"]) == 2
    # Exact growth: the loss before the first step of a stage is that after the last step of the stage before.
    for at in grown["growths"]:
        before, after = [loss for flops, loss in grown["curve"] if math.isclose(flops, at)]
        assert math.isclose(before, after, rel_tol=1e-5)
    goal = scratch["curve"][-1][1]
    share = json.loads((out / "report.json").read_text())["criteria"][0]["values"][0]
    flops, losses = zip(*grown["curve"])
    first = next(i for i, loss in enumerate(losses) if loss <= goal)
    needed = np.interp(-goal, [-losses[first - 1], -losses[first]], [flops[first - 1], flops[first]])
    assert math.isclose(share, needed / scratch["flops"], rel_tol=1e-9)
    assert "one seed" in (out / "page.md").read_text()  # which gives no interval, and confirms nothing
    assert "ConfigDict(" in (out / "even split" / "0" / "page.py").read_text()


def test_results_of_another_study_are_not_mixed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tele_jax.lab.exactness.work", lambda *job: {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main(["lab", "run", "E0", "--out", str(tmp_path / "other")]) == 2
    assert "holds something else than a study" in capsys.readouterr().err
    out = tmp_path / "out"
    study = read_study(load_page("configs/lab/E0.py:smoke"))
    assert run(study, out) == 0
    assert run(dataclasses.replace(study, seeds=(0, 1, 2), title="Other words"), out) == 0  # results stay as they are
    assert len(list(out.glob("*/*/result.json"))) == 6
    with pytest.raises(UserError, match=r"another version of the study \(config.settings differ\)"):
        run(dataclasses.replace(study, settings={}), out)


def test_intervals_and_verdicts_follow_the_rule():
    low, high = interval([1.0, 2.0, 3.0])
    quantile = 4.302652729911275  # of Student's t with 2 degrees of freedom at 0.975, from printed tables
    assert math.isclose(low, 2 - quantile / math.sqrt(3)) and math.isclose(high, 2 + quantile / math.sqrt(3))
    assert interval([1.0]) is None

    def verdict(values, side, at_least=()):
        criterion = Criterion(estimate="x", side=side, threshold=1.0, says="it holds")
        return judge(criterion, Estimate(values, "units", at_least))["verdict"]

    assert verdict([0.5, 0.51, 0.52], "below") == "confirmed"
    assert verdict([0.5, 0.51, 0.52], "above") == "contradicted"
    assert verdict([0.5, 1.0, 1.2], "below") == verdict([0.5], "below") == "not confirmed"
    # A value known from below alone cannot show that it is small.
    assert verdict([0.5, 0.51, 0.52], "below", [False, False, True]) == "not confirmed"
    assert verdict([1.5, 1.51, 1.52], "below", [False, False, True]) == "contradicted"
    assert together(["confirmed", "confirmed"]) == "confirmed"
    assert together(["confirmed", "not confirmed"]) == "not confirmed"
    assert together(["not confirmed", "contradicted"]) == "contradicted"


def test_processes_that_start_at_once_share_a_new_directory(tmp_path):
    study = read_study(load_page("configs/lab/E0.py:smoke"))
    for number in range(40):
        out = tmp_path / str(number)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _, out=out: runner._claim(study, out), range(4)))
        assert {path.name for path in out.iterdir()} == {"study.json", ".lock"}
    (tmp_path / "file").write_text("good")
    with pytest.raises(UserError, match="holds something else than a study"):
        runner._claim(study, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "good"


def test_a_difference_that_is_not_finite_is_no_exact_growth():
    found = {"max_rel": 1e-7, "tolerance": 1e-6, "part_difference": 1e-9, "part_tolerance": 1e-6}
    assert exactness._excess(found) == pytest.approx(0.1)
    for name in ("max_rel", "part_difference"):
        assert exactness._orders(found | {name: None}) == 20
