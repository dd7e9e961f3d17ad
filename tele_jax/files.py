"""Reading files that somebody names: the answer is the content, or one line that says what the path holds.

A directory, a named pipe (which would be waited for without end), a link to itself, a file without permission, text
that is not UTF-8, JSON that is too deep: all are a UserError that names the path.
"""

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

from tele_jax.errors import UserError

_LFS = b"version https://git-lfs.github.com/spec/"
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular(path: str | os.PathLike, what: str = "", *, missing: str = "") -> int:
    """The size in bytes of a file; UserError where there is none, or something else.

    Args:
      path: of the file; links are followed.
      what: put before the path in messages, as "tokenizer ".
      missing: put behind the message where there is nothing at the path.
    """
    where = f"{what}{os.fspath(path)}"
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"{where}: {missing or error.strerror}") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except ValueError as error:  # a zero byte in the path
        raise UserError(f"{where!r}: {error}") from None
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise UserError(f"{where}: is {name}, not a file")
    return status.st_size


def read_bytes(path: str | os.PathLike, what: str = "", *, missing: str = "") -> bytes:
    """The content of a file. Arguments and errors as `require_regular`."""
    require_regular(path, what, missing=missing)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{what}{os.fspath(path)}: {error.strerror}") from None
    require_no_pointer(data[:64], f"{what}{os.fspath(path)}")
    return data


def require_no_pointer(start: bytes, where: str) -> None:
    """Raises UserError where a file begins as a pointer of Git LFS does: its content is elsewhere."""
    if start.startswith(_LFS):
        raise UserError(
            f"{where}: is a Git-LFS pointer, a note in the place of a file that was not fetched; run: git lfs pull"
        )


def read_table(path: str | os.PathLike, what: str = "", *, missing: str = "") -> dict[str, Any]:
    """The table in a JSON file. UserError as `require_regular`, and for what is no JSON, or no table."""
    where = f"{what}{os.fspath(path)}"
    data = read_bytes(path, what, missing=missing)
    try:
        values = json.loads(data.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: too deep") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a table, but {type(values).__name__}")
    return values
