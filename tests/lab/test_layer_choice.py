"""Study E7: choices of layers, rank correlations and differences from results that are made up, and one small run."""

import json
from pathlib import Path

import numpy as np
import pytest

from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.lab import layer_choice, read_study

ROOT = Path(__file__).parents[2]
PAGE = str(ROOT / "configs/lab/E7.py")


def study_of(*changes, budget="cpu"):
    return read_study(load_page(f"{PAGE}:{budget}", [f"--config.{change}" for change in changes]))


def copied(ids):
    return {i for i in ids if ids.count(i) > 1}


def test_rules_and_draws_copy_layers_at_most_once_and_draws_repeat_nothing():
    study, scores = study_of(), [0.9, 0.2, 0.4, 0.1, 0.3, 0.8]
    found = layer_choice.choices_of(study, scores, 9, seed=0)
    assert copied(found["distance"]) == {1, 3, 4}  # the three least of layers 1 to 4
    assert copied(found["first"]) == {0, 1, 2} and copied(found["last"]) == {3, 4, 5}
    assert all(len(ids) == 9 and ids == sorted(ids) and set(ids) == set(range(6)) for ids in found.values())
    drawn = [tuple(ids) for name, ids in found.items() if "_" in name]
    by_rule = {tuple(found[name]) for name in layer_choice.NAMED}
    assert len(drawn) == len({tuple(ids) for ids in found.values()} - by_rule) == 6
    assert found == layer_choice.choices_of(study, scores, 9, seed=0) != layer_choice.choices_of(study, scores, 9, 1)


def test_draws_by_distance_have_a_probability_in_proportion_to_its_inverse():
    study = study_of("settings.named=('distance', 'uniform')", "settings.sampled=1", "settings.random=1")
    draws, counts = 2000, np.zeros(6)
    for seed in range(draws):
        counts[[*copied(layer_choice.choices_of(study, [4.0, 1.0, 2.0, 4.0, 4.0, 4.0], 7, seed)["sampled_1"])]] += 1
    # Layer 1 is that of distance and 5 that of uniform; 1/4, 1/2, 1/4 and 1/4 are left.
    expected = np.array([0.2, 0, 0.4, 0.2, 0.2, 0])
    assert np.all(np.abs(counts / draws - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws))


