"""Documents in text files: reading them, cutting long ones, and recording those that cannot be used.

The formats are all UTF-8: `text` (a file is one document), `jsonl` (a line is {"text": ...}) and those of dialogues
(dialogue_formats.py), where a line, or an element of a file that is one JSON array, is a dialogue. The live feed and
caches read documents by the functions here, and so reject the same ones for the same reasons.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from tele_jax.data.dialogue_formats import DIALOGUES, from_record
from tele_jax.data.messages import Message
from tele_jax.errors import UserError
from tele_jax.files import Table, require_regular, write_file
from tele_jax.settings import DEFAULT_DIALOGUES, DialogueConfig

Format = Literal[
    "text", "jsonl", "dialogues", "messages", "sharegpt", "alpaca", "telechat", "telechat2", "pairs", "prompts"
]
AnyFormat = Format | Literal["task"]
WHOLE = 1 << 62  # larger than any document: no cutting
BLOCK_BYTES = 1 << 20  # of a text file that are read at a time

# A document that cannot be used: {"file", "byte" where its record or this stretch of its text begins, "reason",
# "sample" of its first bytes}, and "line" where it is known, or "element" of an array. For an example of a seqio Task:
# {"task", "split", "shard", "example", "reason", "sample"}.
Reject = Table
Content = str | Sequence[Message] | Mapping[str, np.ndarray]
EMPTY = "the text is empty"  # reason of a Reject
KEPT = 10_000  # rejects of a domain that are kept in memory; the others are counted


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, or a part of one.

    Attributes:
      content: a text, the messages of a dialogue, or the features of an example of a seqio Task.
      begins, ends: whether the document begins and ends with this part.
    """

    content: Content
    begins: bool = True
    ends: bool = True


class Documents(Protocol):
    """The documents of a domain, encoded: files (CorpusDocuments) or a seqio Task (task_documents.TaskDocuments).

    Attributes:
      where: names the domain in messages.
      format: format of the files, or "task".
      checksum: names everything that is read.
      cut: bytes at which long documents are cut into several, or tokens at which dialogues are split; 0 where none is.
      rejected: the first documents that cannot be used.
      num_rejected: number of documents that cannot be used.
    """

    where: str
    format: str
    checksum: str
    cut: int
    rejected: Sequence[Reject]
    num_rejected: int

    def __len__(self) -> int:
        """Number of documents in an epoch; a document that is cut counts as several."""
        ...

    def account(self) -> str:
        """Says in a line how many documents were rejected, and why the first."""
        ...

    def notes(self) -> list[str]:
        """Says in lines what became of dialogues that are longer than a row."""
        ...

    def example(self, i: int) -> np.ndarray:
        """Reads document `i` as int32 [3, n] (encode.COLUMNS)."""
        ...

    def in_order(self, bytes_left: Callable[[], int]) -> Iterator[tuple[np.ndarray, bool]]:
        """Reads all documents in order as (int32 [3, n], whether a text begins with them).

        A text that is longer than `bytes_left()` is cut there, at a character, and then has no end.
        """
        ...


