"""`tele data ACTION`: every action is a module with what a verb has (main.py)."""

import argparse
from pathlib import Path
from typing import Any

from tele_jax.cli import data_cache, data_clean, data_clean_train, data_fetch, data_show, data_stats
from tele_jax.errors import UserError

HELP = "text into training rows, and a look at them"
OVERRIDES = True  # for the actions that take --config
ACTIONS = {
    "fetch": data_fetch,
    "clean": data_clean,
    "clean-train": data_clean_train,
    "cache": data_cache,
    "show": data_show,
    "stats": data_stats,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    for name, module in ACTIONS.items():
        action = actions.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.arguments(action)
        action.add_argument(
            "--json", metavar="FILE", type=Path, default=argparse.SUPPRESS, help="write the figures to FILE as JSON"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises what the action raises, and UserError for --config.a.b=v where there is no --config."""
    if args.overrides and not hasattr(args, "config"):
        raise UserError(f"{args.overrides[0]}: tele data {args.action} takes no --config")
    return ACTIONS[args.action].run(args)
