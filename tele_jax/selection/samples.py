"""The pool as numbered samples, in chunks: consecutive records of a file that are read and worked on apart.

The number of a sample is its place among the records of all files: sources by name, files by path.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tele_jax.data import documents
from tele_jax.data.messages import Message
from tele_jax.errors import UserError
from tele_jax.files import Table, expand
from tele_jax.selection.settings import SourceConfig

CHUNK = 2048  # samples


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive records of one file.

    Attributes:
      number: place among all chunks.
      first: number of its first sample.
      unit: what a record is in the file, a line or an element of an array.
      spans: int64[n, 3], byte, length and number in the file of each record.
    """

    number: int
    source: str
    path: str
    first: int
    unit: str
    spans: np.ndarray

    @property
    def count(self) -> int:
        """Samples, unreadable ones among them."""
        return len(self.spans)

    @property
    def ids(self) -> range:
        """Numbers of the samples."""
        return range(self.first, self.first + self.count)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dialogue of the pool.

    Attributes:
      id: number in the pool.
      messages: None where the record is no dialogue.
      reason: why it is none.
    """

    id: int
    category: str
    messages: Sequence[Message] | None
    reason: str = ""

    def turns(self) -> list[tuple[str, str]]:
        """(what was said since the last answer, answer) of every turn."""
        found, said = [], []
        for message in self.messages or ():
            said.append(message["content"])
            if message["role"] in ("assistant", "bot"):
                found.append(("\n".join(said[:-1]), said[-1]))
                said = []
        return found

    def text(self) -> str:
        """All messages, each on its own lines."""
        return "\n".join(message["content"] for message in self.messages or ())


@dataclasses.dataclass(frozen=True)
class Pool:
    """The files of a page.

    Attributes:
      files: {path: [bytes, SHA-256]}: what a run that goes on compares.
    """

    chunks: tuple[Chunk, ...]
    files: Mapping[str, list[int | str]]

    def __len__(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


def index(sources: Mapping[str, SourceConfig]) -> Pool:
    """Reads every byte of the files once, and cuts them into chunks.

    Raises:
      UserError: a pattern without files, a file of two sources, one that is empty or compressed, no sample at all.
    """
    chunks: list[Chunk] = []
    files: dict[str, list[int | str]] = {}
    owner: dict[str, str] = {}
    for name, source in sorted(sources.items()):
        for path in expand(source.files, f"sources.{name}.files"):
            place = os.path.realpath(path)
            if place in owner:
                raise UserError(f"sources.{name}: {path} is a file of sources.{owner[place]} already")
            owner[place] = name
            first = chunks[-1].first + chunks[-1].count if chunks else 0
            digest, found = _chunks(source, name, path, first, len(chunks))
            chunks += found
            files[path] = [os.path.getsize(path), digest]
    if not chunks:
        raise UserError(f"sources: no sample in {', '.join(files)}")
    return Pool(tuple(chunks), files)


def _chunks(source: SourceConfig, name: str, path: str, first: int, number: int) -> tuple[str, list[Chunk]]:
    found: list[Chunk] = []
    digest, unit = hashlib.sha256(), "line"
    spans: list[tuple[int, int, int]] = []

    def close() -> None:
        where = first + sum(chunk.count for chunk in found)
        found.append(Chunk(number + len(found), name, path, where, unit, np.array(spans, np.int64)))
        spans.clear()

    with documents.open_text(path) as file:
        for offset, data, at in documents.records(file, source.format, digest.update):
            ((unit, place),) = at.items()
            spans.append((offset, len(data), place))
            if len(spans) == CHUNK:
                close()
    if spans:
        close()
    return digest.hexdigest(), found


def read(chunk: Chunk, source: SourceConfig) -> Iterator[Sample]:
    """Yields the samples of a chunk, unreadable ones as well."""
    with open(chunk.path, "rb") as file:
        for number, (offset, length, place) in zip(chunk.ids, chunk.spans.tolist(), strict=True):
            file.seek(offset)
            yield _sample(chunk, source, number, offset, file.read(length), {chunk.unit: place})


def _sample(chunk: Chunk, source: SourceConfig, number: int, offset: int, data: bytes, at: Table) -> Sample:
    rejects: list[Table] = []
    category = source.category or chunk.source
    messages = documents.read_document(chunk.path, offset, data, source.format, rejects.append, at)
    if messages is None:
        return Sample(number, category, None, rejects[0]["reason"])
    named = json.loads(data).get("category")
    if source.category is None and named is not None:
        if not isinstance(named, str) or not named.strip():
            return Sample(number, category, None, f"its category is {named!r}, not a name")
        category = named
    return Sample(number, category, messages)
