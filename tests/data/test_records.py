"""A row survives being stored, whatever it holds; what is not a row is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tele_jax.data import packing
from tele_jax.errors import DamageError

PAD = 3


@st.composite
def rows(draw):
    """Packed rows of any filling: examples with any weights, whole or cut."""
    seq_len = draw(st.integers(1, 40))
    largest = draw(st.sampled_from([300, 1 << 16, 1 << 31]))
    lengths = draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    examples = []
    for length in lengths:
        ids = rng.integers(0, largest, length + 1)
        examples.append(np.array([ids[:-1], ids[1:], rng.integers(0, 2, length)], np.int32))
    if draw(st.booleans()):
        left, full = packing.fit_rows(packing.empty_rows(3, seq_len, PAD), examples, pad_id=PAD)
    else:
        columns = np.concatenate(examples, axis=1)
        left, full = packing.cut_rows(
            packing.empty_rows(1, seq_len, PAD), columns, np.array(lengths), separator=2, pad_id=PAD
        )
    return np.concatenate([full, left]), largest


@given(rows())
def test_a_row_comes_back_as_it_was(made):
    packed, largest = made
    dtype = packing.id_type(largest)
    seq_len = packed.shape[2]
    stored = packing.to_records(packed, dtype)
    back = packing.from_records(stored, seq_len, dtype, PAD)
    for name, expected in packing.to_batch(packed).items():
        assert back[name].dtype == expected.dtype and (back[name] == expected).all(), name
    backwards = packing.from_records(stored[::-1], seq_len, dtype, PAD)
    assert all((backwards[name] == back[name][::-1]).all() for name in back), "a row does not depend on the others"


def packed_row(seq_len=8):
    example = np.array([[2, 5, 6], [5, 6, 7], [1, 0, 1]], np.int32)
    left, _ = packing.fit_rows(packing.empty_rows(1, seq_len, PAD), [example, example], pad_id=PAD)
    return left


def test_small_vocabularies_take_half_the_space():
    sizes = [len(packing.to_records(packed_row(), packing.id_type(n))[0]) for n in (65_536, 65_537)]
    assert sizes[1] - sizes[0] == 2 * 8


def test_what_cannot_be_stored_is_refused():
    dtype = packing.id_type(100)
    row = packed_row()
    for column, value, message in (
        (packing.LOSS_WEIGHTS, 2, "neither 0 nor 1"),
        (packing.TARGETS, 70_000, "does not fit"),
        (packing.TOKENS, 9, "not the target before"),
    ):
        changed = row.copy()
        changed[0, column, 1] = value
        with pytest.raises(ValueError, match=message):
            packing.to_records(changed, dtype)


def test_bytes_that_are_no_row_are_damage():
    dtype = packing.id_type(100)
    (record,) = packing.to_records(packed_row(), dtype)
    beyond = bytearray(record)
    beyond[0] = 9  # more tokens than the row is long
    for damaged in (record[:10], record[:-8], record + b"12345678", bytes(beyond), b""):
        with pytest.raises(DamageError):
            packing.from_records([damaged], 8, dtype, PAD)
    with pytest.raises(DamageError):
        packing.from_records([record], 9, dtype, PAD)
