"""Figures of muP: the coordinate check."""

from typing import TYPE_CHECKING

import numpy as np

from tele_jax.files import Table
from tele_jax.plots import BLUE, add_grid, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def coordinates(found: Table) -> "Figure":
    """Draws how far activations have moved over the width, a column per kind, above with muP and below without.

    found: what coords.check returns.
    """
    kinds, rows = list(found["sizes"]["muP"]["change"]), {"muP": "with muP", "standard": "without muP"}
    figure = new_figure(5.4)
    grid = figure.subplots(2, len(kinds), sharex=True, sharey="col", squeeze=False)
    for axes_of_row, (name, words) in zip(grid, rows.items()):
        for axes, kind in zip(axes_of_row, kinds):
            sizes = np.asarray(found["sizes"][name]["change"][kind])  # width, seed, step
            for step in range(sizes.shape[-1]):
                means = np.exp(np.log(sizes[:, :, step]).mean(axis=1))
                late = 0.25 + 0.75 * (step + 1) / sizes.shape[-1]
                label = f"after step {step + 1}" if axes is grid[0, 0] else None
                axes.plot(
                    found["widths"], means, "o-", color=BLUE, alpha=late, markersize=3, linewidth=1.2, label=label
                )
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(found["widths"], list(map(str, found["widths"])), fontsize=7, minor=False)
            axes.minorticks_off()
            axes.set_title(f"{kind}: slope {found['slopes'][name][kind]:.2f}", fontsize="small")
            add_grid(axes)
        axes_of_row[0].set_ylabel(f"{words}\nmean |x(t) - x(0)|")
    for axes in grid[1]:
        axes.set_xlabel("width")
    figure.suptitle(
        "Change of activations over the width, geometric mean over seeds (slope: the largest)", fontsize="medium"
    )
    figure.legend(loc="outside lower center", ncols=10, frameon=False, fontsize="small")
    return figure
