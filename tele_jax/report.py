"""What a finished run shows: one table, and a picture of the loss across the growths."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tele_jax.train import metrics


def write(workdir: Path, summaries: Sequence[Mapping[str, Any]]) -> str:
    """Writes W/summary.txt and W/loss.png, and returns the table with the picture's path below it."""
    text = table(summaries)
    (workdir / "summary.txt").write_text(text + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return f"{text}\n\nno loss curve: matplotlib is missing; pip install 'tele_jax[plots]'"
    picture = workdir / "loss.png"
    plot(workdir, summaries, picture)
    return f"{text}\n\nloss curve: {picture}"


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One row per stage: parameters, tokens, FLOPs, bits per byte by domain before -> after, growth receipt."""
    domains = sorted({d for s in summaries for d in s.get("bits_per_byte_after", {})})
    head = ["stage", "parameters", "tokens", "FLOPs", *(f"bits/byte {d}" for d in domains), "max logit difference"]
    rows = [head]
    for summary in summaries:
        before, after = (summary.get(f"bits_per_byte_{when}", {}) for when in ("before", "after"))
        receipt = summary.get("receipt")
        rows.append(
            [
                summary["stage"],
                f"{summary['parameters']:,}",
                f"{summary['tokens']:,}" if "tokens" in summary else "",
                f"{summary['flops']:.2e}" if "flops" in summary else "",
                *(f"{before[d]:.3f} -> {after[d]:.3f}" if d in after else "" for d in domains),
                "" if receipt is None else f"{receipt['max_abs']:.1e} ({receipt['policy']})",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(workdir: Path, summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out bits per byte over the tokens of all stages: a line per domain, a dashed line at every growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    offset, growths = 0, []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for summary in summaries:
        if summary["kind"] == "grow":
            growths.append((offset, summary["parameters"]))
            continue
        lines = metrics.read(workdir / summary["stage"] / "metrics" / "metrics.jsonl")
        seen, tokens, losses = 0, [], []
        for line in lines:
            seen = line.get("tokens", seen)
            if "loss" in line:
                tokens.append((offset + seen) / 1e6)
                losses.append(line["loss"])
            for name, value in line.items():
                if name.startswith(metrics.EVALUATION):
                    xs, ys = curves.setdefault(name.rsplit("/", 1)[1], ([], []))
                    xs.append((offset + seen) / 1e6)
                    ys.append(value)
        above.plot(tokens, losses, linewidth=1, label=f"{summary['stage']}, {summary['parameters'] / 1e6:.2f}M")
        offset += summary["tokens"]
    for domain, (xs, ys) in sorted(curves.items()):
        below.plot(xs, ys, marker="o", markersize=3, linewidth=1, label=domain)
    for axes in (above, below):
        for i, (at, _) in enumerate(growths):
            axes.axvline(at / 1e6, color="grey", linestyle="--", linewidth=1, label="growth" if i == 0 else None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    above.set_ylabel("training loss, nats per token")
    below.set_ylabel("held-out text, bits per byte")
    below.set_xlabel("tokens, millions")
    above.set_title("Loss across the growths")
    figure.savefig(path, dpi=120)
    plt.close(figure)
