"""Pictures of losses, growth plans, receipts, layer scores, masks and evaluations, as matplotlib figures.

plots.loss({"loss, nats per token": {"small": (steps, losses)}}, growths=[300])    curves across growths
plots.plan(plan)                       copied, scaled, zero and fresh parts of every leaf
plots.receipts({"exact": receipt})     findings of verify: report.to_json(), or a growth_receipt.json
plots.layer_scores(receipt)            change of the stream by each layer, and the layers that were copied
plots.mask_ramp(schedule, 300)         the masks of policy msg, step by step
plots.dots({"exact": {"embed": [1e-3]}}, ...)      values of rows on a logarithmic axis, one dot per seed
plots.bits_per_byte(results)           results.json of `tele eval bpb`: bars by domain, with intervals

A function returns a new figure and touches no state of pyplot: a notebook shows the figure, a script saves it with
figure.savefig(path), its axes are figure.axes. The extra [plots] installs matplotlib and Pillow;
without them every function raises UserError.
"""

import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.files import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tele_jax.growth import MaskSchedule, Plan

__all__ = ["bits_per_byte", "dots", "layer_scores", "loss", "mask_ramp", "plan", "receipts"]

# Colours that people with any colour vision tell apart (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
CYCLE = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)
STYLES = ("-", "--", "-.", ":")
PALE, INK = "#D9D9D9", "#333333"
LEGEND_BELOW: Table = dict(loc="outside lower center", ncols=3, frameon=False)
DPI, WIDTH = 100, 9  # dots per inch; inches
FEW = 60  # points of a curve up to which each is marked

KINDS = {"copied": BLUE, "scaled": SKY, "zero": PALE, "fresh": ORANGE}
EXPLAINED = {
    "copied": "copied from the source",
    "scaled": "copied and scaled",
    "zero": "zero",
    "fresh": "fresh (random; norm scales constant)",
}
CANNOT_LEARN = {"dead": "no gradient", "locked": "equal to another unit"}
METRICS = {
    "cosine": "1 - cos(in, out)",
    "angular": "angle between in and out, half turns",
    "relative_l2": "|out - in| / |in|",
}

Curve = tuple[Sequence[float], Sequence[float]]


