"""The text files of one domain: checked and indexed in one pass before anything is trained on them, then read anywhere.

Three formats: `text` (a file is one document), `jsonl` (a line is {"text": ...}) and `dialogues` (a line is
{"messages": [...]}, see dialogue.py). Everything is UTF-8. The pass reads every byte, so that what is bad is found at
the start of a run and not on its tenth day; for text it runs at about the speed of the disk.

A document that cannot be used is left out and kept aside (Reject), here and in a cache (shards.py), by read_document.
"""

import codecs
import dataclasses
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from tele_jax.data import dialogue
from tele_jax.errors import UserError
from tele_jax.files import expand, require_regular

Format = Literal["text", "jsonl", "dialogues"]
WHOLE = 1 << 62  # larger than any document: no cutting

# A document that cannot be used: {"file", "byte" where its line or this stretch of its text begins, "reason", "sample"
# of its first bytes}, and "line" where it is known. An example of a seqio Task: {"task", "split", "shard", "example",
# "reason", "sample"}.
Reject = dict[str, Any]
EMPTY = "the text is empty"  # the reason of one of them
KEPT = 10_000  # so many of a domain are kept in memory, and counted beyond: every line of a large corpus may be bad


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The index of one domain: N spans of text. A span is a whole document, or a part of one that is very long.

    Attributes:
      name: of the domain.
      where: the page names its files, for messages: "sources.code.files".
      format: of the files.
      files: paths, sorted.
      file: int32 [N], which file a span is in.
      offset, length: int64 [N], bytes of its record (text: of itself) in the file.
      begin, end: int64 [N], characters of the record's text (jsonl only).
      last: bool [N], whether the document ends with this span.
      num_bytes: int64 [N], UTF-8 bytes of text in the span.
      crc32: uint32 [N], of the bytes of its record: what is read later is known to be what was indexed.
      checksum: BLAKE2 of all files in order and of their sizes, hexadecimal; of what was rejected too.
      rejected: the first KEPT of the documents that cannot be used, in order.
      num_rejected: how many there are.
    """

    name: str
    where: str
    format: Format
    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    last: np.ndarray
    num_bytes: np.ndarray
    crc32: np.ndarray
    checksum: str
    rejected: tuple[Reject, ...]
    num_rejected: int

    def __len__(self) -> int:
        return len(self.file)

    def account(self) -> str:
        """How many of the documents were rejected, and why the first: a line for whoever trains on the rest."""
        return account(self.where, int(self.last.sum()), self.num_rejected, self.rejected)

    def text(self, i: int) -> str:
        """The text of span `i` (formats text and jsonl)."""
        record = self._record(i)
        if self.format == "text":
            return record
        return json.loads(record)["text"][self.begin[i] : self.end[i]]

    def messages(self, i: int) -> list[dialogue.Message]:
        """The messages of dialogue `i` (format dialogues)."""
        return dialogue.from_record(json.loads(self._record(i)))

    def line(self, i: int) -> bytes:
        """The bytes of the line that span `i` is of, without what ends it."""
        return self._record(i).encode().rstrip(b"\r\n")

    def _record(self, i: int) -> str:
        path = self.files[self.file[i]]
        try:
            with open(path, "rb") as file:
                file.seek(self.offset[i])
                data = file.read(self.length[i])
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; the file was there when this run began to read it") from None
        if zlib.crc32(data) != self.crc32[i]:
            raise UserError(
                f"{path}: has changed since this run began to read it (byte {self.offset[i]:,}); put the file back as "
                "it was, or start anew in another work directory"
            )
        return data.decode("utf-8")


_PACKED = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "zip": rb"PK\x03\x04",
}


def check_plain(path: str) -> None:
    """Raises UserError where a file is none, empty or compressed: text is read at any byte of it."""
    require_regular(path)
    with open(path, "rb") as file:
        start = file.read(10)
    if start in (b"", codecs.BOM_UTF8):
        raise UserError(f"{path}: the file is empty")
    for name, magic in _PACKED.items():
        if re.match(magic, start):
            raise UserError(
                f"{path}: is compressed ({name}), and text is read at any byte of a file; unpack it, or have tele data "
                "clean write it with output.compression='none'"
            )


def index(where: str, name: str, patterns: Sequence[str], format: Format, *, span_bytes: int = WHOLE) -> Corpus:
    """Checks all files of a domain and finds the documents in them; those that cannot be used are kept aside.

    A text file is one document: with one byte that is not UTF-8, nothing of it is used.

    Args:
      where: the patterns were found, for messages: "sources.code.files".
      name: of the domain.
      patterns: glob patterns.
      format: of every file.
      span_bytes: a document of more UTF-8 bytes is cut into spans of about so many, after a line end where there is
        one. Dialogues are never cut.

    Raises:
      UserError: a pattern that matches nothing, a file that is empty or compressed, not one document that can be used
        (with the place of the first, and why).
    """
    files = expand(patterns, where)
    spans: list[tuple[int, ...]] = []
    rejected = Rejects()
    checksum = hashlib.blake2b(digest_size=16)
    for number, path in enumerate(files):
        check_plain(path)
        used, bad = len(spans), rejected.count
        scan = _scan_text if format == "text" else _scan_lines
        size = 0
        with open(path, "rb") as file:
            for span, data in scan(path, file, format, span_bytes, rejected.add):
                checksum.update(data)
                size += len(data)
                if span is not None:
                    spans.append((number, *span))
        checksum.update(size.to_bytes(8, "little"))  # where one file ends and the next begins
        if format == "text" and rejected.count > bad:
            del spans[used:]
    if not spans:
        raise nothing_usable(where, place(rejected.first[0]) if rejected.count else None)
    columns = [np.array(column) for column in zip(*spans, strict=True)]
    file, offset, length, begin, end, last, num_bytes, crc32 = columns
    return Corpus(
        name=name,
        where=where,
        format=format,
        files=files,
        file=file.astype(np.int32),
        offset=offset,
        length=length,
        begin=begin,
        end=end,
        last=last,
        num_bytes=num_bytes,
        crc32=crc32.astype(np.uint32),
        checksum=checksum.hexdigest(),
        rejected=tuple(rejected.first),
        num_rejected=rejected.count,
    )


class Indexes:
    """Makes each index once: stages of a run that read the same files share it. Called as `index` is."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns what `make` gave when it was first called for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def __call__(
        self, where: str, name: str, patterns: Sequence[str], format: Format, *, span_bytes: int = WHOLE
    ) -> Corpus:
        stats = [(path, os.stat(path)) for path in expand(patterns, where)]
        known = tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats)
        key = (known, format, span_bytes)
        made = self.once(key, lambda: index(where, name, patterns, format, span_bytes=span_bytes))
        return dataclasses.replace(made, where=where, name=name)


