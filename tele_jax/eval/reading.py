"""Records of evaluation sets, read from the files that users drop into a directory."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tele_jax import files
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import Json

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
LISTS = ("examples", "example", "data")  # keys of a JSON object that holds the records in a list
SPLITS = {"train": "train", "dev": "dev", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(SPLITS)})(?=$|[-_.])", re.IGNORECASE)
_SHARD = re.compile(r"(?:^|[-_.])\d+(?:-of-\d+)?(?=$|[-_.])")


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a file. What it lacks is a UserError that names the file, the place in it and the field.

    Attributes:
      value: mostly an object; its fields are read by the methods.
      where: the file, and the line or number of the record.
      subject: as the names of the file and its folders say; see `find`.
    """

    value: Json
    where: str
    subject: str = ""

    def error(self, text: str) -> UserError:
        """The exception to raise for a record that cannot be used."""
        return UserError(f"{self.where}: {text}")

    def has(self, field: str) -> bool:
        """True where the field is there and is not null."""
        return isinstance(self.value, dict) and self.value.get(field) is not None

    def get(self, field: str, kind: type | tuple[type, ...], what: str) -> Any:
        """The value of a field of one of some types; raises UserError where it is another, or there is none."""
        if not self.has(field):
            raise self.error(f"lacks the field {field!r}")
        value = self.value[field]  # pyright: ignore[reportArgumentType, reportCallIssue, reportOptionalSubscript, reportIndexIssue]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f"the field {field!r} is no {what}, but {value!r:.60}")
        return value

    def text(self, field: str) -> str:
        """The text of a field, without spaces around it; a number as its digits, since readers of CSV make numbers."""
        return str(self.get(field, (str, int, float), "text")).strip()

    def texts(self, field: str) -> list[str]:
        """The list of texts of a field; at least one."""
        value = self.get(field, list, "list of texts")
        if not value or not all(isinstance(text, str) for text in value):
            raise self.error(f"the field {field!r} is no list of texts, but {value!r:.60}")
        return [text.strip() for text in value]

    def inner(self, field: str) -> "Record":
        """The object in a field, as a record."""
        return Record(self.get(field, dict, "object"), f"{self.where}: {field}", self.subject)

    def index(self, field: str, choices: Sequence[str], *, numbers: bool = False) -> int:
        """The place among `choices` of the answer in a field, which is one of them or, with `numbers`, its place."""
        answer = self.text(field)
        if answer in choices:
            return choices.index(answer)
        if numbers and answer.isdecimal() and int(answer) < len(choices):
            return int(answer)
        raise self.error(f"the field {field!r} is {answer!r:.60}, which is none of {', '.join(choices):.200}")


def find(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The files of a set below a folder: {split: {subject: files}}.

    The split is a word in the file's name or its folders: train, dev, test, or val, valid and validation, which are the
    split "val"; without one the split is "". The subject is what remains of the name, or else of the nearest folder.
    Hidden files and folders, as .ipynb_checkpoints, are left out.

    >>> [_place(Path(name)) for name in ("dev/law_dev.csv", "law/test-00000-of-00001.parquet", "test/algebra/12.json")]
    [('dev', 'law'), ('test', 'law'), ('test', 'algebra')]
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        inner = path.relative_to(folder)
        if any(name.startswith(".") for name in inner.parts):
            continue
        split, subject = _place(inner)
        found.setdefault(split, {}).setdefault(subject, []).append(path)
    return found


def _place(path: Path) -> tuple[str, str]:
    """(split, subject) of a file by its path below the folder of the set."""
    names = [path.stem, *reversed(path.parts[:-1])]
    splits = [SPLITS[match[1].lower()] for name in names for match in [_SPLIT.search(name)] if match]
    rests = (_SHARD.sub("", _SPLIT.sub("", name)).strip("-_. ") for name in names)
    return next(iter(splits), ""), next((rest for rest in rests if rest), "")


def read(path: Path, subject: str = "", *, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Yields the records of a file of JSON lines, JSON, CSV or Parquet.

    columns: names for a CSV file whose first line does not name them.

    Raises:
      UserError: no UTF-8, broken JSON or CSV, an empty file; names the file and the line.
    """
    if path.suffix == ".parquet":
        parquet = need("pyarrow.parquet", how="pip install pyarrow")
        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: is no Parquet file ({str(error).splitlines()[0]})") from None
        places = (f"{path}: row {number}" for number in range(1, len(rows) + 1))
        yield from (Record(row, where, subject) for row, where in zip(rows, places, strict=True))
        return
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: is empty")
    records = _csv(text, str(path), columns) if path.suffix == ".csv" else _json(text, str(path))
    yield from (Record(value, where, subject) for value, where in records)


def read_text(path: Path) -> str:
    """The text of a file; raises UserError where it is not UTF-8."""
    try:
        return files.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _json(text: str, path: str) -> Iterator[tuple[Json, str]]:
    lines = text.split("\n")
    first = next(line for line in lines if line.strip()).strip()
    if path.endswith(".jsonl") or (first[0] == "{" and first[-1] == "}" and len(text.strip()) > len(first)):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield files.parse_json(line, f"{path}:{number}", UserError), f"{path}:{number}"
        return
    whole = files.parse_json(text, path, UserError)
    if isinstance(whole, dict):
        key = next((key for key in LISTS if isinstance(whole.get(key), list)), None)
        if key is None:
            yield whole, path
            return
        whole = whole[key]
    if not isinstance(whole, list):
        raise UserError(f"{path}: is no JSON with records")
    yield from ((value, f"{path}: record {number}") for number, value in enumerate(whole, start=1))


def _csv(text: str, path: str, columns: Sequence[str]) -> Iterator[tuple[Json, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader)
        if columns and not set(columns) <= set(header):
            if len(header) != len(columns):
                raise UserError(f"{path}:1: has {len(header)} columns, not {len(columns)}: {', '.join(columns)}")
            yield dict(zip(columns, header, strict=True)), f"{path}:1"
            header = list(columns)
        for row in reader:
            if len(row) != len(header):
                raise UserError(f"{path}:{reader.line_num}: has {len(row)} columns, not {len(header)}")
            yield dict(zip(header, row, strict=True)), f"{path}:{reader.line_num}"
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV: {error}") from None
