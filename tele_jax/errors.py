"""The kinds of failure that a user meets; the command turns them into exit codes 2 and 1."""


class UserError(ValueError):
    """Something that the user wrote or named is wrong: one line, what, where, and what to change. Exit code 2."""


class DamageError(RuntimeError):
    """Something on disk is not what was once written there: one line, what and where. Exit code 1."""


class FailedError(RuntimeError):
    """The work itself failed a check, such as a growth that did not preserve: one line. Exit code 1."""
