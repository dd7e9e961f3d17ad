"""The choice of the layers that are copied when a model gets deeper (study E7).

An arm is a table with `config`, the page of an ordinary run as in `paths`: stages that train the source, one growth,
and the stages behind it. A job trains the source once, and carries out the growth and what follows once for every
choice of layers, as a branch that goes on `after` the source. Choices are

    settings.named      by rule: distance (smallest change first) and uniform, and perhaps middle, last, first
    settings.sampled    draws of layers, each with a probability in proportion to 1 / its distance
    settings.random     draws of layers with equal probabilities

Draws are made from the seed of the job, copy a layer at most once, and repeat no choice; choices by rule that name the
same layers are carried out once. Held-out loss is read right after the growth, after every stage that another one
continues (the probes), and after the last ones (the ends), whose mean is the finished loss of the choice. Two ends that
differ in the order of their data alone say how much of a finished rank belongs to the choice.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from tele_jax import plots
from tele_jax.config import convert
from tele_jax.errors import prefixed, require, require_known
from tele_jax.files import Table
from tele_jax.growth.layers import choose
from tele_jax.growth.receipt import RECEIPT_FILE, plan_of, read_receipt
from tele_jax.lab import paths
from tele_jax.lab.study import Study
from tele_jax.lab.verdict import Estimate, figures, shown
from tele_jax.settings import GrowStage, TrainStage
from tele_jax.stages import RunConfig, run_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tele_jax.lab.report import Results

NAMED = ("distance", "uniform", "middle", "last", "first")
DRAWN = ("sampled", "random")
PALETTE = (plots.BLUE, plots.GREEN, plots.ORANGE, plots.VERMILION, plots.PINK, plots.SKY, plots.INK)
COLORS: dict[str, str] = dict(zip((*NAMED, *DRAWN), PALETTE))
FEWEST = 3  # choices of a rank correlation


@dataclasses.dataclass(frozen=True)
class _Arm:
    """The page of one choice, taken apart: the source, the growth, and what follows."""

    page: Table
    config: RunConfig
    source: list[str]
    behind: list[str]  # the growth first
    probes: list[str]  # stages behind it that others continue, in the order in which they run
    ends: list[str]
    steps: list[int]  # after the growth, at which probes are read: 0 and the ends of `probes`
    src_layers: int
    dst_layers: int
    preserving: bool  # the growth keeps the function, so that all choices begin alike


def _arm(study: Study, arm: str, seed: int, text: Path) -> _Arm:
    """The arm at one seed; raises UserError where its page has not one growth in depth with training behind it."""
    page = paths.job_page(study, arm, seed, text)
    config = run_config(page)
    names, grows = list(config.run), [name for name, s in config.stages.items() if isinstance(s, GrowStage)]
    require(len(grows) == 1, f"config.run: has {len(grows)} growths; the choice of layers is that of one")
    place, growth = names.index(grows[0]), config.stages[grows[0]]
    require(place + 1 < len(names), f"config.run: no stage comes after {grows[0]}")
    assert isinstance(growth, GrowStage)
    require("layers" not in page[grows[0]], f"config.{grows[0]}.layers: leave it out; the study chooses the layers")
    source = config.lineage(grows[0])[:-1]
    plan = plan_of(paths.models_of(config)[source[-1]], growth, f"config.{grows[0]}")
    layers = plan.src_cfg.num_layers, plan.dst_cfg.num_layers
    require(layers[0] < layers[1], f"config.{grows[0]}.model: num_layers does not grow; there is no layer to choose")
    chains = paths.branches_of(config)
    for end, chain in chains.items():
        require(grows[0] in chain, f"config.{end}: ends a branch without {grows[0]}; all have to go through the growth")
    probes = [name for name in next(iter(chains.values()))[:-1] if name in names[place + 1 :]]
    lengths = [stage.steps for stage in map(config.stages.__getitem__, probes) if isinstance(stage, TrainStage)]
    steps = [0, *itertools.accumulate(lengths)]
    return _Arm(page, config, source, names[place:], probes, list(chains), steps, *layers, plan.preserving)


def compute(study: Study) -> dict[str, float]:
    """The planned FLOPs of every arm with all its choices. Raises UserError for what cannot be."""
    paths.check_keys(study, ("data", "named", *DRAWN), ("config",))
    named, counts = _settings(study)
    for name in named:
        require_known(name, NAMED, f"config.settings.named: {name!r} is no rule")
    require(len(set(named)) == len(named), f"config.settings.named={named}: one is named twice")
    for reference in ("distance", "uniform"):
        require(reference in named, f"config.settings.named={named}: {reference!r} is missing, a choice of every study")
    total = len(named) + sum(counts.values())
    require(total >= FEWEST, f"config.settings: {total} choices of layers; a rank correlation needs {FEWEST}")
    planned = {}
    for arm in study.arms:
        with prefixed(f"config.arms.{arm}: "):
            found = _arm(study, arm, study.seeds[0], Path("text"))
            ways = math.comb(found.src_layers, found.dst_layers - found.src_layers)
            require(ways > total, f"{ways} ways to copy layers at most once are too few for {total} choices")
            costs = paths.costs_of(found.config)
            planned[arm] = sum(costs.values()) + (total - 1) * sum(costs[name] for name in found.behind)
    return planned


def _settings(study: Study) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of the choices by rule, and how many draws of each kind there are."""
    named = convert(tuple[str, ...], study.settings.get("named", NAMED), "config.settings.named")
    counts = {kind: convert(int, study.settings.get(kind, 0), f"config.settings.{kind}") for kind in DRAWN}
    for kind, count in counts.items():
        require(count >= 0, f"config.settings.{kind}={count} must not be negative")
    return named, counts


