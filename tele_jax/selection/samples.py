"""The pool as numbered samples, in chunks: stretches of lines of a file that are read and worked on apart.

The number of a sample is its place among the lines of all files that are not blank: sources by name, files by path.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence

from tele_jax.data import documents
from tele_jax.data.dialogue import Message
from tele_jax.errors import UserError
from tele_jax.files import Table, expand
from tele_jax.selection.settings import SourceConfig

CHUNK = 2048  # samples


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive lines of one file.

    Attributes:
      number: place among all chunks.
      first: number of its first sample.
      count: samples, unreadable ones among them.
      offset, line: byte and number of its first line.
    """

    number: int
    source: str
    path: str
    first: int
    count: int
    offset: int
    line: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dialogue of the pool.

    Attributes:
      id: number in the pool.
      line: number in its file, from 1.
      messages: None where the record is no dialogue.
      reason: why it is none.
    """

    id: int
    line: int
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
            digest, found = _chunks(name, path, first, len(chunks))
            chunks += found
            files[path] = [os.path.getsize(path), digest]
    if not chunks:
        raise UserError(f"sources: no sample in {', '.join(files)}")
    return Pool(tuple(chunks), files)


def _chunks(source: str, path: str, first: int, number: int) -> tuple[str, list[Chunk]]:
    found: list[Chunk] = []
    digest, count = hashlib.sha256(), 0
    with documents.open_text(path) as file:
        begin = start = file.tell()
        begin_line = 1
        for line_number, line in enumerate(file, start=1):
            digest.update(line)
            start += len(line)
            count += bool(line.strip())
            if count == CHUNK:
                found.append(Chunk(number + len(found), source, path, first, count, begin, begin_line))
                first, count, begin, begin_line = first + count, 0, start, line_number + 1
    if count:
        found.append(Chunk(number + len(found), source, path, first, count, begin, begin_line))
    return digest.hexdigest(), found


def read(chunk: Chunk, source: SourceConfig) -> Iterator[Sample]:
    """Yields the samples of a chunk, unreadable ones as well.

    Raises:
      UserError: the file is gone, or ends before the chunk does.
    """
    count, offset = 0, chunk.offset
    with documents.open_text(chunk.path) as file:
        file.seek(chunk.offset)
        for number, line in enumerate(file, start=chunk.line):
            if line.strip():
                yield _sample(chunk, source, chunk.first + count, number, offset, line)
                count += 1
            offset += len(line)
            if count == chunk.count:
                return
    raise UserError(f"{chunk.path}: has changed since it was indexed; start again")


def _sample(chunk: Chunk, source: SourceConfig, number: int, line: int, offset: int, data: bytes) -> Sample:
    rejects: list[Table] = []
    category = source.category or chunk.source
    messages = documents.read_document(chunk.path, offset, data.rstrip(b"\r\n"), source.format, rejects.append)
    if messages is None:
        return Sample(number, line, category, None, rejects[0]["reason"])
    named = json.loads(data).get("category")
    if source.category is None and named is not None:
        if not isinstance(named, str) or not named.strip():
            return Sample(number, line, category, None, f"its category is {named!r}, not a name")
        category = named
    return Sample(number, line, category, messages)
