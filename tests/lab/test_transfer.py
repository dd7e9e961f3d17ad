"""Study E8: best learning rates across widths, and predicted losses."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.lab import read_study, transfer

PAGE = str(Path(__file__).parents[2] / "configs" / "lab" / "E8.py")
SYNTHETIC = ["--config.settings.text=synthetic", "--config.settings.held_out=synthetic"]


def test_a_job_trains_with_every_rate_and_repeats_itself(tmp_path):
    study = read_study(load_page(f"{PAGE}:smoke"))
    found = transfer.work(study, "muP 8", 0, tmp_path)
    assert found["rates"] == [2**-7, 2**-6, 2**-5] and len(set(found["losses"])) == 3
    assert all(0 < loss < math.log(256) + 0.1 for loss in found["losses"])
    assert transfer.work(study, "muP 8", 0, tmp_path) == found
    assert found["parameters"] == 2 * 256 * 8 + 3 * 8 + 4 * 8 * 8 + 3 * 8 * 16


def test_the_loss_of_a_rate_is_the_mean_over_repeats_with_keys_of_their_own(tmp_path, monkeypatch):
    page = load_page(f"{PAGE}:smoke")
    page.arms["muP 8"].repeats = 3
    keys = []

    def trained(cfg, config, steps, batch_size, rate, key, train, rows):
        keys.append((rate, tuple(jax.random.key_data(key).tolist())))
        return rate * len(keys)

    monkeypatch.setattr(transfer, "_trained", trained)
    found = transfer.work(read_study(page), "muP 8", 0, tmp_path)
    expected = [rate * np.mean([3 * n + 1, 3 * n + 2, 3 * n + 3]) for n, rate in enumerate(found["rates"])]
    np.testing.assert_allclose(found["losses"], expected)
    assert len({*keys}) == 9 and len({key for _, key in keys}) == 3  # the same three for every rate


def test_estimates_find_the_best_rates_and_the_law_of_the_losses(tmp_path, monkeypatch, capsys):
    """Losses by formulas: parabolas in log2 of the rate, whose least moves by a known amount with the width."""

    def loss(cfg, config, steps, batch_size, rate, key, text, held_out):
        width = cfg.embed_dim
        moves = 0.2 if cfg.mup_base_width else 1.5  # per doubling of the width
        best = -5.3 - moves * math.log2(width / 32)
        return 2 + transfer.count_params(cfg) ** -0.3 + 0.01 * (math.log2(rate) - best) ** 2

    monkeypatch.setattr(transfer, "_trained", loss)
    out, page = tmp_path / "e8", tmp_path / "E8.md"
    assert main(["lab", "run", PAGE, "--budget", "cpu", "--out", str(out), *SYNTHETIC, "--config.seeds=(0, 1)"]) == 0
    study = read_study(load_page(f"{PAGE}:cpu", SYNTHETIC))
    study = dataclasses.replace(study, seeds=(0, 1))
    results = {
        arm: {s: json.loads((out / arm / str(s) / "result.json").read_text())["found"] for s in study.seeds}
        for arm in study.arms
    }
    found = {name: estimate.values for name, estimate in transfer.estimates(study, results).items()}
    np.testing.assert_allclose(found["shift: muP"], 0.4)
    np.testing.assert_allclose(found["shift: standard"], 3.0)
    # The grid's best rate is 2^-5 at width 32; at 128 muP's least lies at -5.7, and the nearest point at -6.
    sizes = results["muP 128"][0]["parameters"]
    least = 2 + sizes**-0.3 + 0.01 * 0.3**2
    np.testing.assert_allclose(found["excess: muP"], 100 * 0.01 * (0.7**2 - 0.3**2) / least)
    np.testing.assert_allclose(found["difference: muP"], 0.01 * (0.3**2 - 0.3**2), atol=1e-12)
    assert max(map(abs, found["prediction"])) < 0.5
    assert main(["lab", "report", str(out), "--page", str(page)]) == 0
    assert "| muP | 128 |" in page.read_text() and page.with_suffix(".png").stat().st_size > 5_000


def test_figures_are_of_means_over_seeds_with_jackknife_values():
    """Noise of a seed moves its best rate; the values have the mean of all seeds and the spread of leaving one out."""
    arms = {f"muP {width}": dict(family="muP", width=width, rates=(0.25, 0.5, 1.0)) for width in (32, 128)}
    page = load_page(f"{PAGE}:smoke", ["--config.settings.reference=muP"])
    page.criteria = [page.criteria[0]]
    with page.unlocked():
        page.arms = arms
    study = dataclasses.replace(read_study(page), seeds=(0, 1, 2))
    drawn = np.random.default_rng(1)
    losses = {arm: np.array([3.0, 2.0, 2.5]) + 1.5 * drawn.normal(size=(3, 3)) for arm in arms}
    results = {
        arm: {s: {"rates": [0.25, 0.5, 1.0], "losses": table[s].tolist(), "parameters": 1} for s in study.seeds}
        for arm, table in losses.items()
    }
    small, large = losses.values()

    def excess(rows):
        at, means = np.argmin(small[rows].mean(0)), large[rows].mean(0)
        return 100 * (means[at] / means.min() - 1)

    without = np.array([excess([s for s in range(3) if s != out]) for out in range(3)])
    expected = excess([0, 1, 2]) + 2 * (without.mean() - without)
    found = transfer.estimates(study, results)
    np.testing.assert_allclose(found["excess: muP"].values, expected)
    np.testing.assert_allclose(found["difference: muP"].values, 0)
    assert np.std(expected) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "--config.arms={'a': {'family': 'standard', 'width': 12, 'rates': [0.1]}}",
            "width=12: num_heads=4 at width 32",
        ),
        ("--config.arms={'a': {'family': 'standard', 'width': 8, 'rates': []}}", "config.arms.a.rates is empty"),
        ("--config.arms={'a': {'family': 'standard', 'width': 8, 'rates': [1, .5]}}", "give them in rising order"),
        ("--config.arms={'a': {'family': 'standard', 'widht': 8, 'rates': [1]}}", "did you mean 'width'?"),
        ("--config.settings.steps=0", "config.settings: steps=0 must be above 0"),
        ("--config.settings.reference=none", "config.settings.reference='none' is no family"),
    ],
)
def test_a_page_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError) as error:
        read_study(load_page(f"{PAGE}:smoke", [change]))
    assert message in str(error.value)
