"""`tele data ACTION`: fetches text, makes training rows of it, and shows what they hold."""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tele_jax import corpora, tables
from tele_jax.clean import models, pipeline, reading
from tele_jax.clean.settings import clean_config
from tele_jax.cli import Outcome, data_show, flag, note, switch
from tele_jax.cli.pages import load_page
from tele_jax.corpora import pool, questions
from tele_jax.data import caching, describe
from tele_jax.data.cache import Counts, Manifest, RowCache
from tele_jax.data.documents import too_long_notes
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table, expand
from tele_jax.settings import cache_config


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    for name, (text, add, run) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        add(action)
        action.set_defaults(run=run)


def run(args: argparse.Namespace) -> Outcome:
    """Raises what the action raises."""
    return args.run(args)


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "name NAME", "stdlib, or MB: quickstart 13, eval 75, pool 33", choices=(*corpora.SETS, "eval", "pool"))
    flag(parser, "--out DIR", "directory to write", Path, required=True)
    flag(parser, "--max-bytes N", "most bytes of text in a domain; default: all", int)
    flag(parser, "--cache DIR", "directory of downloads; default: OUT/packages", Path)


def _fetch(args: argparse.Namespace) -> Outcome:
    """Raises UserError as corpora.fetch and questions.fetch."""
    fetch = {"eval": questions.fetch, "pool": pool.fetch}.get(args.name) or functools.partial(corpora.fetch, args.name)
    fetched = fetch(args.out, max_bytes=args.max_bytes, cache=args.cache, say=note)
    domains = fetched.manifest["domains"].items()
    sources = [
        (domain, name, f"{s['documents']:,}", f"{s['text_bytes']:,}", s["package"], s["licence"])
        for domain, account in domains
        for name, s in account["sources"].items()
    ]
    files = [
        (domain, name, f"{file['documents']:,}", f"{file['text_bytes']:,}")
        for domain, account in domains
        for name, file in account["files"].items()
    ]
    lines = [
        tables.text(sources, ("domain", "source", "documents", "bytes", "package", "licence"), align="llrrll"),
        "",
        tables.text(files, ("domain", "file", "documents", "bytes"), align="llrr"),
    ]
    if fetched.up_to_date:
        lines.append(f"{args.out}: everything was there already; nothing was written")
    if missing := fetched.manifest["missing"]:
        lines.append(f"missing: {', '.join(missing)}; run the command again to try once more")
    return Outcome(fetched.manifest, text="\n".join(lines))


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--config FILE", "page with get_config(), as in configs/data/", required=True)
    flag(parser, "--out DIR", "directory of the cache, not there yet", Path, required=True)
    flag(parser, "--runner NAME", "runner of Beam, or serial; default: DirectRunner", default="DirectRunner")
    flag(parser, "--workers N", "processes of the DirectRunner; default: one a core and shard", int)
    flag(parser, "beam -- BEAM_OPTION", "options of Beam or the runner, after --", nargs="*")
    parser.epilog = "--config.KEY=VALUE changes a value of the page. Started again, it keeps the shards that are done."


