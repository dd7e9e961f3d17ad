"""Training paths with finished branches: growth in stages against a baseline from scratch (studies E2 to E6).

An arm is a table with `config`, the page of an ordinary run, whose training stages read settings.data but for the keys
of `data` that they have themselves. Every job runs it as `tele train` does, with the seed of the job added to that of
each stage, and leaves it as page.py, so that anybody can run it by hand. A stage that no other stage goes on from is a
finished branch: its loss is held against the FLOPs of all stages that lead to it.

settings.baseline names the arm that all arms are compared with. Where a study has several baselines, such as models
from scratch of several sizes, an arm names its own in its key `baseline`, and each of these arms names itself there.

learning_rates of an arm: each is tried at settings.tuning_seed on the path to the first branch, and the one with the
least loss is taken for all seeds. settings.data is a table of data, with vocab_size in the place of the tokenizer where
one is to be trained on the text, or "synthetic"; what is made lies in OUT/text.
"""

import json
import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from tele_jax import files, plots, stages
from tele_jax import report as runs
from tele_jax.config import ModelConfig, convert
from tele_jax.data.vocabulary_training import sample_texts, train_vocabulary, write_vocabulary
from tele_jax.errors import prefixed, require, require_known
from tele_jax.files import Table
from tele_jax.lab.study import Study
from tele_jax.lab.verdict import Estimate, figures, shown
from tele_jax.settings import TrainStage
from tele_jax.stages import RunConfig, run_config
from tele_jax.train import metrics
from tele_jax.train.step import flops_per_token, trained_as

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tele_jax.lab.report import Results

PAGE = '''"""{title}, as a page of `tele train`."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict({page!r})
'''
TRIAL = "trial.json"  # what a learning rate gives
WORDS = 60  # of the synthetic language
# Names of estimates, before the name of an arm.
SHARE, DIFFERENCE, PERCENT = "share of FLOPs: ", "difference: ", "relative difference: "
SEEDS_APART = 1000  # between the seeds of two jobs, so that no stage of one has the seed of a stage of another


def compute(study: Study) -> dict[str, float]:
    """The planned FLOPs of every arm up to its last branch. Raises UserError for an arm that is no run."""
    baseline = study.settings.get("baseline")
    check_keys(study, ("baseline", "data", "tuning_seed"), ("config", "learning_rates", "baseline"))
    require(baseline in study.arms, f"config.settings.baseline={baseline!r} is no arm of the study")
    planned = {}
    for arm in study.arms:
        other = _baseline(study, arm)
        own = isinstance(other, str) and other in study.arms and _baseline(study, other) == other
        require(own, f"config.arms.{arm}.baseline={other!r} is no arm of the study that is its own baseline")
        with prefixed(f"config.arms.{arm}: "):
            _rates(study, arm)
            config = run_config(job_page(study, arm, study.seeds[0], Path("text")))
            planned[arm] = sum(map(costs_of(config).__getitem__, list(branches_of(config).values())[-1]))
    return planned


def check_keys(study: Study, settings: Sequence[str], arms: Sequence[str]) -> None:
    """Raises UserError for a key of settings or of an arm that is not among those, and for data that cannot be."""
    data = study.settings.get("data")
    for key in study.settings:
        require_known(key, settings, f"config.settings.{key}: unknown key")
    if isinstance(data, dict):
        convert(int, data.get("vocab_size", 1), "config.settings.data.vocab_size")
        sources = data.get("sources", {})
        require(isinstance(sources, dict), f"config.settings.data.sources={sources!r}: expected a table of sources")
    else:
        require(data == "synthetic", f"config.settings.data={data!r}: expected a table of data, or 'synthetic'")
    for arm, table in study.arms.items():
        for key in table:
            require_known(key, arms, f"config.arms.{arm}.{key}: unknown key")


def _baseline(study: Study, arm: str) -> str:
    """The arm that one is compared with; a baseline is compared with itself."""
    return study.arms[arm].get("baseline", study.settings["baseline"])


