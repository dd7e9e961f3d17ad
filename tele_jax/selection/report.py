"""The report of a selection: one page of HTML that needs nothing else."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

from tele_jax import tables
from tele_jax.files import Table
from tele_jax.selection.choice import shuffled
from tele_jax.selection.columns import LEFT, SELECTED, Columns, Example

DOTS = 1_500  # samples in the picture, of those that were selected and of those that were not
WIDTH, HEIGHT = 880, 560
COLOURS = ("#3b7dd8", "#d8663b", "#3f9b56", "#b04fa8", "#c9a227", "#2aa5a5", "#8a6bd1", "#a0522d", "#d14b6f", "#708090")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --in: #3b7dd8; --drop: #d8663b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
.bar { height: .8rem; width: 16rem; background: var(--soft); } .bar i { display: block; height: 100%; background: var(--in); }
.bar i.drop { background: var(--drop); } .bar i.other { background: #8888; }
details { margin: .2rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem; margin: .2rem 0 .6rem; font-size: 13px; }
small { opacity: .75; overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
.legend span { display: inline-block; margin-right: 1.2rem; } .legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .35rem; }
"""  # noqa: E501


def page(summary: Table, table: Columns, examples: Mapping[int, Sequence[Example]], seed: int) -> str:
    """Returns the page; examples: of each fate."""
    config = summary["page"]
    how = config["method"] + (f", {config['clusters']['within']} within" if config["method"] == "clusters" else "")
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Selection report</title>",
        "<meta name='viewport' content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>Selection report</h1>",
        f"<p>{summary['selected']:,} of {summary['samples']:,} samples were selected (method: {html.escape(how)}; seed "
        f"{seed}), out of {summary['left']:,} that no stage dropped. They lie in {summary['clusters_covered']:,} of "
        f"{summary['clusters']:,} clusters.</p>",
        "<h2>What was dropped</h2>",
        _drops(summary),
        "<h2>Categories</h2>",
        _categories(summary, table),
        "<h2>Clusters</h2>",
        _clusters(summary, table, seed),
        "<h2>Lengths</h2>",
        _histogram("tokens (words and Han characters) of the answers", table.answer, table),
    ]
    if np.isfinite(table.loss).any():
        parts += ["<h2>Scores of the model</h2>"]
        parts += [_histogram("difficulty: loss with the question / without", table.difficulty, table, log=False)]
        parts += [_histogram("perplexity of the answers, per token", table.perplexity, table)]
    order = sorted(examples.items(), key=lambda item: (item[0] != SELECTED, item[0]))
    parts += ["<h2>Samples</h2>", *(_samples(table, fate, found) for fate, found in order)]
    return "\n".join(parts) + "\n</html>\n"


def _bar(share: float, kind: str = "") -> tables.Markup:
    return tables.Markup(f"<div class=bar><i class='{kind}' style='width:{min(100 * share, 100):.2f}%'></i></div>")


def _percent(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f}%)" if whole else "0"


def _drops(summary: Table) -> str:
    every = summary["samples"]
    rows = [
        (drop["stage"], drop["reason"], _percent(drop["samples"], every), _bar(drop["samples"] / every, "drop"))
        for drop in summary["dropped"]
    ]
    left = summary["left"] - summary["selected"]
    rows += [("", "not chosen", _percent(left, every), _bar(left / every, "other"))]
    rows += [("", "selected", _percent(summary["selected"], every), _bar(summary["selected"] / every))]
    return tables.html(rows, ("stage", "reason", "samples", "share of the pool"), align="llrl")


def _categories(summary: Table, table: Columns) -> str:
    rows = []
    for name, counts in summary["categories"].items():
        of_it = table.category == table.categories.index(name)
        lengths = [_median(table.answer[of_it & rows]) for rows in (table.fate >= LEFT, table.fate == SELECTED)]
        shares = (_percent(counts["left"], counts["samples"]), f"{counts['selected']:,}")
        share = counts["selected"] / max(summary["selected"], 1)
        rows.append((name, f"{counts['samples']:,}", *shares, _bar(share), *lengths))
    header = ("category", "samples", "left", "selected", "share of the selection", "median answer", "of the selected")
    return tables.html(rows, header, align="lrrrlrr")


def _median(values: np.ndarray) -> str:
    return f"{np.median(values):,.0f}" if len(values) else ""


