"""Indexes of text files: every byte is read and checked once before training, and documents are then read at random.

`Indexes` shares indexes among the stages of a run and keeps them on disk. A kept index stands for its files as long as
the path, size, modification time and inode of each are unchanged; otherwise they are read again. Every document that
is read later is compared with the digest in its index: text that changed unnoticed ends the run, and two versions are
never mixed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tele_jax.data import documents
from tele_jax.data.dialogue_formats import DIALOGUES, from_record
from tele_jax.data.documents import (
    WHOLE,
    Document,
    Format,
    Reject,
    Rejects,
    cut_text,
    digest,
    nothing_usable,
    open_text,
    place,
    read_document,
    records,
    stretches,
    text_of,
)
from tele_jax.errors import UserError
from tele_jax.files import PathLike, expand, replacing
from tele_jax.settings import DEFAULT_DIALOGUES, DialogueConfig

# A long document is cut into spans of max(SPAN_BYTES, SPAN_BYTES_PER_TOKEN * seq_len) bytes, about eight rows of
# English: short enough to bound how many rows of one document follow each other, and long enough that few rows begin
# inside a document.
SPAN_BYTES = 16_384
SPAN_BYTES_PER_TOKEN = 32

INDEX_VERSION = 2  # of the files that Indexes keeps
# A span is a whole document, or a part of a very long one.
SPAN = np.dtype(
    [
        ("file", "<i4"),  # number of its file
        ("offset", "<i8"),  # of its record (a line or element; for text the span itself) in the file
        ("length", "<i8"),  # bytes of its record
        ("begin", "<i8"),  # characters of the record's text (jsonl)
        ("end", "<i8"),
        ("last", "?"),  # the document ends with this span
        ("system", "?"),  # the dialogue has a system message
        ("messages", "<i4"),  # number of messages of a dialogue, else 0
        ("num_bytes", "<i8"),  # UTF-8 bytes of text
        ("digest", "<u8"),  # `digest` of its record
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The index of one domain: N spans of text.

    Attributes:
      name: name of the domain.
      where: names its files in messages: "sources.code.files".
      format: format of the files.
      files: paths, sorted.
      spans: SPAN [N].
      checksum: BLAKE2 of the bytes and sizes of all files in order, hexadecimal; rejected documents are included.
      rejected: the first KEPT of the documents that cannot be used, in order.
      num_rejected: number of documents that cannot be used.
      how: how dialogues are read.
    """

    name: str
    where: str
    format: Format
    files: tuple[str, ...]
    spans: np.ndarray
    checksum: str
    rejected: tuple[Reject, ...]
    num_rejected: int
    how: DialogueConfig = DEFAULT_DIALOGUES

    def __len__(self) -> int:
        return len(self.spans)

    def account(self) -> str:
        """Says in a line how many documents were rejected, and why the first."""
        return documents.account(*self._counted())

    def _counted(self) -> tuple[str, int, int, str | None]:
        first = next(map(documents.place, self.rejected), None)
        return self.where, int(self.spans["last"].sum()), self.num_rejected, first

    def check_rejected(self) -> None:
        """Raises UserError where a larger share of the dialogues cannot be used than `how` allows."""
        documents.check_rejected(*self._counted(), self.how.max_rejected)

    def document(self, i: int) -> Document:
        """Reads span `i`. UserError where the file has changed since it was indexed."""
        (found,) = self.documents([i])
        return found

    def documents(self, numbers: Iterable[int]) -> Iterator[Document]:
        """Reads spans in turn; a file stays open while the spans that follow are in it."""
        path, stack = "", contextlib.ExitStack()
        with stack:
            for i in numbers:
                span = self.spans[i]
                try:
                    if path != self.files[span["file"]]:
                        stack.close()
                        path = self.files[span["file"]]
                        file = stack.enter_context(open(path, "rb"))  # noqa: SIM115
                    file.seek(span["offset"])
                    data = file.read(span["length"])
                except OSError as error:
                    raise UserError(
                        f"{path}: {error.strerror}; the file was there when this run began to read it"
                    ) from None
                if digest(data, self.format) != span["digest"]:
                    raise UserError(
                        f"{path}: has changed since this run began to read it (byte {span['offset']:,}); put the file "
                        "back as it was, or start anew in another work directory"
                    )
                yield self._parsed(span, data.decode("utf-8"))

    def _parsed(self, span: np.void, record: str) -> Document:
        if self.format in DIALOGUES:
            return Document(from_record(json.loads(record), self.format, self.how))
        text = record if self.format == "text" else json.loads(record)["text"][span["begin"] : span["end"]]
        continues = span["begin"] > 0 or (self.format == "text" and span["offset"] > 0)
        return Document(text, begins=not continues, ends=bool(span["last"]))

    def line_digests(self) -> np.ndarray:
        """The digests of all records, uint64 [n]; none for the format text."""
        return self.spans["digest"][(self.spans["begin"] == 0) & (self.format != "text")]


