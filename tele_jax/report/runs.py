"""Work directories as they are, read for reports, and the curves of their losses."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tele_jax import checkpoint, files, plots
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table
from tele_jax.growth import receipt as receipts
from tele_jax.stages import RunConfig, parents_of, run_config
from tele_jax.train import metrics, workdir

Series = tuple[list[float], list[float]]


@dataclasses.dataclass
class Stage:
    """A stage of a run, as far as it is.

    lines: of its metrics.  summary: empty while it is under way.
    """

    name: str
    config: Table
    lines: list[Table]
    summary: Table
    directory: Path

    @property
    def kind(self) -> str:
        return self.config["kind"]

    @functools.cached_property
    def receipt(self) -> Table:
        """The receipt of a growth that is complete, else an empty table; raises as receipts.read_receipt."""
        return receipts.read_receipt(self.directory) if "receipt" in self.summary else {}

    @property
    def state(self) -> str:
        if self.summary:
            return "complete"
        return f"at step {int(self.lines[-1]['step']):,}" if self.lines else "not begun"

    @property
    def tokens(self) -> float:
        return self.summary.get("tokens") or max([line.get("tokens", 0) for line in self.lines], default=0)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the model for one token of training, as the log has them; nan before the first line."""
        for line in self.lines:
            if line.get("tokens_per_second"):
                return line["model_flops_per_second"] / line["tokens_per_second"]
        return math.nan


@dataclasses.dataclass
class Run:
    """A work directory.

    name: short, and no two alike.  page: its config as JSON has it.
    """

    name: str
    path: Path
    page: Table
    stages: list[Stage]

    @functools.cached_property
    def config(self) -> RunConfig:
        """The settings of the run; raises UserError where they are of another version of tele_jax."""
        return run_config(self.page)

    @property
    def parents(self) -> dict[str, str | None]:
        """The stage that each stage goes on from; None: a new model, or the checkpoint that the run starts from."""
        return parents_of({stage.name: stage.config.get("after") for stage in self.stages})

    @property
    def rows(self) -> list[list[Stage]]:
        """The stages in the order of the run; a new row where a stage does not go on from the one before it."""
        rows: list[list[Stage]] = []
        for stage in self.stages:
            goes_on = rows and self.parents[stage.name] == rows[-1][-1].name
            rows[-1].append(stage) if goes_on else rows.append([stage])
        return rows

    @functools.cached_property
    def before(self) -> list[Table]:
        """The provenance of the checkpoint that the run starts from; its path alone where it is not there."""
        if self.page.get("start") is None:
            return []
        origin = [{"stage": str(self.page["start"]), "kind": "checkpoint"}]
        try:
            return [*checkpoint.open_lazy(self.page["start"]).provenance, *origin]
        except (UserError, DamageError):
            return origin


def read_config(path: Path) -> Table:
    """The config.json of a run; raises UserError where the directory holds none, DamageError where it is damaged."""
    if not (path / workdir.CONFIG).exists():
        raise UserError(f"{path}: holds no run (no {workdir.CONFIG}); name the work directory of `tele train`")
    workdir.require_own(path)
    return files.read_json(path / workdir.CONFIG)


def read(path: Path, name: str) -> Run:
    """Reads a work directory.

    Raises:
      UserError: it holds no run.  DamageError: a document of it is damaged.
    """
    page = read_config(path)
    stages = []
    for stage in page["run"]:
        at = path / stage
        summary = workdir.read_summary(at) if (at / workdir.SUMMARY).exists() else {}
        stages.append(Stage(stage, page[stage], metrics.read(at / "metrics" / "metrics.jsonl"), summary, at))
    return Run(name, path, page, stages)


def names(paths: Sequence[Path]) -> list[str]:
    """Short names of directories: their last parts, as many as tell them apart.

    >>> names([Path("runs/a/w"), Path("runs/b/w")])
    ['a/w', 'b/w']
    """
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(one[-count:]) for one in parts]
        if len(set(found)) == len(found):
            return found
    raise UserError(f"{', '.join(map(str, paths))}: a work directory is named twice")


def curves(runs: Sequence[Run], over: str) -> tuple[dict[str, dict[str, Series]], list[float]]:
    """Panels of curves over "tokens" in millions or "flops" since the start of each run, and where models grew.

    One run: a curve per stage, and a panel per held-out figure with a curve per domain. Several: a curve per run, and a
    panel per held-out figure and domain. A stage begins where the one that it goes on from ended.
    """
    panels: dict[str, dict[str, Series]] = {}
    growths: list[float] = []
    for run in runs:
        ends = dict[str | None, float]({None: 0.0})
        for stage in run.stages:
            at = ends[run.parents[stage.name]]
            unit = 1e-6 if over == "tokens" else stage.flops_per_token
            ends[stage.name] = at + (stage.tokens * unit if stage.tokens else 0.0)
            if stage.kind == "grow":
                growths += [at] if stage.summary and at not in growths else []
                continue
            seen = 0.0
            for line in stage.lines:
                seen = line.get("tokens", seen)
                for figure, value in line.items():
                    label, name = _panel(figure, run.name if len(runs) > 1 else None, stage)
                    if label:
                        curve = panels.setdefault(label, {}).setdefault(name, ([], []))
                        _add_point(curve, at + seen * unit if seen else at, value)
    return dict(sorted(panels.items(), key=lambda one: one[0] != _LOSS)), growths


_LOSS = "training loss, nats per token"
_TRAINING = ("pretrain", "sft")  # kinds whose loss is that of the next token


def _panel(figure: str, run: str | None, stage: Stage) -> tuple[str, str]:
    """The panel and the curve of a figure of the log; "" where it is not drawn."""
    if figure == "loss" and stage.kind in _TRAINING:
        size = f", {_in_words(stage.summary['parameters'])}" if stage.summary else ""
        return _LOSS, run or f"{stage.name}{size}"
    if not figure.startswith("eval/"):
        return "", ""
    name, _, domain = figure.removeprefix("eval/").partition("/")
    label = "bits per byte" if figure.startswith(metrics.EVALUATION) else name
    return (f"{domain}: {label}", run) if run else (f"held-out text, {label}", domain)


def _in_words(parameters: int) -> str:
    """A number of parameters with its unit.

    >>> _in_words(1_500_000), _in_words(74_112)
    ('1.5M', '74.1k')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)


def _add_point(curve: Series, x: float, y: float) -> None:
    """Adds a point to a curve (xs, ys), behind a gap where a branch begins further to the left."""
    xs, ys = curve
    gap = [math.nan] if xs and x < xs[-1] else []
    xs += [*gap, x]
    ys += [*gap, y]


def picture(runs: Sequence[Run], over: str, title: str) -> Any | None:
    """The curves of `curves` as a figure; None where there are none yet."""
    panels, growths = curves(runs, over)
    if not panels:
        return None
    drawn = {_plain(label): {_plain(name): xy for name, xy in found.items()} for label, found in panels.items()}
    x_label = "tokens, millions" if over == "tokens" else "FLOPs of training"
    return plots.loss(drawn, growths=growths, x_label=x_label, title=title)


def _plain(name: str) -> str:
    """A name as matplotlib shows it letter by letter: no mathematics, and in legends also where it begins with _."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")
