"""The dialogues of several domains shuffled together, each so often in an epoch as its domain says (`copies`)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tele_jax.data import order, packing
from tele_jax.data.documents import Documents, Reject


class ShuffledDomains:
    """Several domains as one: documents.Documents.

    An epoch has every document of a domain floor(copies) times, and a fixed share of them, the fraction of copies, once
    more. That share is chosen by a hash of the domain's name.

    Attributes:
      name: the names of the domains, joined.
    """

    format = "dialogues"
    cut = 0
    where = "sources"

    def __init__(self, domains: Mapping[str, Documents], copies: Mapping[str, float]):
        """copies: above 0, by name of the domain."""
        self.name = " + ".join(domains)
        self.rejected: Sequence[Reject] = ()  # every domain tells of its own
        self.num_rejected = 0
        self._domains = list(domains.values())
        counts = [round(copies[name] * len(documents)) for name, documents in domains.items()]
        self._ends = np.cumsum(counts)
        extra = zip(domains.items(), counts, strict=True)
        self._extra = [_chosen(name, len(documents), count % len(documents)) for (name, documents), count in extra]
        named = "".join(f"{name}\n{each.checksum}\n{each.format}\n{copies[name]!r}\n" for name, each in domains.items())
        self.checksum = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, i: int) -> tuple[int, int]:
        """Returns (number of the domain, number of the document in it) of document `i` of an epoch."""
        domain = int(np.searchsorted(self._ends, i, side="right"))
        number = i - int(self._ends[domain - 1]) if domain else i
        size = len(self._domains[domain])
        return domain, number % size if number < self._whole(domain) else int(self._extra[domain][number % size])

    def _whole(self, domain: int) -> int:
        """Counts the documents of a domain in its whole copies."""
        count = int(self._ends[domain] - (self._ends[domain - 1] if domain else 0))
        return count - len(self._extra[domain])

    def example(self, i: int) -> np.ndarray:
        """Reads document `i` as int32 [3, n] (encode.COLUMNS)."""
        domain, number = self.place(i)
        return self._domains[domain].example(number)

    def account(self) -> str:
        """Says how many documents there are."""
        return f"{self.where}: {len(self):,} documents in an epoch"

    def notes(self) -> list[str]:
        """Returns no line: every domain has its own."""
        return []

    def in_order(self, bytes_left: Callable[[], int]) -> Iterator[tuple[np.ndarray, bool]]:
        """Reads the domains in turn, each document once."""
        for documents in self._domains:
            yield from documents.in_order(bytes_left)

    def lengths(self) -> np.ndarray:
        """Encodes every document, and returns the positions that each document of an epoch takes, int64 [n]."""
        each = [
            np.fromiter((documents.example(i).shape[1] for i in range(len(documents))), np.int64, len(documents))
            for documents in self._domains
        ]
        return np.array([each[domain][number] for domain, number in map(self.place, range(len(self)))])


def _chosen(name: str, size: int, count: int) -> np.ndarray:
    return order.in_epoch(np.arange(count), size, 0, f"copies {name}", 0)


def count_rows(lengths: np.ndarray, start: order.Position, last: int, *, packed: bool) -> int:
    """Counts the rows that WholeRows makes of documents of these lengths, from `start` to document number `last`."""
    empty = [np.broadcast_to(np.int32(0), (3, length)) for length in range(int(lengths.max()) + 1)]
    read = packing.Shuffled(lambda i: empty[lengths[i]], start)
    packer = packing.WholeRows(read, start, pad_id=0, last=last, packed=packed)
    count = 0
    while packer.row().any():
        count += 1
    return count
