"""Tables for people: columns of plain text for the terminal, and HTML for notebooks.

>>> print(text([("en", 12), ("code", 1_500)], ("domain", "rows")))
domain  rows
------------
en        12
code    1500
"""

import html as _html
from collections.abc import Sequence
from typing import Any


def text(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), align: str = "") -> str:
    """Rows of cells as lines of columns two spaces apart, below the header and a rule where there is a header.

    align: "l" or "r" for each column; by default the first column is to the left and all others are to the right.
    """
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    if not cells:
        return ""
    align = align or "l" + "r" * (len(cells[0]) - 1)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = {"l": str.ljust, "r": str.rjust}
    lines = [
        "  ".join(sides[side](cell, width) for side, cell, width in zip(align, row, widths, strict=True)).rstrip()
        for row in cells
    ]
    if header:
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


class Markup(str):
    """HTML that a cell holds as it stands; other cells are escaped."""


def html(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), align: str = "") -> str:
    """The table that `text` prints, as an HTML table."""
    columns = len(header) or (len(rows[0]) if rows else 0)
    sides = {"l": "left", "r": "right"}
    styles = [f' style="text-align: {sides[side]}"' for side in align or "l" + "r" * (columns - 1)]

    def line(row: Sequence[object], tag: str) -> str:
        cells = [cell if isinstance(cell, Markup) else _html.escape(str(cell)) for cell in row]
        return "<tr>" + "".join(f"<{tag}{s}>{cell}</{tag}>" for cell, s in zip(cells, styles)) + "</tr>"

    return "<table>" + (line(header, "th") if header else "") + "".join(line(row, "td") for row in rows) + "</table>"
