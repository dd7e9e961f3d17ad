"""`tele report W`: the table, pictures and sampled replies of a run, complete or under way."""

import argparse
from pathlib import Path

from tele_jax import report
from tele_jax.cli import Outcome, flag
from tele_jax.config import require
from tele_jax.train import workdir


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "workdir W", "work directory of `tele train`", Path)
    flag(parser, "--samples N", "sampled replies to show of each stage of alignment; default: 3", int, default=3)
    parser.epilog = "example: tele report W --samples 5; pictures need the extra [plots]"


def run(args: argparse.Namespace) -> Outcome:
    """Prints the report; the figures are the summaries of the stages that are complete, by name.

    Raises:
      UserError: W is no work directory; DamageError: a document in it is damaged.
    """
    require(args.samples >= 0, f"--samples {args.samples}: must not be negative")
    print(report.show(args.workdir, args.samples))
    found = {path.parent.name: workdir.read_summary(path.parent) for path in args.workdir.glob(f"*/{workdir.SUMMARY}")}
    return Outcome(found)
