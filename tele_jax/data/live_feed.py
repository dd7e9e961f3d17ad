"""Rows of one domain straight from its documents, for `feed.LiveFeed`, without a buffer to be saved.

Documents come in an order that is a pure function of the domain's name, the seed and the epoch (order.py), and a packer
lays them into rows. Where a packer is, is a `Position`: the number of the next document, and which documents its open
rows hold. From those numbers it is made again, bit for bit, in any epoch, in another process and in another stage.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from tele_jax.data import examples, order, packing
from tele_jax.data.position import Position
from tele_jax.data.sources import Corpus
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import DamageError

LANES = 16  # rows of pretraining that are filled in turn
OPEN_ROWS = 8  # rows of fine-tuning to choose from
ORDERED = 256  # places of the order that are computed together


class Documents(Protocol):
    """A domain that can be read live.

    Attributes:
      checksum: of all that is read.
      cut: bytes at which a long document is cut into several; 0 where none is that long.
      format: of the files, or "task".
    """

    checksum: str
    cut: int
    format: str

    def __len__(self) -> int:
        """Number of documents in an epoch; a document that is cut counts as several."""

    def reader(self, start: Position) -> Callable[[int], np.ndarray]:
        """Gives documents by their running number, through all epochs, as int32 [3, n], n > 0 (examples.COLUMNS).

        Which document has which number is a pure function of `start.name` and `start.seed`. Numbers are asked for
        mostly in order; after a restore, first those that were open.
        """


class CorpusDocuments:
    """The spans of a corpus as the documents of a live feed (Documents)."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, kind: examples.Kind, seq_len: int, span_bytes: int):
        """span_bytes: at which the corpus was cut."""
        self._corpus, self._vocabulary, self._kind, self._seq_len = corpus, vocabulary, kind, seq_len
        self.checksum, self.format = corpus.checksum, corpus.format
        self.cut = 0 if corpus.last.all() else span_bytes

    def __len__(self) -> int:
        return len(self._corpus)

    def reader(self, start: Position) -> Callable[[int], np.ndarray]:
        """The reader raises UserError where a file has changed."""

        def example(i: int) -> np.ndarray:
            return examples.example(self._corpus, i, self._vocabulary, self._kind, self._seq_len)

        return Shuffled(example, start)


class Shuffled:
    """Documents that can be read at random, by their running number: every epoch in an order of its own (order.py)."""

    def __init__(self, example: Callable[[int], np.ndarray], start: Position):
        """example: reads document `i` of start.total."""
        self._example, self._start = example, start
        self._ordered: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __call__(self, number: int) -> np.ndarray:
        block = number // ORDERED
        if self._ordered[0] != block:
            self._ordered = (block, self._order(block * ORDERED))
        return self._example(int(self._ordered[1][number % ORDERED]))

    def _order(self, first: int) -> np.ndarray:
        size = self._start.total
        epochs, places = np.divmod(np.arange(first, first + ORDERED), size)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            places[here] = order.in_epoch(places[here], size, self._start.seed, self._start.name, epoch)
        return places


class CutRows:
    """Rows of pretraining: documents are laid end to end and cut where a row is full; nothing is padded or left out.

    LANES rows are filled in turn, each from documents of its own, so that the rows of a long document do not come one
    after the other.
    """

    def __init__(self, read: Callable[[int], np.ndarray], start: Position, *, separator: int, pad_id: int):
        """separator: the first input of a row that continues a document. start: of this feed (`go_on`)."""
        self._read, self._start, self._separator = read, start, separator
        self._empty = packing.empty_rows(1, start.seq_len, pad_id)
        self._next, self._first, self._turn = start.next, list(start.first), start.turn
        rows = start.open or ((),) * LANES
        self._lanes = [(row[0][0], row[0][1], read(row[0][0])) if row else None for row in rows]

    def row(self) -> np.ndarray:
        """The next row, int32 [5, S]."""
        lane, seq_len = self._turn % LANES, self._empty.shape[2]
        parts, filled = [], 0
        while filled < seq_len:
            number, begin, columns = self._lanes[lane] or self._take()
            part = columns[:, begin : begin + seq_len - filled]
            if begin:
                part = part.copy()
                part[0, 0] = self._separator
            parts.append(part)
            filled += part.shape[1]
            end = begin + part.shape[1]
            self._lanes[lane] = (number, end, columns) if end < columns.shape[1] else None
        self._turn += 1
        lengths = np.array([part.shape[1] for part in parts])
        columns = np.concatenate(parts, axis=1)
        # Full to its last position: what is left open is empty, and nothing is filled up.
        return packing.cut_rows(self._empty, columns, lengths, separator=self._separator, pad_id=0)[1][0]

    def _take(self) -> tuple[int, int, np.ndarray]:
        number = self._first.pop(0) if self._first else self._next
        self._next = max(self._next, number + 1)
        return number, 0, self._read(number)

    def position(self) -> Position:
        """The position that the next row comes from."""
        rows = tuple(() if lane is None else ((lane[0], lane[1]),) for lane in self._lanes)
        return dataclasses.replace(
            self._start, next=self._next, first=tuple(self._first), turn=self._turn, open=rows if any(rows) else ()
        )


