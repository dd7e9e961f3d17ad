"""The kinds of failure that a user meets, which the command turns into exit codes 2 and 1; lists in their messages."""

from collections.abc import Iterable


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
    whole = separator.join(texts)
    return whole if len(whole) <= 700 or len(texts) <= 3 else separator.join([*texts[:3], f"and {len(texts) - 3} more"])