class Rejects:
    """A count of the rejected documents, and the first KEPT of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Reject] = []

    def add(self, reject: Reject) -> None:
        """Counts a rejected document."""
        self.count += 1
        if self.count <= KEPT:
            self.first.append(reject)


def digest(data: bytes, format: AnyFormat) -> int:
    """Returns 64 bits that name a record; what ends a line does not count."""
    data = data if format == "text" else data.rstrip(b"\r\n")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


_PACKED = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "zip": rb"PK\x03\x04",
}


@contextlib.contextmanager
def open_text(path: str) -> Iterator[BinaryIO]:
    """Opens a file of text behind its byte order mark, if it has one.

    Raises:
      UserError: there is no such file, or it is empty or compressed: text is read at any byte of a file.
    """
    require_regular(path)
    with open(path, "rb") as file:
        start = file.read(10)
        if start in (b"", codecs.BOM_UTF8):
            raise UserError(f"{path}: the file is empty")
        for name, magic in _PACKED.items():
            if re.match(magic, start):
                raise UserError(
                    f"{path}: is compressed ({name}), and text is read at any byte of a file; unpack it, or have tele "
                    "data clean write it with output.compression='none'"
                )
        file.seek(text_begin(file))
        yield file


def text_begin(file: BinaryIO) -> int:
    """Returns where the text of a file begins: after its byte order mark, if it has one."""
    file.seek(0)
    return len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def stretches(
    file: BinaryIO, sizes: Sequence[int], seen: Callable[[bytes], None]
) -> Iterator[tuple[int, int, bytes, bool]]:
    """Reads a text file once, cut for each of several sizes: (size, offset, bytes, whether the file ends with them).

    Args:
      file: open at the first byte of its text.
      sizes: the most bytes of a stretch.
      seen: is given all bytes once, in order.
    """
    offsets, waiting = dict.fromkeys(sizes, file.tell()), {size: bytearray() for size in sizes}
    while True:
        block = file.read(BLOCK_BYTES)
        seen(block)
        for size, rest in waiting.items():
            rest += block
            while len(rest) > size or (rest and not block):
                last = len(rest) <= size
                data = bytes(rest) if last else bytes(rest[: cut_bytes(rest[:size])])
                del rest[: len(data)]
                yield size, offsets[size], data, last
                offsets[size] += len(data)
        if not block:
            return


# A string, or what opens, closes or divides what JSON is made of.
_JSON = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)


def is_array(file: BinaryIO, format: AnyFormat) -> bool:
    """Tells whether a file of records, open where its text begins, is one JSON array; reads its first bytes."""
    begin = file.tell()
    may_be = format not in ("text", "jsonl")
    first = next((c for c in iter(lambda: file.read(1), b"") if not c.isspace()), b"") if may_be else b""
    file.seek(begin)
    return first == b"["


def records(file: BinaryIO, format: AnyFormat, seen: Callable[[bytes], None]) -> Iterator[tuple[int, bytes, Table]]:
    """Reads a file of records: (offset, bytes, {"line": number}, or {"element": number} of an array) of each.

    What stands after the end of an array, or before a missing end, is one more element, which is not JSON.

    Args:
      file: open where its text begins.
      format: format of the file, not text.
      seen: is given all bytes once, in order.
    """
    if not is_array(file, format):
        for line, data in enumerate(iter(file.readline, b""), start=1):
            seen(data)
            if data.strip():
                yield file.tell() - len(data), data, {"line": line}
        return
    begin = file.tell()
    for block in iter(lambda: file.read(BLOCK_BYTES), b""):
        seen(block)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        number, depth, start = 0, 0, begin
        for token in _JSON.finditer(data, begin):
            kind = data[token.start() : token.start() + 1]
            depth += (kind in b"[{") - (kind in b"]}")
            if kind == b"[" and start == begin:
                start = token.end()
            elif (kind == b"," and depth == 1) or depth == 0:
                found = data[start : token.start()]
                if found.strip() or kind == b",":
                    number += 1
                    yield start + len(found) - len(found.lstrip()), found.strip(), {"element": number}
                start = token.end()
            if depth == 0:
                break
        if depth or data[start:].strip():
            start = max(start - 1, begin)  # with what ended the last element, so that it is no JSON
            yield start, data[start:], {"element": number + 1}


def read_document(
    path: str,
    offset: int,
    data: bytes,
    format: AnyFormat | Callable[[str], Any],
    reject: Callable[[Reject], None],
    at: Mapping[str, int] = MappingProxyType({}),
    keys: Sequence[str] = ("text",),
    how: DialogueConfig = DEFAULT_DIALOGUES,
) -> Any:
    """Returns the text of a document, or the messages of a dialogue; None where it cannot be used.

    Args:
      path, offset: file and byte where the document begins.
      data: a line; for the format text a stretch of the file that ends with a character.
      format: format of the file, or what reads a text and raises UserError where it cannot be used.
      reject: is given the entry of a document that cannot be used.
      at: {"line": number} or {"element": number}, where it is known.
      keys: names that the text of a JSON line may have.
      how: how dialogues are read.
    """
    try:
        text = data.decode("utf-8")
        if callable(format):
            return format(text)
        return text if format == "text" else check_record(text, format, keys, how)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x})"
    except UserError as error:
        reason = str(error)
    sample = data[:200].decode(errors="backslashreplace")
    file = os.fsencode(path).decode(errors="backslashreplace")  # a name may be what no file of text can hold
    reject({"file": file, "byte": offset, "reason": reason, "sample": sample, **at})
    return None


def write_rejected(path: Path, rejected: Sequence[Reject]) -> None:
    """Writes a file of rejects atomically, one a line; removes the file where there are none."""
    if not rejected:
        path.unlink(missing_ok=True)
        return
    write_file(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected))


def account(where: str, used: int, count: int, first: str | None) -> str:
    """Says in a line how many documents were rejected, and why the first.

    Args:
      where: names the domain.
      used, count: number of documents that are used, and that are not.
      first: what `place` says of the first document that is not used.
    """
    first = f"; the first is {first}" if first else ""
    return f"{where}: {count:,} of {count + used:,} documents cannot be used{first}"


def place(reject: Reject) -> str:
    """Says where a rejected document is, and why it cannot be used."""
    if "task" in reject:
        return f"task {reject['task']}, split {reject['split']}, example {reject['example']}: {reject['reason']}"
    where = next(f"{unit} {reject[unit]}" for unit in ("line", "element", "byte") if unit in reject)
    return f"{reject['file']}, {where}: {reject['reason']}"


def nothing_usable(where: str, first: str | None) -> UserError:
    """Returns the error of a domain without a usable document; first: what `place` says of a rejected one."""
    why = f"the first is {first}" if first else "its files hold nothing but blank lines"
    return UserError(f"{where}: not one document can be used; {why}")


def nothing_fits(where: str, seq_len: int) -> UserError:
    """Returns the error of a domain of dialogues of which nothing fits a row of `seq_len` tokens."""
    return UserError(
        f"{where}: not one dialogue is left, all are longer than a row of seq_len={seq_len} tokens; give longer rows, "
        "or another data.dialogues.too_long"
    )


def too_long_notes(where: str, *, split: int, shortened: int, dropped: int) -> list[str]:
    """Says in lines what became of dialogues that are longer than a row."""
    said = {
        "were split at turns": split,
        "were cut to fit": shortened,
        "were left out": dropped,
    }
    return [f"{where}: {n:,} dialogues were longer than a row and {what}" for what, n in said.items() if n]


def check_rejected(where: str, used: int, count: int, first: str | None, most: float) -> None:
    """Raises UserError where more than the share `most` of the dialogues of a domain cannot be used; see `account`."""
    if count > most * (used + count):
        told = account(where, used, count, first)
        raise UserError(f"{told}; data.dialogues.max_rejected={most:g} is the largest share that is taken")


def parse_record(record: str) -> Any:
    """Returns the value of a JSON record; UserError where it is not JSON."""
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None


def check_record(
    record: str, format: AnyFormat, keys: Sequence[str] = ("text",), how: DialogueConfig = DEFAULT_DIALOGUES
) -> Any:
    """Returns the text of a JSON record, under the first of `keys` that it has, or the messages of a dialogue.

    Raises:
      UserError: the record is not of the format; the message says why, and the caller adds where.
    """
    value = parse_record(record)
    if format in DIALOGUES:
        value = from_record(value, format, how)
    elif not isinstance(value, dict) or not (found := [key for key in keys if key in value]):
        named = " or ".join(f'"{key}"' for key in keys)
        raise UserError(f"not a table with the key {named}, as the format {format} asks for")
    elif not isinstance(value := value[found[0]], str):
        raise UserError(f'"{found[0]}" is not a string')
    elif not value:
        raise UserError(EMPTY)
    if "\\u" in record:  # JSON can spell half a surrogate pair, UTF-8 cannot
        try:
            text_of(value).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start} of the text is half a surrogate pair") from None
    return value


def text_of(value: Any) -> str:
    """Returns a text, or the messages of a dialogue joined, whose size alone matters."""
    return value if isinstance(value, str) else "".join(message["content"] for message in value)


def cut_bytes(data: bytes | bytearray) -> int:
    """Returns where to cut `data`: after the last line end of its second half, or else before a character."""
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
    """Returns (begin, end) of spans of about `span_bytes` that cover `text`; none for an empty text."""
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
