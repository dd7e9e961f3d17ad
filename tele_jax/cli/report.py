"""`tele report W ...`: table, pictures and sampled replies of runs, complete or under way; an HTML file of all."""

import argparse
from pathlib import Path

from tele_jax import report
from tele_jax.cli import Outcome, flag
from tele_jax.config import require
from tele_jax.report import page
from tele_jax.train import workdir


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "workdirs W", "work directories of `tele train`", Path, nargs="+")
    flag(parser, "--html FILE", "page to write, with where checkpoints come from, curves, growths and configs", Path)
    flag(parser, "--samples N", "sampled replies to show of each stage of alignment; default: 3", int, default=3)
    parser.epilog = "example: tele report W W2 --html report.html; pictures need the extra [plots]"


def run(args: argparse.Namespace) -> Outcome:
    """Prints the reports; the figures are the summaries of the stages that are complete, by name.

    Of several runs the figures have the name of the directory above the names of the stages.

    Raises:
      UserError: W is no work directory; DamageError: a document in it is damaged.
    """
    require(args.samples >= 0, f"--samples {args.samples}: must not be negative")
    several, found = len(args.workdirs) > 1, {}
    for name, path in zip(page.names(args.workdirs), args.workdirs, strict=True):
        print(*([f"{name}:"] if several else []), report.show(path, args.samples), sep="\n")
        found[name] = {at.parent.name: workdir.read_summary(at.parent) for at in path.glob(f"*/{workdir.SUMMARY}")}
    if args.html is not None:
        page.write(args.workdirs, args.html, samples=args.samples)
        print(f"page: {args.html}")
    return Outcome(found if several else next(iter(found.values())))
