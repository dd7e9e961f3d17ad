"""`tele data clean`, and `tele data clean-train` for the models of its stages `quality` and `perplexity`."""

import argparse
import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from tele_jax import tables
from tele_jax.clean import models, pipeline, reading
from tele_jax.clean.settings import clean_config
from tele_jax.cli.pages import load_page
from tele_jax.cli.verb import Outcome, flag, note
from tele_jax.errors import UserError
from tele_jax.files import Table, expand

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner", "PrismRunner")
CLEAN = "clean and deduplicate text, from raw files to jsonl by domain"
TRAIN = "train a quality classifier or an n-gram model for `clean`"


def clean_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--config PAGE", "page, as configs/data/clean_quickstart.py", required=True)
    flag(parser, "--out DIR", "directory to write; must not exist", required=True)
    runners = f"runner of Beam: {', '.join(RUNNERS)} ...; default: DirectRunner"
    flag(parser, "--runner R", runners, default="DirectRunner")
    flag(parser, "--workers N", "processes of the DirectRunner; default: 1", int, default=1)
    flag(parser, "--beam OPTION", "option of Beam: --beam=--project=P; repeat it", action="append", default=[])


def clean(args: argparse.Namespace) -> Outcome:
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
    return Outcome({**report, "seconds": seconds}, text=f"{_table(report)}\n{done}")


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Silences Beam, which logs the traceback of what its caller is told anyway, and warns of what is not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _table(report: Table) -> str:
    rows = []
    for stage in report["stages"]:
        gone = stage["in"]["documents"] - stage["out"]["documents"]
        reasons = ", ".join(f"{entry['reason']} {entry['documents']:,}" for entry in stage["dropped"][:3])
        numbers = (stage["in"]["documents"], gone, stage["in"]["bytes"], stage["out"]["bytes"])
        rows.append((stage["stage"], *(f"{number:,}" for number in numbers), reasons))
    header = ("stage", "documents in", "dropped", "bytes in", "bytes out", "most frequent reasons")
    return tables.text(rows, header, align="lrrrrl")


def train_arguments(parser: argparse.ArgumentParser) -> None:
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


def train(args: argparse.Namespace) -> Outcome:
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
