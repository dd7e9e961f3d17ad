"""`tele VERB ...`: finds the verb, runs it, and turns its outcome into an exit code.

A verb is a module of this package with HELP (one line), arguments(parser), and run(args), which prints for people and
returns its figures as a dict, or None. They are imported only when called, so that `tele --help` loads none.
"""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tele_jax.cli import exit_codes as outcome
from tele_jax.errors import UserError

VERBS = {
    "train": "run the stages of a config: pretrain, grow, fine-tune",
    "grow": "grow a checkpoint into a larger one",
    "plan": "compile a training step for a TPU slice: does it fit, what does it cost",
    "inspect": "show what a checkpoint holds",
    "import": "read a released checkpoint",
    "export": "write a checkpoint for other programs to read",
    "tokenizer": "train or inspect a tokenizer",
    "data": "fetch text, make rows of it, look at them",
    "generate": "continue a prompt",
    "chat": "talk to a fine-tuned model",
    "preflight": "check a command before it is started on other machines",
}


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage, so that a mistake is one line."""

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 2 for a user's mistake, 1 for a failure.

    argv: None for the command line of this process, which is then the verb's own to set up; a notebook's or a test's is
      not.
    """
    own_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if own_process and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _main(argv, own_process)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        known = outcome.of(error)
        if known is None:
            raise
        print(f"tele: {outcome.one_line(known[0])}", file=sys.stderr)
        if own_process and isinstance(error, KeyboardInterrupt):
            # Threads that are at work would be waited for, and print pages of what was taken from them. What they write
            # is safe from a kill.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(known[1])
        return known[1]


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The verb's module and its arguments; raises UserError for a command line that is not understood."""
    parser = Parser(prog="tele", description="Pretrain, grow, fine-tune and talk to Tele-FLM and TeleChat models.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    module = None
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        if list(argv[:1]) == [verb]:
            module = importlib.import_module(f"tele_jax.cli.{verb}")
            module.arguments(sub)
            if not any(a.dest == "json" for a in sub._actions):
                sub.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE as JSON")
    # argparse knows no open family of flags: --config.a.b=v is taken out first.
    overrides = [word for word in argv if word.startswith("--config.")]
    if overrides and not getattr(module, "OVERRIDES", False):
        raise UserError(f"{overrides[0]}: only verbs that take --config understand this")
    args = parser.parse_args([word for word in argv if word not in overrides])
    args.overrides = overrides
    return module, args


def _require_writable(target: Path) -> None:
    """Raises UserError where the figures could not be written: now, and not after hours of work."""
    if target.is_dir():
        raise UserError(f"--json {target}: is a directory; name a file")
    if not target.parent.is_dir():
        raise UserError(f"--json {target}: there is no directory {target.parent}")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UserError(f"--json {target}: cannot be written")


def _main(argv: list[str], own_process: bool) -> int:
    module, args = parse(argv)
    args.own_process = own_process
    if getattr(args, "json", None) is not None:
        _require_writable(args.json)
    figures = module.run(args)
    if getattr(args, "json", None) is not None:
        args.json.write_text(json.dumps(figures or {}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
