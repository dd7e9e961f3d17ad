"""`tele data clean`."""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from tele_jax.clean import pipeline
from tele_jax.clean.settings import clean_config
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner", "PrismRunner")
HELP = "clean and deduplicate text, from raw files to jsonl by domain"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="PAGE", help="such as configs/data/clean_quickstart.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write; it must not exist yet")
    parser.add_argument("--runner", default="DirectRunner", metavar="R", help=f"Beam's: {', '.join(RUNNERS)} ...")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes of the DirectRunner (1)")
    parser.add_argument(
        "--beam", action="append", default=[], metavar="OPTION", help="for Beam, e.g. --beam=--project=P; repeat it"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
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
