"""What the command says of an error, and with which exit code it ends: 2 for a user's mistake, 1 for a failure."""

from tele_jax.errors import DamageError, FailedError, UserError


def of(error: BaseException) -> tuple[str, int] | None:
    """(message, exit code), or None for what is a mistake of ours and deserves a traceback."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)):
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, (DamageError, FailedError)):
        return str(error), 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return None


def one_line(message: object) -> str:
    return " ".join(str(message).split())
