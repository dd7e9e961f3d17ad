"""A page's stages composed into one Beam pipeline, and run into a directory that appears when it is complete."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tele_jax import processes
from tele_jax.clean import output, reading, stages
from tele_jax.clean.settings import CleanConfig
from tele_jax.config import to_dict
from tele_jax.errors import DamageError, FailedError, UserError
from tele_jax.extras import need
from tele_jax.files import Table, expand, new_directory


@dataclasses.dataclass(frozen=True)
class Input:
    """A file of a source."""

    path: str
    size: int
    source: str


def inputs(config: CleanConfig) -> list[Input]:
    """All files, by the rank and name of their source, then by path; a file's place in it is its number.

    Raises:
      UserError: a pattern without files, a source without a byte, a file that two sources name.
    """
    found: list[Input] = []
    owner: dict[str, str] = {}
    for name, source in config.sources.items():
        local = expand([pattern for pattern in source.files if "://" not in pattern], f"sources.{name}.files")
        files = [Input(path, os.path.getsize(path), name) for path in local]
        for pattern in source.files:
            if "://" in pattern:
                matched = need("apache_beam.io.filesystems").FileSystems.match([pattern])[0].metadata_list
                files += [Input(entry.path, entry.size_in_bytes, name) for entry in matched]
                if not matched:
                    raise UserError(f"sources.{name}.files: no file matches {pattern}")
        files = sorted(dict.fromkeys(files), key=lambda file: file.path)
        if not sum(file.size for file in files):
            raise UserError(f"sources.{name}: its {len(files)} files are empty")
        for file in files:
            place = file.path if "://" in file.path else os.path.realpath(file.path)
            if place in owner:
                raise UserError(f"sources.{name}: {file.path} is a file of sources.{owner[place]} already")
            owner[place] = name
        found += files
    return found


def check(config: CleanConfig) -> None:
    """Loads every model, list and library that the stages need: what is missing is found now, not in a worker."""
    need("apache_beam")
    for name in config.stages:
        if name in stages.LOCAL:
            stages.build(name, config)
    modules = {"extract": "resiliparse.extract.html2text", "language": "pycld2", "duplicates": "rensa"}
    for name, module in modules.items():
        if name in config.stages:
            need(module)


def _shards(config: CleanConfig, files: Sequence[Input]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for file in files:
        domain = config.sources[file.source].domain
        sizes[domain] = sizes.get(domain, 0) + file.size
    return {domain: -(-size // config.output.shard_bytes) for domain, size in sizes.items()}


def clean(
    config: CleanConfig,
    out: str,
    *,
    options: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Runs all stages; writes shards, manifest.json, report.json, report.html and rejects/ to the directory `out`.

    The result is the same with any number of workers of the DirectRunner; other runners were not tried.

    Args:
      config: of the run.
      out: a local directory that does not exist, or an address that Beam's file systems know, such as gs://bucket/x.
        A local one appears by a rename when all is written; at an address, manifest.json is written last.
      options: Beam's, such as "--runner=DataflowRunner".
      say: gets lines about what takes long, and warnings.

    Returns:
      the report.

    Raises:
      UserError: input, page, model or `out` are not what they should be.
      FailedError: a file cannot be written, no document could be read, or none is left.
    """
    files = inputs(config)
    check(config)
    total = sum(file.size for file in files)
    say(f"{len(files):,} files, {total:,} bytes; {len(config.stages)} stages")
    with _making(out) as directory:
        try:
            with processes.ending_beam_workers():
                _run(config, files, directory, [*options, processes.BEAM_OPTION])
        except Exception as error:
            raise _cause(error) from error
        figures = _read_json(directory, "figures.json")
        account = output.report(figures["tally"], config, [file.path for file in files])
        _refuse_empty(account, figures["shards"])
        for name in config.sources:
            read = account["read"].get(name, {})
            if not read.get("out", {}).get("documents"):
                say(f"WARNING: sources.{name}: none of its documents could be read; see the report")
        output.replace_file(f"{directory}/report.json", _json(account))
        output.replace_file(f"{directory}/report.html", output.report_page(account).encode())
        # Last: with it, the directory is complete.
        output.replace_file(f"{directory}/manifest.json", _json(_manifest(config, files, figures)))
        if "://" not in directory:
            os.unlink(f"{directory}/figures.json")
    return account


