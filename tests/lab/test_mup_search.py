"""`tele mup search` and `transfer`: trials that are done once, and settings that become pages of larger widths."""

import ast
import json
import math

import pytest

pytest.importorskip("optuna", reason="the extra [mup] is not installed")

import numpy as np

from tele_jax import files
from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.data.vocabulary_training import train_vocabulary, write_vocabulary
from tele_jax.errors import DamageError, FailedError
from tele_jax.lab import paths
from tele_jax.lab.mup import search
from tele_jax.stages import run_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = """from ml_collections import ConfigDict

def get_config():
    config = ConfigDict(dict(run=("proxy",)))
    config.proxy = dict(
        kind="pretrain", batch_size=2, seq_len=16, steps=8, optimizer=dict(learning_rate=3e-3), log_every=1,
        eval_every=8, checkpoint_every=8, schedule=dict(warmup=1),
        model=dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=432, max_seq_len=16,
                   mup_base_width=16, dtype="float32", remat="none"),
        data=dict(tokenizer="TEXT/tokenizer.model", eval_bytes=400, sources=dict(words=dict(
            files=("TEXT/train.jsonl",), validation_files=("TEXT/validation.jsonl",), format="jsonl"))),
    )
    config.search = dict(space=dict(learning_rate=[1e-3, 4e-3], output_mult=[1.0, 2.0, 4.0]))
    return config
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.py"
    path.write_text(PAGE.replace("TEXT", str(tmp_path / "text")))
    return path


@pytest.fixture
def fake_runs(monkeypatch):
    """Writes figures by a formula in the place of training, and keeps the values of all trials that were trained."""
    trained = []

    def run(config, workdir):
        stage = config.proxy
        rate, mult = stage.optimizer.learning_rate, stage.model.output_mult
        trained.append((rate, mult))
        if len(trained) == run.interrupt_at:
            raise KeyboardInterrupt
        if mult == run.diverges:
            raise FailedError("loss nan at step 3")
        loss = 2 + (math.log(rate / 4e-3)) ** 2 + (math.log(mult / 2)) ** 2
        lines = [{"step": s, "loss": 5 - math.log(s), "grad_norm": math.exp((-1) ** s)} for s in range(1, 9)]
        lines.append({"step": 8, "eval/bits_per_byte/words": loss})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workdir / "proxy" / "metrics").mkdir(parents=True, exist_ok=True)
        files.write_file(workdir / "proxy" / "metrics" / "metrics.jsonl", text)

    run.interrupt_at = run.diverges = None
    monkeypatch.setattr(search.runs, "run", run)
    run.trained = trained
    return run


def test_a_killed_search_goes_on_and_trains_nothing_twice(page, tmp_path, fake_runs, capsys):
    command = ["mup", "search", "--config", str(page), "--out", str(tmp_path / "out")]
    fake_runs.interrupt_at = 3
    assert main(command) == 130
    assert main(command) == 0
    grid = {(rate, mult) for rate in (1e-3, 4e-3) for mult in (1.0, 2.0, 4.0)}
    assert fake_runs.trained[2] == fake_runs.trained[3]  # the trial that was under way
    assert len(fake_runs.trained) == 7 and set(fake_runs.trained) == grid
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    best = found["trials"][found["best"]]
    assert best["values"] == {"learning_rate": 4e-3, "output_mult": 2.0} and best["value"] == 2.0
    # The loss falls by 1 per factor e of steps, exactly; the logarithm of the gradient norm is 1 and -1 in turn.
    np.testing.assert_allclose([best["decrease"], best["trend"], best["gradient"]], [1, 0, 1], atol=1e-12)
    assert (tmp_path / "out" / "parallel.png").stat().st_size > 5_000
    capsys.readouterr()
    assert main(command) == 0 and len(fake_runs.trained) == 7
    lines = capsys.readouterr().out.splitlines()
    assert "held-out bits per byte" in lines[0] and "2.0000" in lines[2]  # the best comes first
    assert main([*command, "--config.search.seed=1"]) == 2
    assert "holds another search" in capsys.readouterr().err
    assert main(["mup", "search", "--config", str(page), "--out", str(tmp_path)]) == 2
    assert "holds something else than a search" in capsys.readouterr().err


def test_trials_that_diverge_are_kept_as_failed(page, tmp_path, fake_runs, capsys):
    fake_runs.diverges = 2.0
    command = ["mup", "search", "--config", str(page), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [t["value"] for t in found["trials"] if t["values"]["output_mult"] == 2.0] == [None, None]
    assert found["trials"][found["best"]]["values"]["output_mult"] in (1.0, 4.0)
    assert main([*command, "--config.search.space={'output_mult': [2.0]}", "--out", str(tmp_path / "b")]) == 1
    assert "every trial diverged" in capsys.readouterr().err


def test_a_figure_of_training_or_of_a_domain_is_minimised_by_its_name(page, tmp_path, fake_runs):
    for figure, least in (("loss", 5 - math.log(8)), ("eval/bits_per_byte/words", 2.0)):
        out = tmp_path / figure.replace("/", "_")
        assert (
            main(["mup", "search", "--config", str(page), "--out", str(out), f"--config.search.figure={figure}"]) == 0
        )
        found = json.loads((out / "results.json").read_text())
        assert found["figure"] == figure and found["trials"][found["best"]]["value"] == pytest.approx(least)


def test_tpe_draws_from_ranges_and_repeats_itself(page, tmp_path, fake_runs):
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1}, "output_mult": [1.0, 2.0]}
    how = [f"--config.search.space={space}", "--config.search.sampler=tpe", "--config.search.trials=14"]
    drawn = []
    for name in "ab":
        fake_runs.trained.clear()
        assert main(["mup", "search", "--config", str(page), "--out", str(tmp_path / name), *how]) == 0
        drawn.append(list(fake_runs.trained))
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 14
    assert all(1e-4 <= rate <= 1e-1 for rate, _ in drawn[0])


def test_a_found_setting_becomes_a_page_of_a_larger_width(page, tmp_path, capsys):
    trained = train_vocabulary(paths._synthetic(tmp_path / "text"), preset="tele_flm", vocab_size=432)
    write_vocabulary(trained, tmp_path / "text" / "tokenizer.model", preset="tele_flm")
    out, larger = tmp_path / "out", tmp_path / "w32.py"
    text = page.read_text().replace("num_heads=2", "num_heads=2, num_kv_heads=2")  # no fewer than heads, and said
    page.write_text(text)
    one = "--config.search.space={'learning_rate': [4e-3], 'input_mult': [2.0]}"
    assert main(["mup", "search", "--config", str(page), "--out", str(out), one]) == 0
    assert (out / "trials" / "0000" / "run" / "proxy" / "summary.json").exists()
    out = out.rename(tmp_path / 'out\\U""" ')  # a name that a Python string has to escape
    command = ["mup", "transfer", str(out), "--width", "32", "--out", str(larger)]
    assert main(command) == 0
    before, after = (
        run_config(p).stages["proxy"] for p in (search.read_page(load_page(str(page)))[1], load_page(str(larger)))
    )
    assert after.model == before.model.replace(embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=48, input_mult=2.0)
    assert 'of out\\U"""  at width 32' in (ast.get_docstring(ast.parse(larger.read_text()), clean=False) or "")
    assert after.model.head_dim == 8 and after.model.width_ratio == 2
    assert after.optimizer.learning_rate == 4e-3 and after.data == before.data
    deep = tmp_path / "deep.py"
    assert main([*command[:-1], str(deep), "--layers", "4"]) == 0
    model = run_config(load_page(str(deep))).stages["proxy"].model
    assert model == after.model.replace(num_layers=4, residual_mult=0.25)
    for words, message in (
        (command, "exists, and would be overwritten"),
        ([*command[:-1], "page.txt"], "a page is a .py file"),
        ([*command[:-1], "new.py", "--trial", "7"], "--trial 7: is not finished; finished trials: 0"),
        (
            ["mup", "transfer", str(out), "--width", "20", "--out", "new.py"],
            "num_heads=2 at width 16 would be no whole number",
        ),
        (["mup", "transfer", str(tmp_path), "--width", "32", "--out", "new.py"], "holds no search"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    files.write_json(out / "search.json", {"search": {}, "run": 3})
    with pytest.raises(DamageError, match=r"search\.json: run: expected a table"):
        search.found_page(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("search.space={}", "config.search: space is empty"),
        ("search.space={'learning_rate': []}", "space.learning_rate is empty"),
        ("search.space={'learning_rat': [1]}", "space.learning_rat cannot be searched; did you mean 'learning_rate'?"),
        ("search.space={'init_std': {'low': 2, 'high': 1}}", "0 < low < high has to hold"),
        ("search.space={'init_std': {'low': 0, 'high': 1}}", "0 < low < high has to hold"),
        ("search.space={'init_std': {'low': 1, 'high': 2, 'points': 1}}", "points=1 must be 2 or more"),
        ("search.space={'init_std': {'low': 1, 'hihg': 2}}", "did you mean 'high'?"),
        ("search.space={'init_std': 0.1}", "give a list of values, or dict(low=, high=, points=)"),
        ("search.space={'init_std': [0.1, 0.1]}", "a value stands there twice"),
        ("search.space={'init_std': [0.1, 'x']}", "must be a finite number"),
        ("search.space={'init_std': [0.1, -0.1]}", "init_std=-0.1 must be above 0"),
        ("search.sampler=tpe", "trials: missing"),
        ("search.sampler=random", "'random' is not one of 'grid', 'tpe'"),
        ("search.tirals=3", "did you mean 'trials'?"),
        ("proxy.model.mup_base_width=None", "mup_base_width: missing"),
        ("proxy.data.sources.words.validation_files=()", "name what to minimise"),
        ("search.figure=los", "figure='los' is no figure of the run; it has loss, grad_norm, eval/bits_per_byte/words"),
        ("search.figure=eval/bits_per_byte/word", "it has loss, grad_norm, eval/bits_per_byte/words"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(change, message, page, tmp_path, capsys):
    assert main(["mup", "search", "--config", str(page), "--out", str(tmp_path / "out"), f"--config.{change}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