def span_bytes_for(seq_len: int) -> int:
    """Returns the bytes at which long documents are cut for rows of `seq_len` tokens."""
    return max(SPAN_BYTES, SPAN_BYTES_PER_TOKEN * seq_len)


def expand_domain(patterns: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns the files of a domain, as files.expand, whose messages it ends with a hint."""
    return expand(patterns, where, hint="; rate=0 leaves the domain out" if where.endswith(".files") else "")


def index(
    where: str,
    name: str,
    patterns: Sequence[str],
    format: Format,
    *,
    span_bytes: int = WHOLE,
    how: DialogueConfig = DEFAULT_DIALOGUES,
) -> Corpus:
    """Reads and checks all files of a domain and finds the documents in them.

    A text file is one document: with one byte that is not UTF-8, nothing of it is used.

    Args:
      where: names the patterns in messages: "sources.code.files".
      name: name of the domain.
      patterns: glob patterns.
      format: format of every file.
      span_bytes: a document of more UTF-8 bytes is cut into spans of about this size, after a line end where there is
        one. Dialogues are never cut.
      how: how dialogues are read.

    Raises:
      UserError: a pattern that matches nothing; a file that is empty or compressed; not one document that can be used
        (with the place of the first, and why).
    """
    return _index(where, name, expand_domain(patterns, where), format, [span_bytes], how)[span_bytes]


def _index(
    where: str, name: str, files: tuple[str, ...], format: Format, sizes: Sequence[int], how: DialogueConfig
) -> dict[int, Corpus]:
    """Reads every file once and indexes it for every size of spans."""
    spans: dict[int, list[tuple]] = {size: [] for size in sizes}
    rejected = {size: Rejects() for size in sizes}
    checksum = hashlib.blake2b(digest_size=16)
    for number, path in enumerate(files):
        before = {size: (len(spans[size]), rejected[size].count) for size in sizes}
        with open_text(path) as file:
            begin = file.tell()
            scan = _scan_text if format == "text" else _scan_records
            for size, span in scan(path, file, format, rejected, checksum.update, how):
                spans[size].append((number, *span))
            checksum.update((file.tell() - begin).to_bytes(8, "little"))  # where a file ends and the next begins
        for size, (used, bad) in before.items():
            if format == "text" and rejected[size].count > bad:
                del spans[size][used:]
    made = {}
    for size in sizes:
        first, count = rejected[size].first, rejected[size].count
        if not spans[size]:
            raise nothing_usable(where, place(first[0]) if count else None)
        found = np.array(spans.pop(size), SPAN)
        made[size] = Corpus(name, where, format, files, found, checksum.hexdigest(), tuple(first), count, how)
    return made


_Found = Iterator[tuple[int, tuple]]  # (size, a SPAN without its file)


def _scan_text(
    path: str,
    file: BinaryIO,
    format: Format,
    rejected: dict[int, Rejects],
    seen: Callable[[bytes], None],
    how: DialogueConfig,
) -> _Found:
    for size, offset, data, last in stretches(file, list(rejected), seen):
        if read_document(path, offset, data, format, rejected[size].add) is not None:
            yield size, (offset, len(data), 0, 0, last, False, 0, len(data), digest(data, format))


def _scan_records(
    path: str,
    file: BinaryIO,
    format: Format,
    rejected: dict[int, Rejects],
    seen: Callable[[bytes], None],
    how: DialogueConfig,
) -> _Found:
    def reject(entry: Reject) -> None:
        for each in rejected.values():
            each.add(entry)

    for offset, data, at in records(file, format, seen):
        if (value := read_document(path, offset, data, format, reject, at, how=how)) is None:
            continue
        text, named = text_of(value), digest(data, format)
        messages = len(value) if format in DIALOGUES else 0
        system = messages > 0 and value[0]["role"] == "system"
        for size in rejected:
            for begin, end in cut_text(text, size if format == "jsonl" else WHOLE):
                num_bytes = len(text[begin:end].encode())
                yield size, (offset, len(data), begin, end, end == len(text), system, messages, num_bytes, named)


class Indexes:
    """Makes each index once, for all stages of a run, and keeps it on disk for the next start. Called as `index` is.

    Files are read once for all sizes of spans that `seq_lens` and the call ask for. Nothing is written before `keep_in`
    is called, so that a run which is refused leaves no trace.
    """

    def __init__(self, directory: PathLike | None = None, *, seq_lens: Iterable[int] = ()):
        """Reads nothing yet.

        Args:
          directory: where an earlier start kept indexes, e.g. W/indexes. None: nowhere.
          seq_lens: the row lengths of all stages.
        """
        self._directory = None if directory is None else Path(directory)
        self._sizes = {span_bytes_for(seq_len) for seq_len in seq_lens}
        self._made: dict[Any, Any] = {}
        self._unwritten: list[tuple[tuple, Corpus]] = []

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """Returns what `make` gave when it was first called for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def __call__(
        self,
        where: str,
        name: str,
        patterns: Sequence[str],
        format: Format,
        *,
        span_bytes: int = WHOLE,
        how: DialogueConfig = DEFAULT_DIALOGUES,
    ) -> Corpus:
        files = expand_domain(patterns, where)
        span_bytes = WHOLE if format in DIALOGUES else span_bytes
        stamps, read = _stamps(files), (how.learned, how.system) if format in DIALOGUES else ()
        key = (stamps, format, span_bytes, read)
        if key not in self._made and (kept := self._kept(key, files)) is not None:
            self._made[key] = kept
        if key not in self._made:
            sizes = {span_bytes} if format in DIALOGUES else {span_bytes, *self._sizes}
            for size, made in _index(where, name, files, format, sorted(sizes), how).items():
                self._made[stamps, format, size, read] = made
                if stamps == _stamps(files):  # no file changed meanwhile
                    self._unwritten.append(((stamps, format, size, read), made))
        return dataclasses.replace(self._made[key], where=where, name=name, how=how)

    def _file(self, key: tuple) -> Path:
        """The file of an index, named by the paths of its text; what it holds says of which version of them it is."""
        stamps, format, span_bytes, read = key
        named = json.dumps([INDEX_VERSION, format, span_bytes, read, [path for path, *_ in stamps]])
        return (self._directory or Path()) / f"{hashlib.blake2b(named.encode(), digest_size=16).hexdigest()}.npz"

    def _kept(self, key: tuple, files: tuple[str, ...]) -> Corpus | None:
        """Reads a kept index; None where there is none, or the text has changed."""
        if self._directory is None:
            return None
        try:
            with np.load(self._file(key), allow_pickle=False) as arrays:  # checks its CRC-32
                spans, about = arrays["spans"], json.loads(arrays["about"].tobytes())
        except Exception:  # zipfile, zlib and numpy raise a dozen unrelated types for damage; the text is read instead
            return None
        fields = {"stamps": list, "checksum": str, "rejected": list, "num_rejected": int}
        typed = isinstance(about, dict) and {name: type(value) for name, value in about.items()} == fields
        if not typed or about.pop("stamps") != [list(stamp) for stamp in key[0]] or not _are_sound(spans, key[0]):
            return None
        rejected = tuple(about.pop("rejected"))
        if not all(isinstance(reject, dict) for reject in rejected) or about["num_rejected"] < len(rejected):
            return None
        return Corpus(name="", where="", format=key[1], files=files, spans=spans, rejected=rejected, **about)

    def keep_in(self, directory: PathLike) -> None:
        """Writes the indexes made so far, each atomically, unless the disk does not allow it: they only save time."""
        self._directory = Path(directory)
        unwritten, self._unwritten = self._unwritten, []
        with contextlib.suppress(OSError):
            if unwritten:
                self._directory.mkdir(parents=True, exist_ok=True)
            for key, made in unwritten:
                about = {"stamps": key[0], "checksum": made.checksum}
                about |= {"rejected": made.rejected, "num_rejected": made.num_rejected}
                with replacing(self._file(key)) as temporary, temporary.open("wb") as file:
                    np.savez(file, spans=made.spans, about=np.frombuffer(json.dumps(about).encode(), np.uint8))


def _are_sound(spans: np.ndarray, stamps: tuple[tuple[str, int, int, int], ...]) -> bool:
    """Tells whether spans can be those of files with these stamps: in order, inside them, each with some text."""
    if spans.dtype != SPAN or spans.ndim != 1 or not len(spans):
        return False
    sizes, file = np.array([size for _, size, *_ in stamps]), spans["file"]
    if file.min() < 0 or file.max() >= len(sizes):
        return False
    offset, length, begin, end = (spans[name] for name in ("offset", "length", "begin", "end"))
    inside = (offset >= 0) & (length > 0) & (length <= sizes[file]) & (offset <= sizes[file] - length)
    text = (begin >= 0) & (begin <= end) & (end <= length) & (spans["num_bytes"] > 0)
    # A span follows the record of the one before, or is a later part of the same record.
    same, next_file = (file[1:] == file[:-1]), (file[1:] > file[:-1])
    later = (offset[1:] >= offset[:-1] + length[:-1]) | ((offset[1:] == offset[:-1]) & (begin[1:] == end[:-1]))
    text &= spans["messages"] >= 0
    return bool((inside & text).all() and (next_file | (same & later)).all() and spans["last"][-1])


def _stamps(files: Sequence[str]) -> tuple[tuple[str, int, int, int], ...]:
    """(path, size, modification time in ns, inode) of every file."""
    stats = [(os.path.abspath(path), os.stat(path)) for path in files]
    return tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats)
