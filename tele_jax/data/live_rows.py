"""Rows of one domain straight from its documents, for `feed.LiveFeed`, without a buffer that has to be saved.

Documents come in an order that is a pure function of the domain's name, the seed and the epoch (order.py), and a packer
lays them into rows. A `Position` says where a packer is: the number of the next document, and the documents in its open
rows. A packer is rebuilt from it bit for bit, in any epoch, in another process and in another stage.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from tele_jax.data import order, packing
from tele_jax.data.domains import Documents
from tele_jax.data.order import Position
from tele_jax.errors import DamageError

LANES = 16  # rows of pretraining that are filled in turn
OPEN_ROWS = 8  # rows of fine-tuning to choose from
ORDERED = 256  # places of the order that are computed together


class Shuffled:
    """Reads documents by their running number through all epochs, each epoch in an order of its own (order.py)."""

    def __init__(self, example: Callable[[int], np.ndarray], start: Position):
        """example: reads document `i` of start.total, as int32 [3, n], n > 0 (encode.COLUMNS)."""
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


class _Packer:
    """The documents that come next, by number, and the position."""

    def __init__(self, read: Callable[[int], np.ndarray], start: Position, pad_id: int):
        self._read, self._start, self._pad_id = read, start, pad_id
        self._next, self._first, self._turn = start.next, list(start.first), start.turn

    def _take(self) -> tuple[int, np.ndarray]:
        number = self._first.pop(0) if self._first else self._next
        self._next = max(self._next, number + 1)
        return number, self._read(number)

    def _open(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The documents in the open rows, as Position.open has them."""
        raise NotImplementedError

    def position(self) -> Position:
        """Returns the position that the next row comes from."""
        rows = self._open()
        here = {"next": self._next, "first": tuple(self._first), "turn": self._turn}
        return dataclasses.replace(self._start, **here, open=rows if any(rows) else ())


class CutRows(_Packer):
    """Rows of pretraining: documents are laid end to end and cut where a row is full; nothing is padded or left out.

    LANES rows are filled in turn, each from documents of its own, so that the rows of a long document do not come one
    after the other.
    """

    def __init__(self, read: Callable[[int], np.ndarray], start: Position, *, separator: int, pad_id: int):
        """separator: the first input of a row that continues a document. start: position of this feed (`go_on`)."""
        super().__init__(read, start, pad_id)
        self._separator, self._empty = separator, packing.empty_rows(1, start.seq_len, pad_id)
        rows = start.open or ((),) * LANES
        self._lanes = [(row[0][0], row[0][1], read(row[0][0])) if row else None for row in rows]

    def row(self) -> np.ndarray:
        """Returns the next row, int32 [5, S]."""
        lane, seq_len = self._turn % LANES, self._empty.shape[2]
        parts, filled = [], 0
        while filled < seq_len:
            if (current := self._lanes[lane]) is None:
                number, columns = self._take()
                current = (number, 0, columns)
            number, begin, columns = current
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
        # The row is full to its last position: no row is left open, and no padding is used.
        return packing.cut_rows(self._empty, columns, lengths, separator=self._separator, pad_id=0)[1][0]

    def _open(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        return tuple(() if lane is None else ((lane[0], lane[1]),) for lane in self._lanes)


class WholeRows(_Packer):
    """Rows of fine-tuning: an example stays whole, and goes where it leaves the least room among OPEN_ROWS rows."""

    def __init__(self, read: Callable[[int], np.ndarray], start: Position, *, pad_id: int):
        """start: position of this feed (`go_on`)."""
        super().__init__(read, start, pad_id)
        self._rows = [[(number, read(number)) for number, _ in row] for row in start.open or ((),) * OPEN_ROWS]

    def row(self) -> np.ndarray:
        """Returns the next row, int32 [5, S]."""
        while True:
            number, example = self._take()
            filled = [sum(columns.shape[1] for _, columns in row) for row in self._rows]
            k, fits = packing.best_row(filled, example.shape[1], self._start.seq_len)
            if fits:
                self._rows[k].append((number, example))
                continue
            full, self._rows[k] = self._rows[k], [(number, example)]
            self._turn += 1
            empty = packing.empty_rows(1, self._start.seq_len, self._pad_id)
            return packing.fit_rows(empty, [columns for _, columns in full], pad_id=self._pad_id)[0][0]

    def _open(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        return tuple(tuple((number, 0) for number, _ in row) for row in self._rows)


def go_on(before: Position | None, name: str, documents: Documents, *, kind: str, seq_len: int, seed: int) -> Position:
    """Returns the position at which a feed of rows of `kind` and `seq_len` begins, after what an earlier one has read.

    Rows of pretraining go on inside the documents that are cut, at any row length. Whole dialogues that wait in the
    open rows of fine-tuning stay there if the row length is the same, and come first otherwise. Where another row
    length cuts long documents at other places, the next epoch begins. `before` is None at the beginning.
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