class Rejects:
    """A count of the rejected documents, and the first KEPT of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Reject] = []

    def add(self, reject: Reject) -> None:
        self.count += 1
        if self.count <= KEPT:
            self.first.append(reject)


_Span = tuple[int, int, int, int, bool, int, int]  # offset, length, begin, end, last, num_bytes, crc32


def _scan_text(
    path: str, file: Any, format: Format, span_bytes: int, reject: Callable[[Reject], None]
) -> Iterator[tuple[_Span | None, bytes]]:
    size = os.fstat(file.fileno()).st_size
    offset = begin_of(file)
    good = True
    while offset < size:
        file.seek(offset)
        data = file.read(min(span_bytes, size - offset))
        last = offset + len(data) >= size
        if not last:
            data = data[: cut_bytes(data)]
        good = good and read_document(path, offset, data, format, reject) is not None
        yield (offset, len(data), 0, 0, last, len(data), zlib.crc32(data)) if good else None, data
        offset += len(data)


def _scan_lines(
    path: str, file: Any, format: Format, span_bytes: int, reject: Callable[[Reject], None]
) -> Iterator[tuple[_Span | None, bytes]]:
    offset = begin_of(file)
    for line, data in enumerate(file, start=1):
        # What comes after the first span of a line belongs to data that was given out already.
        fresh = data
        if data.strip():
            text = text_of(read_document(path, offset, data, format, reject, line) or "")
            crc32 = zlib.crc32(data)
            for begin, end in cut_text(text, span_bytes if format == "jsonl" else WHOLE):
                num_bytes = len(text[begin:end].encode())
                yield (offset, len(data), begin, end, end == len(text), num_bytes, crc32), fresh
                fresh = b""
        if fresh:
            yield None, fresh
        offset += len(data)


def begin_of(file: Any) -> int:
    """Where the text of a file begins, and the file's position from then on: after a byte order mark, if it has one."""
    begin = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    file.seek(begin)
    return begin