def _cache(args: argparse.Namespace) -> Outcome:
    """Raises UserError and FailedError as caching.make."""
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be above 0")
    config = cache_config(load_page(args.config, args.overrides))
    began = time.perf_counter()
    bar = tqdm(desc=args.out.name, unit="shard", disable=not sys.stderr.isatty())
    told = [began]

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if bar.disable and time.perf_counter() - told[0] > 30:
            told[0] = time.perf_counter()
            print(f"{done} of {total} shards", file=sys.stderr)

    how = {"runner": args.runner, "workers": args.workers, "options": args.beam, "progress": progress, "say": note}
    load_tasks = functools.partial(load_page, os.path.abspath(args.config))
    with bar:
        manifest = caching.make(config, args.out, **how, load_tasks=load_tasks)
    seconds = time.perf_counter() - began
    total = sum(domain.counts.text_bytes for domain in manifest.domains.values())
    lines = [_table(manifest), ""]
    lines.append(f"{args.out}: {total / 1e6:,.1f} MB of text in {seconds:.1f} s, {total / seconds / 1e6:.2f} MB/s")
    for name, domain in manifest.domains.items():
        counts, where = domain.counts, args.out / name / "*.rejected.jsonl"
        notes = {
            f"WARNING: {name}: {counts.rejected:,} documents cannot be used; which and why: {where}": counts.rejected,
            f"WARNING: {name}: {counts.held_out:,} documents are held out as well (validation_files)": counts.held_out,
        }
        lines += [line for line, count in notes.items() if count]
        lines += too_long_notes(name, split=counts.split, shortened=counts.shortened, dropped=counts.dropped)
    figures: Table = {"seconds": round(seconds, 3), "text_bytes_per_second": round(total / seconds)}
    figures |= {"cores": len(os.sched_getaffinity(0)), "digest": manifest.digest}
    figures |= {"domains": {name: vars(domain.counts) for name, domain in manifest.domains.items()}}
    return Outcome(figures, text="\n".join(lines))


def _table(manifest: Manifest) -> str:
    """One line per domain of a cache, and one of their sums."""
    every = {name: (domain.counts, len(domain.shards)) for name, domain in manifest.domains.items()}
    if len(every) > 1:
        sums = sum((domain.counts for domain in manifest.domains.values()), Counts())
        every["all"] = (sums, sum(number for _, number in every.values()))
    rows = [
        (
            name,
            *(f"{getattr(counts, column):,}" for column in ("documents", "rejected", "text_bytes", "tokens")),
            f"{describe.tokens_per_byte(counts):.4f}",
            f"{counts.rows:,}",
            f"{100 * counts.tokens / (counts.rows * manifest.seq_len):.2f}%",
            f"{number:,}",
        )
        for name, (counts, number) in every.items()
    ]
    header = ("domain", "documents", "rejected", "text bytes", "tokens", "tokens/byte", "rows", "filled", "shards")
    return tables.text(rows, header)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "dir DIR", "directory that `tele data cache` wrote", Path)
    flag(parser, "--tokens N", "tokens of a run, whose epochs are counted; default: all of the cache", float)
    flag(parser, "--plot FILE", "file of the picture; default: DIR/stats.png", Path)
    switch(parser, "--verify", "read every shard and compare its checksum")


def _stats(args: argparse.Namespace) -> Outcome:
    """Raises UserError and DamageError as cache.RowCache, and DamageError for a checksum that differs."""
    cache = RowCache(args.dir)
    if args.tokens is not None and not 0 < args.tokens < float("inf"):
        raise UserError(f"--tokens {args.tokens:g}: must be above 0 and finite")
    manifest = cache.manifest
    rows = sum(cache.rows.values()) if args.tokens is None else max(1, round(args.tokens / manifest.seq_len))
    simulated, epochs, shares = describe.simulate(manifest), describe.epochs(manifest, rows), describe.shares(manifest)
    drawn = [(n, f"{100 * rate:.4f}%", f"{100 * simulated[n]:.4f}%", f"{epochs[n]:.3f}") for n, rate in shares.items()]
    lengths = [
        (name, *(f"{2 * describe.length_quantile(domain.counts, q) - 1:,}" for q in (0.5, 0.9)))
        for name, domain in manifest.domains.items()
    ]
    parts = [
        f"{args.dir}: {manifest.kind} rows of {manifest.seq_len} tokens, {manifest.vocab_size:,} ids",
        _table(manifest),
        f"A run of {rows:,} rows, {rows * manifest.seq_len:,} tokens; shares counted in {describe.SIMULATED_ROWS:,}:",
        tables.text(drawn, ("domain", "share asked", "share drawn", "epochs")),
        "Tokens of a document, half of them have at most, nine in ten at most (within a factor of 2):",
        tables.text(lengths, ("domain", "half", "nine in ten")),
    ]
    print("\n\n".join(parts))
    if args.verify:
        _verify(cache)
    domains = {
        name: vars(domain.counts)
        | {"tokens_per_byte": describe.tokens_per_byte(domain.counts), "share": shares[name]}
        | {"share_drawn": simulated[name], "epochs": epochs[name]}
        for name, domain in manifest.domains.items()
    }
    figures = {"kind": manifest.kind, "seq_len": manifest.seq_len, "digest": manifest.digest, "rows_of_run": rows}
    return Outcome(figures | {"domains": domains}, text=f"\n{_picture(manifest, args)}")