def _clusters(summary: Table, table: Columns, seed: int) -> str:
    """A picture of the samples that no stage dropped, in the two directions in which their features spread most."""
    order = shuffled(np.arange(len(table)), seed)
    drawn = []
    for fate in (LEFT, SELECTED):
        rows = np.flatnonzero((table.fate == fate) & np.isfinite(table.place[:, 0]))
        drawn.append(rows[np.argsort(order[rows], kind="stable")[:DOTS]])
    places = np.concatenate([table.place[rows] for rows in drawn] + [table.centres.astype(np.float32)])
    if not len(places):
        return "<p>No sample is left.</p>"
    low, high = places.min(0), places.max(0)
    scale = np.array([WIDTH - 40, HEIGHT - 40]) / np.where(high > low, high - low, 1)
    at = lambda values: 20 + (values - low) * scale  # noqa: E731
    names = list(summary["categories"])
    colour = {table.categories.index(name): COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    dots = []
    for fate, rows in zip((LEFT, SELECTED), drawn, strict=True):
        size, look = (2, "opacity='.45'") if fate == LEFT else (3.2, "stroke='#000' stroke-width='.5'")
        for row, (x, y) in zip(rows.tolist(), at(table.place[rows]).tolist(), strict=True):
            fill = colour[int(table.category[row])]
            dots.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{size}' fill='{fill}' {look}/>")
    for x, y in at(table.centres).tolist():
        dots.append(f"<path d='M{x - 5:.1f} {y:.1f}h10M{x:.1f} {y - 5:.1f}v10' stroke='currentColor'/>")
    legend = "".join(
        f"<span><i style='background:{COLOURS[i % len(COLOURS)]}'></i>{html.escape(name)}</span>"
        for i, name in enumerate(names)
    )
    kind = summary["page"]["clusters"]["features"]
    what = "hashed character n-grams (TF-IDF, SVD)" if kind == "hashed" else "the states of the model"
    return (
        f"<p>Features: {what}. Large dots were selected, faint ones were not; crosses are the centres of clusters. "
        f"At most {DOTS:,} of each are drawn, in the two directions in which the features spread most.</p>"
        f"<p class=legend>{legend}</p><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{''.join(dots)}</svg>"
    )


def _histogram(title: str, values: np.ndarray, table: Columns, *, log: bool = True) -> str:
    """Shares of the pool and of the selection by the size of a value, on a logarithmic scale where `log`."""
    known = np.isfinite(values) & (values > 0)
    if not known.any():
        return ""
    if log:
        ends = np.log2(values[known])
        edges = 2.0 ** np.arange(np.floor(ends.min()), np.floor(ends.max()) + 2)
    else:
        low, high = np.quantile(values[known], (0.005, 0.995))
        edges = np.linspace(low, max(high, low + 1e-3), 31)
        values = np.clip(values, edges[0], edges[-1])  # the outermost bars hold what lies beyond
    counts = [np.histogram(values[known & rows], edges)[0] for rows in (table.fate >= LEFT, table.fate == SELECTED)]
    portions = [count / max(count.sum(), 1) for count in counts]
    top = max(float(portion.max()) for portion in portions) or 1.0
    step, bars = (WIDTH - 40) / (len(edges) - 1), []
    for i in range(len(edges) - 1):
        for side, (portion, fill) in enumerate(zip(portions, ("var(--line)", "var(--in)"), strict=True)):
            tall = 150 * float(portion[i]) / top
            x = 20 + step * (i + 0.08 + 0.42 * side)
            bars.append(
                f"<rect x='{x:.1f}' y='{165 - tall:.1f}' width='{0.42 * step:.1f}' height='{tall:.1f}' fill='{fill}'/>"
            )
    labels = [
        f"<text x='{20 + step * i:.1f}' y='182' text-anchor='middle'>{_number(edges[i])}</text>"
        for i in range(0, len(edges), max(1, len(edges) // 12))
    ]
    return (
        f"<p>{html.escape(title)}; grey: the pool, blue: the selection</p>"
        f"<svg viewBox='0 0 {WIDTH} 190' role='img'>{''.join(bars)}{''.join(labels)}</svg>"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _samples(table: Columns, fate: int, found: Sequence[Example]) -> str:
    stage, reason = table.reasons[fate]
    name = f"{stage}: {reason}" if stage else {LEFT: "not chosen"}.get(fate, reason)
    count = int((table.fate == fate).sum())
    parts = [f"<details{' open' if fate == SELECTED else ''}><summary><b>{html.escape(name)}</b>, {count:,}</summary>"]
    for example in found:
        line = ", ".join(filter(None, (example.category, example.where, example.detail)))
        parts.append(f"<small>{html.escape(line)}</small><pre>{html.escape(example.text)}</pre>")
    return "\n".join([*parts, "</details>"])
