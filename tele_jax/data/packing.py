"""Packing examples into rows of fixed length, and rows as bytes, in numpy.

A row is int32 [5, S]: tokens, targets, loss_weights, segment_ids (1, 2, ... and 0 for padding), positions (from 0 in
every segment). There are two ways to pack. Both take the rows that are still open, fill them with examples, and return
the full rows together with those left open, so that packing can stop after any example and go on later.

`cut_rows` (pretraining): examples are laid end to end, and a row ends where it is full, inside an example or not. No
position is wasted and every target is kept, once. The rest of a cut example starts the next row as a segment of its
own, whose first input is the separator again.
`fit_rows` (fine-tuning): an example stays whole; it goes where it leaves the least room, and if it fits nowhere, the
fullest row is closed, its end padded.

For live feeds, `CutRows` and `WholeRows` pack documents in an order that is a pure function of the domain's name, the
seed and the epoch (order.py). No buffer has to be saved: a `Position` holds the number of the next document and the
documents in the open rows, and a packer is rebuilt from it bit for bit, in another process or stage.

A cache stores a row as one record of an ArrayRecord file. A record is little-endian, for S positions, with ids of 16
bits where the vocabulary has at most 65,536 of them and of 32 bits otherwise:

    uint32        number of positions that are not padding
    uint32        number of segments
    ids [S]       targets; padding at the end
    bits [S]      loss weights, most significant bit first
    uint32 [...]  where each segment begins
    uint32 [...]  the first input of each segment

The rest follows: inside a segment an input is the target before it, and positions count from its beginning.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tele_jax.data import order
from tele_jax.data.documents import Documents
from tele_jax.data.order import Position
from tele_jax.errors import DamageError

COLUMNS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
TOKENS, TARGETS, LOSS_WEIGHTS, SEGMENT_IDS, POSITIONS = range(5)
HEADER = 8  # bytes of a record before its ids
LANES = 16  # rows of pretraining that are filled in turn
OPEN_ROWS = 8  # rows of fine-tuning to choose from
ORDERED = 256  # places of the order that are computed together


def empty_rows(count: int, seq_len: int, pad_id: int) -> np.ndarray:
    """Returns rows of padding, int32 [count, 5, seq_len]."""
    rows = np.zeros((count, 5, seq_len), np.int32)
    rows[:, [TOKENS, TARGETS]] = pad_id
    return rows


def used(row: np.ndarray) -> int:
    """Counts the positions of a row that are not padding."""
    return int(np.count_nonzero(row[SEGMENT_IDS]))


def _append(row: np.ndarray, start: int, example: np.ndarray) -> None:
    """Writes int32 [3, n] into the row as a new segment at `start`."""
    stop = start + example.shape[1]
    row[: len(example), start:stop] = example
    row[SEGMENT_IDS, start:stop] = row[SEGMENT_IDS, start - 1] + 1 if start else 1
    row[POSITIONS, start:stop] = np.arange(stop - start)


def cut_rows(
    open_rows: np.ndarray, columns: np.ndarray, lengths: np.ndarray, *, separator: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lays examples end to end.

    Args:
      open_rows: int32 [1, 5, S], the row to go on with.
      columns: int32 [3, N], the examples one after the other. float64 where a loss weight is neither 0 nor 1; then
        the rows are float64 as well, here and in `fit_rows`.
      lengths: int [n], of each of them, above 0; their sum is N.
      separator: the first input of a segment that continues an example.
      pad_id: fills what is open.

    Returns:
      (open_rows int32 [1, 5, S], full rows int32 [R, 5, S]).
    """
    seq_len, filled = open_rows.shape[2], used(open_rows[0])
    end = filled + columns.shape[1]
    # All rows as one line: what the open row holds, the examples, and room up to the end of a row.
    count = end // seq_len + 1
    line = np.ascontiguousarray(empty_rows(count, seq_len, pad_id).transpose(1, 0, 2)).reshape(5, -1)
    line = line.astype(np.result_type(open_rows, columns), copy=False)
    line[:, :filled] = open_rows[0, :, :filled]
    line[: len(columns), filled:end] = columns
    # A segment begins where an example does, and where a row does.
    rows = np.arange(seq_len * (filled > 0), end, seq_len)
    starts = filled + np.cumsum(lengths) - lengths
    line[TOKENS, np.setdiff1d(rows, starts)] = separator
    begins = np.zeros(count * seq_len, np.int32)
    begins[np.flatnonzero(line[SEGMENT_IDS, :filled] * (line[POSITIONS, :filled] == 0))] = 1
    begins[rows] = begins[starts] = 1
    line[SEGMENT_IDS, :end] = begins.reshape(count, seq_len).cumsum(axis=1, dtype=np.int32).ravel()[:end]
    places = np.arange(count * seq_len, dtype=np.int32)
    line[POSITIONS, :end] = (places - np.maximum.accumulate(places * begins))[:end]
    packed = np.ascontiguousarray(line.reshape(5, count, seq_len).transpose(1, 0, 2))
    return packed[-1:], packed[:-1]


