"""Results of evaluations, read from files and laid into the published tables."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tele_jax import tables
from tele_jax.errors import UserError
from tele_jax.eval.tables import FAMILIES, TABLES, Published, find_domains
from tele_jax.files import Table, read_table

# Names of the benchmarks in the harness, beside their own in lower case without "-".
TASK_NAMES = {
    "ARC": "arc_challenge", "TruthfulQA": "truthfulqa_mc2", "C-Eval": "ceval-valid", "BBH": "bbh_fewshot",
    "MATH": "minerva_math",
}  # fmt: skip
METRICS = ("acc", "exact_match", "math_verify")  # the first that a task has, where a column names no metric


class Result(NamedTuple):
    """Results of a model.

    Attributes:
      kind: "domains", "positions", "tasks", "alignbench" or "teleeval".
      model: its name; for positions with that of the domain.
      values: {domain: {"loss": ..., ...}}, {length: perplexity}, {"task metric": percent}, or {category: score}.
      shots: examples before a question, by task.
    """

    kind: str
    model: str
    values: Mapping[str, Any]
    shots: Mapping[str, int] = MappingProxyType({})


def read_results(path: Path) -> list[Result]:
    """Reads results of `tele eval`, or {"kind": "alignbench", "model", "scores": {category: score}}.

    path: the file, or the directory that holds it as results.json.

    Raises:
      UserError: no such file, or one of another kind; a figure that is not a finite number.
    """
    file = path / "results.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(f"{path}: is a directory without results.json")
    table = read_table(file)
    kind = table.get("kind")
    try:
        if kind == "bits_per_byte":
            models = {name: model["domains"].items() for name, model in table["models"].items()}
            keys = [shown.figure for shown in TABLES if shown.family in FAMILIES]
            figures = {
                m: {domain: {k: float(f[k]) for k in keys} for domain, f in found} for m, found in models.items()
            }
            by_length = {
                f"{m}, {domain}": perplexities(f["positions"]) for m, found in models.items() for domain, f in found
            }
            long = [Result("positions", name, values) for name, values in by_length.items() if len(values) > 1]
            return [Result("domains", model, domains) for model, domains in figures.items()] + long
        if kind in ("alignbench", "teleeval"):
            return [Result(kind, str(table["model"]), {name: float(x) for name, x in table["scores"].items()})]
        if "results" in table and "n-shot" in table:
            values = {
                f"{task} {metric}": value
                for task, figures in table["results"].items()
                for metric, value in percents(figures).items()
            }
            unknown = next((name for name, value in values.items() if not math.isfinite(value)), None)
            if unknown is not None:
                raise UserError(f"{file}: {unknown} is not a finite number")
            return [Result("tasks", str(table["config"]["model"]), values, dict(table["n-shot"]))]
    except UserError:
        raise
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: is not as tele eval writes results; a field is missing or of another type") from None
    if kind in ("dialogue", "pairs", "reference_overlap"):
        raise UserError(f"{file}: holds results of the kind {kind!r}, which no published table has")
    raise UserError(f"{file}: holds no results of tele eval bpb, harness, dialogue or code")


def perplexities(positions: Sequence[Table]) -> dict[str, float]:
    """Perplexity of a domain by length: of the documents of at least 2k, 4k, ... tokens, each cut there.

    positions: as results of `tele eval bpb` have them. A length that no document reaches is left out.

    >>> perplexities([{"to": 2048, "cut": {"documents": 3, "loss": 0.0}}, {"to": 4096, "cut": None}])
    {'2k': 1.0}
    """
    return {f"{part['to'] / 1024:g}k": math.exp(part["cut"]["loss"]) for part in positions if part["cut"] is not None}


def percents(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a task in percent, by metric; of several filters the first.

    >>> percents({"alias": "x", "pass@1,none": 0.25, "pass@1_stderr,none": 0.5})
    {'pass@1': 25.0}
    """
    found: dict[str, float] = {}
    for name, value in figures.items():
        metric = name.partition(",")[0]
        if isinstance(value, float) and not metric.endswith("_stderr"):
            found.setdefault(metric, 100 * value)
    return found


