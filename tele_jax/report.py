"""A whole run and its report: one table, and pictures of the loss across growths and of the layers copied there."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tele_jax import plots, tables
from tele_jax.errors import DamageError, UserError, require, whole
from tele_jax.eval import in_training
from tele_jax.files import Table
from tele_jax.growth import receipt as receipts
from tele_jax.processes import is_first
from tele_jax.stages import RunConfig, run_config
from tele_jax.train import loop, metrics


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
    panels, growths = curves(workdir, summaries)
    pictures = [("loss curve", workdir / "loss.png", plots.loss(panels, growths=growths, x_label="tokens, millions"))]
    for summary in summaries:
        receipt = _receipt(workdir / summary["stage"]) if "receipt" in summary else {}
        if receipt.get("layer_scores") is not None:
            picture = workdir / summary["stage"] / "layer_scores.png"
            pictures.append((f"layers copied by {summary['stage']}", picture, plots.layer_scores(receipt)))
    for _, path, figure in pictures:
        figure.savefig(path, dpi=120)
    return "\n".join([text, "", *(f"{what}: {path}" for what, path, _ in pictures)])


def table(summaries: Sequence[Table]) -> str:
    """A table with a row per stage: parameters, tokens, FLOPs, bits per byte by domain before -> after, growth."""
    domains = sorted({d for s in summaries for d in s.get("bits_per_byte_after", {})})
    head = ["stage", "parameters", "tokens", "FLOPs", *(f"bits/byte {d}" for d in domains), "max logit difference"]
    rows = []
    for summary in summaries:
        before, after = (summary.get(f"bits_per_byte_{when}", {}) for when in ("before", "after"))
        rows.append(
            [
                summary["stage"],
                _parameters(summary),
                f"{summary['tokens']:,}" if "tokens" in summary else "",
                f"{summary['flops']:.2e}" if "flops" in summary else "",
                *(_change(before.get(d), after.get(d)) for d in domains),
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


def curves(workdir: Path, summaries: Sequence[Table]) -> tuple[dict[str, Mapping[str, plots.Curve]], list[float]]:
    """(panels, growths) for plots.loss, over millions of tokens from the start of the run.

    Training loss with a curve per stage, held-out bits per byte with a curve per domain.
    """
    training: dict[str, tuple[list[float], list[float]]] = {}
    held_out: dict[str, tuple[list[float], list[float]]] = {}
    offset, growths = 0, []
    for summary in summaries:
        if "tokens" not in summary:
            growths.append(offset / 1e6)
            continue
        stage = training.setdefault(f"{summary['stage']}, {summary['parameters'] / 1e6:.2f}M", ([], []))
        seen = 0
        for line in metrics.read(workdir / summary["stage"] / "metrics" / "metrics.jsonl"):
            seen = line.get("tokens", seen)
            values = [(stage, line["loss"])] if "loss" in line else []
            values += [
                (held_out.setdefault(name.removeprefix(metrics.EVALUATION), ([], [])), value)
                for name, value in line.items()
                if name.startswith(metrics.EVALUATION)
            ]
            for (xs, ys), value in values:
                xs.append((offset + seen) / 1e6)
                ys.append(value)
        offset += summary["tokens"]
    panels = {"training loss, nats per token": training, "held-out text, bits per byte": dict(sorted(held_out.items()))}
    return {label: panel for label, panel in panels.items() if panel}, growths


def _receipt(directory: Path) -> Table:
    try:
        return receipts.read_receipt(directory)
    except (UserError, DamageError) as error:
        raise DamageError(f"{error}; no picture of its layers can be drawn") from None