def choices_of(study: Study, scores: Sequence[float], dst_layers: int, seed: int) -> dict[str, list[int]]:
    """The source of every layer of the larger model, for each choice by name.

    scores: how much each layer of the source changes its input.
    """
    named, counts = _settings(study)
    every, drawn = range(len(scores)), np.random.default_rng(seed)
    extra = dst_layers - len(scores)
    first = sorted([*every, *(i % len(scores) for i in range(extra))])
    found = {name: first if name == "first" else choose(name, len(scores), dst_layers, scores) for name in named}
    inverse = 1 / np.maximum(scores, np.mean(scores) / 100)  # none so small that no other layer is ever drawn
    for kind, weights in zip(DRAWN, (inverse / inverse.sum(), None)):
        for number in range(1, counts[kind] + 1):
            ids = found[named[0]]
            while ids in found.values():
                copied = drawn.choice(len(scores), extra, replace=False, p=weights)
                ids = sorted([*every, *map(int, copied)])
            found[f"{kind}_{number}"] = ids
    return found


def _branched(arm: _Arm, choices: Mapping[str, Any]) -> Table:
    """The page with the growth and what follows it once for every choice."""
    made = {key: value for key, value in arm.page.items() if key not in ("run", *arm.behind)}
    for choice, layers in choices.items():
        for name in arm.behind:
            table = made[f"{name}_{choice}"] = dict(arm.page[name])
            if table["kind"] == "grow":
                table |= {"layers": layers, "after": arm.source[-1]}
            elif table.get("after") in arm.behind:
                table["after"] += f"_{choice}"
    return made | {"run": [*arm.source, *(f"{name}_{choice}" for choice in choices for name in arm.behind)]}


