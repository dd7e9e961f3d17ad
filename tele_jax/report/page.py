"""One HTML file about one run or several: where every checkpoint comes from, curves, growths, configs, sampled replies.

The file needs nothing beside it: pictures are SVG inside it, and it asks no network for anything.
"""

import dataclasses
import io
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tele_jax import checkpoint, files, plots
from tele_jax.errors import DamageError, UserError, require
from tele_jax.extras import need
from tele_jax.files import Table
from tele_jax.growth import Plan
from tele_jax.growth import receipt as receipts
from tele_jax.report import add_point, read_config, read_samples, rollouts
from tele_jax.settings import TrainStage
from tele_jax.stages import RunConfig, run_config
from tele_jax.train import metrics, workdir
from tele_jax.train.trainer import mask_schedule

HOW = "pip install 'tele_jax[plots]'"
Series = tuple[list[float], list[float]]


@dataclasses.dataclass
class Stage:
    """A stage of a run, as far as it is.

    lines: of its metrics.  summary: empty while it is under way.  receipt: of a growth, or empty.
    """

    name: str
    config: Table
    lines: list[Table]
    summary: Table
    receipt: Table
    directory: Path

    @property
    def kind(self) -> str:
        return self.config["kind"]

    @property
    def state(self) -> str:
        if self.summary:
            return "complete"
        return f"at step {int(self.lines[-1]['step']):,}" if self.lines else "not begun"

    @property
    def tokens(self) -> float:
        return max([line.get("tokens", 0) for line in self.lines], default=0)

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

    name: short, and no two alike.  page: its config as JSON has it.  before: how the checkpoint that it starts from was
    made, oldest first.
    """

    name: str
    path: Path
    page: Table
    config: RunConfig
    stages: list[Stage]
    before: list[Table]


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
        receipt = receipts.read_receipt(at) if "receipt" in summary else {}
        lines = metrics.read(at / "metrics" / "metrics.jsonl")
        stages.append(Stage(stage, page[stage], lines, summary, receipt, at))
    return Run(name, path, page, run_config(page), stages, _before(page))


def _before(page: Table) -> list[Table]:
    """The history of the checkpoint that a run starts from; its path alone where it is no longer there."""
    if page.get("start") is None:
        return []
    origin = [{"stage": str(page["start"]), "kind": "checkpoint"}]
    try:
        return [*checkpoint.open_lazy(page["start"]).provenance, *origin]
    except (UserError, DamageError):
        return origin


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

    One run: a curve per stage. Several: a curve per run, and a panel per held-out figure.
    """
    panels: dict[str, dict[str, Series]] = {}
    growths: list[float] = []
    for run in runs:
        at, ends = 0.0, dict[str | None, float]()
        for stage in run.stages:
            at = ends[stage.name] = ends.get(stage.config.get("after"), at)
            unit = 1e-6 if over == "tokens" else stage.flops_per_token
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
                        add_point(curve, at + seen * unit if seen else at, value)
            at = ends[stage.name] = at + (stage.tokens * unit if stage.tokens else 0.0)
    return dict(sorted(panels.items(), key=lambda one: one[0] != _LOSS)), growths


_LOSS = "training loss, nats per token"
_TRAINING = ("pretrain", "sft")  # kinds whose loss is that of the next token


