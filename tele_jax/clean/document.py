"""A document on its way through the stages, the ways it can leave, and the account that every stage keeps."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

SAMPLES = 3  # kept for every reason
SAMPLE_CHARS = 240
OFFSET_BITS = 40  # of a uid: bytes or records in a file; the rest counts files


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A document and where it comes from.

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

    def replace(self, **changes: object) -> "Document":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """The reason for which a document leaves: short, for counting, and the detail of what was found."""

    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """A record that could not become a document; its bytes are written to rejects/."""

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


_Sample = tuple[bytes, str, str, str]


@dataclasses.dataclass
class Count:
    """A number of documents and bytes, and samples (order, origin, detail, text): those of the lowest order of all."""

    documents: int = 0
    bytes: int = 0
    samples: list[_Sample] = dataclasses.field(default_factory=list)

    def add(self, documents: int, num_bytes: int, samples: Iterable[_Sample]) -> None:
        """Adds figures; the result does not depend on the order of calls."""
        self.documents += documents
        self.bytes += num_bytes
        self.samples = sorted([*self.samples, *samples])[:SAMPLES]


# What happened: "in" and "out" (reason: ""), "drop" and "change" (reason: why).
Key = tuple[str, str, str, str]  # stage, source, what, reason


class Tally:
    """The account of one or more stages: counts by (stage, source, what, reason)."""

    def __init__(self):
        self.counts: dict[Key, Count] = {}

    def add(self, key: Key, document: Document, detail: str = "", *, text: str | None = None, size: int | None = None):
        """Counts a document under a key, with a sample where something happened to it."""
        size = num_bytes(document.text) if size is None else size
        samples = []
        if key[2] in ("drop", "change"):
            order = hashlib.blake2b(document.uid.to_bytes(16, "big"), digest_size=8).digest()
            shown = (document.text if text is None else text)[:SAMPLE_CHARS]
            samples.append((order, document.origin, detail, shown))
        self.counts.setdefault(key, Count()).add(1, size, samples)

    def merge(self, other: "Tally") -> None:
        """Adds another's counts to this one's."""
        for key, count in other.counts.items():
            self.counts.setdefault(key, Count()).add(count.documents, count.bytes, count.samples)
