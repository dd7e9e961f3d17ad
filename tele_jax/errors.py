"""The kinds of failure that a user meets, which the command turns into exit codes 2 and 1; checks that raise them."""

import contextlib
import difflib
import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class UserError(ValueError):
    """Something that the user wrote or named is wrong: one line, what, where, and what to change. Exit code 2."""


class DamageError(RuntimeError):
    """Something on disk is not what was once written there: one line, what and where. Exit code 1."""


class FailedError(RuntimeError):
    """The work itself failed a check, such as a growth that did not preserve: one line. Exit code 1."""


def abridged(items: Iterable[object], separator: str = ", ") -> str:
    """The items of a list as text for a message; where that is longer than 700 characters, the first three of them.

    >>> abridged(f"layers.attn.weight_{i}: expected float32[80,8192,64,128], got none" for i in range(12))[-45:]
    'float32[80,8192,64,128], got none, and 9 more'
    """
    texts = [str(item) for item in items]
    full = separator.join(texts)
    return full if len(full) <= 700 or len(texts) <= 3 else separator.join([*texts[:3], f"and {len(texts) - 3} more"])


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Puts a prefix before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def given(value: T | None, message: str) -> T:
    """The value; raises UserError(message) where it is None."""
    if value is None:
        raise UserError(message)
    return value


def whole(value: Any, what: str) -> int:
    """Returns the value as an int. Raises UserError unless it is a whole number; 3.0, "3" and True are not."""
    try:
        require(not isinstance(value, (bool, np.bool_)), f"{what}={value!r} must be a whole number")
        return operator.index(value)
    except TypeError:
        raise UserError(f"{what}={value!r} must be a whole number") from None


def check_seed(seed: object, what: str = "seed") -> int:
    """Returns the seed as an int. Raises UserError unless 0 <= seed < 2^32, what every kind of random key takes."""
    require(0 <= whole(seed, what) < 2**32, f"{what}={seed} must be in [0, 2^32)")
    return whole(seed, what)


def nearest(word: object, known: Collection[str], what: str) -> str:
    """A hint for a word that is not known: the known one that is nearest to it, or all, which are called `what`."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{what}: {', '.join(known)}"


def require_known(name: str, known: Collection[str], message: str) -> None:
    """Raises UserError(message), with the nearest known name or else all of them, for a name that is not known."""
    require(name in known, f"{message}; {nearest(name, known, 'known')}")