def work(study: Study, arm: str, seed: int, directory: Path) -> Table:
    """Trains the source and the branch that chooses by distance, whose receipt has the scores, and then the others."""
    text, title = directory.parents[1] / "text", f"{study.name}: {arm}, seed {seed}"
    paths.make_text(study, text)
    parts = _arm(study, arm, seed, text)
    by_distance, measured = {"distance": "distance"}, directory / "run" / f"{parts.behind[0]}_distance"
    if not (measured / RECEIPT_FILE).exists():
        paths.run_page(_branched(parts, by_distance), directory, title)
    scores = read_receipt(measured)["layer_scores"]
    choices = choices_of(study, scores, parts.dst_layers, seed)
    same = {name: next(other for other, ids in choices.items() if ids == choices[name]) for name in choices}
    carried = {name: ids for name, ids in choices.items() if same[name] == name}
    summaries = paths.run_page(_branched(parts, by_distance | carried | by_distance), directory, title)
    sources, found = paths.sources_of(parts.page), {"scores": scores, "layers": choices, "probes": {}, "ends": {}}
    for name, first in same.items():
        losses = {
            stage: [paths.mean_loss(bits, sources) for _, bits in paths.evaluations(directory, f"{stage}_{first}")]
            for stage in parts.behind[1:]
        }
        found["probes"][name] = [losses[parts.behind[1]][0], *(losses[stage][-1] for stage in parts.probes)]
        found["ends"][name] = [losses[stage][-1] for stage in parts.ends]
    return found | {"flops": sum(summary.get("flops", 0.0) for summary in summaries.values())}


# ----------------------------------------------------------------------------------------------------------- estimates


def _groups(study: Study) -> dict[str, list[str]]:
    """Names of choices by what they have in common: each rule alone, and the draws of each kind."""
    named, counts = _settings(study)
    drawn = {kind: [f"{kind}_{i}" for i in range(1, count + 1)] for kind, count in counts.items() if count}
    return {name: [name] for name in named} | drawn


def _finished(found: Table, choices: Iterable[str]) -> float:
    """The mean finished loss of some choices."""
    return float(np.mean([found["ends"][name] for name in choices]))