def values_of(table: Published, result: Result) -> tuple[dict[str, float], dict[str, str]]:
    """The columns that a result has of a table, and the domain, task or category that each is from."""
    if result.kind == "domains" and table.family in FAMILIES:
        found = find_domains(table.family, result.values)
        values = {column: result.values[domain][table.figure] for column, domain in found.items()}
    elif result.kind == table.family:
        named = {column: _names(table, column) for column in table.parts}
        keys = {
            column: [f"{name} {m}" for name in names for m in _metrics(table, column)]
            if table.family == "tasks"
            else names
            for column, names in named.items()
        }
        found = {column: name for column, names in keys.items() for name in reversed(names) if name in result.values}
        values = {column: result.values[name] for column, name in found.items()}
    else:
        return {}, {}
    whole = len(values) == len(table.parts)
    return values | ({name: table.average(name, values) for name in table.averages} if whole else {}), found


def _names(table: Published, column: str) -> tuple[str, ...]:
    """The names in results that a column may have, the one that counts first."""
    own = column.lower().replace("-", "")
    return table.figure + own, own, TASK_NAMES.get(column, ""), column


def _metrics(table: Published, column: str) -> Sequence[str]:
    return (table.metrics[column],) if column in table.metrics else METRICS


def compare(results: Sequence[Result]) -> tuple[Table, str]:
    """Lays results into the published tables that they have a column of: as data, and as text for people.

    Raises:
      UserError: two results of a model differ; no result has a column of any table.
    """
    results, shown, texts = _merged(results), [], []
    for table in TABLES:
        rows: dict[str, dict[str, float]] = {}
        notes = [
            f"as printed; the cells of {row} give {name} = {computed}, not {printed}"
            for row, name, printed, computed in table.unlike_their_cells()
        ]
        for result in results:
            values, found = values_of(table, result)
            if values:
                rows[result.model] = values
                notes += _notes(table, result, found)
        if rows:
            printed = {row: dict(zip(table.columns, map(float, cells))) for row, cells in table.rows.items()}
            shown.append({"title": table.title, "source": table.source, "published": printed, "results": rows})
            texts.append(_text(table, rows, notes))
    if not shown:
        raise UserError("none of these results has a domain, task or category that a published table has")
    return {"tables": shown}, "\n\n".join(texts)


def _merged(results: Sequence[Result]) -> list[Result]:
    """Joins the results of a kind that a model has in several files."""
    merged: dict[tuple[str, str], Result] = {}
    for result in results:
        before = merged.setdefault((result.kind, result.model), Result(result.kind, result.model, {}))
        for name, value in result.values.items():
            if before.values.get(name, value) != value:
                raise UserError(f"{result.model}: two of the results have {name}, and differ; leave one out")
        values, shots = {**before.values, **result.values}, {**before.shots, **result.shots}
        merged[result.kind, result.model] = Result(result.kind, result.model, values, shots)
    return list(merged.values())


def _notes(table: Published, result: Result, found: Mapping[str, str]) -> list[str]:
    missing = [part for part in table.parts if part not in found]
    notes = []
    if found and table.averages and missing:
        notes.append(f"{result.model}: no {' or '.join(table.averages)} without {', '.join(missing)}")
    for column in missing if table.family == result.kind == "tasks" else ():
        others = [name for name in result.values if name.partition(" ")[0] in _names(table, column)]
        if others:
            expected = " or ".join(_metrics(table, column))
            notes.append(f"{result.model}: no {column}, which is {expected} here, from {', '.join(others)}")
    for column, key in found.items():
        name = key.partition(" ")[0]
        shots, usual = result.shots.get(name), table.shots.get(column)
        if shots is not None and usual is not None and shots != usual:
            notes.append(f"{result.model}: {name} with {shots} examples, the published {column} with {usual}")
    return notes


def _text(table: Published, rows: Mapping[str, Mapping[str, float]], notes: Sequence[str]) -> str:
    digits = max((len(cell.partition(".")[2]) for cells in table.rows.values() for cell in cells), default=2)
    lines = [(row, *cells) for row, cells in table.rows.items()]
    for model, values in rows.items():
        ours = (f"{values[c]:.{digits}f}" if c in values else "-" for c in table.columns)
        lines.append((model, *ours))
    heads = [f"{column} ({table.shots[column]})" if column in table.shots else column for column in table.columns]
    text = tables.text(lines, ("", *heads))
    return "\n".join([f"{table.title} [{table.source}]", text, *(f"  {note}" for note in notes)])
