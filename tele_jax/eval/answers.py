"""Answers of a model, kept on disk as they come, so that an evaluation that was killed goes on from them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tele_jax import files
from tele_jax.config import given, require
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Json, Table

RUN = "run.json"


class Answers:
    """A file with one JSON line [key, answer] an answer; in memory alone where there is no path.

    A key is the SHA-256 of all that an answer depends on besides what `claim` compared.
    """

    def __init__(self, path: Path | None = None):
        self._kept: dict[str, Json] = {}
        self._file = None
        if path is not None:
            data = path.read_bytes() if path.exists() else b""
            lines = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line
            for number, line in enumerate(lines.splitlines(), start=1):
                entry = files.parse_json(line, f"{path}:{number}")
                whole = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
                if not whole or not (isinstance(entry[1], str) or _is_score(entry[1])):
                    raise DamageError(f"{path}:{number}: damaged, is no answer; remove the file to ask again")
                self._kept[entry[0]] = entry[1]
            self._file = path.open("ab")
            self._file.truncate(len(lines))

    @staticmethod
    def key(*parts: Any) -> str:
        """The key of a question, which is made of values that JSON has."""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, key: str, kind: type[list] | type[str]) -> Any:
        """The answer to a question, a list of log-probability and True for the likeliest, or a text; or None."""
        answer = self._kept.get(key)
        if answer is not None and not isinstance(answer, kind):
            name = given(self._file, "an answer in memory").name
            raise DamageError(f"{name}: damaged, {answer!r:.40} answers another question; remove the file to ask again")
        return answer

    def add(self, key: str, answer: Json) -> None:
        """Keeps an answer; it survives the end of this process."""
        self._kept[key] = answer
        if self._file is not None:
            self._file.write(json.dumps([key, answer]).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _is_score(answer: Json) -> bool:
    return isinstance(answer, list) and [type(part) for part in answer] == [float, bool]


def claim(out: Path, settings: Table) -> None:
    """Makes `out` the directory of a run with these settings, or finds that it is.

    Raises:
      UserError: `out` holds a run with other settings, whose first difference the message names, or something else.
    """
    path, settings = out / RUN, json.loads(json.dumps(settings))
    if path.exists():
        before = files.read_table(path)
        for key in dict.fromkeys([*settings, *before]):
            if settings.get(key) != before.get(key):
                was, now = (json.dumps(table.get(key), ensure_ascii=False)[:80] for table in (before, settings))
                raise UserError(
                    f"{out}: holds another run, whose {key} was {was} and is now {now}; choose another --out"
                )
        return
    require(not out.exists() or out.is_dir(), f"{out}: is a file; --out is a directory")
    if out.exists() and os.listdir(out):
        raise UserError(f"{out}: is there already and holds something else; choose another --out")
    files.write_json(path, settings)
