"""Tables: every column is as wide as its widest cell, on its side; HTML is escaped."""

from tele_jax import tables


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("a", 1, "x"), ("long", 12345, "y")]
    lines = tables.text(rows, ("name", "count", "what"), align="lrl").splitlines()
    assert lines == ["name  count  what", "-----------------", "a         1  x", "long  12345  y"]


def test_without_a_header_there_is_no_rule_and_without_rows_nothing():
    assert tables.text([("a", 10), ("b", 5)]) == "a  10\nb   5"
    assert tables.text([]) == ""
    assert tables.html([]) == "<table></table>"


def test_html_is_escaped_and_aligned():
    page = tables.html([("a<b", 3)], ("name", "n"))
    assert "a&lt;b" in page and '<td style="text-align: right">3</td>' in page and page.count("<tr>") == 2
    assert "<td><b>x</b></td>" in tables.html([(tables.Markup("<b>x</b>"),)]).replace(' style="text-align: left"', "")