def _compared(study: Study) -> list[str]:
    """The arms that are compared with another."""
    return [arm for arm in study.arms if _baseline(study, arm) != arm]


def _rates(study: Study, arm: str) -> tuple[float, ...]:
    """The learning rates to choose from; none: the page of the arm has its own."""
    rates = convert(tuple[float, ...], study.arms[arm].get("learning_rates", ()), "learning_rates")
    seed = study.settings.get("tuning_seed")
    apart = isinstance(seed, int) and seed not in study.seeds
    where = f"config.settings.tuning_seed={seed!r}"
    require(not rates or apart, f"{where}: learning_rates are chosen at a seed apart; give one")
    return rates


def models_of(config: RunConfig) -> dict[str, ModelConfig]:
    """The model that every stage of a run leaves; raises UserError where the FLOPs of a stage cannot be planned."""
    require(config.start is None, "config.start: leave it out; an arm begins with training, so that all of it counts")
    models: dict[str, ModelConfig] = {}
    for name, parent in config.parents.items():
        stage, cfg = config.stages[name], models.get(parent or "")
        if isinstance(stage, TrainStage):
            before = stage.model_after(cfg)
            assert before is not None  # run_config has seen to it
            why = "FLOPs of a study are planned before any text is read"
            require(stage.steps is not None, f"config.{name}.epochs: {why}; give steps in its place")
            cfg = stages.model_of(stage, trained_as(before))
        else:
            cfg, _ = stages.find_kind(stage.kind).outline(stage, cfg, f"config.{name}")
        models[name] = cfg
    return models


def costs_of(config: RunConfig) -> dict[str, float]:
    """Model FLOPs of every stage of a run."""
    costs, models = dict.fromkeys(config.stages, 0.0), models_of(config)
    for name, stage in config.stages.items():
        if isinstance(stage, TrainStage):
            costs[name] = flops_per_token(models[name], stage.seq_len) * stage.steps * stage.tokens_per_step
    return costs


def branches_of(config: RunConfig) -> dict[str, list[str]]:
    """The stages that lead to every finished branch, by its last stage, which no other continues."""
    continued = set(config.parents.values())
    return {name: config.lineage(name) for name in config.run if name not in continued}


def job_page(study: Study, arm: str, seed: int, text: Path, rate: float | None = None, branches: bool = True) -> Table:
    """The page of one job. rate: the learning rate of all stages, where it was tuned. branches: all, or the first."""
    page = study.arms[arm].get("config")
    require(isinstance(page, dict), "config: missing; it is the page of a run")
    page = json.loads(json.dumps(page))  # a copy
    for name, table in page.items():
        if isinstance(table, dict) and table.get("kind") not in (None, "grow"):
            require(isinstance(table.get("data", {}), dict), f"config.{name}.data is no table")
            table["data"] = _data(study, text) | table.get("data", {})
            table["seed"] = table.get("seed", 0) + SEEDS_APART * seed
            if rate is not None:
                require(isinstance(table.get("optimizer", {}), dict), f"config.{name}.optimizer is no table")
                table["optimizer"] = table.get("optimizer", {}) | {"learning_rate": rate}
    if not branches:
        page["run"] = next(iter(branches_of(run_config(page)).values()))
        page = {key: page[key] for key in page if key in ("run", *page["run"]) or key in ("mesh", "num_slices")}
    return page


def work(study: Study, arm: str, seed: int, directory: Path) -> Table:
    """Runs the stages of one arm, or what an earlier start has left of them, at the rate that did best."""
    text = directory.parents[1] / "text"
    make_text(study, text)
    rates = _rates(study, arm)
    trials = {rate: directory.parent / "tuning" / f"{rate:g}" for rate in rates}
    for rate, wait in ((rate, wait) for wait in (False, True) for rate in rates):  # shared with jobs of other seeds
        with files.locked(trials[rate] / ".lock", wait) as free:
            if free and not (trials[rate] / TRIAL).exists():
                page = job_page(study, arm, study.settings["tuning_seed"], text, rate, branches=False)
                files.write_json(
                    trials[rate] / TRIAL, _carried_out(page, trials[rate], f"{study.name}: {arm}, {rate:g}")
                )
    tuned = {f"{rate:g}": files.read_json(where / TRIAL)["branches"][-1][1] for rate, where in trials.items()}
    best = float(min(tuned, key=tuned.__getitem__)) if tuned else None
    page = job_page(study, arm, seed, text, best)
    return _carried_out(page, directory, f"{study.name}: {arm}, seed {seed}") | {"learning_rate": best, "tuned": tuned}


