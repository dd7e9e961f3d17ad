"""A whole run and its report: one table, and pictures of the loss across growths and of the layers copied there.

report.runs reads work directories and draws their curves; report.page makes one HTML file about one run or several.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tele_jax import files, plots, tables
from tele_jax.config import written_table
from tele_jax.errors import DamageError, UserError, require, whole
from tele_jax.eval import in_training
from tele_jax.files import Table
from tele_jax.growth import receipt as receipts
from tele_jax.processes import is_first
from tele_jax.report.runs import picture, read, read_config
from tele_jax.stages import RunConfig, run_config
from tele_jax.train import loop, metrics
from tele_jax.train import workdir as owned

_SAMPLE = {"prompt": str, "reply": str, "reward": float}
ROLLOUTS: dict[str, tuple[str, ...]] = {  # figures of rollouts, by the label of their panel
    "reward": ("reward",),
    "KL, nats a token": ("kl", "kl_forward"),
    "entropy, nats": ("entropy",),
    "tokens of a reply": ("reply_tokens",),
    "share": ("cut_share", "clip_fraction"),
}


def run(
    config: RunConfig | Mapping[str, Any] | ConfigDict, workdir: str | Path, *, from_step: int | None = None
) -> list[Table]:
    """Runs the stages of a config as `tele train` does: writes and prints the report, and returns the summaries.

    config: the ConfigDict of a page, a dict like it, or a RunConfig.

    Raises:
      UserError: an argument of another type. UserError, FailedError, Stopped: as train.loop.run.
    """
    is_path = isinstance(workdir, (str, Path)) and bool(str(workdir).strip())
    require(is_path, f"workdir: expected the path of the run's own directory, got {workdir!r}")
    require(from_step is None or whole(from_step, "from_step") >= 0, f"from_step={from_step} must not be negative")
    if not isinstance(config, RunConfig):
        if not hasattr(config, "items"):
            raise UserError(f"config: expected a ConfigDict, a dict or a RunConfig, got {config!r}")
        config = run_config(config)
    workdir = Path(workdir)
    summaries = loop.run(config, workdir, from_step=from_step, open_tasks=in_training.open_tasks)
    if is_first():
        print(write(workdir, summaries))
    return summaries


def write(workdir: Path, summaries: Sequence[Table]) -> str:
    """Writes W/summary.txt, W/loss.png, and W/<stage>/layer_scores.png for every growth that chose layers by distance.

    Returns the table, with the paths of the pictures below it.

    Raises:
      DamageError: a growth receipt is missing or damaged; the table is written all the same.
    """
    text = table(summaries)
    (workdir / "summary.txt").write_text(text + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return f"{text}\n\nno pictures: matplotlib is missing; pip install 'tele_jax[plots]'"
    curves = picture([read(workdir, workdir.name)], "tokens", "Loss across the growths")
    pictures = [] if curves is None else [("loss curve", workdir / "loss.png", curves)]
    for summary in summaries:
        receipt = _receipt(workdir / summary["stage"]) if "receipt" in summary else {}
        if receipt.get("layer_scores") is not None:
            path = workdir / summary["stage"] / "layer_scores.png"
            pictures.append((f"layers copied by {summary['stage']}", path, plots.layer_scores(receipt)))
    for stage in (summary["stage"] for summary in summaries):
        drawn = rollouts(stage, metrics.read(workdir / stage / "metrics" / "metrics.jsonl"))
        pictures += [] if drawn is None else [(f"rollouts of {stage}", workdir / stage / "rollouts.png", drawn)]
    for _, path, figure in pictures:
        figure.savefig(path, dpi=120)
    return "\n".join([text, "", *(f"{what}: {path}" for what, path, _ in pictures)])


def show(workdir: Path, samples: int = 3) -> str:
    """The report of a run that may still be under way: what `write` says, how far each stage is, and sampled replies.

    Raises:
      UserError: the directory holds no run.
      DamageError: a document of the run is damaged.
    """
    names = read_config(workdir)["run"]
    complete = [name for name in names if (workdir / name / owned.SUMMARY).exists()]
    parts = [write(workdir, [owned.read_summary(workdir / name) for name in complete])] if complete else []
    for name in names:
        lines = metrics.read(workdir / name / "metrics" / "metrics.jsonl")
        if name not in complete:
            where = f"at step {int(lines[-1]['step'])}" if lines else "not begun"
            parts.append(f"stage {name}: {where}")
        parts += sampled(workdir / name, samples)
    return "\n".join(parts)


def sampled(directory: Path, most: int) -> list[str]:
    """Lines with the first replies of the latest rollout that a stage has written down; none where it draws none."""
    if (found := read_samples(directory, most)) is None:
        return []
    step, path, replies = found
    lines = [f"replies of stage {directory.name} at step {step} ({path}):"]
    for reply in replies:
        lines += [f"  reward {reply['reward']:.4g}  prompt  {reply['prompt']!r}", f"{'':16}reply   {reply['reply']!r}"]
    return lines


def read_samples(directory: Path, most: int) -> tuple[int, Path, list[Table]] | None:
    """(step, file, its first replies) of the latest rollout that a stage has written down; None where it draws none."""
    found = owned.samples(directory)
    if not found or not most:
        return None
    step, path = max(found.items())
    texts = path.read_bytes().removesuffix(b"\n").split(b"\n")[:most]  # a text may hold other ends of lines
    return (
        step,
        path,
        [
            written_table(files.parse_json(text, str(path)), str(path), _SAMPLE, required=tuple(_SAMPLE))
            for text in texts
        ],
    )


def rollouts(stage: str, lines: Sequence[Table]) -> Any:
    """A figure of the rewards, distance from the reference and lengths of rollouts; None for a stage that draws none.

    lines: of the metrics of the stage.
    """
    panels = {}
    for label, figures in ROLLOUTS.items():
        found = {name: [(line["step"], line[name]) for line in lines if name in line] for name in figures}
        panels[label] = {name: tuple(zip(*points, strict=True)) for name, points in found.items() if points}
    panels = {label: panel for label, panel in panels.items() if panel}
    return plots.loss(panels, title=f"Rollouts of stage {stage}") if "reward" in panels else None


def table(summaries: Sequence[Table]) -> str:
    """A table with a row per stage: parameters, tokens, FLOPs, bits per byte by domain before -> after, growth."""
    domains = sorted({d for s in summaries for d in s.get("bits_per_byte_after", {})})
    others = sorted({name for s in summaries for name in s.get("figures_after", {})})
    head = ["stage", "parameters", "tokens", "FLOPs", *(f"bits/byte {d}" for d in domains), *others]
    head += ["max logit difference"]
    rows = []
    for summary in summaries:
        before, after = (summary.get(f"bits_per_byte_{when}", {}) for when in ("before", "after"))
        first, last = (summary.get(f"figures_{when}", {}) for when in ("before", "after"))
        rows.append(
            [
                summary["stage"],
                _parameters(summary),
                f"{summary['tokens']:,}" if "tokens" in summary else "",
                f"{summary['flops']:.2e}" if "flops" in summary else "",
                *(_change(before.get(d), after.get(d)) for d in domains),
                *(_change(first.get(name), last.get(name)) for name in others),
                _moved(summary.get("receipt")),
            ]
        )
    return tables.text(rows, head)


def _parameters(summary: Table) -> str:
    """The size of the model, and how much of it was trained where that is less or adapters beside it (LoRA)."""
    size, trained = summary["parameters"], summary.get("trained_parameters")
    return f"{size:,}" if trained in (None, size) else f"{size:,} ({trained:,} trained)"


def _moved(receipt: Table | None) -> str:
    """Says how far a growth moved the logits; null stands for a number that is not finite."""
    if receipt is None:
        return ""
    moved = math.nan if receipt["max_abs"] is None else receipt["max_abs"]
    return f"{moved:.1e} ({receipt['policy']})"


def _change(before: float | None, after: float | None) -> str:
    """Bits per byte before and after a stage; held-out text may have been added while the stage was under way."""
    if after is None:
        return ""
    return f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f}"


def _receipt(directory: Path) -> Table:
    try:
        return receipts.read_receipt(directory)
    except (UserError, DamageError) as error:
        raise DamageError(f"{error}; no picture of its layers can be drawn") from None