def spearman(first, second):
    """The textbook formula for ranks without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    n = len(first)
    return 1 - 6 * np.sum((ranks[0] - ranks[1]) ** 2) / (n * (n**2 - 1))


def test_rank_correlations_and_differences_are_taken_within_a_seed():
    study, drawn, results = study_of("seeds=(0, 1)"), np.random.default_rng(0), {}
    names = list(layer_choice.choices_of(study, np.arange(1.0, 7.0), 9, 0))
    for arm in study.arms:
        results[arm] = {}
        for seed in study.seeds:
            layers = layer_choice.choices_of(study, np.arange(1.0, 7.0), 9, seed)
            probes = {name: [*drawn.normal(size=3)] for name in names}
            ends = {name: [*drawn.normal(size=2)] for name in names}
            for name in ("uniform", "middle"):  # the same layers, carried out once
                layers[name], probes[name], ends[name] = layers["distance"], probes["distance"], ends["distance"]
            results[arm][seed] = {"layers": layers, "probes": probes, "ends": ends}
    found = layer_choice.estimates(study, results)
    assert sorted(found) == sorted(layer_choice.names(study))
    assert "rank correlation at 0: exact" not in found  # all begin at the loss of the source
    alone = [name for name in names if name not in ("uniform", "middle")]
    for arm, step, place in (("exact", 16, 1), ("exact", 128, 2), ("interleave", 0, 0), ("interleave", 128, 2)):
        expected = [
            spearman([one["probes"][n][place] for n in alone], [np.mean(one["ends"][n]) for n in alone])
            for one in results[arm].values()
        ]
        np.testing.assert_allclose(found[f"rank correlation at {step}: {arm}"].values, expected, atol=1e-12)
    ends = [spearman(*zip(*(one["ends"][n] for n in alone), strict=True)) for one in results["exact"].values()]
    np.testing.assert_allclose(found["rank correlation of two ends: exact"].values, ends, atol=1e-12)
    random = [n for n in names if n.startswith("random")]
    expected = [
        np.mean(one["ends"]["distance"]) - sum(sum(one["ends"][n]) for n in random) / 8
        for one in results["exact"].values()
    ]
    np.testing.assert_allclose(found["distance against random: exact"].values, expected, atol=1e-12)
    assert found["distance against uniform: exact"].values == [0.0, 0.0]
    header, rows = layer_choice.rows(study, results)
    assert all(len(row) == len(header) for row in rows) and len(rows) == 2 * (5 + 2 + 1)
    assert len(layer_choice.picture(study, results).axes) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds=()", "seeds is empty"),
        ("settings.nmaed=()", "config.settings.nmaed: unknown key; did you mean 'named'?"),
        ("settings.named=('distance', 'unifrm')", "'unifrm' is no rule; did you mean 'uniform'?"),
        ("settings.named=('uniform',)", "'distance' is missing"),
        ("settings.random=-1", "config.settings.random=-1 must not be negative"),
        ("settings={'data': 'synthetic', 'named': ('distance', 'uniform')}", "2 choices of layers"),
        ("settings.random=14", "20 ways to copy layers at most once are too few for 21 choices"),
        ("arms.exact.config.grow.model={'embed_dim': 64}", "config.grow.model: num_layers does not grow"),
        ("arms.exact.config.grow.after='probe_1'", "config.grow.after='probe_1': a growth goes on after a training"),
        ("arms.exact.config.grow.layers=(0, 1)", "config.grow.layers: leave it out; the study chooses the layers"),
        ("arms.exact.config.end_2.after='source'", "config.end_2: ends a branch without grow; all have to go through"),
        ("arms.exact.config.run=('source', 'grow')", "config.end_1: unknown key"),
        ("arms.exact={'confg': {}}", "config.arms.exact.confg: unknown key; did you mean 'config'?"),
        ("arms.exact.config.end_1.data=3", "config.end_1.data is no table"),
    ],
)
def test_a_page_that_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(UserError) as raised:
        study_of(change)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_growth_does_not_pass_over_a_stage_of_the_source():
    page = load_page(f"{PAGE}:cpu")
    arm = page.arms.exact.config
    arm.cool = {key: value for key, value in arm.source.items() if key != "model"}
    arm.grow.after, arm.run = "source", ("source", "cool", *arm.run[1:])
    with pytest.raises(UserError, match=r"^config\.arms\.exact: config\.cool: ends a branch without grow"):
        read_study(page)


def test_e7_grows_one_source_by_every_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "e7"
    assert main(["lab", "run", "E7", "--budget", "smoke", "--out", str(out)]) == 0
    job = out / "interleave" / "0"
    found = json.loads((job / "result.json").read_text())["found"]
    inner = sorted((1, 2), key=lambda i: found["scores"][i])
    assert found["layers"]["distance"] == sorted([0, 1, 2, 3, inner[0]])
    page = load_page(str(job / "page.py"))  # the whole job, for `tele train`
    for choice in ("uniform", "random_1"):
        assert list(page[f"grow_{choice}"].layers) == found["layers"][choice]
        assert page[f"grow_{choice}"].after == "source" and page.run.index(f"grow_{choice}") > page.run.index("source")
        receipt = json.loads((job / "run" / f"grow_{choice}" / "growth_receipt.json").read_text())
        assert receipt["layers"] == found["layers"][choice] and receipt["policy"] == "interleave"
        assert receipt["source"]["path"] == str(job / "run" / "source" / "checkpoints" / "2")
    assert len({tuple(probes) for probes in found["probes"].values()}) == 3
    assert "**Verdict at the budget `smoke`: not confirmed.**" in (out / "page.md").read_text()
    (job / "result.json").unlink()  # stopped before it was written: the stages are there, and the same is found again
    assert main(["lab", "run", "E7", "--budget", "smoke", "--out", str(out)]) == 0
    assert json.loads((job / "result.json").read_text())["found"] == found
