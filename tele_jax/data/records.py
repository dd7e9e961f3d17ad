"""A packed row as bytes and back. A cache stores one row as one record of an ArrayRecord file.

Little-endian, `tokens of a row` S, ids of 16 bits where the vocabulary has at most 65,536 of them and of 32 bits else:

    uint32        number of positions that are not padding
    uint32        number of segments
    ids [S]       targets; padding at the end
    bits [S]      loss weights, most significant bit first
    uint32 [...]  where each segment begins
    uint32 [...]  the first input of each segment

The rest follows: inside a segment an input is the target before it, and positions count from its beginning.
"""

from collections.abc import Sequence

import numpy as np

from tele_jax.data import packing
from tele_jax.errors import DamageError

VERSION = 1
HEADER = 8  # bytes


def id_type(vocab_size: int) -> np.dtype:
    """What the ids of a vocabulary are stored as."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode(rows: np.ndarray, dtype: np.dtype) -> list[bytes]:
    """int32 [R, 5, S] as R records.

    Raises:
      ValueError: loss weights other than 0 and 1, ids beyond `dtype`, or inputs that do not follow from the targets.
    """
    segment_ids, tokens, targets = (
        rows[:, column] for column in (packing.SEGMENT_IDS, packing.TOKENS, packing.TARGETS)
    )
    weights = rows[:, packing.LOSS_WEIGHTS]
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


def decode(records: Sequence[bytes], seq_len: int, dtype: np.dtype, pad_id: int) -> dict[str, np.ndarray]:
    """The batch of arrays [R, S] that training takes (packing.to_batch), of R records.

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
    return dict(zip(packing.COLUMNS, (tokens, targets, weights, segment_ids, positions), strict=True))