def _rank_correlation(found: Table, first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Spearman's rank correlation over the choices that differ in their layers."""
    different = {tuple(ids): name for name, ids in found["layers"].items()}.values()
    pairs = [(first[name], second[name]) for name in different]
    return float(np.asarray(stats.spearmanr(np.array(pairs)))[0])


def estimates(study: Study, results: "Results") -> dict[str, Estimate]:
    """For every arm, within each seed:

    "rank correlation at N: ARM": of the loss N steps after the growth with the finished loss; not at 0 where all begin
    alike. "rank correlation of two ends: ARM": of the finished losses of two ends. "A against B: ARM": finished loss of
    the choices A minus that of B, where B is uniform or random.
    """
    found, groups = {}, _groups(study)
    for arm in study.arms:
        told = [results[arm][seed] for seed in study.seeds]
        parts = _arm(study, arm, study.seeds[0], Path("text"))
        for place, step in enumerate(parts.steps):
            if step or not parts.preserving:
                ranks = [
                    _rank_correlation(
                        one,
                        {name: probes[place] for name, probes in one["probes"].items()},
                        {name: _finished(one, [name]) for name in one["ends"]},
                    )
                    for one in told
                ]
                found[f"rank correlation at {step}: {arm}"] = Estimate(ranks, "Spearman's rho")
        if len(parts.ends) > 1:
            two = [[{name: ends[i] for name, ends in one["ends"].items()} for i in (0, 1)] for one in told]
            ranks = [_rank_correlation(one, *ends) for one, ends in zip(told, two)]
            found[f"rank correlation of two ends: {arm}"] = Estimate(ranks, "Spearman's rho")
        for reference, name in itertools.product(("uniform", "random"), groups):
            if reference in groups and name != reference:
                values = [_finished(one, groups[name]) - _finished(one, groups[reference]) for one in told]
                size = max(_finished(one, groups[reference]) for one in told)
                found[f"{name} against {reference}: {arm}"] = Estimate(values, "bits per byte", size=size)
    return found


def names(study: Study) -> list[str]:
    """The names of the estimates, found from results that are made up."""
    choices = [name for group in _groups(study).values() for name in group]
    made: Results = {}
    for arm in study.arms:
        parts = _arm(study, arm, study.seeds[0], Path("text"))
        layers = {name: [number] for number, name in enumerate(choices)}
        losses = {name: [float(number)] * len(parts.steps + parts.ends) for number, name in enumerate(choices)}
        made[arm] = {seed: {"layers": layers, "probes": losses, "ends": losses} for seed in study.seeds}
    return list(estimates(study, made))


def rows(study: Study, results: "Results") -> tuple[list[str], list[list[str]]]:
    """A row per arm and choice: what it copied, its losses; and a row with the rank correlations of the arm."""
    found, lines = estimates(study, results), []
    steps = sorted({step for arm in study.arms for step in _arm(study, arm, study.seeds[0], Path("text")).steps})
    told = lambda name: shown(figures(found[name])) if name in found else ""  # noqa: E731
    for arm, seeds in results.items():
        at = _arm(study, arm, study.seeds[0], Path("text")).steps
        for group, choices in _groups(study).items():
            copied = "; ".join(
                " or ".join(_copies(one["layers"][name]) for name in choices) if len(choices) < 3 else "several"
                for one in seeds.values()
            )
            probes = {
                step: f"{np.mean([one['probes'][name][place] for one in seeds.values() for name in choices]):.4f}"
                for place, step in enumerate(at)
            }
            final = float(np.mean([_finished(one, choices) for one in seeds.values()]))
            losses = [*(probes.get(step, "") for step in steps), f"{final:.4f}"]
            lines.append([arm, group, copied, *losses, told(f"{group} against uniform: {arm}")])
        ranks = [told(f"rank correlation at {step}: {arm}") for step in steps]
        lines.append([arm, "rank correlation", "", *ranks, told(f"rank correlation of two ends: {arm}"), ""])
    at = [f"loss {step} steps after" for step in steps]
    return ["arm", "choice", "layers copied, by seed", *at, "finished loss", "finished against uniform"], lines


def _copies(ids: Sequence[int]) -> str:
    """The layers that have a copy, such as "1 2 4"."""
    return " ".join(str(i) for i, before in zip(ids[1:], ids) if i == before)


def picture(study: Study, results: "Results") -> "Figure":
    """Finished loss over the loss at every probe, one dot per choice and seed, relative to the mean of the seed."""
    parts = {arm: _arm(study, arm, study.seeds[0], Path("text")) for arm in results}
    width, found = max(len(part.steps) for part in parts.values()), estimates(study, results)
    figure = plots.new_figure(1.2 + 3.0 * len(results))
    grid = figure.subplots(len(results), width, squeeze=False)
    for row, (arm, seeds) in zip(grid, results.items(), strict=True):
        for axes in row[len(parts[arm].steps) :]:
            axes.set_axis_off()
        for place, (axes, step) in enumerate(zip(row, parts[arm].steps)):
            for (group, choices), one in itertools.product(_groups(study).items(), seeds.values()):
                every = one["layers"]
                middle = np.mean([one["probes"][name][place] for name in every]), _finished(one, every)
                # Choices that begin alike differ by rounding: 9 decimals of a loss are none of it.
                dots = [
                    (round(one["probes"][c][place] - middle[0], 9), _finished(one, [c]) - middle[1]) for c in choices
                ]
                color = COLORS[group]
                label = group if one is seeds[study.seeds[0]] else None
                axes.plot(*zip(*dots, strict=True), "o", color=color, markersize=4, alpha=0.8, label=label)
            rank = f"rank correlation at {step}: {arm}"
            title = shown(figures(found[rank])) if rank in found else "all begin alike"
            axes.set_title(f"{arm}, rank correlation\n{title}", fontsize="small")
            axes.set_xlabel(f"loss {step} steps after, bits per byte", fontsize="small")
            axes.tick_params(labelsize=7)
            axes.locator_params(nbins=4)
            if rank not in found:
                axes.set_xlim(-0.001, 0.001)
            plots.add_grid(axes)
        row[0].set_ylabel("finished loss, bits per byte\n(both relative to the seed's mean)", fontsize="small")
    handles = grid[0][0].get_legend_handles_labels()
    figure.suptitle(study.title, fontsize="medium")
    figure.legend(*handles, **plots.LEGEND_BELOW | dict(ncols=7))
    return figure
