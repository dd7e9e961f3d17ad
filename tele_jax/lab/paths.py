"""Training paths at equal compute: growth in stages against a baseline from scratch (study E5).

An arm is a table with `config`, the page of an ordinary run, whose training stages read settings.data. Every job runs
it as `tele train` does, with the seed of the job added to that of each stage, and leaves it as page.py, so that anybody
can run it by hand. settings.baseline names the arm that others are compared with. Where settings.data is "synthetic",
the text and its tokenizer are made in OUT/text.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from tele_jax import files, plots, stages
from tele_jax import report as runs
from tele_jax.config import ModelConfig, require
from tele_jax.data.vocabulary_training import train_vocabulary, write_vocabulary
from tele_jax.files import Table
from tele_jax.lab.study import Study
from tele_jax.lab.verdict import Estimate
from tele_jax.settings import TrainStage
from tele_jax.stages import run_config
from tele_jax.train import metrics
from tele_jax.train.step import flops_per_token, trained_as

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tele_jax.lab.report import Results

PAGE = '''"""{name}: {arm}, seed {seed}, as a page of `tele train`."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict({page!r})
'''
WORDS = 60  # of the synthetic language
SEEDS_APART = 1000  # between the seeds of two jobs, so that no stage of one has the seed of a stage of another


def split_steps(
    models: Sequence[ModelConfig], shares: Sequence[float], flops: float, *, batch_size: int, seq_len: int
) -> list[int]:
    """Steps of each stage that share the tokens of a path as given and take so many FLOPs together.

    The steps of the first stage make up for what rounding leaves of the others.

    >>> small = ModelConfig(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16, vocab_size=32)
    >>> split_steps([small, small.replace(num_layers=2)], [3, 1], 1e8, batch_size=2, seq_len=16)
    [321, 107]
    """
    step = [flops_per_token(cfg, seq_len) * batch_size * seq_len for cfg in models]
    scale = flops / sum(share * cost for share, cost in zip(shares, step, strict=True))
    later = [max(1, round(scale * share)) for share in shares[1:]]
    rest = flops - sum(steps * cost for steps, cost in zip(later, step[1:]))
    require(rest >= step[0], f"split_steps: {flops:.3g} FLOPs leave no step for the first stage; give more")
    return [round(rest / step[0]), *later]


def compute(study: Study) -> dict[str, float]:
    """The planned FLOPs of every arm. Raises UserError for an arm that is no run."""
    baseline = study.settings.get("baseline")
    require(baseline in study.arms, f"config.settings.baseline={baseline!r} is no arm of the study")
    return {arm: _planned(_page(study, arm, study.seeds[0], Path("text"))) for arm in study.arms}


def _planned(page: Table) -> float:
    """Model FLOPs of all training stages of a run."""
    cfg, total, config = None, 0.0, run_config(page)
    for name, stage in config.stages.items():
        if isinstance(stage, TrainStage):
            before = stage.model_after(cfg)
            assert before is not None and stage.steps is not None  # run_config has seen to it
            cfg = stages.model_of(stage, trained_as(before))
            total += flops_per_token(cfg, stage.seq_len) * stage.steps * stage.tokens_per_step
        else:
            cfg, _ = stages.find_kind(stage.kind).outline(stage, cfg, f"config.{name}")
    return total


def _page(study: Study, arm: str, seed: int, text: Path) -> Table:
    """The page of one job."""
    page = study.arms[arm].get("config")
    require(isinstance(page, dict), f"config.arms.{arm}.config: missing; it is the page of a run")
    data = study.settings.get("data")
    made = {"tokenizer": str(text / "tokenizer.model"), "eval_bytes": 4_000}
    made["sources"] = {
        "words": {
            "files": [str(text / "train.jsonl")],
            "validation_files": [str(text / "validation.jsonl")],
            "format": "jsonl",
        }
    }
    page = json.loads(json.dumps(page))  # a copy
    for table in page.values():
        if isinstance(table, dict) and table.get("kind") not in (None, "grow"):
            table["data"] = made if data == "synthetic" else data
            table["seed"] = table.get("seed", 0) + SEEDS_APART * seed
    return page


def work(study: Study, arm: str, seed: int, directory: Path) -> Table:
    """Runs the stages of one arm, or what an earlier start has left of them."""
    text = directory.parents[1] / "text"
    if study.settings.get("data") == "synthetic":
        _synthetic(text)
    page = _page(study, arm, seed, text)
    files.write_file(directory / "page.py", PAGE.format(name=study.name, arm=arm, seed=seed, page=page))
    summaries = runs.run(ConfigDict(page), directory / "run")
    rates = {name: source.get("rate", 1.0) for name, source in _sources(page).items()}
    curve, growths, spent, told = [], [], 0.0, []
    for summary in summaries:
        if "flops" not in summary:
            growths.append(spent)
            continue
        for line in metrics.read(directory / "run" / summary["stage"] / "metrics" / "metrics.jsonl"):
            known = {domain: rate for domain, rate in rates.items() if metrics.EVALUATION + domain in line}
            if known:
                mean = sum(rate * line[metrics.EVALUATION + d] for d, rate in known.items()) / sum(known.values())
                curve.append([spent + summary["flops"] * line["step"] / summary["steps"], mean])
        spent += summary["flops"]
        told.append({key: summary[key] for key in ("stage", "parameters", "tokens", "flops")})
    return {"flops": spent, "curve": curve, "growths": growths, "stages": told}


def _sources(page: Table) -> Table:
    return next(table["data"]["sources"] for table in page.values() if isinstance(table, dict) and "data" in table)


def _synthetic(text: Path) -> None:
    """Writes sentences of a small language in which each word leads to few others, and a tokenizer for them."""
    if (text / "tokenizer.model").exists():
        return
    drawn = random.Random(0)
    words = ["".join(drawn.choices("aeioulnrst", k=drawn.randint(2, 6))) for _ in range(WORDS)]
    after = {word: drawn.sample(words, 3) for word in words}
    documents = []
    for _ in range(240):
        word, said = drawn.choice(words), []
        for _ in range(80):
            said.append(word)
            word = drawn.choice(after[word])
        documents.append(" ".join(said))
    for name, part in (("train", documents[20:]), ("validation", documents[:20])):
        lines = "".join(json.dumps({"text": document}) + "\n" for document in part)
        files.write_file(text / f"{name}.jsonl", lines)
    trained = train_vocabulary(documents[20:], preset="tele_flm", vocab_size=432)
    write_vocabulary(trained, text / "tokenizer.model", preset="tele_flm")


def _reached(curve: Sequence[Sequence[float]], goal: float) -> float | None:
    """FLOPs at which a curve first comes down to a loss, between two evaluations by a straight line; None: never.

    >>> _reached([[0, 4.0], [10, 2.0], [20, 1.0]], 1.5)
    15.0
    """
    for i, (at, loss) in enumerate(curve):
        if loss <= goal:
            if i == 0 or curve[i - 1][1] <= goal or curve[i - 1][0] == at:
                return float(at)
            before, higher = curve[i - 1]
            return float(before + (at - before) * (higher - goal) / (higher - loss))
    return None


def estimates(study: Study, results: "Results") -> dict[str, Estimate]:
    """For every arm but the baseline, "share of FLOPs: ARM" and "difference: ARM", within each seed.

    The share is that of the baseline's FLOPs which the arm needs for the baseline's final held-out loss; an arm that
    does not get there needs at least as much as it took. The difference is that of the final losses.
    """
    baseline, found = study.settings["baseline"], {}
    for arm in study.arms:
        if arm == baseline:
            continue
        pairs = [(results[baseline][seed], results[arm][seed]) for seed in study.seeds]
        needed = [_reached(other["curve"], base["curve"][-1][1]) for base, other in pairs]
        shares = [(other["flops"] if at is None else at) / base["flops"] for at, (base, other) in zip(needed, pairs)]
        unit = "of the FLOPs from scratch"
        found[f"share of FLOPs: {arm}"] = Estimate(shares, unit, [at is None for at in needed])
        differences = [other["curve"][-1][1] - base["curve"][-1][1] for base, other in pairs]
        found[f"difference: {arm}"] = Estimate(differences, "bits per byte")
    return found


def rows(study: Study, results: "Results") -> tuple[list[str], list[list[str]]]:
    """A row per arm: its stages, its FLOPs, its final loss and the share of FLOPs that it needed, means over seeds."""
    shares = estimates(study, results)
    lines = []
    for arm, seeds in results.items():
        first = next(iter(seeds.values()))
        path = " -> ".join(f"{s['parameters'] / 1e6:.2f}M: {s['tokens'] / 1e6:.3g}M tokens" for s in first["stages"])
        final: Any = np.mean([result["curve"][-1][1] for result in seeds.values()])
        share = shares.get(f"share of FLOPs: {arm}")
        needed = "1" if share is None else f"{np.mean(share.values):.3f}"
        if share is not None and any(share.at_least):
            needed = f"at least {needed} ({sum(share.at_least)} of {len(share.at_least)} seeds do not get there)"
        lines.append([arm, path, f"{first['flops']:.3e}", f"{final:.4f}", needed])
    return ["arm", "stages", "FLOPs", "final held-out bits per byte", "share of FLOPs for the baseline's loss"], lines


def picture(study: Study, results: "Results") -> "Figure":
    """Held-out loss over FLOPs, a curve per arm: the first seed."""
    seed = study.seeds[0]
    points = {arm: seeds[seed]["curve"] for arm, seeds in results.items()}
    curves = {arm: ([at for at, _ in curve], [loss for _, loss in curve]) for arm, curve in points.items()}
    label = f"held-out text, bits per byte (seed {seed})"
    return plots.loss({label: curves}, x_label="training FLOPs (model FLOPs)", title=study.title)
