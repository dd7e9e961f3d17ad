"""`tele data clean` and `tele data clean-train`."""

import argparse
import contextlib
import gzip
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tele_jax.cli.pages import load_page
from tele_jax.data.clean import ngrams, pipeline, quality
from tele_jax.data.clean.settings import clean_config
from tele_jax.data.sources import expand
from tele_jax.errors import UserError

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner", "PrismRunner")


def arguments(actions: Any) -> None:
    """Declares both actions; `actions` is what add_subparsers returned."""
    clean = actions.add_parser("clean", help="clean and deduplicate text, from raw files to jsonl by domain")
    clean.add_argument(
        "--config", required=True, metavar="PAGE", help="a page such as configs/data/clean_quickstart.py"
    )
    clean.add_argument("--out", required=True, metavar="DIR", help="the directory to write; it must not exist yet")
    clean.add_argument(
        "--runner", default="DirectRunner", metavar="R", help=f"Beam's: {', '.join(RUNNERS)} (DirectRunner)"
    )
    clean.add_argument("--workers", type=int, default=1, metavar="N", help="processes of the DirectRunner (1)")
    clean.add_argument(
        "--beam",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option for Beam, e.g. --beam=--project=P; repeat",
    )
    train = actions.add_parser("clean-train", help="train a quality classifier or an n-gram model for `clean`")
    kinds = train.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=type(clean))
    classifier = kinds.add_parser("quality", help="a classifier of good against bad documents")
    classifier.add_argument("--good", required=True, nargs="+", metavar="FILE", help="jsonl or text (a paragraph each)")
    classifier.add_argument("--bad", required=True, nargs="+", metavar="FILE", help="the same, of what is to go")
    model = kinds.add_parser("ngrams", help="a Kneser-Ney model of usual text")
    model.add_argument("--order", type=int, default=ngrams.ORDER, metavar="N", help="longest n-gram (5)")
    model.add_argument("files", nargs="+", metavar="FILE", help="jsonl or text (a paragraph each), of one language")
    for action in (classifier, model):
        action.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
        action.add_argument("--field", default="text", help="of jsonl records (text)")
    for action in (clean, classifier, model):
        action.add_argument(
            "--json", metavar="FILE", type=Path, default=argparse.SUPPRESS, help="write the figures to FILE as JSON"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError and FailedError as pipeline.clean."""
    if args.action == "clean":
        return clean(args)
    return train_quality(args) if args.kind == "quality" else train_ngrams(args)


def clean(args: argparse.Namespace) -> dict[str, Any]:
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
        report = pipeline.clean(
            config, args.out, options=options, say=lambda line: print(f"tele: {line}", file=sys.stderr)
        )
    seconds = time.monotonic() - start
    _print(report)
    size = report["stages"][0]["in"]["bytes"]
    print(f"{args.out}: complete; {size / seconds / 1e6:.2f} MB/s, {seconds:.1f} s; look at {args.out}/report.html")
    return {**report, "seconds": seconds}


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Beam logs the traceback of what its caller is told anyway, and warns of libraries that are not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _print(report: dict[str, Any]) -> None:
    rows = [("stage", "documents in", "dropped", "bytes in", "bytes out", "most frequent reasons")]
    for stage in report["stages"]:
        gone = stage["in"]["documents"] - stage["out"]["documents"]
        reasons = ", ".join(f"{entry['reason']} {entry['documents']:,}" for entry in stage["dropped"][:3])
        numbers = (stage["in"]["documents"], gone, stage["in"]["bytes"], stage["out"]["bytes"])
        rows.append((stage["stage"], *(f"{number:,}" for number in numbers), reasons))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    for row in rows:
        cells = [cell.rjust(w) if 0 < i < 5 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def train_quality(args: argparse.Namespace) -> dict[str, Any]:
    good, bad = (list(_texts(files, args.field)) for files in (args.good, args.bad))
    trained = quality.train(good, bad)
    trained.classifier.save(args.out)
    figures = {name: getattr(trained, name) for name in ("train_documents", "held_out_documents")}
    figures |= {name: round(getattr(trained, name), 4) for name in ("accuracy", "precision", "recall")}
    print(f"{args.out}: from {len(good):,} good and {len(bad):,} bad documents")
    print(
        f"on {trained.held_out_documents:,} that were held out: accuracy {trained.accuracy:.3f}, "
        f"precision {trained.precision:.3f}, recall {trained.recall:.3f} of the good"
    )
    return figures


def train_ngrams(args: argparse.Namespace) -> dict[str, Any]:
    if not 1 <= args.order <= 7:
        raise UserError(f"--order {args.order}: must be 1 to 7")
    texts = list(_texts(args.files, args.field))
    rest, held_out = [t for i, t in enumerate(texts) if i % 20], texts[::20]
    trained = ngrams.train(rest, order=args.order)
    trained.save(args.out)
    values = sorted(trained.perplexity(text) for text in held_out)
    quantiles = {f"{p}%": values[min(len(values) * p // 100, len(values) - 1)] for p in (5, 25, 50, 75, 95)}
    print(f"{args.out}: {sum(map(len, trained.grams)):,} n-grams from {len(rest):,} documents")
    print("perplexity per token of those held out: " + ", ".join(f"{k} {v:.1f}" for k, v in quantiles.items()))
    return {"documents": len(rest), "ngrams": [len(g) for g in trained.grams], "perplexity": quantiles}


def _texts(patterns: list[str], field: str) -> Iterator[str]:
    for path in expand(patterns, "FILE"):
        opened = gzip.open if path.endswith(".gz") else open
        try:
            with opened(path, "rt", encoding="utf-8") as file:
                if ".jsonl" not in path:
                    yield from (part for part in file.read().split("\n\n") if part.strip())
                    continue
                for number, line in enumerate(file, start=1):
                    try:
                        yield json.loads(line)[field]
                    except (ValueError, KeyError, TypeError):
                        raise UserError(f"{path}:{number}: no JSON record with a field {field!r}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
