"""The files of a selection: the samples that were selected, the manifest, the report."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tele_jax.clean.screening import mask
from tele_jax.config import to_dict
from tele_jax.data.messages import Message
from tele_jax.files import Table, replacing, write_file
from tele_jax.selection import report, samples
from tele_jax.selection.choice import shuffled
from tele_jax.selection.chunks import Read
from tele_jax.selection.columns import LEFT, SELECTED, Columns, Example
from tele_jax.selection.samples import Chunk, Pool
from tele_jax.selection.settings import SelectConfig

EXAMPLES, EXAMPLE_CHARS = 3, 400  # samples of each fate in the report


def write(out: Path, directory: Path, config: SelectConfig, pool: Pool, table: Columns) -> Table:
    """Writes selected.jsonl, manifest.jsonl and report.html; returns the summary."""
    wanted = _examples(table, config.seed)
    examples: dict[int, list[Example]] = {}
    with contextlib.ExitStack() as stack:
        chosen, manifest = (
            stack.enter_context(open(stack.enter_context(replacing(out / name)), "w", encoding="utf-8"))
            for name in ("selected.jsonl", "manifest.jsonl")
        )
        for chunk in pool.chunks:
            details = Read.load(directory, chunk.number).drops
            rows = chunk.ids
            lines = [_account(chunk, table, row, details.get(row - chunk.first)) for row in rows]
            manifest.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            if wanted.isdisjoint(rows) and (table.fate[rows.start : rows.stop] != SELECTED).all():
                continue
            for sample, line in zip(samples.read(chunk, config.sources[chunk.source]), lines, strict=True):
                if table.fate[sample.id] == SELECTED:
                    chosen.write(_record(sample.messages or (), table.name(sample.id), sample.id))
                if sample.id in wanted:
                    examples.setdefault(int(table.fate[sample.id]), []).append(_example(sample, line))
    summary = _summary(config, pool, table)
    write_file(out / "report.html", report.page(summary, table, examples, config.seed))
    return summary


def _record(messages: Sequence[Message], category: str, number: int) -> str:
    record = {"messages": [dict(message) for message in messages], "category": category, "id": number}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _account(chunk: Chunk, table: Columns, row: int, drop: tuple[str, str, str] | None) -> Table:
    """The line of the manifest for a sample; figures that there are not are left out."""
    fate = int(table.fate[row])
    stage, reason = table.reasons[fate]
    line: Table = {"id": row, "file": chunk.path, chunk.unit: int(chunk.spans[row - chunk.first, 2])}
    line["category"] = table.name(row)
    line["fate"] = {LEFT: "not chosen", SELECTED: "selected"}.get(fate, "dropped")
    if stage:
        line |= {"stage": stage, "reason": reason}
    if drop is not None and drop[2]:
        line["detail"] = drop[2]
    if table.copy_of[row] >= 0:
        line["copy_of"] = int(table.copy_of[row])
    names = {"turns": "turns", "question_tokens": "question", "answer_tokens": "answer"}
    line |= {name: int(getattr(table, column)[row]) for name, column in names.items()}
    if table.tokens[row]:
        line["model_tokens"] = int(table.tokens[row])
    if np.isfinite(table.loss[row]):
        loss, alone = float(table.loss[row]), float(table.alone[row])
        line |= {"loss": _short(loss), "loss_alone": _short(alone), "difficulty": _short(loss / alone)}
        line["perplexity"] = _short(float(np.exp(loss)))
    if table.cluster[row] >= 0:
        line |= {"cluster": int(table.cluster[row]), "distance": _short(float(table.distance[row]))}
    return line


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _examples(table: Columns, seed: int) -> set[int]:
    """Numbers of the samples that the report shows: the first of each fate in a random order."""
    order = shuffled(np.arange(len(table)), seed)
    found: set[int] = set()
    for fate in range(len(table.reasons)):
        rows = np.flatnonzero(table.fate == fate)
        most = 3 * EXAMPLES if fate == SELECTED else EXAMPLES
        found.update(rows[np.argsort(order[rows], kind="stable")[:most]].tolist())
    return found


def _example(sample: samples.Sample, line: Mapping) -> Example:
    detail = line.get("detail", "")
    if "copy_of" in line:
        detail = f"copy of sample {line['copy_of']}"
    elif "difficulty" in line:
        detail = f"difficulty {line['difficulty']:.3f}, perplexity {line['perplexity']:.1f}"
    shown = "\n".join(f"{message['role']}: {_ends(message['content'])}" for message in (sample.messages or ())[:6])
    text = mask(shown, ("email", "phone", "id", "ip", "card"))[0]
    unit = next(name for name in ("line", "element") if name in line)
    where = f"{'/'.join(Path(line['file']).parts[-2:])}, {unit} {line[unit]}"
    return Example(where, sample.category, detail, text)


def _ends(text: str) -> str:
    """The beginning and the end of a text: whether it is truncated is seen at its end."""
    half = EXAMPLE_CHARS // 2
    return text if len(text) <= EXAMPLE_CHARS else f"{text[:half]} [...] {text[-half:]}"


def _summary(config: SelectConfig, pool: Pool, table: Columns) -> Table:
    selected, left = table.fate == SELECTED, table.fate <= SELECTED
    drops = [
        {"stage": stage, "reason": reason, "samples": int((table.fate == fate).sum())}
        for fate, (stage, reason) in enumerate(table.reasons)
        if fate > SELECTED
    ]
    categories = {
        name: {
            "samples": int((table.category == number).sum()),
            "left": int((left & (table.category == number)).sum()),
            "selected": int((selected & (table.category == number)).sum()),
        }
        for number, name in sorted(enumerate(table.categories), key=lambda item: item[1])
    }
    clusters = np.unique(table.cluster[left & (table.cluster >= 0)])
    covered = np.unique(table.cluster[selected & (table.cluster >= 0)])
    return {
        "samples": len(table),
        "dropped": drops,
        "left": int(left.sum()),
        "selected": int(selected.sum()),
        "categories": categories,
        "clusters": len(clusters),
        "clusters_covered": len(covered),
        "files": {path: list(file) for path, file in pool.files.items()},
        "page": to_dict(config),
    }