def loss(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    growths: Sequence[float] = (),
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    title: str = "Loss across the growths",
) -> "Figure":
    """Curves over a common axis, with a vertical line wherever the model grew.

    Args:
      panels: {label of the vertical axis, with its unit: {name of the curve: (xs, ys)}}, one below the other.
      growths: places on the horizontal axis where the model grew.
      x_label: label of the horizontal axis, with its unit.
      x_range: part of the horizontal axis to show, all by default; the vertical axis then fits the curves in it.

    Raises:
      UserError: no panel; a curve whose xs and ys differ in length.
    """
    require(len(panels) > 0, "plots.loss: no panel to draw; give {label of the vertical axis: {name: (xs, ys)}}")
    figure = new_figure(1.5 + 3.2 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves) in zip(rows, panels.items(), strict=True):
        for i, (name, (xs, ys)) in enumerate(curves.items()):
            require(len(xs) == len(ys), f"plots.loss: curve {name!r} has {len(xs)} xs and {len(ys)} ys")
            style = dict(color=CYCLE[i % len(CYCLE)], linestyle=STYLES[i // len(CYCLE) % len(STYLES)])
            marker = "o" if len(xs) <= FEW else None
            axes.plot(xs, ys, label=name, **style, linewidth=1.5, marker=marker, markersize=3.5)
        for i, at in enumerate(growths):
            axes.axvline(at, color=INK, linestyle="--", linewidth=1, label="growth" if i == 0 else None)
        if x_range is not None:
            _zoom(axes, curves.values(), x_range)
        axes.set_ylabel(label)
        add_grid(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    rows[-1].set_xlabel(x_label)
    rows[0].set_title(title)
    return figure


def _zoom(axes: "Axes", curves: Iterable[Curve], x_range: tuple[float, float]) -> None:
    low, high = x_range
    seen = [y for xs, ys in curves for x, y in zip(xs, ys, strict=True) if low <= x <= high]
    axes.set_xlim(low, high)
    if seen:
        margin = 0.05 * (max(seen) - min(seen)) or 1.0
        axes.set_ylim(min(seen) - margin, max(seen) + margin)


def plan(plan: "Plan") -> "Figure":
    """Stacked bars of every leaf of the grown model: the parts that are copied, scaled, zero and fresh."""
    tallies = {name: plan.tally(name) for name in plan.dst_spec}
    total = {kind: sum(tally[kind] for tally in tallies.values()) for kind in KINDS}
    rows = {"all parameters": total, **tallies}
    shapes = {name: " x ".join(f"{size:,}" for size in spec.shape) for name, spec in plan.dst_spec.items()}
    figure, axes = _single(2.2 + 0.32 * len(rows))
    places, sizes = np.arange(len(rows)), np.array([sum(tally.values()) for tally in rows.values()])
    left = np.zeros(len(rows))
    for kind, color in KINDS.items():
        share = 100 * np.array([tally[kind] for tally in rows.values()]) / sizes
        axes.barh(places, share, left=left, color=color, edgecolor="white", linewidth=0.8, label=EXPLAINED[kind])
        left += share
    for place, (name, size) in enumerate(zip(rows, sizes, strict=True)):
        shape = f" = {shapes[name]}" if " x " in shapes.get(name, "") else ""
        axes.text(101, place, f"{size:,}{shape}", va="center", fontsize=8)
    axes.set_yticks(places, list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the entries of each grown array, percent (right: how many entries)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(**LEGEND_BELOW | dict(ncols=len(KINDS)))
    grown = [f"{axis} {m.src_size:,} -> {m.dst_size:,}" for axis, m in plan.maps.items() if not m.is_identity]
    lines = [", ".join(grown[i : i + 3]) for i in range(0, len(grown), 3)] or ["no axis grows"]
    axes.set_title(f"Growth by policy {plan.policy}\n" + ",\n".join(lines), fontsize="medium")
    return figure


def layer_scores(receipt: Table) -> "Figure":
    """Bars of how much every source layer changes its input; layers that the growth copied stand out.

    receipt: growth_receipt.json, as `tele grow` and a growth stage write it. Its fields `layer_scores` (a float for
    each source layer), `layers` (the source of each layer of the grown model) and `layer_metric` (absent: cosine) are
    read.

    Raises:
      UserError: the receipt has no scores, since the layers were not chosen by distance.
    """
    scores, layers = receipt.get("layer_scores"), receipt.get("layers")
    if scores is None or layers is None:
        raise UserError('plots.layer_scores: the receipt has no layer scores; only layers="distance" measures them')
    copies = np.bincount(np.asarray(layers, np.int64), minlength=len(scores)) - 1
    metric = receipt.get("layer_metric") or "cosine"
    figure, axes = _single(4.2)
    ids = np.arange(len(scores))
    ends = (len(scores) > 2) & ((ids == 0) | (ids == len(scores) - 1)) & (copies == 0)
    for where, color, label in (
        (copies > 0, ORANGE, "copied; the copy comes right after it"),
        ((copies == 0) & ~ends, BLUE, "not copied"),
        (ends, PALE, "first and last: never copied"),
    ):
        if where.any():
            axes.bar(ids[where], np.asarray(scores)[where], color=color, label=label)
    for i in ids[copies > (0 if len(scores) <= 24 else 1)]:  # with many layers, only numbers above one copy
        axes.annotate(f"+{copies[i]}", (i, scores[i]), ha="center", va="bottom", fontsize="small")
    axes.margins(y=0.12)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("source layer")
    axes.set_ylabel(f"change of the stream by a layer ({metric})\n{METRICS.get(metric, '')}".rstrip())
    axes.set_title(f"Which layers were copied: {len(scores)} -> {len(layers)}, those that change least")
    add_grid(axes, "y")
    figure.legend(**LEGEND_BELOW)
    return figure


def mask_ramp(
    schedule: "MaskSchedule", steps: int | Sequence[int], *, x_label: str = "steps after the growth"
) -> "Figure":
    """Curves of the mask on the new units of every grown axis, over range(steps) or the steps given: a Figure.

    Raises:
      UserError: the schedule's plan has no masks; no step.
    """
    at = range(steps) if isinstance(steps, int) else list(steps)
    require(len(at) > 0, f"plots.mask_ramp: steps={steps} is no step at all")
    states = [schedule(step) for step in at]
    names = {axis for state in states if state is not None for axis in state}
    axes_of_plan = [axis for axis, axis_map in schedule.plan.maps.items() if axis in names and axis_map.fresh.any()]
    require(
        bool(axes_of_plan),
        f"plots.mask_ramp: there are no masks to draw: policy {schedule.plan.policy} has none, or nothing grows, or "
        "the ramp is over at the first step",
    )
    curves: dict[tuple[float, ...], list[str]] = {}  # axes whose masks rise together share a line
    for axis in axes_of_plan:
        new = schedule.plan.maps[axis].fresh
        values = tuple(1.0 if state is None else float(state[axis][new].min()) for state in states)
        curves.setdefault(values, []).append(axis)
    figure, axes = _single(3.8)
    for i, (values, names) in enumerate(curves.items()):
        axes.plot(at, values, color=CYCLE[i % len(CYCLE)], linewidth=2, label=f"new units of {', '.join(names)}")
    axes.axhline(1, color=INK, linestyle="--", linewidth=1, label="what was there before")
    gone = next((step for step, state in zip(at, states, strict=True) if state is None), None)
    if gone is not None:
        label = f"from step {gone} on: the model without masks"
        axes.axvline(gone, color=INK, linestyle=":", linewidth=1.2, label=label)
    axes.set_ylim(-0.05, 1.1)
    axes.set_xlabel(x_label)
    axes.set_ylabel("mask (0: as if it were not there)")
    axes.set_title("What is new enters gradually")
    add_grid(axes)
    figure.legend(**LEGEND_BELOW)
    return figure


def receipts(receipts: Mapping[str, Table]) -> "Figure":
    """Findings of verify, one row per growth: how far the function moved, and the new units that cannot learn.

    receipts: {name of the growth: content of report.to_json() or of a growth_receipt.json}.

    Raises:
      UserError: no receipt, or one without the fields of a report.
    """
    require(len(receipts) > 0, "plots.receipts: no receipt to draw; give {name: receipt}")
    for name, receipt in receipts.items():
        missing = {"max_rel", "kl", "tolerance", "dead", "locked", "preserving", "lively", "ok"} - set(receipt)
        listed = ", ".join(sorted(missing))
        require(not missing, f"plots.receipts: {name!r} is no receipt of a growth: {listed} missing")
    rows = list(receipts.values())
    places = np.arange(len(rows))
    figure = new_figure(1.9 + 0.55 * len(rows))
    moved, divergence, units = figure.subplots(1, 3, sharey=True, width_ratios=(1, 0.9, 0.9))
    _log_dots(moved, [row["max_rel"] for row in rows], rows)
    _log_dots(divergence, [None if row["kl"] is None else abs(row["kl"]) for row in rows], rows)
    promised = [(place, row["tolerance"]) for place, row in enumerate(rows) if row["preserving"] and row["tolerance"]]
    for i, (place, tolerance) in enumerate(promised):
        label = "tolerance: what rounding explains" if i == 0 else None
        moved.plot([tolerance] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=2, label=label)
    _unit_bars(units, rows)
    moved.set_xlabel("largest logit difference,\nrelative to the largest logit")
    divergence.set_xlabel("KL divergence of predictions,\nmean, |nats per token|")
    units.set_xlabel("number of new units\nthat cannot learn")
    moved.set_yticks(places, [f"{name}\n{_verdict(row)[0]}" for name, row in receipts.items()])
    moved.set_ylim(len(rows) - 0.5, -0.5)
    for axes in (moved, divergence, units):
        add_grid(axes, "x")
    figure.legend(**LEGEND_BELOW, fontsize="small")
    figure.suptitle("Did the function stay the same, and can everything new learn?", fontsize="medium")
    return figure


def dots(
    groups: Mapping[str, Mapping[str, Sequence[float]]], *, x_label: str, title: str, threshold: tuple[float, str]
) -> "Figure":
    """Dots of the values of rows on a logarithmic axis, coloured by group, and a line at threshold, (value, label).

    groups: {group: {row: its values, such as one per seed}}; what is not above 0 is drawn at the left end.
    """
    names = [name for rows in groups.values() for name in rows]
    require(len(names) > 0, "plots.dots: no row to draw; give {group: {row: values}}")
    figure, axes = _single(1.8 + 0.24 * len(names))
    floor = min((v for rows in groups.values() for vs in rows.values() for v in vs if v > 0), default=1.0) / 3
    place = 0
    for i, (group, rows) in enumerate(groups.items()):
        points = [(max(v, floor), place + at) for at, values in enumerate(rows.values()) for v in values]
        axes.plot(*zip(*points), "os^D"[i % 4], color=CYCLE[i % len(CYCLE)], label=group, markersize=5)
        place += len(rows)
    axes.axvline(threshold[0], color=INK, linestyle="--", linewidth=1, label=threshold[1])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xscale="log", xlabel=x_label, title=title)
    add_grid(axes, "x")
    figure.legend(**LEGEND_BELOW)
    return figure


def bits_per_byte(results: Table) -> "Figure":
    """Bars of the bits per byte of every model by domain, with 95% intervals and the floor that xz sets: a Figure.

    results: content of results.json, as `tele eval bpb` writes it.

    Raises:
      UserError: no such results.
    """
    require(
        bool(results.get("models")) and bool(results.get("text")), "plots.bits_per_byte: no results of tele eval bpb"
    )
    names, models = list(results["text"]), results["models"]
    figure, axes = _single(4.2)
    places, width = np.arange(len(names)), 0.8 / len(models)
    for i, (model, found) in enumerate(models.items()):
        rows = [found["domains"][name] for name in names]
        values = np.array([row["bits_per_byte"] for row in rows])
        ends = np.array([row["interval"] or [row["bits_per_byte"]] * 2 for row in rows])
        at = places + (i - (len(models) - 1) / 2) * width
        axes.bar(at, values, 0.92 * width, color=CYCLE[i % len(CYCLE)], label=model)
        axes.errorbar(at, values, np.abs(ends.T - values), fmt="none", ecolor=INK, capsize=3, linewidth=1.2)
    floors = [results["text"][name]["xz"] for name in names]
    axes.hlines(floors, places - 0.45, places + 0.45, color=INK, linestyle="--", linewidth=1, label="xz")
    axes.set_xticks(places, names)
    axes.set_ylabel("bits per byte")
    axes.set_title("Bits per byte by domain, with 95% intervals over documents")
    add_grid(axes, "y")
    figure.legend(**LEGEND_BELOW)
    return figure


def _verdict(row: Mapping[str, object]) -> tuple[str, str, str]:
    """Returns (words, marker, colour); a policy that promises little keeps its promise easily, so the words say so."""
    if not row["ok"]:
        return "NOT ok", "X", VERMILION
    if not row["preserving"]:
        return "changes the function", "s", ORANGE
    return ("ok" if row["lively"] else "ok, but copies stay copies"), "o", GREEN


def _log_dots(axes: "Axes", values: Sequence[float | None], rows: Sequence[Table]) -> None:
    """Draws a dot per row on a logarithmic axis, with its number; 0 and None, which have no place, become a text."""
    tolerances = [row["tolerance"] for row in rows if row["tolerance"] is not None]
    positive = [v for v in values if v is not None and v > 0 and math.isfinite(v)] + tolerances
    low = 10.0 ** (math.floor(math.log10(min(positive, default=1e-8))) - 1)
    high = 10.0 ** (math.ceil(math.log10(max(positive, default=1.0))) + 1)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    for place, (value, row) in enumerate(zip(values, rows, strict=True)):
        _, marker, color = _verdict(row)
        small: Table = dict(textcoords="offset points", fontsize=8)
        if value is not None and value > 0 and math.isfinite(value):
            axes.plot([value], [place], marker, color=color, markersize=8)
            axes.annotate(f"{value:.2g}", (value, place), (0, 8), ha="center", **small)
        else:
            words = "not checked" if value is None else "0, exactly" if value == 0 else f"{value}"
            axes.annotate(words, (low, place), (6, 0), va="center", color=color, **small)


def _unit_bars(axes: "Axes", rows: Sequence[Table]) -> None:
    """Draws bars of dead and locked units, each with its number."""
    for offset, kind, color in ((-0.18, "dead", INK), (0.18, "locked", PINK)):
        counts = [None if row[kind] is None else len(row[kind]) for row in rows]
        places = np.arange(len(rows)) + offset
        label = f"{kind}: {CANNOT_LEARN[kind]}"
        axes.barh(places, [count or 0 for count in counts], height=0.3, color=color, label=label)
        for place, count in zip(places, counts, strict=True):
            text = "not checked" if count is None else f"{count:,} {kind}"
            axes.annotate(f" {text}", (count or 0, place), va="center", fontsize=8)
    most = max(len(row[kind] or ()) for row in rows for kind in CANNOT_LEARN)
    axes.set_xlim(0, 1.9 * max(most, 1))
    axes.locator_params(axis="x", integer=True, nbins=4)


def add_grid(axes: "Axes", which: Literal["both", "x", "y"] = "both") -> None:
    axes.grid(axis=which, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _single(height: float) -> tuple["Figure", "Axes"]:
    figure = new_figure(height)
    return figure, figure.add_subplot()


def new_figure(height: float) -> "Figure":
    """An empty figure of WIDTH x height inches."""
    return _figure_class()(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


@functools.cache
def _figure_class() -> type:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image  # matplotlib's own requirement
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(
            f"tele.plots needs the package {package!r}, which is not installed: pip install 'tele_jax[plots]'"
        ) from None

    class Picture(Figure):
        """A figure with its own canvas, which notebooks show without pyplot."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._agg = FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            # A palette of 256 colours looks the same, and keeps notebooks with their outputs small.
            self._agg.draw()
            picture = Image.fromarray(np.asarray(self._agg.buffer_rgba())).convert("RGB")
            buffer = io.BytesIO()
            picture.quantize(256).save(buffer, format="png", optimize=True)
            return buffer.getvalue()

    return Picture


def __dir__() -> list[str]:
    return sorted(__all__)
