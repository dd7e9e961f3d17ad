"""Files: read with one line that says what is wrong, written whole or not at all, locked. Nobody else renames or locks.

A directory, a named pipe (which would be waited for without end), a link to itself, a file without permission, text
that is not UTF-8, JSON that is too deep: all are a UserError that names the path.
"""

import codecs
import contextlib
import errno
import fcntl
import glob
import itertools
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tele_jax.errors import DamageError, UserError

if TYPE_CHECKING:
    from etils import epath

PathLike = str | os.PathLike[str]
AnyPath = TypeVar("AnyPath", Path, "epath.Path")  # local, or local or in a bucket
Json = Any  # a value as JSON has it
Table = dict[str, Any]  # an object of JSON, by the names of its fields

_DEEPEST = 64  # tables and lists inside each other, in a document of ours
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of the machine, not of the path that was given
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


def parse_json(text: str | bytes, where: str, error: type[Exception] = DamageError) -> Json:
    """The value of a JSON document that tele_jax wrote; stricter than `json`, which takes what no writer makes.

    Args:
      where: names the document in messages.
      error: what is raised for text that is not UTF-8 or not JSON, is too deep, names a key twice, or holds a number
        that is not finite.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_single_keys, parse_constant=_not_finite, parse_float=_finite)
        _require_shallow(value)
        return value
    except UnicodeDecodeError as problem:
        raise error(f"{where}: damaged, not UTF-8 at byte {problem.start:,}") from None
    except RecursionError:
        raise error(f"{where}: damaged, not JSON that can be read: too deep") from None
    except ValueError as problem:
        raise error(f"{where}: damaged, not JSON ({problem})") from None


def _require_shallow(value: object) -> None:
    """Raises RecursionError for what whoever walks through the value, json.dumps for one, would stumble over."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise RecursionError
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = list(itertools.chain.from_iterable(inside))


def _single_keys(pairs: list[tuple[str, Any]]) -> Table:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return table


def _not_finite(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _not_finite(digits)


def read_json(path: str | os.PathLike) -> Json:
    """The value of a JSON document that tele_jax wrote.

    Raises:
      UserError: there is no such file.
      DamageError: the file is not JSON; see `parse_json`.
    """
    return parse_json(read_bytes(path, missing="missing"), os.fspath(path))


def is_plain_name(name: str) -> bool:
    """Tells whether a name is one part of a path that leads nowhere else: no separator, no zero byte, not . or .."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return 0 < len(encoded) <= 255 and name not in (".", "..") and not set(name) & set("/\\\0")


def read_table(path: str | os.PathLike, what: str = "", *, missing: str = "") -> Table:
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


@contextlib.contextmanager
def locked(file: Path, wait: bool = False) -> Iterator[bool]:
    """Locks a file, which is made where needed with its directory; yields False where another process has the lock.

    wait: stays until the lock is free, and yields True.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except OSError:
            free = False
        yield free


@contextlib.contextmanager
def held_alone(file: Path, message: str) -> Iterator[None]:
    """Locks a file as `locked`; raises UserError(message) where another process has the lock."""
    with locked(file) as free:
        if not free:
            raise UserError(message)
        yield


def flush(path: str | os.PathLike) -> None:
    """Returns when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(path: Path, target: Path) -> None:
    """Gives a complete file or directory its final name, in one step."""
    os.replace(path, target)
    flush(target.parent)


@contextlib.contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and then moves what was written there to `path`: all of it or nothing.

    A body that leaves no file there leaves `path` as it was. The default name of the temporary path has the number of
    the process, for files that several processes may write at once.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            flush(temporary)
            move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """The hidden file beside `path` in which `write_file` writes what becomes `path`; a kill may leave it."""
    return path.with_name(f".{path.name}.tele_jax.tmp")


def write_file(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes a file, text as UTF-8, and its directory where needed: a kill leaves the old file or the new one.

    One process at a time may write a file; the next call removes the temporary file that a kill leaves.

    Raises:
      UserError: `path` is a directory, a file is in the place of a directory above it, or the system forbids writing.
      DamageError: the disk is full or fails.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, temporary_of(path)) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes JSON as `write_file` writes text."""
    write_file(path, json.dumps(_json_value(value), indent=2, allow_nan=False) + "\n")


def append(path: Path, data: bytes) -> None:
    """Appends to a file, which is made where needed. A kill or a full disk may leave a part of the data there.

    Raises:
      UserError, DamageError: as `write_file`.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Names the path in what goes wrong in the body: DamageError where the disk is full or fails, or UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise DamageError(f"{path}: could not be written ({error.strerror}); make room and start again") from None
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


@contextlib.contextmanager
def new_directory(path: Path, what: str) -> Iterator[Path]:
    """Yields the directory PATH.partial, which becomes `path` when the body ends, with all files on the disk.

    A body that fails leaves nothing. What a killed process left is removed first.

    Args:
      path: must not exist; the directories above it are made.
      what: names the content in messages, as "export".

    Raises:
      UserError: `path` exists or cannot be made; PATH.partial holds something else, or another process is writing it.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already, and is not overwritten; choose another path")
    partial = path.with_name(path.name + ".partial")
    marker = partial / ".lock"
    if os.path.lexists(partial) and not marker.is_file() and not (partial.is_dir() and not os.listdir(partial)):
        raise UserError(f"{partial}: is needed for the unfinished {what}, but exists already")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made ({error.strerror}); choose another place") from None
    with held_alone(marker, f"{partial}: is being written by another process"):
        for child in partial.iterdir():
            if child != marker:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        try:
            yield partial
            for place in [*partial.rglob("*"), partial]:
                flush(place)
            marker.unlink()
            move(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _json_value(value: object) -> Json:
    """JSON values, with null in the place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def expand(patterns: Sequence[str], where: str, *, hint: str = "") -> tuple[str, ...]:
    """Returns the files that the glob patterns match (`**` crosses directories), each once, sorted.

    A path that exists is taken literally, whatever brackets or stars its name has. A file that two paths reach (`a.txt`
    and `./a.txt`, or a link) is listed once, under its first path.

    Args:
      patterns: paths and glob patterns.
      where: names the patterns in messages.
      hint: ends the message where no file matches.

    Raises:
      UserError: a pattern matches no file, or something else than a plain file.
    """
    found = set()
    for pattern in patterns:
        paths = (
            [pattern] if os.path.exists(pattern) and not os.path.isdir(pattern) else glob.glob(pattern, recursive=True)
        )
        matches = [path for path in paths if not os.path.isdir(path)]
        for path in matches:
            if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
                raise UserError(f"{where}: {path} is not a plain file, and text is read at any byte of it")
        if not matches:
            if os.path.isdir(pattern):
                raise UserError(f"{where}: {pattern} is a directory; give a pattern, e.g. {pattern.rstrip('/')}/*.txt")
            raise UserError(f"{where}: no file matches {pattern}{hint}")
        found.update(matches)
    first: dict[str, str] = {}
    for path in sorted(found):
        first.setdefault(os.path.realpath(path), path)
    return tuple(first.values())
