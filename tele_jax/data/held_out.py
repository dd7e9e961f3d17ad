"""Batches of held-out text, to be evaluated in bits per byte."""

import dataclasses

import numpy as np

from tele_jax.data import packing
from tele_jax.data.domains import Documents, OpenData
from tele_jax.data.templates import separator
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out text of one domain.

    Weights are 1 on tokens of text only: not on the end-of-sequence token, nor on `<_end>`. So the loss summed over
    the weights, in bits, over num_bytes is exactly the number of bits per byte of text, whatever the tokenizer and
    however the text falls into documents. (Training does count these tokens.)

    Attributes:
      batches: batches as those of a feed; the last one is filled up with rows of padding.
      num_bytes: UTF-8 bytes whose tokens are predicted.
      num_tokens: number of these tokens: the sum of all loss_weights.
    """

    batches: list[dict[str, np.ndarray]]
    num_bytes: int
    num_tokens: int


def held_out(opened: OpenData, *, batch_size: int) -> dict[str, HeldOut]:
    """Reads the first data.eval_bytes of the text that is held out of each domain, always as the same batches.

    A document longer than what is left of eval_bytes is cut at a character; a dialogue or an example of a Task is not,
    and the last one may go beyond; of these, learned tokens count. Documents longer than seq_len are cut into pieces,
    each with the separator as its only context. Documents that cannot be used are left out.

    Raises:
      UserError: as OpenData.held_out.
    """
    held = {}
    for name, documents in opened.held_out.items():
        how = (opened.vocabulary, opened.seq_len, batch_size, opened.data.eval_bytes)
        key = ("held out", documents.where, documents.checksum, opened.kind, *how, opened.vocabulary.template)
        text = opened.index.once(key, lambda documents=documents, how=how: _batches(documents, *how))
        if text is None:
            raise UserError(f"eval_bytes={opened.data.eval_bytes} holds no character of {documents.where}; give more")
        held[name] = text
    return held


def _batches(
    documents: Documents, vocabulary: Vocabulary, seq_len: int, batch_size: int, max_bytes: int
) -> HeldOut | None:
    """Returns None where max_bytes holds no character."""
    sizes = np.array([len(spelled) for spelled in vocabulary.piece_bytes])
    spaced = np.array([spelled[:1] == b" " for spelled in vocabulary.piece_bytes])
    num_bytes, num_tokens, pieces = 0, 0, []
    for example, begins in documents.in_order(lambda: max_bytes - num_bytes):  # noqa: B023  counts on
        _, targets, weights = example
        weights *= sizes[targets] > 0
        num_tokens += int(weights.sum())
        num_bytes += int((sizes[targets] * weights).sum())
        # At the start of each stretch of text, the dummy prefix is a space that is not in the text.
        if vocabulary.adds_dummy_prefix and begins:
            num_bytes -= int(np.count_nonzero(spaced[targets] & (np.diff(weights, prepend=0) == 1)))
        for start in range(0, example.shape[1], seq_len):
            piece = example[:, start : start + seq_len].copy()
            if start:
                piece[0, 0] = separator(vocabulary)
            pieces.append(piece)
        if num_bytes >= max_bytes:
            break
    if not num_bytes:
        return None
    pad_id = max(vocabulary.pad_id, 0)
    open_rows, full_rows = packing.fit_rows(packing.empty_rows(64, seq_len, pad_id), pieces, pad_id=pad_id)
    rows = np.stack([*full_rows, *filter(packing.used, open_rows)])
    padding = packing.empty_rows(-len(rows) % batch_size, seq_len, pad_id)
    batches = np.concatenate([rows, padding]).reshape(-1, batch_size, *rows.shape[1:])
    return HeldOut([packing.to_batch(batch) for batch in batches], num_bytes, num_tokens)
