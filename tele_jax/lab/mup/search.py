"""Search of muP's settings on a small model: rates, initial standard deviations and multipliers (arXiv 2404.16645).

A page of a run with a table `search` beside its stages says what is searched; every trial is that run with other values
in its first stage, carried out as `tele train` does.

    OUT/search.json                       the page; another search is refused in this directory
    OUT/trials/<number>/run/              work directory of a trial
    OUT/trials/<number>/result.json       written last: the trial is done, and never done again
    OUT/results.json, OUT/parallel.png    all trials that are done

optuna draws the values. Seeded and asked in order, it gives each trial the same values again when the command is
started once more: what is done is read back, and the trial that was under way goes on.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ml_collections import ConfigDict

from tele_jax import extras, files
from tele_jax import report as runs
from tele_jax.config import check_seed, checked, finite, from_dict, require, written_table
from tele_jax.errors import DamageError, FailedError, UserError, require_known
from tele_jax.files import Table
from tele_jax.lab.mup.pictures import parallel
from tele_jax.lab.mup.widths import first_stage
from tele_jax.settings import TrainStage
from tele_jax.stages import run_config
from tele_jax.train import metrics

SEARCH, RESULT, RESULTS, LOCK = "search.json", "result.json", "results.json", ".lock"
# What can be searched, and the table of the first stage that has it.
TABLES = {
    **dict.fromkeys(("learning_rate", "matrix_learning_rate", "weight_decay"), "optimizer"),
    **dict.fromkeys(("init_std", "matrix_init_std", "input_mult", "output_mult"), "model"),
}
HELD_OUT = "held-out bits per byte"
TRAINED, BITS = ("loss", "grad_norm"), "bits_per_byte"  # figures of training that can be minimised; of held-out text


@checked
class Range:
    """Values from low to high on a logarithmic scale: `points` of them for a grid, any for TPE."""

    low: float  # the smallest value
    high: float  # the largest value
    points: int = 3  # values of a grid, both ends included

    def __post_init__(self):
        require(0 < self.low < self.high < math.inf, f"low={self.low} and high={self.high}: 0 < low < high has to hold")
        require(self.points > 1, f"points={self.points} must be 2 or more")

    @property
    def grid(self) -> list[float]:
        """The points, at equal ratios."""
        return [float(value) for value in np.geomspace(self.low, self.high, self.points)]


@checked
class SearchConfig:
    """The space of a search, and the way through it."""

    space: dict[str, Any]  # {key of TABLES: list of values, or a table with low, high and points}
    sampler: Literal["grid", "tpe"] = "grid"  # all combinations, or values that look promising (arXiv 2304.11127)
    trials: int | None = None  # trials of tpe; None: all combinations of a grid
    seed: int = 0  # seed of the order and of tpe's values
    figure: str | None = None  # figure of metrics.jsonl to minimise, at its last line; None: held-out bits per byte

    def __post_init__(self):
        check_seed(self.seed)
        require(len(self.space) > 0, "space is empty: name what is searched, such as learning_rate=[1e-3, 2e-3]")
        for key, given in self.space.items():
            require_known(key, TABLES, f"space.{key} cannot be searched")
            self._values(key, given)
        require(
            self.sampler == "grid" or self.trials is not None, "trials: missing; tpe goes on for as long as it is told"
        )
        require(self.trials is None or self.trials > 0, f"trials={self.trials} must be above 0")

    @staticmethod
    def _values(key: str, given: Any) -> "list[float] | Range":
        if isinstance(given, Mapping):
            return from_dict(Range, given, f"space.{key}")
        require(isinstance(given, (list, tuple)), f"space.{key}: give a list of values, or dict(low=, high=, points=)")
        require(len(given) > 0, f"space.{key} is empty; leave it out, or give values")
        values = [finite(value, f"space.{key}") for value in given]
        require(len(set(values)) == len(values), f"space.{key}: a value stands there twice")
        return values

    @property
    def axes(self) -> "dict[str, list[float] | Range]":
        """Values or range of every key."""
        return {key: self._values(key, given) for key, given in self.space.items()}

    @property
    def grid(self) -> dict[str, list[float]]:
        """The values of a grid by key."""
        return {key: axis.grid if isinstance(axis, Range) else axis for key, axis in self.axes.items()}

    @property
    def count(self) -> int:
        """The number of trials."""
        combinations = math.prod(len(values) for values in self.grid.values())
        if self.sampler == "tpe":
            assert self.trials is not None  # __post_init__ has seen to it
            return self.trials
        return min(combinations, self.trials or combinations)


def read_page(page: Mapping[str, Any] | ConfigDict) -> tuple[SearchConfig, Table]:
    """Splits a page into the search and the run, both checked, with the first and the last combination of the grid.

    Raises:
      UserError: no or an empty space, an unknown key, a range that is none, a model without muP, a run that cannot be.
    """
    table = json.loads(json.dumps(page.to_dict() if isinstance(page, ConfigDict) else dict(page)))
    require("search" in table, "config.search: missing; it says what is searched, such as search=dict(space=...)")
    search, run = from_dict(SearchConfig, table.pop("search"), "config.search"), table
    stage, cfg = first_stage(run_config(run))
    require(
        cfg.mup_base_width is not None,
        f"config.{run['run'][0]}.model.mup_base_width: missing; what is found without muP holds for one width alone",
    )
    sources = stage.data.sources.values()
    require(
        search.figure is not None or any(s.validation_files or s.validation_split for s in sources),
        "config.search.figure: missing; the run has no held-out text, so name what to minimise, such as 'loss'",
    )
    if search.figure is not None and stage.measures == (BITS,):  # other kinds have figures of their own
        held = [name for name, s in stage.data.sources.items() if s.validation_files or s.validation_split]
        tasks = () if stage.tasks is None else stage.tasks.names
        known = [
            *TRAINED,
            *(metrics.EVALUATION + name for name in held),
            *(f"{metrics.TASKS}{t}/METRIC" for t in tasks),
        ]
        found = search.figure in known or search.figure.startswith(tuple(f"{metrics.TASKS}{task}/" for task in tasks))
        require(found, f"config.search.figure={search.figure!r} is no figure of the run; it has {', '.join(known)}")
    for end in (min, max):
        run_config(with_values(run, {key: end(values) for key, values in search.grid.items()}))
    return search, run


def with_values(run: Table, values: Mapping[str, float]) -> Table:
    """The page of a run with values of a trial in its first stage."""
    run = json.loads(json.dumps(run))  # a copy
    stage = run[run["run"][0]]
    for key, value in values.items():
        stage.setdefault(TABLES[key], {})[key] = value
    return run


def search(page: Mapping[str, Any] | ConfigDict, out: Path, say: Callable[[str], None] = print) -> Table:
    """Carries out the trials that are not done, and writes results and picture.

    Returns:
      {"trials": [{"number", "values", "value", criteria}], "best": number | None, "figure": what was minimised}

    Raises:
      UserError: as read_page; OUT holds another search; optuna is missing. What a trial raises ends the search, which
        then goes on; a trial that diverges is kept as failed.
    """
    config, run = read_page(page)
    optuna = extras.need("optuna", how="pip install 'tele_jax[mup]'")
    _claim(out, {"search": json.loads(json.dumps(dataclasses.asdict(config))), "run": run})
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if config.sampler == "grid":
        sampler = optuna.samplers.GridSampler(config.grid, seed=config.seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=config.seed)
    trials = []

    def objective(asked: Any) -> float:
        values = {key: _suggested(asked, key, axis, config) for key, axis in config.axes.items()}
        trials.append(_trial(config, run, asked.number, values, out / "trials" / f"{asked.number:04d}", say))
        if trials[-1]["value"] is None:
            raise optuna.TrialPruned
        return trials[-1]["value"]

    with files.held_alone(out / LOCK, f"{out}: another process searches here"):
        optuna.create_study(sampler=sampler).optimize(objective, n_trials=config.count)
        return write_results(config, trials, out)


def _suggested(trial: Any, key: str, axis: "list[float] | Range", config: SearchConfig) -> float:
    if isinstance(axis, Range) and config.sampler == "tpe":
        return trial.suggest_float(key, axis.low, axis.high, log=True)
    return trial.suggest_categorical(key, config.grid[key])


def _claim(out: Path, described: Table) -> None:
    """Writes down what is searched; UserError for a directory that holds another search, or something else."""
    if (out / SEARCH).exists():
        same = files.read_json(out / SEARCH) == described
        require(same, f"{out}: holds another search; choose another --out, or remove it")
        return
    holds = out.exists() and (not out.is_dir() or any(out.iterdir()))
    require(not holds, f"{out}: holds something else than a search; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / SEARCH, described)


def _trial(
    config: SearchConfig, run: Table, number: int, values: Mapping[str, float], directory: Path, say: Callable
) -> Table:
    """The result of one trial, which is carried out where it is not done."""
    path = directory / RESULT
    if path.exists():
        found = read_result(path)
        if found["values"] != dict(values):
            raise DamageError(f"{path}: has other values than optuna draws now; was it another version of optuna?")
        return found
    page = with_values(run, values)
    say(f"trial {number + 1} of {config.count}: " + ", ".join(f"{key} {value:g}" for key, value in values.items()))
    failed = None
    try:
        runs.run(ConfigDict(page), directory / "run")
    except FailedError as error:
        failed = str(error)
    stage = directory / "run" / page["run"][0]
    lines = metrics.read(stage / "metrics" / "metrics.jsonl")
    value = None if failed else _value(config, first_stage(run_config(page))[0], lines)
    found = {"number": number, "values": dict(values), "value": value, "failed": failed, **criteria(lines)}
    files.write_json(path, found)
    return found


def _value(config: SearchConfig, stage: TrainStage, lines: list[dict[str, float]]) -> float:
    """The figure that the search minimises, at the end of the first stage."""
    last = {name: value for line in lines for name, value in line.items()}
    if config.figure is not None:
        require_known(config.figure, last, f"config.search.figure={config.figure!r} is no figure of the run")
        return last[config.figure]
    rates = {n: s.rate for n, s in stage.data.sources.items() if metrics.EVALUATION + n in last}
    return sum(rate * last[metrics.EVALUATION + n] for n, rate in rates.items()) / sum(rates.values())


def criteria(lines: list[dict[str, float]]) -> dict[str, float | None]:
    """The criteria of the Tele-FLM report over the second half of a stage, from the lines of metrics.jsonl.

    decrease: how fast the loss falls, in nats per factor e of steps; trend: the standard deviation of the loss around
    that straight line, in nats; gradient: the standard deviation of the logarithm of the gradient norm. The report
    names them and gives no formula (arXiv 2404.16645); the formulas are ours. None: fewer than three lines.
    """
    known = [line for line in lines if "loss" in line and "grad_norm" in line]
    half = [line for line in known if known and line["step"] > known[-1]["step"] / 2]
    if len(half) < 3:
        return dict.fromkeys(("decrease", "trend", "gradient"))
    steps, losses, norms = (np.array([line[name] for line in half]) for name in ("step", "loss", "grad_norm"))
    slope, start = np.polyfit(np.log(steps), losses, 1)
    trend = losses - (slope * np.log(steps) + start)
    found = {"decrease": -slope, "trend": np.std(trend), "gradient": np.std(np.log(norms))}
    return {name: float(value) if math.isfinite(value) else None for name, value in found.items()}


def read_result(path: Path) -> Table:
    """The result of a trial; raises DamageError for a damaged one."""
    fields = {"number": int, "values": dict[str, float], "value": float | None}
    return written_table(files.read_json(path), str(path), fields, required=fields)


def write_results(config: SearchConfig, trials: list[Table], out: Path) -> Table:
    """Writes OUT/results.json and OUT/parallel.png, and returns the former."""
    done = [trial for trial in trials if trial["value"] is not None]
    best = min(done, key=lambda trial: trial["value"])["number"] if done else None
    found = {"figure": config.figure or HELD_OUT, "best": best, "trials": trials}
    files.write_json(out / RESULTS, found)
    if done:
        picture = out / "parallel.png"
        with files.writing(picture):
            parallel([t["values"] for t in done], [t["value"] for t in done], found["figure"]).savefig(picture, dpi=120)
    return found


def found_page(out: Path, trial: int | None = None) -> tuple[Table, Table]:
    """(page of the run with the values of a trial, result of that trial); trial None is the best that is done.

    Raises:
      UserError: OUT holds no search, no trial is done, or not that one. DamageError: a document of it is damaged.
    """
    require((out / SEARCH).exists(), f"{out}: holds no search (no {SEARCH}); name the directory of `tele mup search`")
    fields = {"search": dict[str, Any], "run": dict[str, Any]}
    run = written_table(files.read_json(out / SEARCH), str(out / SEARCH), fields, required=fields)["run"]
    done = {r["number"]: r for r in map(read_result, sorted(out.glob(f"trials/*/{RESULT}"))) if r["value"] is not None}
    require(bool(done), f"{out}: no trial is done; `tele mup search` goes on")
    if trial is None:
        trial = min(done, key=lambda number: done[number]["value"])
    if trial not in done:
        raise UserError(f"--trial {trial}: is not finished; finished trials: {', '.join(map(str, sorted(done)))}")
    return with_values(run, done[trial]["values"]), done[trial]
