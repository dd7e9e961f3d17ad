"""The files of a cleaning run: shards, rejects and the report, each written whole or not at all."""

import base64
import gzip
import hashlib
import html as escaping
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tele_jax import tables
from tele_jax.clean.document import SAMPLES, Document, Reject, Tally, num_bytes
from tele_jax.clean.screening import mask
from tele_jax.clean.settings import CleanConfig, OutputConfig
from tele_jax.errors import FailedError
from tele_jax.extras import need
from tele_jax.files import Table, write_file

FORMAT = "tele_jax cleaned text 2"
TRAIN, VALIDATION = "train", "validation"  # splits; the files of training have no more than their number


def replace_file(path: str | Path, data: bytes) -> None:
    """Writes a local file or an object of a bucket: all of it, or nothing.

    Raises:
      UserError, DamageError: as files.write_file.
      FailedError: an object cannot be written.
    """
    path = str(path)
    if "://" not in path:
        write_file(path, data)
        return
    try:  # an object appears when it is closed
        with need("apache_beam.io.filesystems").FileSystems.create(path, compression_type="uncompressed") as file:
            file.write(data)
    except OSError as error:
        raise FailedError(f"{path}: cannot be written: {error.strerror or error}") from error


def compress(lines: Iterable[str], level: int) -> bytes:
    """gzip without name and time: the same bytes for the same lines (and the same zlib)."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=level, mtime=0) as file:
        for line in lines:
            file.write(line.encode("utf-8", "surrogatepass"))
    return buffer.getvalue()


def shard_of(uid: int, shards: int) -> int:
    """The number of a document's shard, by a hash: shards are equal in size and each is a sample of the whole."""
    return int.from_bytes(hashlib.blake2b(uid.to_bytes(16, "big"), digest_size=8).digest(), "big") % shards


def split_of(document: Document, validation_share: float) -> str:
    """VALIDATION where the hash of the text is below `validation_share` of all hashes, else TRAIN.

    The text alone decides: it is on the same side in every run, whatever else a domain holds.
    """
    data = document.text.encode("utf-8", "surrogatepass")
    order = int.from_bytes(hashlib.blake2b(data, digest_size=8, person=VALIDATION.encode()).digest(), "big")
    return VALIDATION if order < validation_share * 2**64 else TRAIN


def record(document: Document) -> str:
    """A document as a line of JSON."""
    fields = {"text": document.text, "language": document.language, "source": document.source, "url": document.url}
    fields = {key: value for key, value in fields.items() if value is not None}
    return json.dumps({**fields, "origin": document.origin}, ensure_ascii=False) + "\n"


def write_shard(
    directory: str,
    domain: str,
    split: str,
    shard: int,
    shards: int,
    documents: Iterable[Document],
    config: OutputConfig,
) -> Table:
    """Writes one shard in the order of uids; returns its entry in the manifest."""
    documents = sorted(documents, key=lambda document: document.uid)
    prefix = f"{VALIDATION}-" if split == VALIDATION else ""
    name = f"{domain}/{prefix}{shard:05d}-of-{shards:05d}.jsonl"
    if config.compression == "gz":
        name, data = f"{name}.gz", compress(map(record, documents), config.level)
    else:
        data = "".join(map(record, documents)).encode("utf-8", "surrogatepass")
    text_bytes = sum(num_bytes(document.text) for document in documents)
    return {"split": split, "documents": len(documents), "text_bytes": text_bytes, **_write(directory, name, data)}


def _write(directory: str, name: str, data: bytes) -> Table:
    replace_file(f"{directory}/{name}", data)
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_rejects(directory: str, source: str, rejects: Iterable[Reject]) -> Table:
    """Writes what could not be read of a source, bytes as base64; returns its entry in the manifest."""
    data = compress(_reject_lines(rejects), 6)
    name = f"rejects/{source}.jsonl.gz"
    return _write(directory, name, data)


def _reject_lines(rejects: Iterable[Reject]) -> Iterator[str]:
    for reject in sorted(rejects, key=lambda reject: (reject.uid, reject.reason)):
        fields = {"origin": reject.origin, "reason": reject.reason, "detail": reject.detail}
        if reject.data:
            fields["base64"] = base64.b64encode(reject.data).decode()
        yield json.dumps(fields, ensure_ascii=False) + "\n"


_WAYS = ("in", "out")  # of a stage
_REFERENCE = re.compile(r"\{(\d+)@(\d+)\}")


def counts(tally: Tally) -> list[Table]:
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


def _count(entries: Sequence[Table]) -> dict[str, int]:
    return {name: sum(entry[name] for entry in entries) for name in ("documents", "bytes")}


def report(entries: Sequence[Table], config: CleanConfig, paths: Sequence[str]) -> Table:
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


def _by_source(entries: Sequence[Table], config: CleanConfig) -> Table:
    result = {}
    for source in config.sources:
        mine = [entry for entry in entries if entry["key"][1] == source]
        result[source] = {what: _count([e for e in mine if e["key"][2] == what]) for what in _WAYS}
        result[source]["dropped"] = {e["key"][3]: e["documents"] for e in mine if e["key"][2] == "drop"}
    return result


def _reasons(entries: Sequence[Table], what: str, paths: Sequence[str]) -> list[Table]:
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
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
.bar { height: .8rem; min-width: 10rem; background: var(--drop); } .bar i { display: block; height: 100%; background: var(--in); }
details { margin: .2rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem; margin: .2rem 0 .6rem; font-size: 13px; }
small { opacity: .75; overflow-wrap: anywhere; }
"""  # noqa: E501


def report_page(account: Table) -> str:
    """The report as one page that needs nothing else."""
    stages = account["stages"]
    first, last = stages[0]["in"], stages[-1]["out"]
    rows = [
        (
            tables.Markup(f"<a href='#{stage['stage']}'>{stage['stage']}</a>"),
            f"{stage['in']['documents']:,}",
            _with_percent(stage["in"]["documents"] - stage["out"]["documents"], stage["in"]["documents"]),
            _size(stage["out"]["bytes"]),
            _bar(stage["out"]["bytes"] / max(stage["in"]["bytes"], 1)),
        )
        for stage in stages
    ]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Cleaning report</title>",
        f"<style>{_STYLE}</style><h1>Cleaning report</h1>",
        f"<p>{first['documents']:,} documents, {_size(first['bytes'])} in; {last['documents']:,} documents, "
        f"{_size(last['bytes'])} out ({_percent(last['bytes'], first['bytes'])} of the bytes). "
        "Bars: bytes that stay (blue) and go (orange) in a stage.</p>",
        tables.html(rows, ("stage", "documents in", "dropped", "bytes out", "bytes"), align="lrrrl"),
        *map(_stage, stages),
    ]
    return "\n".join(parts) + "\n</html>\n"


def _stage(stage: Table) -> str:
    rows = [
        (
            source,
            *(f"{entry[what]['documents']:,}" for what in ("in", "out")),
            *(_size(entry[w]["bytes"]) for w in ("in", "out")),
        )
        for source, entry in stage["by_source"].items()
        if entry["in"]["documents"]
    ]
    header = ("source", "documents in", "out", "bytes in", "out")
    parts = [f"<h2 id='{stage['stage']}'>{stage['stage']}</h2>", tables.html(rows, header)]
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


def _bar(share: float) -> tables.Markup:
    return tables.Markup(f"<div class=bar><i style='width:{min(100 * share, 100):.2f}%'></i></div>")


def _with_percent(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part, whole)})"


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,} B"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "0%"
