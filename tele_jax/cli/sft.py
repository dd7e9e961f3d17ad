"""`tele sft ACTION`: prepares fine-tuning."""

import argparse
import time

from tele_jax import tables
from tele_jax.cli import Outcome, Progress, flag, note
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.selection import pipeline
from tele_jax.selection.settings import select_config

DONE = {"read": "read", "features": "turned into features", "scores": "scored"}  # phases of a selection


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    text = "select dialogues for fine-tuning"
    select = actions.add_parser("select", help=text, description=text)
    flag(select, "--config PAGE", "page, as configs/data/select_pool.py", required=True)
    flag(select, "--out DIR", "directory to write; an unfinished selection in it goes on", required=True)
    help = "directory of results to keep, for selections with other bands, counts or methods; default: DIR/unfinished"
    flag(select, "--results PATH", f"{help}, until the selection is complete")
    flag(select, "--workers N", "processes for what needs no model; default: 1", int, default=1)
    select.epilog = "example: tele sft select --config configs/data/select_pool.py --out few --config.count=1000"


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError and FailedError as pipeline.select."""
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    config = select_config(load_page(args.config, args.overrides))
    bars: dict[str, Progress] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = Progress(what, unit=f"chunks {DONE[what]}")
        bars[what](done, total)

    start = time.monotonic()
    how = {"results": args.results, "workers": args.workers}
    summary = pipeline.select(config, args.out, **how, say=note, progress=progress)
    seconds = time.monotonic() - start
    text = f"{_fates(summary)}\n\n{_categories(summary)}\n"
    text += (
        f"{args.out}/selected.jsonl: {summary['selected']:,} samples in {seconds:.1f} s; look at {args.out}/report.html"
    )
    return Outcome({**summary, "seconds": seconds}, text)


def _fates(summary: Table) -> str:
    rows = [(drop["stage"], drop["reason"], f"{drop['samples']:,}") for drop in summary["dropped"]]
    rows += [("", "not chosen", f"{summary['left'] - summary['selected']:,}")]
    rows += [("", "selected", f"{summary['selected']:,}")]
    return tables.text(rows, ("stage", "reason", "samples"), align="llr")


def _categories(summary: Table) -> str:
    rows = [(name, *(f"{count:,}" for count in counts.values())) for name, counts in summary["categories"].items()]
    return tables.text(rows, ("category", "samples", "left", "selected"))