def read_document(
    path: str, offset: int, data: bytes, format: Format, reject: Callable[[Reject], None], line: int | None = None
) -> Any:
    """The text in the bytes of a document, or its messages; None where it cannot be used, which `reject` is then told.

    Args:
      path, offset: where the bytes begin.
      data: a line; of a text file all, or a stretch that ends with a character.
      format: of the file.
      reject: is given an entry.
      line: the number of the line, where it is known.
    """
    try:
        text = data.decode("utf-8")
        return text if format == "text" else check_record(text, format)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x})"
    except UserError as error:
        reason = str(error)
    sample = data[:200].decode(errors="backslashreplace")
    file = os.fsencode(path).decode(errors="backslashreplace")  # a name may be what no file of text can hold
    entry = {"file": file, "byte": offset, "reason": reason, "sample": sample}
    reject(entry if line is None else entry | {"line": line})
    return None


def account(where: str, used: int, count: int, rejected: Sequence[Reject]) -> str:
    """Says how many documents were rejected, and why the first: a line for whoever trains on the rest.

    Args:
      where: the page names them.
      used, count: number of documents that are used, and that are not.
      rejected: the first of those.
    """
    first = f"; the first is {place(rejected[0])}" if count else ""
    return f"{where}: {count:,} of {count + used:,} documents cannot be used{first}"


def place(reject: Reject) -> str:
    """Where a document that cannot be used is, and why it cannot."""
    if "task" in reject:
        return f"task {reject['task']}, split {reject['split']}, example {reject['example']}: {reject['reason']}"
    where = f"line {reject['line']}" if "line" in reject else f"byte {reject['byte']}"
    return f"{reject['file']}, {where}: {reject['reason']}"


def nothing_usable(where: str, first: str | None) -> UserError:
    """The error of a domain without a single usable document; first: what `place` says of a rejected one."""
    why = f"the first is {first}" if first else "its files hold nothing but blank lines"
    return UserError(f"{where}: not one document can be used; {why}")


def check_record(record: str, format: Format) -> Any:
    """The text of a JSON line, or its messages if it is a dialogue.

    Raises:
      UserError: it is not of the format; says why, and leaves it to the caller to say where.
    """
    try:
        value = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if format == "dialogues":
        value = dialogue.from_record(value)
    elif not isinstance(value, dict) or "text" not in value:
        raise UserError(f'not a table with the key "text", as the format {format} asks for')
    elif not isinstance(value := value["text"], str):
        raise UserError('"text" is not a string')
    elif not value:
        raise UserError(EMPTY)
    if "\\u" in record:  # JSON can spell half a surrogate pair, UTF-8 cannot
        try:
            text_of(value).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start} of the text is half a surrogate pair") from None
    return value


def text_of(value: Any) -> str:
    """The text of what check_record gives: for a dialogue all of its messages joined (only their size matters)."""
    return value if isinstance(value, str) else "".join(message["content"] for message in value)


def cut_bytes(data: bytes) -> int:
    """Where to cut `data`: after the last line end of its second half, or else before a character."""
    cut = data.rfind(b"\n", len(data) // 2) + 1
    if cut == 0:
        cut = len(data)
        while cut and data[cut - 1] & 0xC0 == 0x80:
            cut -= 1
        if cut and data[cut - 1] >= 0xC0:
            cut -= 1
        cut = cut or len(data)  # no character begins here: not UTF-8, which is for the decoder to say
    return cut


def cut_text(text: str, span_bytes: int) -> list[tuple[int, int]]:
    """(begin, end) of spans of about `span_bytes` that cover `text`; none for an empty text."""
    num_bytes = len(text.encode()) if len(text) * 4 > span_bytes else 0
    if num_bytes <= span_bytes:
        return [(0, len(text))] if text else []
    step = max(1, span_bytes * len(text) // num_bytes)
    spans, begin = [], 0
    while begin < len(text):
        end = min(begin + step, len(text))
        if end < len(text):
            newline = text.rfind("\n", begin + step // 2, end)
            end = newline + 1 if newline >= 0 else end
        spans.append((begin, end))
        begin = end
    return spans
