"""Figures of muP: the coordinate check, and the trials of a search."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tele_jax.files import Table
from tele_jax.plots import BLUE, add_grid, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def coordinates(found: Table) -> "Figure":
    """Draws how far activations moved over the width or depth, a column per kind, above with the rule, below without.

    found: what coords.check returns.
    """
    at, (rule, standard) = found["at"], found["sizes"]
    kinds, rows = list(found["sizes"][rule]["change"]), {rule: f"with {rule}", standard: f"without {rule}"}
    figure = new_figure(5.4)
    grid = figure.subplots(2, len(kinds), sharex=True, sharey="col", squeeze=False)
    for axes_of_row, (name, words) in zip(grid, rows.items()):
        for axes, kind in zip(axes_of_row, kinds):
            sizes = np.asarray(found["sizes"][name]["change"][kind])  # width, seed, step
            for step in range(sizes.shape[-1]):
                means = np.exp(np.log(sizes[:, :, step]).mean(axis=1))
                late = 0.25 + 0.75 * (step + 1) / sizes.shape[-1]
                label = f"after step {step + 1}" if axes is grid[0, 0] else None
                axes.plot(at, means, "o-", color=BLUE, alpha=late, markersize=3, linewidth=1.2, label=label)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(at, list(map(str, at)), fontsize=7, minor=False)
            axes.minorticks_off()
            axes.set_title(f"{kind}: slope {found['slopes'][name][kind]:.2f}", fontsize="small")
            add_grid(axes)
        axes_of_row[0].set_ylabel(f"{words}\nmean |x(t) - x(0)|")
    for axes in grid[1]:
        axes.set_xlabel(found["axis"] if found["axis"] == "width" else "depth, layers")
    figure.suptitle(
        f"Change of activations over the {found['axis']}, geometric mean over seeds (slope: the largest)",
        fontsize="medium",
    )
    figure.legend(loc="outside lower center", ncols=10, frameon=False, fontsize="small")
    return figure


def parallel(points: Sequence[Mapping[str, float]], values: Sequence[float], figure_name: str) -> "Figure":
    """Parallel coordinates: a line per trial over what was searched, coloured by what was minimised.

    points: the values of every trial; those of a key that are all above 0 stand on a logarithmic axis.
    """
    from matplotlib import colormaps

    names = list(points[0])
    heights = np.array([[point[name] for name in names] for point in points], float)
    logs = (heights > 0).all(axis=0)
    heights[:, logs] = np.log(heights[:, logs])
    span = np.ptp(heights, axis=0)
    heights = (heights - heights.min(axis=0)) / np.where(span > 0, span, 1)
    low, high = min(values), max(values)
    scaled = (np.asarray(values) - low) / ((high - low) or 1.0)
    heights, names = np.column_stack([heights, scaled]), [*names, figure_name]
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    shades = colormaps["viridis_r"]
    for at in np.argsort(values)[::-1]:  # the best on top
        axes.plot(heights[at], color=shades(scaled[at]), linewidth=2.5 if scaled[at] == 0 else 1.0, alpha=0.8)
    for place, name in enumerate(names):
        axes.axvline(place, color="#333333", linewidth=0.8)
        own = [*(point[name] for point in points)] if place < len(names) - 1 else list(values)
        marks = sorted(set(zip(heights[:, place].round(6), own)))
        for height, value in marks if len(marks) <= 8 else (marks[0], marks[-1]):
            axes.annotate(f" {value:.4g}", (place, height), fontsize=7, va="center")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(names) - 0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{len(points)} trials, coloured by {figure_name} (dark: high)", fontsize="medium")
    return figure