def fit_rows(open_rows: np.ndarray, examples: Iterable[np.ndarray], *, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Places whole examples.

    Args:
      open_rows: int32 [K, 5, S], K rows to choose from; more of them leave less padding.
      examples: int32 [3, n] each, n <= S.
      pad_id: fills the rest.

    Returns:
      (open_rows int32 [K, 5, S], full rows int32 [R, 5, S]).
    """
    examples = list(examples)
    dtype = np.result_type(open_rows, *{example.dtype for example in examples})
    rows = list(open_rows.astype(dtype))
    seq_len, starts, full = open_rows.shape[2], [used(row) for row in rows], []
    for example in examples:
        k, fits = best_row(starts, example.shape[1], seq_len)
        if not fits:
            full.append(rows[k])
            rows[k], starts[k] = empty_rows(1, seq_len, pad_id)[0].astype(dtype), 0
        _append(rows[k], starts[k], example)
        starts[k] += example.shape[1]
    return np.stack(rows), _stack(full, seq_len)


def best_row(filled: Sequence[int], length: int, seq_len: int) -> tuple[int, bool]:
    """Returns the row that an example of `length` fills best, and True; else the fullest one, to be closed, and False.

    filled: positions that are taken in every open row.
    """
    fitting = [k for k, taken in enumerate(filled) if taken + length <= seq_len]
    return max(fitting or range(len(filled)), key=filled.__getitem__), bool(fitting)


def spread(rows: np.ndarray, distance: int) -> np.ndarray:
    """Reorders [R, ...] so that rows which were neighbours, and may be of one document, are up to `distance` apart."""
    stride = max(1, -(-len(rows) // distance))
    return np.concatenate([rows[i::stride] for i in range(stride)])


def to_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Turns [B, 5, S] into the dict of arrays [B, S] that training takes: int32, loss_weights float32."""
    types = {"loss_weights": np.float32}
    return {name: np.ascontiguousarray(rows[:, i], types.get(name, np.int32)) for i, name in enumerate(COLUMNS)}


def _stack(rows: Sequence[np.ndarray], seq_len: int) -> np.ndarray:
    return np.stack(rows) if rows else np.zeros((0, 5, seq_len), np.int32)


def id_type(vocab_size: int) -> np.dtype:
    """Returns the type that the ids of a vocabulary are stored as."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def to_records(rows: np.ndarray, dtype: np.dtype) -> list[bytes]:
    """Writes int32 [R, 5, S] as R records.

    Raises:
      ValueError: loss weights other than 0 and 1, ids beyond `dtype`, or inputs that do not follow from the targets.
    """
    segment_ids, tokens, targets = (rows[:, column] for column in (SEGMENT_IDS, TOKENS, TARGETS))
    weights = rows[:, LOSS_WEIGHTS]
    begins = np.diff(segment_ids, axis=1, prepend=0) > 0
    inside = (segment_ids > 0) & ~begins
    if ((weights != 0) & (weights != 1)).any():
        raise ValueError("a loss weight is neither 0 nor 1")
    if len(rows) and max(targets.max(), tokens.max()) > np.iinfo(dtype).max:
        raise ValueError(f"an id does not fit {dtype}")
    if (tokens[:, 1:] != targets[:, :-1])[inside[:, 1:]].any():
        raise ValueError("an input is not the target before it")
    used = np.count_nonzero(segment_ids, axis=1)
    header = np.stack([used, segment_ids.max(axis=1, initial=0)], axis=1).astype("<u4")
    targets, weights = targets.astype(dtype), np.packbits(weights.astype(np.uint8), axis=1)
    row, start = np.nonzero(begins)
    tails = np.split(np.stack([start, tokens[row, start]]).astype("<u4"), np.cumsum(header[:-1, 1]), axis=1)
    return [b"".join(map(np.ndarray.tobytes, parts)) for parts in zip(header, targets, weights, tails)]


def from_records(records: Sequence[bytes], seq_len: int, dtype: np.dtype, pad_id: int) -> dict[str, np.ndarray]:
    """Reads R records as the batch of arrays [R, S] that training takes (to_batch).

    Raises:
      DamageError: a record that is not such a row.
    """
    fixed = HEADER + seq_len * dtype.itemsize + -(-seq_len // 8)
    blocks = np.frombuffer(b"".join([record[:fixed] for record in records]), np.uint8)
    if len(blocks) != len(records) * fixed:
        raise DamageError(f"a record is shorter than a row of {seq_len} tokens")
    blocks = blocks.reshape(len(records), fixed)
    header = blocks[:, :HEADER].copy().view("<u4").astype(np.int64)
    if any(len(record) != fixed + 8 * count for record, count in zip(records, header[:, 1].tolist())):
        raise DamageError(f"a record is not a row of {seq_len} tokens")
    ids, bits = blocks[:, HEADER : fixed - -(-seq_len // 8)], blocks[:, fixed - -(-seq_len // 8) :]
    targets = np.ascontiguousarray(ids).view(dtype).astype(np.int32)
    weights = np.unpackbits(bits, axis=1, count=seq_len).astype(np.float32)
    row = np.repeat(np.arange(len(records)), header[:, 1])
    tails = [np.frombuffer(record, "<u4", offset=fixed).reshape(2, -1) for record in records]
    start, first = np.concatenate([np.zeros((2, 0), "<u4"), *tails], axis=1).astype(np.int64)
    if (header[:, 0] > seq_len).any() or (start >= seq_len).any():
        raise DamageError(f"a record is not a row of {seq_len} tokens")
    tokens = np.empty_like(targets)
    tokens[:, 1:] = targets[:, :-1]
    tokens[row, start] = first
    begins = np.zeros(targets.shape, np.int32)
    begins[row, start] = 1
    segment_ids = np.cumsum(begins, axis=1, dtype=np.int32)
    places = np.arange(seq_len, dtype=np.int32)
    positions = places - np.maximum.accumulate(begins * places, axis=1)
    for i in np.flatnonzero(header[:, 0] < seq_len).tolist():
        end = header[i, 0]
        tokens[i, end:] = pad_id
        segment_ids[i, end:] = positions[i, end:] = 0
    return dict(zip(COLUMNS, (tokens, targets, weights, segment_ids, positions), strict=True))


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
        self._separator, self._empty = separator, empty_rows(1, start.seq_len, pad_id)
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
        return cut_rows(self._empty, columns, lengths, separator=self._separator, pad_id=0)[1][0]

    def _open(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        return tuple(() if lane is None else ((lane[0], lane[1]),) for lane in self._lanes)


class WholeRows(_Packer):
    """Rows of fine-tuning: an example stays whole, and goes where it leaves the least room among OPEN_ROWS rows.

    Behind the last example come the rows that are still open, and then rows of padding without end.
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        start: Position,
        *,
        pad_id: int,
        last: int | None = None,
        packed: bool = True,
    ):
        """Reads the examples of the open rows.

        Args:
          read: reads an example by its number, through all epochs.
          start: position of this feed (`go_on`).
          pad_id: fills the rest of rows.
          last: number of the first example that is not read any more; None: they never end.
          packed: whether a row takes several examples.
        """
        super().__init__(read, start, pad_id)
        self._last, self._packed = last, packed
        self._rows = [[(number, read(number)) for number, _ in row] for row in start.open or ((),) * OPEN_ROWS]

    def row(self) -> np.ndarray:
        """Returns the next row, int32 [5, S], or float64 where a loss weight is no whole number."""
        while self._first or self._last is None or self._next < self._last:
            number, example = self._take()
            if not self._packed:
                return self._closed([(number, example)])
            filled = [sum(columns.shape[1] for _, columns in row) for row in self._rows]
            k, fits = best_row(filled, example.shape[1], self._start.seq_len)
            if fits:
                self._rows[k].append((number, example))
                continue
            full, self._rows[k] = self._rows[k], [(number, example)]
            return self._closed(full)
        k = next((k for k, row in enumerate(self._rows) if row), 0)
        full, self._rows[k] = self._rows[k], []
        return self._closed(full)

    def _closed(self, examples: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        self._turn += bool(examples)
        columns = [columns for _, columns in examples]
        empty = empty_rows(1, self._start.seq_len, self._pad_id).astype(np.result_type(np.int32, *columns))
        return fit_rows(empty, columns, pad_id=self._pad_id)[0][0]

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
    if position is None or found != wanted or len(position.open) not in (0, rows):
        raise DamageError(f"the saved position in the data is damaged: {name} is not of this feed")
