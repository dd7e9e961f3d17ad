"""What every stage did, as JSON and as a page: counts of documents and bytes, reasons, samples."""

import html as escaping
import re
from collections.abc import Sequence
from typing import Any

from tele_jax.clean.document import SAMPLES, Tally
from tele_jax.clean.privacy import mask
from tele_jax.clean.settings import CleanConfig

_REFERENCE = re.compile(r"\{(\d+)@(\d+)\}")


def counts(tally: Tally) -> list[dict[str, Any]]:
    """A tally as plain lists, in a fixed order."""
    return [
        {
            "key": list(key),
            "documents": count.documents,
            "bytes": count.bytes,
            "samples": [[order.hex(), origin, detail, text] for order, origin, detail, text in count.samples],
        }
        for key, count in sorted(tally.counts.items())
    ]


def _count(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(entry[name] for entry in entries) for name in ("documents", "bytes")}


def build(entries: Sequence[dict[str, Any]], config: CleanConfig, paths: Sequence[str]) -> dict[str, Any]:
    """The report of a run.

    Args:
      entries: as `counts` gives them.
      config: names the stages.
      paths: of the files, by number: references in details become paths.

    Personal identifiers in samples are masked, also those of stages before `privacy`.
    """
    stages = []
    for name in ("read", *config.stages):
        mine = [entry for entry in entries if entry["key"][0] == name]
        stages.append(
            {
                "stage": name,
                "in": _count([e for e in mine if e["key"][2] == "in"]),
                "out": _count([e for e in mine if e["key"][2] == "out"]),
                "dropped": _reasons(mine, "drop", paths),
                "changed": _reasons(mine, "change", paths),
                "by_source": _by_source(mine, config),
            }
        )
    return {"stages": stages, "read": stages[0]["by_source"]}


def _by_source(entries: Sequence[dict[str, Any]], config: CleanConfig) -> dict[str, Any]:
    result = {}
    for source in config.sources:
        mine = [entry for entry in entries if entry["key"][1] == source]
        result[source] = {what: _count([e for e in mine if e["key"][2] == what]) for what in ("in", "out")}
        result[source]["dropped"] = {e["key"][3]: e["documents"] for e in mine if e["key"][2] == "drop"}
    return result


def _reasons(entries: Sequence[dict[str, Any]], what: str, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Entries by reason, over sources, most documents first."""
    result = []
    chosen = [entry for entry in entries if entry["key"][2] == what]
    for reason in sorted({entry["key"][3] for entry in chosen}):
        mine = [entry for entry in chosen if entry["key"][3] == reason]
        samples = sorted(tuple(sample) for entry in mine for sample in entry["samples"])[:SAMPLES]
        result.append(
            {
                "reason": reason,
                **_count(mine),
                "samples": [
                    {"origin": origin, "detail": _with_paths(detail, paths), "text": _masked(text)}
                    for _, origin, detail, text in samples
                ],
            }
        )
    return sorted(result, key=lambda entry: (-entry["documents"], entry["reason"]))


def _masked(text: str) -> str:
    return mask(text, ("email", "phone", "id", "ip", "card"))[0]


def _with_paths(detail: str, paths: Sequence[str]) -> str:
    def path(match: re.Match) -> str:
        return f"{paths[int(match.group(1))]}@{match.group(2)}"

    return _REFERENCE.sub(path, detail)


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --in: #3b7dd8; --drop: #d8663b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { height: .8rem; min-width: 10rem; background: var(--drop); } .bar i { display: block; height: 100%; background: var(--in); }
details { margin: .2rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem; margin: .2rem 0 .6rem; font-size: 13px; }
small { opacity: .75; overflow-wrap: anywhere; }
"""  # noqa: E501


def html(account: dict[str, Any]) -> str:
    """The report as one page that needs nothing else."""
    stages = account["stages"]
    first, last = stages[0]["in"], stages[-1]["out"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Cleaning report</title>",
        f"<style>{_STYLE}</style><h1>Cleaning report</h1>",
        f"<p>{first['documents']:,} documents, {_size(first['bytes'])} in; {last['documents']:,} documents, "
        f"{_size(last['bytes'])} out ({_percent(last['bytes'], first['bytes'])} of the bytes). "
        "Bars: bytes that stay (blue) and go (orange) in a stage.</p>",
        "<table><tr><th>stage<th class=n>documents in<th class=n>dropped<th class=n>bytes out<th>bytes</tr>",
    ]
    for stage in stages:
        share = 100 * stage["out"]["bytes"] / max(stage["in"]["bytes"], 1)
        gone = stage["in"]["documents"] - stage["out"]["documents"]
        parts.append(
            f"<tr><td><a href='#{stage['stage']}'>{stage['stage']}</a><td class=n>{stage['in']['documents']:,}"
            f"<td class=n>{gone:,} ({_percent(gone, stage['in']['documents'])})"
            f"<td class=n>{_size(stage['out']['bytes'])}<td>"
            f"<div class=bar><i style='width:{min(share, 100):.2f}%'></i></div></tr>"
        )
    parts.append("</table>")
    parts += [_stage(stage) for stage in stages]
    return "\n".join(parts) + "\n</html>\n"


def _stage(stage: dict[str, Any]) -> str:
    parts = [f"<h2 id='{stage['stage']}'>{stage['stage']}</h2>"]
    parts.append("<table><tr><th>source<th class=n>documents in<th class=n>out<th class=n>bytes in<th class=n>out</tr>")
    for source, figures in stage["by_source"].items():
        if figures["in"]["documents"]:
            parts.append(
                f"<tr><td>{escaping.escape(source)}<td class=n>{figures['in']['documents']:,}"
                f"<td class=n>{figures['out']['documents']:,}<td class=n>{_size(figures['in']['bytes'])}"
                f"<td class=n>{_size(figures['out']['bytes'])}</tr>"
            )
    parts.append("</table>")
    for what in ("dropped", "changed"):
        for entry in stage[what]:
            parts.append(
                f"<details><summary>{what}: <b>{escaping.escape(entry['reason'])}</b>, {entry['documents']:,} "
                f"documents, {_size(entry['bytes'])}</summary>"
            )
            for sample in entry["samples"]:
                line = ": ".join(filter(None, (sample["origin"], sample["detail"])))
                parts.append(f"<small>{escaping.escape(line)}</small><pre>{escaping.escape(sample['text'])}</pre>")
            parts.append("</details>")
    return "\n".join(parts)


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,} B"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "0%"
