"""A document on its way through the stages, the ways it can leave, and the account that every stage keeps."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

SAMPLES = 3  # kept for every reason
SAMPLE_CHARS = 240
OFFSET_BITS = 40  # of a uid: bytes or records in a file; the rest counts files


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
      uid: file number << 40 | place in the file: unique, and in the order of the sources' ranks and names, then
        paths, then places. "First" always means the lowest uid.
      text: Unicode text; of the format html and warc the page's source until it is extracted.
      source: the page's name of the source.
      domain: which output it goes to.
      origin: path and place, for people.
      url: where the record names one.
      language: en, zh, code or other; None until it is known.
      html: whether `text` is a page's source.
    """

    uid: int
    text: str
    source: str
    domain: str
    origin: str
    url: str | None = None
    language: str | None = None
    html: bool = False

    def replace(self, **changes: Any) -> "Document":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """Why a document leaves: a short reason that is counted, and what exactly was found."""

    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """What could not become a document: the bytes are kept aside."""

    uid: int
    source: str
    origin: str
    reason: str  # "not UTF-8", "not JSON", "no text", "unreadable"
    detail: str
    data: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive documents of one file: what Beam moves. `key` is the uid of the first that was read."""

    key: int
    documents: tuple[Document, ...]


def num_bytes(text: str) -> int:
    """UTF-8 bytes. A lone surrogate, which JSON can spell, counts three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def batches(documents: Iterable[Document | Reject], max_documents: int, max_chars: int) -> Iterator[Batch | Reject]:
    """Groups documents as they come; rejects pass."""
    held: list[Document] = []
    chars = 0
    for item in documents:
        if isinstance(item, Reject):
            yield item
            continue
        held.append(item)
        chars += len(item.text)
        if len(held) >= max_documents or chars >= max_chars:
            yield Batch(held[0].uid, tuple(held))
            held, chars = [], 0
    if held:
        yield Batch(held[0].uid, tuple(held))


def _sample_order(uid: int) -> bytes:
    return hashlib.blake2b(uid.to_bytes(16, "big"), digest_size=8).digest()


_Sample = tuple[bytes, str, str, str]


@dataclasses.dataclass
class Count:
    """How many documents and bytes; samples are (order, origin, detail, text), those of the lowest order of all."""

    documents: int = 0
    bytes: int = 0
    samples: list[_Sample] = dataclasses.field(default_factory=list)

    def add(self, document: Document, size: int, detail: str, *, sample: str | None) -> None:
        """Counts one document of `size` bytes; `sample` is the text to show, None for none."""
        self.documents += 1
        self.bytes += size
        if sample is not None:
            order = _sample_order(document.uid)
            if len(self.samples) < SAMPLES or order < self.samples[-1][0]:
                self.samples.append((order, document.origin, detail, sample[:SAMPLE_CHARS]))
                self._trim()

    def merge(self, other: "Count") -> None:
        """Adds another's figures; the result does not depend on the order of merges."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.samples = [*self.samples, *other.samples]
        self._trim()

    def _trim(self) -> None:
        self.samples.sort()
        del self.samples[SAMPLES:]


# What happened: "in" and "out" (reason: ""), "drop" and "change" (reason: why).
Key = tuple[str, str, str, str]  # stage, source, what, reason


class Tally:
    """The account of one or more stages: counts by (stage, source, what, reason)."""

    def __init__(self):
        self.counts: dict[Key, Count] = {}

    def add(self, key: Key, document: Document, detail: str = "", *, text: str | None = None, size: int | None = None):
        """Counts a document under a key, with a sample where something happened to it."""
        size = num_bytes(document.text) if size is None else size
        sample = (document.text if text is None else text) if key[2] in ("drop", "change") else None
        self.counts.setdefault(key, Count()).add(document, size, detail, sample=sample)

    def merge(self, other: "Tally") -> "Tally":
        """Adds another's counts to this one's."""
        for key, count in other.counts.items():
            self.counts.setdefault(key, Count()).merge(count)
        return self