def _picture(manifest: Manifest, args: argparse.Namespace) -> str:
    """Draws it; says where it is, or why there is none: a cache may be read-only, and its figures are wanted still."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: matplotlib is missing; pip install 'tele_jax[plots]'"
    picture = args.plot or args.dir / "stats.png"
    try:
        describe.plot(manifest, picture)
    except ValueError as error:  # no format that matplotlib knows
        raise UserError(f"--plot {picture}: {error}") from None
    except OSError as error:
        if args.plot:
            raise
        return f"no picture: {picture}: {error.strerror}; --plot FILE puts it elsewhere"
    return f"picture: {picture}"


def _verify(cache: RowCache) -> None:
    total = sum(len(domain.shards) for domain in cache.manifest.domains.values())
    damaged = []
    for shard, problem in tqdm(cache.verify(), total=total, unit="shard", disable=not sys.stderr.isatty()):
        if problem:
            damaged.append(f"{cache.path / shard.file}: {problem}")
            print(f"DAMAGED {damaged[-1]}")
    if damaged:
        raise DamageError(f"{len(damaged)} of {total} shards are damaged; remove the cache and make it again")
    print(f"\nverified: {total:,} shards hold what was written")


def _clean_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--config PAGE", "page, as configs/data/clean_quickstart.py", required=True)
    flag(parser, "--out DIR", "directory to write; must not exist", required=True)
    runners = "DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, PrismRunner ...; default: DirectRunner"
    flag(parser, "--runner R", f"runner of Beam: {runners}", default="DirectRunner")
    flag(parser, "--workers N", "processes of the DirectRunner; default: 1", int, default=1)
    flag(parser, "--beam OPTION", "option of Beam: --beam=--project=P; repeat it", action="append", default=[])


def _clean(args: argparse.Namespace) -> Outcome:
    """Raises UserError and FailedError as pipeline.clean."""
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    config = clean_config(load_page(args.config, args.overrides))
    options = [f"--runner={args.runner}", *args.beam]
    if args.runner == "DirectRunner":
        mode = "multi_processing" if args.workers > 1 else "in_memory"
        options += [f"--direct_running_mode={mode}", f"--direct_num_workers={args.workers}"]
    elif args.workers > 1:
        raise UserError("--workers: only for the DirectRunner; other runners take --beam=--num_workers=N and the like")
    start = time.monotonic()
    with _without_tracebacks():
        report = pipeline.clean(config, args.out, options=options, say=note)
    seconds, size = time.monotonic() - start, report["stages"][0]["in"]["bytes"]
    rate = f"{size / seconds / 1e6:.2f} MB/s, {seconds:.1f} s"
    done = f"{args.out}: complete; {rate}; look at {args.out}/report.html"
    return Outcome({**report, "seconds": seconds}, text=f"{_stage_table(report)}\n{done}")


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Silences Beam, which logs the traceback of what its caller is told anyway, and warns of what is not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _stage_table(report: Table) -> str:
    rows = []
    for stage in report["stages"]:
        gone = stage["in"]["documents"] - stage["out"]["documents"]
        reasons = ", ".join(f"{entry['reason']} {entry['documents']:,}" for entry in stage["dropped"][:3])
        numbers = (stage["in"]["documents"], gone, stage["in"]["bytes"], stage["out"]["bytes"])
        rows.append((stage["stage"], *(f"{number:,}" for number in numbers), reasons))
    header = ("stage", "documents in", "dropped", "bytes in", "bytes out", "most frequent reasons")
    return tables.text(rows, header, align="lrrrrl")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=type(parser))
    classifier = kinds.add_parser("quality", help="train a classifier of good against bad documents")
    flag(classifier, "--good FILE", "jsonl or text (a paragraph each)", required=True, nargs="+")
    flag(classifier, "--bad FILE", "files of what is to be dropped", required=True, nargs="+")
    model = kinds.add_parser("ngrams", help="train a Kneser-Ney model of usual text")
    flag(model, "--order N", "length of the longest n-gram; default: 5", int, default=5)
    flag(model, "files FILE", "jsonl or text (a paragraph each), of one language", nargs="+")
    for action in (classifier, model):
        flag(action, "--out FILE", "file to write", Path, required=True)
        flag(action, "--field", "field of jsonl records; default: text", default="text")


def _train(args: argparse.Namespace) -> Outcome:
    """Raises UserError for bad input, before anything is written."""
    return _train_quality(args) if args.kind == "quality" else _train_ngrams(args)


def _train_quality(args: argparse.Namespace) -> Outcome:
    good, bad = (list(_texts(files, args.field)) for files in (args.good, args.bad))
    trained = models.train_classifier(good, bad)
    trained.classifier.save(args.out)
    figures = {name: getattr(trained, name) for name in ("train_documents", "held_out_documents")}
    figures |= {name: round(getattr(trained, name), 4) for name in ("accuracy", "precision", "recall")}
    text = (
        f"{args.out}: from {len(good):,} good and {len(bad):,} bad documents\n"
        f"on {trained.held_out_documents:,} that were held out: accuracy {trained.accuracy:.3f}, "
        f"precision {trained.precision:.3f}, recall {trained.recall:.3f} of the good"
    )
    return Outcome(figures, text)


def _train_ngrams(args: argparse.Namespace) -> Outcome:
    if not 1 <= args.order <= 7:
        raise UserError(f"--order {args.order}: must be 1 to 7")
    texts = list(_texts(args.files, args.field))
    rest, held_out = [t for i, t in enumerate(texts) if i % 20], texts[::20]
    trained = models.train_ngrams(rest, order=args.order)
    trained.save(args.out)
    values = sorted(trained.perplexity(text) for text in held_out)
    quantiles = {f"{p}%": values[min(len(values) * p // 100, len(values) - 1)] for p in (5, 25, 50, 75, 95)}
    made = f"{args.out}: {sum(map(len, trained.grams)):,} n-grams from {len(rest):,} documents"
    held = "perplexity per token of those held out: " + ", ".join(f"{k} {v:.1f}" for k, v in quantiles.items())
    figures = {"documents": len(rest), "ngrams": [len(g) for g in trained.grams], "perplexity": quantiles}
    return Outcome(figures, text=f"{made}\n{held}")


def _texts(patterns: list[str], field: str) -> Iterator[str]:
    for path in expand(patterns, "FILE"):
        try:
            with io.TextIOWrapper(reading.open_stream(path), encoding="utf-8-sig", newline="\n") as file:
                if ".jsonl" not in path:
                    yield from (part for part in file.read().split("\n\n") if part.strip())
                    continue
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _text(line, field, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
        except reading.READ_ERRORS as error:
            raise UserError(f"{path}: cannot be read: {error}") from None


def _text(line: str, field: str, where: str) -> str:
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: no JSON record with a field {field!r}") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is no string")
    return text


ACTIONS: dict[str, tuple[str, Any, Any]] = {
    "fetch": ("fetch real text that every machine can get, as jsonl by domain", _fetch_arguments, _fetch),
    "clean": ("clean and deduplicate text, from raw files to jsonl by domain", _clean_arguments, _clean),
    "clean-train": ("train a quality classifier or an n-gram model for `clean`", _train_arguments, _train),
    "cache": ("tokenise and pack text into rows that can be read at random", _cache_arguments, _cache),
    "show": (
        "print rows of a cache or page as text, with segment borders and loss weights",
        data_show.arguments,
        data_show.run,
    ),
    "stats": ("show what a cache holds: sizes, shares, lengths, tokens per byte", _stats_arguments, _stats),
}