def _panel(figure: str, run: str | None, stage: Stage) -> tuple[str, str]:
    """The panel and the curve of a figure of the log; "" where it is not drawn."""
    if figure == "loss" and stage.kind in _TRAINING:
        return _LOSS, run or stage.name
    if not figure.startswith("eval/"):
        return "", ""
    name, _, domain = figure.removeprefix("eval/").partition("/")
    label = "bits per byte" if figure.startswith(metrics.EVALUATION) else name
    return (f"{domain}: {label}", run) if run else (f"held out: {label}", domain)


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: (path of the key, its values as JSON, "" where there is none)."""
    flat = [_flat(run.page) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [(key, [json.dumps(one[key], ensure_ascii=False) if key in one else "" for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(value: Any, path: str = "") -> Table:
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    nested = [_flat(one, f"{path}.{key}" if path else str(key)) for key, one in value.items()]
    return {key: one for part in nested for key, one in part.items()}


def growth_of(run: Run, stage: Stage) -> Table:
    """The part of the page on a growth: sizes of the axes that grew, findings, pictures of layers and masks."""
    receipt, plan_file = stage.receipt, stage.directory / receipts.PLAN_FILE
    src, dst = receipt.get("src_cfg", {}), receipt.get("dst_cfg", {})
    grown = [(key, src.get(key), value) for key, value in dst.items() if value != src.get(key)]
    pictures = []
    if receipt.get("layer_scores") is not None:
        pictures.append(svg(plots.layer_scores(receipt), f"layers copied by {stage.name} of {run.name}"))
    after = run.stages[run.stages.index(stage) + 1 :][:1]
    if receipt.get("masked") and after and plan_file.exists():
        settings = run.config.stages[after[0].name]
        assert isinstance(settings, TrainStage)
        schedule = mask_schedule(settings, Plan.from_json(files.read_json(plan_file)))
        steps = sorted({round(settings.steps * i / 200) for i in range(201)}) if settings.steps else []
        if steps and any(schedule(step) is not None for step in steps):
            picture = plots.mask_ramp(schedule, steps, x_label=f"step of stage {after[0].name}")
            pictures.append(svg(picture, f"masks of {stage.name} of {run.name}"))
    units = {kind: None if receipt.get(kind) is None else len(receipt[kind]) for kind in ("dead", "locked")}
    return {"stage": stage, "grown": grown, "pictures": pictures, "units": units}


def _plain(name: str) -> str:
    """A name as matplotlib shows it letter by letter: no mathematics, and in legends also where it begins with _."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def svg(figure: Any, label: str) -> str:
    """A figure as an SVG element: text stays text, and the same figure gives the same bytes."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)
    # Ids are unique in a figure, and have to be in the page.
    own = f"f{zlib.crc32(label.encode()):x}-"
    text = re.sub(r'id="', f'id="{own}', text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{own}", text)
    escaped = need("markupsafe", how=HOW).escape(label)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)


def write(paths: Sequence[Path], out: Path, *, samples: int = 3) -> None:
    """Writes the page about work directories to `out`, which is replaced where it is a page of this kind.

    samples: sampled replies to show of each stage of alignment.

    Raises:
      UserError: a directory that holds no run, or is named twice; `out` is something else; a package is missing.
      DamageError: a document of a run is damaged.
    """
    jinja2 = need("jinja2", how=HOW)
    if out.exists():
        require(out.is_file() and MARK in out.read_bytes()[:200].decode(errors="replace"), f"{out}: {_OTHER}")
    require(out.parent.is_dir(), f"{out}: there is no directory {out.parent}")
    runs = [read(path, name) for path, name in zip(paths, names(paths), strict=True)]
    charts = []
    for over, x_label in (("tokens", "tokens, millions"), ("flops", "FLOPs of training")):
        panels, growths = curves(runs, over)
        if panels:
            panels = {
                _plain(label): {_plain(name): xy for name, xy in found.items()} for label, found in panels.items()
            }
            title = f"Loss over {'tokens' if over == 'tokens' else 'FLOPs'}"
            charts.append(svg(plots.loss(panels, growths=growths, x_label=x_label, title=title), title))
    growths = {run.name: [growth_of(run, s) for s in run.stages if s.receipt] for run in runs}
    drawn: dict[str, list[str]] = {run.name: [] for run in runs}
    for run in runs:
        for stage in run.stages:
            if (figure := rollouts(stage.name, stage.lines)) is not None:
                drawn[run.name].append(svg(figure, f"rollouts of {stage.name} of {run.name}"))
    replies = {
        run.name: [(s.name, *found) for s in run.stages if (found := read_samples(s.directory, samples))]
        for run in runs
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    text = environment.get_template("page.html").render(
        mark=MARK, runs=runs, charts=charts, growths=growths, rollouts=drawn, replies=replies,
        differences=differences(runs) if len(runs) > 1 else [], domains=_domains(runs), config=_written,
    )  # fmt: skip
    files.write_file(out, text)


MARK = "<!-- tele report -->"
_OTHER = "is not a page that `tele report --html` wrote; name another file"


def _written(run: Run) -> str:
    return json.dumps(run.page, indent=2, ensure_ascii=False)


def _domains(runs: Sequence[Run]) -> list[str]:
    """Held-out domains and other figures that summaries of any stage have."""
    found = {
        name for run in runs for stage in run.stages
        for part in ("bits_per_byte_after", "figures_after") for name in stage.summary.get(part, {})
    }  # fmt: skip
    return sorted(found)
