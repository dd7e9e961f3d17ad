"""`tele VERB ...`: finds the verb, runs it, and turns its outcome into an exit code.

A verb is a module of this package with arguments(parser) and run(args), which returns an Outcome. One that sets up the
process that it has for itself has set_up() as well. Modules are imported only when called, so that `tele --help` loads
none.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tele_jax import files
from tele_jax.cli import Outcome, Parser, VerbParser, of_error, one_line
from tele_jax.errors import UserError

VERBS = {
    "train": "run the stages of a config: pretrain, grow, fine-tune",
    "report": "show the table, pictures and sampled replies of a run",
    "grow": "grow a checkpoint into a larger one",
    "merge": "merge checkpoints of one architecture into one",
    "plan": "compile a step of training, growth or decoding for a TPU slice: does it fit, what does it cost",
    "inspect": "show what a checkpoint holds",
    "import": "read a released checkpoint",
    "export": "write a checkpoint for other programs to read",
    "tokenizer": "train or inspect a tokenizer",
    "data": "fetch and clean text, make training rows of it, look at them",
    "sft": "select dialogues for fine-tuning",
    "generate": "continue a prompt",
    "chat": "talk to a fine-tuned model",
    "eval": "find out how good a model is",
    "score-reward": "score answers with a reward model",
    "lab": "carry out studies that measure what growth is worth",
    "mup": "check muP, and find settings on small models for large ones",
    "preflight": "check a command before it is started on other machines (launch/)",
}


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
        outcome = _run(argv, own_process)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        outcome = of_error(error)
        if outcome is None:
            raise
        if own_process and isinstance(error, KeyboardInterrupt):
            # Threads that are at work would be waited for, and print pages of what was taken from them. What they write
            # is safe from a kill.
            print(f"tele: {outcome.error}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(outcome.code)
    if outcome.error:
        print(f"tele: {one_line(outcome.error)}", file=sys.stderr)
    return outcome.code


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The verb's module and its arguments; raises UserError for a command line that is not understood."""
    parser, verbs = _parser()
    module = None
    if argv and argv[0] in VERBS:
        module = importlib.import_module(f"tele_jax.cli.{argv[0].replace('-', '_')}")
        module.arguments(verbs.choices[argv[0]])
    end = list(argv).index("--") if "--" in argv else len(argv)
    words = [f"--override={word}" if word.startswith("--config.") else word for word in argv[:end]]
    args = parser.parse_args([*words, *argv[end:]])
    assert module is not None  # the parser knows the verbs, and no other
    if args.overrides and not hasattr(args, "config"):
        verb = " ".join(filter(None, (args.verb, getattr(args, "action", None))))
        raise UserError(f"{args.overrides[0]}: tele {verb} takes no --config")
    return module, args


def _parser() -> tuple[Parser, "argparse._SubParsersAction[VerbParser]"]:
    description = "Pretrain, grow, fine-tune and talk to Tele-FLM and TeleChat models."
    parser = Parser(prog="tele", description=description)
    parser.add_argument("--version", action="version", version=f"tele {importlib.metadata.version('tele_jax')}")
    parser.set_defaults(json=None, overrides=())
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=VerbParser)
    for verb, text in VERBS.items():
        verbs.add_parser(verb, help=text, description=text)
    return parser, verbs


def _require_writable(target: Path) -> None:
    """Raises UserError where the figures could not be written: now, and not after hours of work."""
    if target.is_dir():
        raise UserError(f"--json {target}: is a directory; name a file")
    if not target.parent.is_dir():
        raise UserError(f"--json {target}: there is no directory {target.parent}")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UserError(f"--json {target}: cannot be written")


def _run(argv: list[str], own_process: bool) -> Outcome:
    if not argv:
        print(_parser()[0].format_help(), end="")
        return Outcome()
    module, args = parse(argv)
    if args.json is not None:
        _require_writable(args.json)
    if own_process and hasattr(module, "set_up"):
        module.set_up()
    outcome = module.run(args)
    if outcome.text:
        print(outcome.text)
    if args.json is not None and outcome.figures is not None:
        with files.writing(args.json):
            args.json.write_text(json.dumps(outcome.figures, indent=2) + "\n")
    return outcome


if __name__ == "__main__":
    sys.exit(main())
