"""One HTML file about one run or several: where every checkpoint comes from, curves, growths, configs, sampled replies.

The file needs nothing beside it: pictures are SVG inside it, and it asks no network for anything.
"""

import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tele_jax import files, plots
from tele_jax.errors import require
from tele_jax.extras import need
from tele_jax.files import Table
from tele_jax.growth import Plan
from tele_jax.growth import receipt as receipts
from tele_jax.report import read_samples, rollouts
from tele_jax.report.runs import Run, Stage, names, picture, read
from tele_jax.settings import TrainStage
from tele_jax.train.trainer import mask_schedule

HOW = "pip install 'tele_jax[plots]'"


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
    if receipt.get("masked") and plan_file.exists():
        plan = Plan.from_json(files.read_json(plan_file))
        pictures += [_masks(run, stage, name, plan) for name, parent in run.parents.items() if parent == stage.name]
    units = {kind: None if receipt.get(kind) is None else len(receipt[kind]) for kind in ("dead", "locked")}
    return {"stage": stage, "grown": grown, "pictures": list(filter(None, pictures)), "units": units}


def _masks(run: Run, growth: Stage, name: str, plan: Plan) -> str:
    """The picture of the masks of a growth over the steps of a stage that opens them; "" where there is none."""
    settings = run.config.stages[name]
    if not isinstance(settings, TrainStage) or not settings.steps:
        return ""
    schedule, steps = mask_schedule(settings, plan), sorted({round(settings.steps * i / 200) for i in range(201)})
    if all(schedule(step) is None for step in steps):
        return ""
    figure = plots.mask_ramp(schedule, steps, x_label=f"step of stage {name}")
    return svg(figure, f"masks of {growth.name} of {run.name}, opened by {name}")


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
    for over, title in (("tokens", "Loss over tokens"), ("flops", "Loss over FLOPs")):
        if (figure := picture(runs, over, title)) is not None:
            charts.append(svg(figure, title))
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