def _run(config: CleanConfig, files: Sequence[Input], directory: str, options: Sequence[str]) -> None:
    beam = need("apache_beam")
    need("apache_beam.options.pipeline_options")
    need("tele_jax.clean.transforms")
    from tele_jax.clean import transforms

    parts = [
        part
        for number, file in enumerate(files)
        for part in reading.ranges(number, file.path, file.size, file.source, config.sources[file.source])
    ]
    # As many partitions as keep the tables of one near 32 MB: about a seventh of the text, in some 30 groups.
    partitions = max(1, sum(file.size for file in files) // (256 << 20))
    try:
        pipeline = beam.Pipeline(options=beam.options.pipeline_options.PipelineOptions(list(options)))
    except (ValueError, ImportError) as error:
        raise UserError(f"--runner or --beam: {str(error).splitlines()[0]}") from None
    batches, rejects, tally = pipeline | beam.Create(parts, reshuffle=False) | "read" >> transforms.Read(config)
    tallies = [tally]
    for name in config.stages:
        if name in stages.LOCAL:
            stage = transforms.Local(name, config)
        else:
            stage = transforms.Compare(name, config, partitions)
        batches, tally = batches | name >> stage
        tallies.append(tally)
    shards = batches | "write" >> transforms.Shards(directory, _shards(config, files), config.output)
    kept_aside = (
        rejects
        | "Rejects" >> beam.GroupByKey()
        | "Write rejects"
        >> beam.MapTuple(lambda source, items: (source, output.write_rejects(directory, source, items)))
    )
    account = tuple(tallies) | beam.Flatten() | beam.CombineGlobally(transforms.merged)
    shards, kept_aside = (
        collection | f"{label} as a list" >> beam.combiners.ToList()
        for label, collection in (("Shards", shards), ("Rejects", kept_aside))
    )
    _ = account | "Figures" >> beam.Map(
        lambda tally, shards, rejects: output.replace_file(
            f"{directory}/figures.json", _json(_figures(tally, shards, rejects))
        ),
        beam.pvalue.AsSingleton(shards),
        beam.pvalue.AsSingleton(kept_aside),
    )
    pipeline.run().wait_until_finish()


def _figures(tally, shards, rejects) -> Table:
    by_domain: dict[str, list[Table]] = {}
    for domain, entry in sorted(shards, key=lambda pair: pair[1]["file"]):
        by_domain.setdefault(domain, []).append(entry)
    return {"tally": output.counts(tally), "shards": by_domain, "rejects": dict(sorted(rejects))}


_OURS = re.compile(r"tele_jax\.errors\.(UserError|FailedError|DamageError): (.*?)(?: \[while running|\n|$)")


def _cause(error: Exception) -> Exception:
    """Our own error under what Beam wraps around it (another process's is only text), else the error in one line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (UserError, FailedError, DamageError)):
            return type(seen)(str(seen).split(" [while running")[0])
        seen = seen.__cause__ or seen.__context__
    found = _OURS.search(str(error))
    if found:
        kind = {"UserError": UserError, "DamageError": DamageError}.get(found.group(1), FailedError)
        return kind(found.group(2))
    lines = [line for line in str(error).splitlines() if line.strip()]
    return FailedError(f"the pipeline failed: {type(error).__name__}: {lines[-1] if lines else ''}")


def _manifest(config: CleanConfig, files: Sequence[Input], figures: Table) -> Table:
    settings = to_dict(config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "format": output.FORMAT,
        "config": settings,
        "config_sha256": digest,
        "inputs": [dataclasses.asdict(file) for file in files],
        "shards": figures["shards"],
        "rejects": figures["rejects"],
    }


def _refuse_empty(account: Table, shards: Table) -> None:
    if shards:
        return
    stage = account["stages"][0]
    if not stage["out"]["documents"]:
        reasons = ", ".join(f"{entry['reason']} {entry['documents']:,}" for entry in stage["dropped"])
        raise FailedError(f"none of {stage['in']['documents']:,} documents could be read: {reasons}")
    dropped = [(e["documents"], s["stage"], e["reason"]) for s in account["stages"] for e in s["dropped"]]
    most = ", ".join(f"{stage}: {reason} {count:,}" for count, stage, reason in sorted(dropped, reverse=True)[:3])
    raise FailedError(f"no document is left of {stage['out']['documents']:,}; most went for {most}")


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _read_json(directory: str, name: str) -> Any:
    with reading.open_raw(f"{directory}/{name}") as file:
        return json.loads(file.read())


@contextlib.contextmanager
def _making(out: str) -> Iterator[str]:
    """Yields the directory to write to: at an address `out` itself, else one that becomes `out` when the body ends."""
    if "://" not in out:
        with new_directory(Path(out).absolute(), "text") as directory:
            yield str(directory)
        return
    if need("apache_beam.io.filesystems").FileSystems.exists(f"{out}/manifest.json"):
        raise UserError(f"{out}: exists already, and is not overwritten; choose another address")
    yield out.rstrip("/")