def run_page(page: Table, directory: Path, title: str) -> dict[str, Table]:
    """Runs a page as `tele train` does, or what is left of it, and returns the summaries of its stages by name."""
    files.write_file(directory / "page.py", PAGE.format(title=title, page=page))
    return {summary["stage"]: summary for summary in runs.run(ConfigDict(page), directory / "run")}


def _carried_out(page: Table, directory: Path, title: str) -> Table:
    """Runs a page as `tele train` does, and reads the held-out losses of its branches and of the path to the last."""
    summaries = run_page(page, directory, title)
    branches, chains = [], branches_of(run_config(page))
    curve, growths, told = [], [], []
    for chain in chains.values():
        curve, growths, told, spent = [], [], [], 0.0
        for summary in map(summaries.__getitem__, chain):
            if "flops" not in summary:
                growths.append(spent)
                continue
            for step, found in evaluations(directory, summary["stage"]):
                curve.append([spent + summary["flops"] * step / summary["steps"], mean_loss(found, sources_of(page))])
            spent += summary["flops"]
            told.append({key: summary[key] for key in ("stage", "parameters", "tokens", "flops")})
        branches.append([spent, curve[-1][1]])
    return {"flops": branches[-1][0], "branches": branches, "curve": curve, "growths": growths, "stages": told}


def evaluations(directory: Path, stage: str) -> list[tuple[int, dict[str, float]]]:
    """(step, bits per byte of held-out text by domain) of every evaluation of a stage of a job."""
    found, prefix = [], metrics.EVALUATION
    for line in metrics.read(directory / "run" / stage / "metrics" / "metrics.jsonl"):
        bits = {name.removeprefix(prefix): bits for name, bits in line.items() if name.startswith(prefix)}
        found += [(int(line["step"]), bits)] if bits else []
    return found


def mean_loss(bits: Mapping[str, float], sources: Table) -> float:
    """The mean of bits per byte over domains, weighted by their rates."""
    rates = {name: sources[name].get("rate", 1.0) for name in bits}
    return sum(rate * bits[name] for name, rate in rates.items()) / sum(rates.values())


def sources_of(page: Table) -> Table:
    """The domains that the first stage of a page reads."""
    return next(table["data"]["sources"] for table in page.values() if isinstance(table, dict) and "data" in table)


def _data(study: Study, text: Path) -> Any:
    """The table of data that every training stage reads."""
    data, tokenizer = study.settings["data"], {"tokenizer": str(text / "tokenizer.model")}
    if data == "synthetic":
        read = {"files": [str(text / "train.jsonl")], "validation_files": [str(text / "validation.jsonl")]}
        return tokenizer | {"eval_bytes": 4_000, "sources": {"words": read | {"format": "jsonl"}}}
    return {key: data[key] for key in data if key != "vocab_size"} | tokenizer if "vocab_size" in data else data


def make_text(study: Study, text: Path) -> None:
    """Makes what settings.data leaves to the study: a tokenizer of the text with vocab_size ids, or all of the text."""
    data, made = study.settings["data"], text / "tokenizer.model"
    if made.exists() or (data != "synthetic" and "vocab_size" not in data):
        return
    if data == "synthetic":
        documents, size = _synthetic(text), 432
    else:
        patterns = [pattern for source in data["sources"].values() for pattern in source["files"]]
        documents, size = list(sample_texts(patterns, max_bytes=3_000_000, seed=0)), data["vocab_size"]
    write_vocabulary(train_vocabulary(documents, preset="tele_flm", vocab_size=size), made, preset="tele_flm")


