"""Packing examples into rows of fixed length, and rows as bytes, in numpy.

A row is int32 [5, S]: tokens, targets, loss_weights, segment_ids (1, 2, ... and 0 for padding), positions (from 0 in
every segment). There are two ways to pack. Both take the rows that are still open, fill them with examples, and return
the full rows together with those left open, so that packing can stop after any example and go on later.

`cut_rows` (pretraining): examples are laid end to end, and a row ends where it is full, inside an example or not. No
position is wasted and every target is kept, once. The rest of a cut example starts the next row as a segment of its
own, whose first input is the separator again.
`fit_rows` (fine-tuning): an example stays whole; it goes where it leaves the least room, and if it fits nowhere, the
fullest row is closed, its end padded.

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

from collections.abc import Iterable, Sequence

import numpy as np

from tele_jax.errors import DamageError

COLUMNS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
TOKENS, TARGETS, LOSS_WEIGHTS, SEGMENT_IDS, POSITIONS = range(5)
HEADER = 8  # bytes of a record before its ids


def empty_rows(count: int, seq_len: int, pad_id: int) -> np.ndarray:
    """Int32 [count, 5, seq_len] of padding."""
    rows = np.zeros((count, 5, seq_len), np.int32)
    rows[:, [TOKENS, TARGETS]] = pad_id
    return rows


def used(row: np.ndarray) -> int:
    """Number of positions of a row that are not padding."""
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
      columns: int32 [3, N], the examples one after the other.
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
    rows = list(open_rows.copy())
    seq_len, starts, full = open_rows.shape[2], [used(row) for row in rows], []
    for example in examples:
        k, fits = best_row(starts, example.shape[1], seq_len)
        if not fits:
            full.append(rows[k])
            rows[k], starts[k] = empty_rows(1, seq_len, pad_id)[0], 0
        _append(rows[k], starts[k], example)
        starts[k] += example.shape[1]
    return np.stack(rows), _stack(full, seq_len)


def best_row(filled: Sequence[int], length: int, seq_len: int) -> tuple[int, bool]:
    """The row that an example of `length` fills best, and True; else the fullest one, to be closed, and False.

    filled: positions that are taken in every open row.
    """
    fitting = [k for k, taken in enumerate(filled) if taken + length <= seq_len]
    return max(fitting or range(len(filled)), key=filled.__getitem__), bool(fitting)


def spread(rows: np.ndarray, distance: int) -> np.ndarray:
    """Reorders [R, ...] so that rows which were neighbours, and may be of one document, are up to `distance` apart."""
    stride = max(1, -(-len(rows) // distance))
    return np.concatenate([rows[i::stride] for i in range(stride)])


def to_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """[B, 5, S] as the dict of arrays [B, S] that training takes: int32, loss_weights float32."""
    batch = {name: np.ascontiguousarray(rows[:, i]) for i, name in enumerate(COLUMNS)}
    batch["loss_weights"] = batch["loss_weights"].astype(np.float32)
    return batch


def _stack(rows: Sequence[np.ndarray], seq_len: int) -> np.ndarray:
    return np.stack(rows) if rows else np.zeros((0, 5, seq_len), np.int32)


def id_type(vocab_size: int) -> np.dtype:
    """What the ids of a vocabulary are stored as."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def to_records(rows: np.ndarray, dtype: np.dtype) -> list[bytes]:
    """int32 [R, 5, S] as R records.

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
    """The batch of arrays [R, S] that training takes (to_batch), of R records.

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
