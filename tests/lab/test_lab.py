"""`tele lab`: jobs that are done once, reports from their JSON alone, verdicts by rule, and pages that are refused."""

import contextlib
import dataclasses
import json
import math
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tele_jax import ModelConfig, files
from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.lab import arms, exactness, paths, read_study, run, runner
from tele_jax.lab import report as lab_report
from tele_jax.lab.study import BUDGETS, Criterion
from tele_jax.lab.verdict import Estimate, interval, judge, together
from tele_jax.train import metrics
from tele_jax.train.step import flops_per_token

ROOT = Path(__file__).parents[2]
# Stages of arms that are refused.
SHAPE = {"batch_size": 2, "seq_len": 8, "optimizer": {"learning_rate": 0.1}}
SHORT, EPOCHS = {"kind": "pretrain", "steps": 2} | SHAPE, {"kind": "sft", "epochs": 2} | SHAPE
MODEL = {"model": {"num_layers": 1, "embed_dim": 8, "num_heads": 1, "mlp_dim": 8, "vocab_size": 500}}
GROW = {"kind": "grow", "model": {"num_layers": 2}}


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
        ("--config.budget=cpu", "is a page of budget 'cpu'; --budget smoke chooses another"),
        ("--config.settings={'modle': {}}", "config.settings.modle: unknown key; did you mean 'model'?"),
        ("--config.settings={'model': 3}", "config.settings.model=3 is no table"),
        ("--config.arms={'a': {'growth': 3}}", "config.arms.a.growth=3 is no table"),
        ("--config.arms={'a': {'growth': {'embed_dim': 20}, 'policy': 3}}", "config.arms.a"),
        ("--config.arms={'a': {'growth': {'embed_dim': 20}}}", "config.criteria: there is no estimate 'least mistake'"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("settings.baseline=none", "config.settings.baseline='none' is no arm"),
        ("settings.data=3", "config.settings.data=3: expected a table of data"),
        ("settings.data={'vocab_size': '9', 'sources': {}}", "config.settings.data.vocab_size"),
        ("settings.tuning=3", "config.settings.tuning: unknown key; did you mean 'tuning_seed'?"),
        ("arms.a={'config': 3}", "config.arms.a: config: missing"),
        ("arms.a={'config': {}}", "config.arms.a: config.run: missing"),
        ("arms.a={'confg': {}}", "config.arms.a.confg: unknown key; did you mean 'config'?"),
        ("arms.a={'config': {}, 'baseline': 'b'}", "config.arms.a.baseline='b' is no arm of the study that is its own"),
        ("arms.a={'config': {}, 'learning_rates': 3}", "config.arms.a: learning_rates"),
        ("settings.tuning_seed=0", "config.settings.tuning_seed=0: learning_rates are chosen at a seed apart"),
        ("arms.a={'config': {'run': ['x'], 'x': {'kind': 'pretrain', 'optimizer': 3}}}", "config.arms.a: config.x"),
        (
            f"arms.a={{'config': {{'start': 'c', 'run': ['g', 'x'], 'g': {GROW}, 'x': {SHORT}}}}}",
            "a: config.start: leave",
        ),
        (f"arms.a={{'config': {{'start': 'c', 'run': ['x'], 'x': {SHORT}}}}}", "config.arms.a: config.start: leave it"),
        (f"arms.a={{'config': {{'run': ['x', 'y'], 'x': {SHORT | MODEL}, 'y': {EPOCHS}}}}}", "config.y.epochs: FLOPs"),
    ],
)
def test_paths_that_cannot_be_are_refused_in_one_line(change, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = load_page("configs/lab/E5.py:smoke", ["--config.settings.tuning_seed=100", f"--config.{change}"])
    with page.unlocked():
        page.arms["from scratch"].learning_rates = (0.1,)
    with pytest.raises(UserError) as raised:
        read_study(page)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_arms_of_unequal_compute_and_unknown_studies_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tele_jax.lab.exactness.compute", lambda study: {"long": 2e9, "short": 1e9})
    out = str(tmp_path / "out")
    assert main(["lab", "run", "E0", "--out", out, "--config.equal_compute=0.01"]) == 2
    assert "long takes 2e+09 FLOPs and short 1e+09" in capsys.readouterr().err
    assert main(["lab", "run", "E00", "--out", out]) == 2
    assert "did you mean 'E0'?" in capsys.readouterr().err


def test_e5_grows_at_equal_compute_and_reports_finished_branches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "e5"
    # Three steps more of one arm are no equal compute.
    page = load_page("configs/lab/E5.py:smoke")
    page.arms["from scratch"].config.end_1.steps += 3
    with pytest.raises(UserError, match=r"more than equal_compute=0\.1 allows"):
        read_study(page)
    change = "--config.title=It's a title"
    assert main(["lab", "run", "E5", "--out", str(out), change]) == 0
    found = {p.parent.parent.name: json.loads(p.read_text())["found"] for p in out.glob("*/*/result.json")}
    grown, scratch = found["our split"], found["from scratch"]
    assert [stage["stage"] for stage in grown["stages"]] == ["first_1", "end_1"]
    assert grown["stages"][-1]["parameters"] == scratch["stages"][0]["parameters"]
    assert 0.9 < grown["flops"] / scratch["flops"] < 1.1 and len(grown["growths"]) == 1
    # Exact growth: the loss before the first step of a stage is that after the last step of the stage before.
    for at in grown["growths"]:
        before, after = [loss for flops, loss in grown["curve"] if math.isclose(flops, at)]
        assert math.isclose(before, after, rel_tol=1e-5)
    assert scratch["branches"] == [scratch["curve"][-1]] and grown["branches"] == [grown["curve"][-1]]
    page = (out / "page.md").read_text()
    assert "one seed" in page  # which gives no interval, and confirms nothing
    command = next(line for line in page.splitlines() if line.startswith("    tele"))
    assert shlex.split(command) == ["tele", "lab", "run", "E5", "--budget", "smoke", change]
    assert "ConfigDict(" in (out / "our split" / "0" / "page.py").read_text()


def branched(ends, depths=(1, 4), rates=(), rewarm=0):
    """An arm through models of some depths, finished at as many steps' worth of FLOPs of the last, and that step."""
    stage = dict(kind="pretrain", batch_size=2, seq_len=16, optimizer=dict(learning_rate=0.1), checkpoint_every=10)
    model = dict(vocab_size=64, embed_dim=16, num_heads=2, mlp_dim=24)
    step = 32 * flops_per_token(ModelConfig(num_layers=depths[-1], **model), 16)
    how = dict(stage=stage, decay=0.25, warmup=3, ends=[steps * step for steps in ends], rewarm=rewarm)
    page = arms.path(model, [dict(num_layers=depth) for depth in depths], [1.0] * len(depths), **how)
    return dict(config=page) | (dict(learning_rates=rates) if rates else {}), step


def test_the_rate_rises_again_behind_every_growth_and_nowhere_else():
    page, _ = branched((200,), (1, 2, 4))
    risen = branched((200,), (1, 2, 4), rewarm=5)[0]["config"]
    changed = {name: stage["schedule"]["warmup"] for name, stage in risen.items() if stage != page["config"][name]}
    assert changed == {"size_1_2": 5, "end_1": 5}
    alone = [branched((200,), (4,), rewarm=rise)[0] for rise in (0, 5)]
    assert alone[0] == alone[1]  # from scratch there is no growth


def test_an_arm_is_compared_with_the_baseline_that_it_names():
    page = load_page(f"{ROOT}/configs/lab/E5.py:smoke")
    short, long, grown = (
        branched(ends, depths)[0] for ends, depths in (((200,), (4,)), ((400,), (4,)), ((400,), (1, 4)))
    )
    own = dict(baseline="from scratch, long")
    page.settings.baseline, page.equal_compute, page.seeds = "from scratch", 0.05, (0,)
    page.arms = {"from scratch": short, "from scratch, long": long | own, "grown": grown | own}
    page.criteria = (dict(estimate="share of FLOPs: grown", side="below", threshold=1.0, says="it holds"),)
    study = read_study(page)  # the two baselines differ in compute, and those that are compared do not
    ends = {"from scratch": (200, 3.0), "from scratch, long": (400, 2.5), "grown": (300, 2.0)}
    results = {arm: {0: {"flops": end[0], "branches": [end]}} for arm, end in ends.items()}
    found = {name: estimate.values for name, estimate in paths.estimates(study, results).items()}
    grown = {"share of FLOPs: grown": [0.75], "difference: grown": [-0.5], "relative difference: grown": [-20.0]}
    assert found == {name: pytest.approx(values) for name, values in grown.items()}
    page.arms["grown"].baseline = "from scratch"
    with pytest.raises(UserError, match=r"grown takes .* FLOPs and from scratch .*, more than equal_compute=0.05"):
        read_study(page)


def test_finished_branches_decide_and_rates_are_tuned_at_a_seed_apart(tmp_path, monkeypatch):
    """Training is stood in for: a loss falls with the steps before it, and is higher with the wrong rate."""
    (scratch, step), (grown, _) = branched((200,), (4,), (0.1, 0.3)), branched((50, 100, 200))
    ran = []

    def train(page, workdir):
        page, done, made, before = page.to_dict(), {}, [], ""
        ran.append((page["first_1"]["seed"], page["run"]))
        for name in page["run"]:
            stage = page[name]
            if stage["kind"] == "grow":
                made.append({"stage": name})
                continue
            before = stage.get("after") or before
            done[name] = done.get(before, 0) + stage["steps"]
            loss = 5 - 0.01 * done[name] + abs(stage["optimizer"]["learning_rate"] - 0.3)
            line = json.dumps({"step": stage["steps"], metrics.EVALUATION + "words": loss})
            files.write_file(workdir / name / "metrics" / "metrics.jsonl", line + "\n")
            depth = 1 if name.startswith("first") and "grow_1_2" in page else 4
            cfg = ModelConfig(**(page["first_1"]["model"] | {"num_layers": depth}))
            flops = stage["steps"] * 32 * flops_per_token(cfg, 16)
            made.append({"stage": name, "flops": flops, "steps": stage["steps"], "parameters": depth, "tokens": 1})
            before = name
        return made

    monkeypatch.setattr(paths.runs, "run", train)
    page = load_page("configs/lab/E5.py:smoke")
    page.arms = {"from scratch": scratch, "our split": grown}
    page.settings.tuning_seed = 100
    page.equal_compute, page.seeds = 0.05, (0, 1)
    out = tmp_path / "out"
    study = read_study(page)
    run(study, out)
    found = {arm: json.loads((out / arm / "1" / "result.json").read_text())["found"] for arm in study.arms}
    assert found["from scratch"]["learning_rate"] == 0.3 and set(found["from scratch"]["tuned"]) == {"0.1", "0.3"}
    assert [seed for seed, _ in ran] == [100_000, 100_000, 0, 0, 1000, 1000]  # tuned once for both seeds
    # Branches end at the FLOPs that were asked for, to half a step of the large model; the small one's steps are cheap.
    grown = np.array(found["our split"]["branches"])
    assert np.all(np.abs(grown[:, 0] / step - [50, 100, 200]) < 0.5)
    ((flops, goal),) = found["from scratch"]["branches"]
    needed = np.interp(-goal, -grown[:, 1], grown[:, 0])
    assert 50 < needed / step < 200
    assert np.allclose(lab_report(out)["criteria"][0]["values"], needed / flops, rtol=1e-12)
    percent = Criterion(estimate="relative difference: our split", side="below", threshold=0.5, says="it ends lower")
    run(dataclasses.replace(study, criteria=(percent,)), out)  # the jobs are done; the report is another
    assert np.allclose(lab_report(out)["criteria"][0]["values"], 100 * (grown[-1, 1] - goal) / goal, rtol=1e-9)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/lab/[!_]*.py")), ids=lambda path: path.stem)
def test_every_page_plans_its_arms_at_every_budget(path):
    for budget in BUDGETS:
        study = read_study(load_page(f"{path}:{budget}"))
        assert (study.name, study.budget) == (path.stem, budget)
    assert f"`tele lab run {path.stem} --budget cpu`" in (ROOT / "docs" / "lab" / "index.md").read_text()


def test_whoever_finds_nothing_to_do_waits_for_the_others(tmp_path, monkeypatch):
    begun, end = threading.Event(), threading.Event()

    def work(study, arm, seed, directory):
        begun.set()
        end.wait(60)
        return {}

    monkeypatch.setattr("tele_jax.lab.exactness.work", work)
    monkeypatch.setattr(runner, "_programs_kept", contextlib.nullcontext)  # JAX has one setting for all threads
    page = load_page("configs/lab/E0.py:smoke")
    page.seeds = (0,)
    study = read_study(page)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, study, tmp_path / "out")
        begun.wait(60)
        begun.clear()
        second = pool.submit(run, study, tmp_path / "out")
        begun.wait(60)  # the second job, by the second process
        assert not first.done() and not second.done()
        end.set()
        first.result()
        second.result()
    assert len(list((tmp_path / "out").glob("*/*/result.json"))) == 2


def test_results_of_another_study_are_not_mixed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tele_jax.lab.exactness.work", lambda *job: {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main(["lab", "run", "E0", "--out", str(tmp_path / "other")]) == 2
    assert "holds something else than a study" in capsys.readouterr().err
    out = tmp_path / "out"
    study = read_study(load_page("configs/lab/E0.py:smoke"))
    run(study, out)
    run(dataclasses.replace(study, seeds=(0, 1, 2), title="Other words"), out)  # results stay as they are
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
    # Bounds give no interval: the values themselves may lie further apart.
    assert verdict([0.5, 0.51, 0.52], "below", [False, False, True]) == "not confirmed"
    assert verdict([1.5, 1.51, 1.52], "below", [False, False, True]) == "not confirmed"
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
