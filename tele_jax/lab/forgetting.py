"""Forgetting in fine-tuning: what a model loses on the text it was trained on when it learns another (study E9).

An arm is a table with `config`, the page of an ordinary run as in `paths`, which trains on settings.data. Every
finished branch of it is fine-tuned with each of settings.learning_rates: stages that go on `after` the branch, with the
fields of settings.tuning, on the domains of settings.new. These are a table of sources, or "synthetic" where
settings.data is. settings.baseline names the arm that others are compared with; the last branches of all arms have
models of one size.

Forgetting is the rise of bits per byte on held-out text of the old domains from before the fine-tuning to its end, gain
the fall on the new ones. Four comparisons within a seed:

    equal compute       last branches of both arms, mean over the learning rates
    equal gain          the same branches, where both have gained as much, between learning rates by a straight line,
                        which below the lowest rate begins at no fine-tuning: never beyond what was measured
    equal loss          the baseline as it would be at the loss that the arm had on the old domains before, by a
                        straight line through the branches of the baseline; extrapolated where that loss lies beyond
                        all of them, which tables say
    gain                the gains of the last branches, mean over the learning rates
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tele_jax import files, plots
from tele_jax.config import convert
from tele_jax.errors import UserError, prefixed, require
from tele_jax.files import Table
from tele_jax.lab import paths
from tele_jax.lab.study import Study
from tele_jax.lab.verdict import Estimate, figures, shown
from tele_jax.stages import run_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tele_jax.lab.report import Results

SEEN = 1e-7  # rate of the old domains in fine-tuning: they are evaluated, and never drawn
# What a study of this kind sets in the stages that fine-tune, by key, and what says it.
SET_BY_STUDY = {
    "after": "every branch of an arm is fine-tuned",
    "data": "settings.new names the domains",
    "seed": "config.seeds gives those of the jobs",
    "optimizer.learning_rate": "settings.learning_rates lists those that are tried",
}
SHARE = 0.9  # of the smaller of two largest gains, at which arms are compared
# Names of estimates, before the name of an arm.
COMPUTE, GAIN = "forgetting: ", "gain: "
EQUAL_GAIN, EQUAL_LOSS = "forgetting at equal gain: ", "forgetting at equal loss: "


def compute(study: Study) -> dict[str, float]:
    """The planned FLOPs of every arm up to its last branch, before fine-tuning. Raises UserError for what cannot be."""
    paths.check_keys(study, ("baseline", "data", "new", "tuning", "learning_rates"), ("config",))
    baseline, data, new = (study.settings.get(key) for key in ("baseline", "data", "new"))
    require(baseline in study.arms, f"config.settings.baseline={baseline!r} is no arm of the study")
    rates = _rates(study)
    require(len(rates) > 0, "config.settings.learning_rates is empty: fine-tuning needs at least one")
    require(list(rates) == sorted(set(rates)), f"config.settings.learning_rates={rates} do not rise")
    if not (data == new == "synthetic"):
        require(isinstance(new, dict) and bool(new), f"config.settings.new={new!r}: expected a table of sources")
        known = data.get("sources", {}) if isinstance(data, dict) else {}
        both = [name for name in new or () if name in known]
        require(not both, f"config.settings.new: {', '.join(both)} is among the domains of settings.data as well")
    planned, last = {}, {}
    for arm in study.arms:
        with prefixed(f"config.arms.{arm}: "):
            page, ends = _page(study, arm, study.seeds[0], Path("text"))
            with _naming_settings():
                config = run_config(page)
                models, costs = paths.models_of(config), paths.costs_of(config)
            chain = next(chain for chain in paths.branches_of(config).values() if ends[-1] in chain)
            planned[arm] = sum(costs[name] for name in chain[:-1])
            last[arm] = models[ends[-1]]
    for arm, model in last.items():
        same = model.axis_sizes == last[baseline].axis_sizes
        require(same, f"config.arms.{arm}: its last branch has another size of model than that of {baseline}")
    return planned


@contextlib.contextmanager
def _naming_settings() -> Iterator[None]:
    """Names, in a UserError about a stage that fine-tunes, the settings that the stage is made of."""
    try:
        yield
    except UserError as error:
        message = re.sub(r"config\.\w+_tune_\d+\b", "config.settings.tuning", str(error))
        raise UserError(message.replace("config.settings.tuning.data.sources", "config.settings.new")) from None


def _rates(study: Study) -> tuple[float, ...]:
    return convert(tuple[float, ...], study.settings.get("learning_rates", ()), "config.settings.learning_rates")


def _page(study: Study, arm: str, seed: int, text: Path) -> tuple[Table, list[str]]:
    """The page of one job, with the fine-tuning of every branch, and the last stages of the branches."""
    page, tuning = paths.job_page(study, arm, seed, text), study.settings.get("tuning")
    if not isinstance(tuning, dict) or not isinstance(tuning.get("optimizer", {}), dict):
        raise UserError("config.settings.tuning: expected a table with the fields of the stages that fine-tune")
    given = {**tuning, **{f"optimizer.{key}": value for key, value in tuning.get("optimizer", {}).items()}}
    for key, instead in SET_BY_STUDY.items():
        require(key not in given, f"config.settings.tuning.{key}: leave it out; {instead}")
    ends, old = list(paths.branches_of(run_config(page))), paths.sources_of(page)
    sources = _new(study, text) | {name: source | {"rate": SEEN} for name, source in old.items()}  # new ones first
    read = next(table["data"] for table in page.values() if isinstance(table, dict) and "data" in table)
    data = read | {"sources": sources}
    for end, (number, rate) in itertools.product(ends, enumerate(_rates(study), start=1)):
        optimizer = tuning.get("optimizer", {}) | {"learning_rate": rate}
        own = {"after": end, "optimizer": optimizer, "data": data, "seed": paths.SEEDS_APART * seed}
        page[f"{end}_tune_{number}"] = tuning | own
        page["run"] = [*page["run"], f"{end}_tune_{number}"]
    return page, ends


def _new(study: Study, text: Path) -> Table:
    """The sources of the new domains."""
    if study.settings["new"] != "synthetic":
        return study.settings["new"]
    read = {"files": [str(text / "new_train.jsonl")], "validation_files": [str(text / "new_validation.jsonl")]}
    return {"words_reversed": read | {"format": "jsonl"}}


def _make_new(study: Study, text: Path) -> None:
    """Writes the new domain of a synthetic study: the sentences of the old one, spelled backwards."""
    for name in ("train", "validation") if study.settings["new"] == "synthetic" else ():
        lines = (text / f"{name}.jsonl").read_text("utf-8").splitlines()
        turned = [json.dumps({"text": json.loads(line)["text"][::-1]}) + "\n" for line in lines]
        files.write_file(text / f"new_{name}.jsonl", "".join(turned))


def work(study: Study, arm: str, seed: int, directory: Path) -> Table:
    """Trains one arm, fine-tunes its branches, and reads held-out text of all domains before and after."""
    text = directory.parents[1] / "text"
    paths.make_text(study, text)
    _make_new(study, text)
    page, ends = _page(study, arm, seed, text)
    summaries = paths.run_page(page, directory, f"{study.name}: {arm}, seed {seed}")
    old, new = paths.sources_of(page), _new(study, text)
    chains = {chain[-2]: chain[:-1] for chain in paths.branches_of(run_config(page)).values()}
    branches = []
    for end in ends:
        read = []
        for number in range(1, len(_rates(study)) + 1):
            evaluated = [bits for _, bits in paths.evaluations(directory, f"{end}_tune_{number}")]
            read.append(
                [
                    {
                        part: paths.mean_loss({name: bits[name] for name in sources}, sources)
                        for part, sources in (("old", old), ("new", new))
                    }
                    for bits in (evaluated[0], evaluated[-1])
                ]
            )
        flops = sum(summaries[name].get("flops", 0.0) for name in chains[end])
        branches.append({"flops": flops, "before": read[0][0], "after": [after for _, after in read]})
    return {"flops": branches[-1]["flops"], "branches": branches, "parameters": summaries[ends[-1]]["parameters"]}


# ----------------------------------------------------------------------------------------------------------- estimates


def _forgetting(branch: Table) -> list[float]:
    """The rise of the loss on old domains, by learning rate."""
    return [after["old"] - branch["before"]["old"] for after in branch["after"]]


def _gains(branch: Table) -> list[float]:
    """The fall of the loss on new domains, by learning rate."""
    return [branch["before"]["new"] - after["new"] for after in branch["after"]]


def _at_gain(branch: Table, gain: float) -> float:
    """Forgetting where the gain, followed from none over rising learning rates, first comes up to `gain`.

    >>> _at_gain({"before": {"old": 2.0, "new": 5.0}, "after": [{"old": 2.5, "new": 3.0}]}, 1.0)
    0.25
    """
    points = [(0.0, 0.0), *zip(_gains(branch), _forgetting(branch), strict=True)]
    for (low, before), (high, after) in itertools.pairwise(points):
        if low < gain <= high:
            return float(before + (after - before) * (gain - low) / (high - low))
    return 0.0  # nothing was gained


def _at_loss(branches: Sequence[Table], loss: float) -> float:
    """Mean forgetting at a loss before fine-tuning, by a straight line through branches (least squares)."""
    losses = np.array([branch["before"]["old"] for branch in branches])
    slope, level = np.polyfit(losses, np.array([np.mean(_forgetting(branch)) for branch in branches]), 1)
    return float(slope * loss + level)


def _is_beyond(branches: Sequence[Table], loss: float) -> bool:
    """True where a loss lies outside those of the branches, so that the line through them is extrapolated."""
    losses = [branch["before"]["old"] for branch in branches]
    return not min(losses) <= loss <= max(losses)


def _compared(base: Table, other: Table) -> dict[str, float]:
    """The differences of an arm from the baseline in one seed, by the beginnings of the names of estimates."""
    first, second = base["branches"][-1], other["branches"][-1]
    goal = SHARE * min(max(_gains(first)), max(_gains(second)))
    mean = lambda values: float(np.mean(values))  # noqa: E731
    found = {
        COMPUTE: mean(_forgetting(second)) - mean(_forgetting(first)),
        GAIN: mean(_gains(second)) - mean(_gains(first)),
        EQUAL_GAIN: _at_gain(second, goal) - _at_gain(first, goal),
    }
    if len(base["branches"]) > 1:
        found[EQUAL_LOSS] = mean(_forgetting(second)) - _at_loss(base["branches"], second["before"]["old"])
    return found


def estimates(study: Study, results: "Results") -> dict[str, Estimate]:
    """For every arm but the baseline "forgetting: ARM", "gain: ARM", "forgetting at equal gain: ARM", and "forgetting
    at equal loss: ARM" where the baseline has several branches: that of the arm minus that of the baseline, by seed.
    """
    baseline, found = study.settings["baseline"], {}
    for arm in study.arms:
        if arm != baseline:
            pairs = [(results[baseline][seed], results[arm][seed]) for seed in study.seeds]
            seeds = [_compared(*pair) for pair in pairs]
            size = max(other["branches"][-1]["before"]["old"] for _, other in pairs)
            beyond = [_is_beyond(base["branches"], other["branches"][-1]["before"]["old"]) for base, other in pairs]
            for name in seeds[0]:
                extrapolated = beyond if name == EQUAL_LOSS else ()
                values = [one[name] for one in seeds]
                found[name + arm] = Estimate(values, "bits per byte", extrapolated=extrapolated, size=size)
    return found


def names(study: Study) -> list[str]:
    """The names of the estimates."""
    baseline = study.settings["baseline"]
    _, ends = _page(study, baseline, study.seeds[0], Path("text"))
    kinds = (COMPUTE, GAIN, EQUAL_GAIN, *((EQUAL_LOSS,) if len(ends) > 1 else ()))
    return [kind + arm for arm in study.arms if arm != baseline for kind in kinds]


def rows(study: Study, results: "Results") -> tuple[list[str], list[list[str]]]:
    """A row per branch: what it was before, and forgetting and gain at every learning rate; means over seeds."""
    found, lines = estimates(study, results), []
    told = lambda name: shown(figures(found[name])) if name in found else ""  # noqa: E731
    for arm, seeds in results.items():
        for place, first in enumerate(next(iter(seeds.values()))["branches"]):
            branches = [result["branches"][place] for result in seeds.values()]
            before = [float(np.mean([branch["before"][part] for branch in branches])) for part in ("old", "new")]
            both = [np.mean([of(branch) for branch in branches], axis=0) for of in (_forgetting, _gains)]
            tuned = [f"{forgot:+z.4f}, {gained:z.4f}" for forgot, gained in zip(*both, strict=True)]
            is_last = place + 1 == len(next(iter(seeds.values()))["branches"])
            compared = [told(kind + arm) if is_last else "" for kind in (COMPUTE, EQUAL_GAIN, EQUAL_LOSS)]
            lines.append([arm, f"{first['flops']:.3e}", *(f"{loss:.4f}" for loss in before), *tuned, *compared])
    header = ["arm", "FLOPs of training", "old domains before, bits per byte", "new domain before"]
    header += [f"forgetting, gain at {rate:g}" for rate in _rates(study)]
    header += [f"forgetting against the baseline at equal {what}" for what in ("compute", "gain", "loss")]
    return header, lines


def picture(study: Study, results: "Results") -> "Figure":
    """On the left forgetting over gain, a line per arm through its learning rates; on the right forgetting over the
    loss before, for all branches.
    """
    figure = plots.new_figure(4.8)
    left, right = figure.subplots(1, 2)
    for i, (arm, seeds) in enumerate(results.items()):
        color: dict[str, Any] = dict(color=plots.CYCLE[i % len(plots.CYCLE)])
        last = [result["branches"][-1] for result in seeds.values()]
        gains, forgot = ([of(branch) for branch in last] for of in (_gains, _forgetting))
        left.plot(np.mean(gains, axis=0), np.mean(forgot, axis=0), "o-", label=arm, **color)
        left.plot(np.ravel(gains), np.ravel(forgot), ".", markersize=4, alpha=0.5, **color)
        every = [branch for result in seeds.values() for branch in result["branches"]]
        right.plot([b["before"]["old"] for b in every], [np.mean(_forgetting(b)) for b in every], "o", **color)
    rates = ", ".join(f"{rate:g}" for rate in _rates(study))
    left.set(xlabel=f"gain on the new domain, bits per byte\n(learning rates {rates}; line: mean of the seeds)")
    left.set(ylabel="forgetting of the old domains, bits per byte")
    right.set(xlabel="loss on the old domains before, bits per byte\n(every branch and seed)")
    right.set(ylabel="forgetting, mean over the learning rates")
    for axes in (left, right):
        plots.add_grid(axes)
    figure.suptitle(study.title, fontsize="medium")
    figure.legend(**plots.LEGEND_BELOW)
    return figure