def _synthetic(text: Path) -> list[str]:
    """Writes sentences of a small language in which each word leads to few others; returns those to train on."""
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
    return documents[20:]


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
    """For every arm that is no baseline, its share of FLOPs, difference and relative difference, within each seed.

    The share is that of the baseline's FLOPs at which the arm has the held-out loss of the finished baseline: between
    finished branches by a straight line, and no less than the FLOPs of the first branch. An arm that does not get there
    needs at least as much as it took. The differences are those of the losses of the last branches.
    """
    found = {}
    for arm in _compared(study):
        pairs = [(results[_baseline(study, arm)][seed], results[arm][seed]) for seed in study.seeds]
        needed = [_reached(other["branches"], base["branches"][-1][1]) for base, other in pairs]
        shares = [(other["flops"] if at is None else at) / base["flops"] for at, (base, other) in zip(needed, pairs)]
        unit = "of the baseline's FLOPs"
        found[SHARE + arm] = Estimate(shares, unit, [at is None for at in needed])
        ends = [(base["branches"][-1][1], other["branches"][-1][1]) for base, other in pairs]
        differences = [end - base for base, end in ends]
        found[DIFFERENCE + arm] = Estimate(differences, "bits per byte", size=max(base for base, _ in ends))
        relative = [100 * (end / base - 1) for base, end in ends]
        found[PERCENT + arm] = Estimate(relative, "percent of the baseline's loss", size=100.0)
    return found


def names(study: Study) -> list[str]:
    """The names of the estimates."""
    return [kind + arm for arm in _compared(study) for kind in (SHARE, DIFFERENCE, PERCENT)]


def rows(study: Study, results: "Results") -> tuple[list[str], list[list[str]]]:
    """A row per arm: its longest path, its learning rates, FLOPs and loss, and how it compares with the baseline."""
    found, lines = estimates(study, results), []
    for arm, seeds in results.items():
        first = next(iter(seeds.values()))
        path = " -> ".join(f"{s['parameters'] / 1e3:,.0f}k: {s['tokens'] / 1e6:.2f}M" for s in _joined(first["stages"]))
        tuned = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in first["tuned"].items())
        tuned = f"{first['learning_rate']:g} of {tuned}" if tuned else "as the page says"
        final: Any = np.mean([result["branches"][-1][1] for result in seeds.values()])
        kinds = (DIFFERENCE, PERCENT, SHARE)
        compared = [shown(figures(found[kind + arm])) if kind + arm in found else "" for kind in kinds]
        whole = next(iter(results[_baseline(study, arm)].values()))["flops"]
        flops = f"{first['flops']:.3e} ({first['flops'] / whole:.3g})"
        lines.append([arm, path, tuned, flops, f"{final:.4f}", *compared])
    header = ["arm", "parameters: tokens of each stage", "learning rate of those tried (loss at the seed apart)"]
    header += ["FLOPs (share of the baseline's)", "finished loss, bits per byte"]
    header += ["difference to the baseline at the end", "in percent"]
    return [*header, "share of FLOPs for the baseline's loss"], lines


def _joined(told: Sequence[Table]) -> list[Table]:
    """Stages with the parts of one size put together."""
    joined: list[Table] = []
    for stage in told:
        if joined and joined[-1]["parameters"] == stage["parameters"]:
            joined[-1] = joined[-1] | {"tokens": joined[-1]["tokens"] + stage["tokens"]}
        else:
            joined.append(stage)
    return joined


