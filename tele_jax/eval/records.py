"""Records of an evaluation, line by line as JSON: read, kept as they are made, and means over them with an interval."""

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tele_jax import files
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table

Fields = Mapping[str, tuple[type, ...]]  # that a record must have, with their types
RESAMPLES, LEVEL = 2000, (2.5, 97.5)


def read_lines(path: Path, fields: Fields, key: str) -> list[Table]:
    """Reads a file of one JSON object a line, plain or as gzip.

    Args:
      fields: that every object must have, with their types.
      key: the field that no two objects may have alike.

    Raises:
      UserError: no such file, no line, not JSON, a field that is missing or of another type, a key that comes twice.
    """
    data = files.read_bytes(path)
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error):
        raise UserError(f"{path}: damaged, does not unpack") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start:,}") from None
    rows, seen = [], set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not JSON") from None
        if lacks := _lacks(row, fields):
            raise UserError(f"{where}: {lacks}")
        if row[key] in seen:
            raise UserError(f"{where}: {key} {row[key]} occurs twice")
        seen.add(row[key])
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no line")
    return rows


def _lacks(row: object, fields: Fields) -> str:
    """Names a field that a record does not have, or has with another type; "" for a record that is right."""
    for name, kinds in fields.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return f"needs a field {name!r}, {' or '.join(kind.__name__ for kind in kinds)}"
    return ""


def digest(value: object) -> str:
    """The SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Records:
    """The lines of a file that grows; see `keep`."""

    def __init__(self, path: Path, rows: list[Table]):
        self.rows, self._file = rows, path.open("a", encoding="utf-8")

    def add(self, row: Table) -> None:
        """Appends a line."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def keep(path: Path, about: Table, fields: Fields) -> Iterator[Records]:
    """Opens a file of records, with those that an earlier call with the same `about` has left, and closes it.

    about: all that the records depend on, as JSON; it lies beside the file as NAME.about.json. A last line that a kill
      cut short is dropped.
    fields: that every record has.

    Raises:
      UserError: the file is of another `about`, or another process writes it.
      DamageError: a line is not what was written.
    """
    note = path.with_suffix(".about.json")
    with files.held_alone(path.with_suffix(".lock"), f"{path}: is being written by another process"):
        if note.exists():
            before = files.read_json(note)
            if not isinstance(before, dict):
                raise DamageError(f"{note}: damaged, not a table")
            other = sorted(name for name in {*before, *about} if before.get(name) != about.get(name))
            if other:
                raise UserError(f"{path}: was made with another {other[0]}; choose another --out, or remove the files")
        elif path.exists():
            raise UserError(f"{path}: exists already, and {note.name} does not say what it was made with")
        else:
            files.write_json(note, about)
        whole, _, cut = files.read_bytes(path).rpartition(b"\n") if path.exists() else (b"", b"", b"")
        lines = whole.split(b"\n") if whole else []
        rows = [files.parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
        for number, row in enumerate(rows, start=1):
            if lacks := _lacks(row, fields):
                raise DamageError(f"{path}, line {number}: damaged, {lacks}; remove the file to start anew")
        if cut:
            files.write_file(path, whole + b"\n" if whole else b"")
        with contextlib.closing(Records(path, rows)) as records:
            yield records


def resampled_means(values: Sequence[float], name: str) -> np.ndarray:
    """Means of values that are drawn anew, with replacement: float64[RESAMPLES]. The draws follow from the name."""
    rng = np.random.default_rng(list(name.encode()))
    known = np.asarray(values, np.float64)
    return np.array([known[rng.integers(len(known), size=len(known))].mean() for _ in range(RESAMPLES)])


def interval(samples: np.ndarray) -> list[float]:
    """The 95% interval of bootstrap samples."""
    return np.percentile(samples, LEVEL).tolist()
