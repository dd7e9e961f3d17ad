"""`tele lab ACTION`: lists, runs and reports studies of growth."""

import argparse
from pathlib import Path

from tele_jax import lab, tables
from tele_jax.cli import Outcome, flag
from tele_jax.cli.pages import load_page
from tele_jax.cli.train import set_up  # noqa: F401 - as `tele train`
from tele_jax.errors import UserError, nearest
from tele_jax.lab.study import BUDGETS
from tele_jax.lab.verdict import shown
from tele_jax.train.trainer import Stopped

PAGES = Path("configs/lab")


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    for name, (text, action, epilog) in ACTIONS.items():
        added = actions.add_parser(name, help=text, description=text, epilog=epilog)
        added.set_defaults(run=action)
        if name == "run":
            flag(added, "study STUDY", "name of a page in configs/lab, or its path")
            flag(added, "--budget SIZE", "size of the work; default: smoke", choices=BUDGETS, default="smoke")
            flag(added, "--out DIR", "directory of the results; default: runs/lab/STUDY/SIZE", Path)
            added.set_defaults(config=None)  # --config.KEY=VALUE changes the page
        if name == "report":
            flag(added, "directory DIR", "directory of `tele lab run`", Path)
            flag(added, "--page FILE", "where to write the page, its figure beside it; default: DIR/page.md", Path)


def run(args: argparse.Namespace) -> Outcome:
    """Raises what the action raises."""
    return args.run(args)


def _pages() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PAGES.glob("[!_]*.py"))}


def _list(args: argparse.Namespace) -> Outcome:
    studies = {name: lab.read_study(load_page(f"{path}:smoke")) for name, path in _pages().items()}
    if not studies:
        raise UserError(f"{PAGES}: holds no page; start the command in the directory of the project")
    rows = [(name, study.title, study.hypothesis) for name, study in studies.items()]
    figures = {name: {"title": title, "hypothesis": hypothesis} for name, title, hypothesis in rows}
    return Outcome(figures, tables.text(rows, ("study", "title", "hypothesis"), "lll"))


def _run(args: argparse.Namespace) -> Outcome:
    """Runs the jobs that are left, then writes the report; raises UserError as read_study and lab.run."""
    known = _pages()
    path = known.get(args.study, Path(args.study))
    if args.study not in known and not path.exists():
        raise UserError(f"{args.study}: no page of {PAGES} and no file; {nearest(args.study, known, 'studies')}")
    page = load_page(f"{path}:{args.budget}", args.overrides)
    with page.unlocked():
        page.overrides = tuple(args.overrides)
    study = lab.read_study(page)
    if study.budget != args.budget:
        raise UserError(f"{path}: is a page of budget {study.budget!r}; --budget {args.budget} chooses another")
    out = args.out or Path("runs/lab") / study.name / study.budget
    try:
        lab.run(study, out)
    except Stopped as stopped:
        return Outcome(error=f"{stopped}; finished jobs are kept", code=130 if stopped.interrupted else 143)
    return _shown(lab.report(out))


def _report(args: argparse.Namespace) -> Outcome:
    return _shown(lab.report(args.directory, args.page))


def _shown(found: dict) -> Outcome:
    rows = [(one["says"], shown(one), one["verdict"]) for one in found["criteria"]]
    text = tables.text(rows, ("criterion", "mean [95% interval]", "verdict"), "lll")
    return Outcome(found, f"{text}\n\n{found['study']}, budget {found['budget']}: {found['verdict']}\n{found['page']}")


ACTIONS = {
    "list": ("show the studies", _list, "example: tele lab list"),
    "run": (
        "carry out a study, or what is left of it, and report it",
        _run,
        "example: tele lab run E0 --budget cpu. Started again, it goes on; started on several devices at once with one "
        "--out, the processes share the jobs. --config.KEY=VALUE changes the page.",
    ),
    "report": ("make the report of a study from its results", _report, "example: tele lab report runs/lab/E0/cpu"),
}