class WholeRows:
    """Rows of fine-tuning: an example stays whole, and goes where it leaves the least room among OPEN_ROWS rows."""

    def __init__(self, read: Callable[[int], np.ndarray], start: Position, *, pad_id: int):
        """start: of this feed (`go_on`)."""
        self._read, self._start, self._pad_id = read, start, pad_id
        self._next, self._first, self._turn = start.next, list(start.first), start.turn
        rows = start.open or ((),) * OPEN_ROWS
        self._rows = [[(number, read(number)) for number, _ in row] for row in rows]

    def row(self) -> np.ndarray:
        """The next row, int32 [5, S]."""
        while True:
            number = self._first.pop(0) if self._first else self._next
            self._next = max(self._next, number + 1)
            example = self._read(number)
            filled = [sum(columns.shape[1] for _, columns in row) for row in self._rows]
            k, fits = packing.best_row(filled, example.shape[1], self._start.seq_len)
            if fits:
                self._rows[k].append((number, example))
                continue
            full, self._rows[k] = self._rows[k], [(number, example)]
            self._turn += 1
            empty = packing.empty_rows(1, self._start.seq_len, self._pad_id)
            return packing.fit_rows(empty, [columns for _, columns in full], pad_id=self._pad_id)[0][0]

    def position(self) -> Position:
        """The position that the next row comes from."""
        rows = tuple(tuple((number, 0) for number, _ in row) for row in self._rows)
        return dataclasses.replace(
            self._start, next=self._next, first=tuple(self._first), turn=self._turn, open=rows if any(rows) else ()
        )


def go_on(before: Position | None, name: str, documents: Documents, *, kind: str, seq_len: int, seed: int) -> Position:
    """The position at which a feed of rows of `kind` and `seq_len` begins, after what an earlier one has read.

    Rows of pretraining go on inside the documents that are cut, at any row length. Whole dialogues that wait in the
    open rows of fine-tuning stay there if the row length is the same, and come first otherwise. Where another row
    length cuts long documents at other places, the next epoch begins.

    before: None for the beginning.
    """
    shape = {"kind": kind, "seq_len": seq_len, "total": len(documents), "cut": documents.cut}
    if before is None:
        return Position(checksum=documents.checksum, name=name, seed=seed, **shape)
    if (before.total, before.cut) != (len(documents), documents.cut):
        epoch = -(-before.next // before.total)
        return dataclasses.replace(before, **shape, next=epoch * len(documents), open=(), first=(), turn=0)
    if before.kind == kind and (kind == "pretrain" or before.seq_len == seq_len):
        return dataclasses.replace(before, **shape)
    waiting = [number for row in before.open for number, given in row if not given]
    return dataclasses.replace(before, **shape, open=(), first=(*before.first, *sorted(waiting)), turn=0)


def check_own(position: Position | None, name: str, documents: Documents, *, kind: str, seq_len: int) -> None:
    """Raises DamageError for a position that no feed of this domain and shape can have come to."""
    wanted = (documents.checksum, len(documents), documents.cut, kind, seq_len)
    rows = LANES if kind == "pretrain" else OPEN_ROWS
    found = position and (position.checksum, position.total, position.cut, position.kind, position.seq_len)
    if found != wanted or len(position.open) not in (0, rows):
        raise DamageError(f"the saved position in the data is damaged: {name} is not of this feed")