def picture(study: Study, results: "Results") -> "Figure":
    """Held-out loss over FLOPs on the left; on the right what the criteria are about, of each arm, with its interval.

    The left has all finished branches, with their mean over seeds as a line; where no arm has more than one, the path
    of the first seed. The right has shares of FLOPs, or relative differences where no criterion asks for a share.
    """
    figure = plots.new_figure(max(4.8, 1.6 + 0.55 * len(results)))
    losses, compared = figure.subplots(1, 2, width_ratios=(3, 2))
    finished = any(len(result["branches"]) > 1 for seeds in results.values() for result in seeds.values())
    colors = {arm: plots.CYCLE[i % len(plots.CYCLE)] for i, arm in enumerate(results)}
    for i, (arm, seeds) in enumerate(results.items()):
        told = list(seeds.values()) if finished else [seeds[study.seeds[0]]]
        ends = np.array([result["branches" if finished else "curve"] for result in told])
        style = dict(color=colors[arm], linestyle=plots.STYLES[i // len(plots.CYCLE)])
        losses.plot(*ends.mean(0).T, label=arm, marker="o" if finished else None, **style)
        if finished:
            losses.plot(*ends.reshape(-1, 2).T, ".", color=colors[arm], markersize=4, alpha=0.5)
    for baseline in dict.fromkeys(_baseline(study, arm) for arm in results):
        goal = np.mean([result["branches"][-1][1] for result in results[baseline].values()])
        losses.axhline(goal, color=colors[baseline], linestyle="--", linewidth=1, label=f"end of {baseline}")
    kind = f"finished; line: mean of {len(study.seeds)} seeds" if finished else f"seed {study.seeds[0]}"
    losses.set(xlabel="training FLOPs (model FLOPs)", ylabel=f"held-out text, bits per byte\n({kind})")
    _compare(compared, study, results, colors)
    for axes in (losses, compared):
        plots.add_grid(axes)
    figure.suptitle(study.title, fontsize="medium")
    longest = max(len(str(label)) for axes in figure.axes for label in axes.get_legend_handles_labels()[1])
    figure.legend(**plots.LEGEND_BELOW | dict(ncols=3 if longest < 30 else 2))
    return figure


def _compare(axes: Any, study: Study, results: "Results", colors: dict[str, str]) -> None:
    """Draws a bar per arm that is no baseline: its share of FLOPs or relative difference, with its interval."""
    found, bases = estimates(study, results), {_baseline(study, arm) for arm in results}
    baseline = bases.pop() if len(bases) == 1 else "its baseline"
    kind = SHARE if any(criterion.estimate.startswith(SHARE) for criterion in study.criteria) else PERCENT
    needed = {arm: figures(found[kind + arm]) for arm in _compared(study)}
    small: Any = dict(fontsize=8, va="bottom", transform=axes.get_yaxis_transform(), zorder=5)
    clear: Any = dict(facecolor="white", edgecolor="none", alpha=0.85, pad=0.6)  # no line goes through a text
    for place, (arm, told) in enumerate(needed.items()):
        bound, count = told["at_least"], len(told["values"])
        hatch = "///" if bound else None
        axes.barh(place, told["mean"], color=colors[arm], height=0.4, hatch=hatch, edgecolor="white", linewidth=0)
        if told["interval"] is not None:
            ends = [[abs(told["mean"] - end)] for end in told["interval"]]
            axes.errorbar(told["mean"], place, xerr=ends, color=plots.INK, capsize=4)
        text = f"at least {told['mean']:.3g} (bound in {bound} of {count})" if bound else shown(told)
        axes.text(0.01, place - 0.24, text, bbox=clear, **small)
    claims = {(one.side, one.threshold) for one in study.criteria if one.estimate.startswith(kind)}
    for side, threshold in sorted(claims):
        axes.axvline(threshold, color=plots.INK, linestyle=":", linewidth=1.2, label=f"{side} {threshold:.3g}: claimed")
    axes.axvline(1 if kind == SHARE else 0, color=plots.INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(needed)), list(needed), fontsize=8)
    share = f"share of the FLOPs of {baseline} for the loss of its end, 95% interval"
    percent = f"difference to the end of {baseline}, percent of its loss, 95% interval"
    label = textwrap.wrap(share if kind == SHARE else percent, 30)
    if kind == SHARE and any(told["at_least"] for told in needed.values()):
        label.append("(hatched: at least)")
    axes.set(ylim=(len(needed) - 0.4, -0.8), xlabel="\n".join(label))
