"""The `tele` command, one module a verb; here, what all verbs share: parser and flags, progress, the outcome."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tele_jax.config import require
from tele_jax.errors import DamageError, FailedError, UserError, nearest
from tele_jax.files import Table


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage, so that a mistake is one line."""

    def error(self, message: str):
        verb = self.prog.removeprefix("tele").strip()  # `tele: ` stands before every error
        raise UserError(f"{verb}: {message}; see {self.prog} --help".removeprefix(": "))

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Names a flag that there is not: argparse would speak of missing arguments first."""
        words = list(args or ())
        own = itertools.takewhile(lambda word: word[:1] == "-" if self._subparsers else word != "--", words)
        for name in (word.partition("=")[0] for word in own if word[:2] == "--"):
            if name != "--" and " " not in name and name not in self._option_string_actions:
                known = [flag for flag in self._option_string_actions if flag[:2] == "--" and flag != "--override"]
                self.error(f"unrecognized argument {name}; {nearest(name, known, 'flags')}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Names the nearest of the choices, which argparse does not."""
        if action.choices is not None and value not in action.choices:
            hint = nearest(value, list(map(str, action.choices)), "choose from")
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")


class VerbParser(Parser):
    """The parser of a verb, or of an action of a verb, with the flags that all of them have."""

    def __init__(self, **how: Any):
        super().__init__(allow_abbrev=False, **how)
        absent = {"default": argparse.SUPPRESS}  # an action would replace what its verb was given
        flag(self, "--json FILE", "file to write the figures to, as JSON", Path, **absent)
        # argparse knows no open family of flags: main.parse makes --override=--config.a.b=v of --config.a.b=v.
        flag(self, "--override", argparse.SUPPRESS, dest="overrides", action="append", **absent)


def flag(parser: "argparse._ActionsContainer", names: str, help: str, type: Any = None, **how: Any) -> None:
    """Adds an argument to a parser or group; names: "--out DIR", "--message, --prompt TEXT" or "src SRC"."""
    flags, _, metavar = names.replace(", ", ",").partition(" ")
    how |= {key: value for key, value in (("type", type), ("metavar", metavar)) if value}
    parser.add_argument(*flags.split(","), help=help, **how)


def switch(parser: "argparse._ActionsContainer", name: str, help: str) -> None:
    """Adds a flag without a value, which is False unless it is given."""
    parser.add_argument(name, help=help, action="store_true")


def refuse_flags(args: argparse.Namespace, defaults: Mapping[str, object], why: str) -> None:
    """Raises UserError, naming the flag, where one of these arguments is not its default."""
    for name, default in defaults.items():
        require(getattr(args, name) == default, f"--{name.replace('_', '-')}: {why}")


def pick(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments of these names, as keywords."""
    return {name: getattr(args, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a verb.

    Attributes:
      figures: written by --json; None where another process writes them.
      text: is printed on standard output.
      error: is printed on standard error, as one line.
      code: the exit code, 2 for a user's mistake and 1 for a failure.
    """

    figures: Table | None = None
    text: str = ""
    error: str = ""
    code: int = 0


def of_error(error: BaseException) -> Outcome | None:
    """The outcome that an error amounts to; None for a defect of tele_jax, which deserves a traceback."""
    if isinstance(error, UserError):
        return Outcome(error=str(error), code=2)
    if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)):
        return Outcome(error=f"{error.filename}: {error.strerror}", code=2)
    if isinstance(error, (DamageError, FailedError)):
        return Outcome(error=str(error), code=1)
    if isinstance(error, KeyboardInterrupt):
        return Outcome(error="interrupted", code=130)
    return None


def one_line(message: object) -> str:
    """The message with every run of spaces and line ends as one space."""
    return " ".join(str(message).split())


def note(message: object) -> None:
    """Prints a line on standard error, as the command."""
    print(f"tele: {message}", file=sys.stderr)


class Progress:
    """Shows how far a long work is: progress(done, all), in bytes, or in what `unit` names.

    On a terminal it is a bar, elsewhere a line at every tenth; of bytes only where they are `least` or more.
    title: what stands before the bar.
    """

    def __init__(self, title: str, *, unit: str = "bytes", least: int = 10**9):
        self._title, self._unit, self._bar, self._tenth = title, unit, None, 0
        self._least = least if unit == "bytes" else 0

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if sys.stderr.isatty():
            if self._bar is None:
                in_bytes = self._unit == "bytes"
                how = {"unit": "B", "unit_scale": True} if in_bytes else {"unit": f" {self._unit}", "initial": done}
                self._bar = tqdm(total=total, desc=self._title, **how)
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
        elif total >= self._least and 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            print(f"  {done:,} of {total:,} {self._unit}", flush=True)
