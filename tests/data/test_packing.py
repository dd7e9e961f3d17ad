"""Packing loses nothing, moves nothing, and knows where segments begin."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tele_jax.data import packing

SEPARATOR, PAD = 2, 3
SEQ_LEN = 12


@st.composite
def examples(draw, max_length):
    """Examples of tokens that occur once each, with any weights, also all 0, and also with the token 0."""
    lengths = draw(st.lists(st.integers(1, max_length), max_size=25))
    first = 0
    result = []
    for length in lengths:
        tokens = np.arange(first, first + length + 1)
        weights = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        result.append(np.array([tokens[:-1], tokens[1:], weights], np.int32))
        first += length + 1
    return result


def segments(rows):
    """Every segment as [5, n], read off the rows by their segment ids."""
    found = []
    for row in rows:
        ids = row[packing.SEGMENT_IDS]
        used = np.flatnonzero(ids)
        assert (used == np.arange(len(used))).all(), "padding in the middle"
        assert (np.diff(ids[used], prepend=0) >= 0).all() and set(ids[used]) == set(range(1, ids.max() + 1))
        assert (row[:3, len(used) :] == np.array([[PAD], [PAD], [0]])).all() and not row[4, len(used) :].any()
        for segment in range(1, ids.max() + 1):
            part = row[:, ids == segment]
            assert (part[packing.POSITIONS] == np.arange(part.shape[1])).all()
            found.append(part)
    return found


def cut(open_rows, examples):
    columns = np.concatenate([np.zeros((3, 0), np.int32), *examples], axis=1)
    lengths = np.array([example.shape[1] for example in examples], np.int64)
    return packing.cut_rows(open_rows, columns, lengths, separator=SEPARATOR, pad_id=PAD)


@given(examples(40))
def test_cutting_keeps_every_target_and_its_weight_in_order_without_padding(examples):
    left, rows = cut(packing.empty_rows(1, SEQ_LEN, PAD), examples)
    assert all(packing.used(row) == SEQ_LEN for row in rows) and packing.used(left[0]) < SEQ_LEN
    found = segments([*rows, *left])
    expected = np.concatenate([np.zeros((3, 0), int), *examples], axis=1)
    assert (np.concatenate([np.zeros((5, 0), int), *found], axis=1)[1:3] == expected[1:]).all()
    starts = {int(example[1, 0]) for example in examples}
    for segment in found:
        own_start = int(segment[packing.TARGETS, 0]) in starts
        # Inside a segment an input is the target before it; at its start, the example's own or the separator.
        assert (segment[packing.TOKENS, 1:] == segment[packing.TARGETS, :-1]).all()
        assert segment[packing.TOKENS, 0] == (segment[packing.TARGETS, 0] - 1 if own_start else SEPARATOR)
    assert starts <= {int(segment[packing.TARGETS, 0]) for segment in found}


@given(examples(40), st.integers(0, 25))
def test_cutting_can_stop_and_go_on(examples, at):
    start = packing.empty_rows(1, SEQ_LEN, PAD)
    left, rows = cut(start, examples)
    half, first = cut(start, examples[:at])
    rest, second = cut(half, examples[at:])
    assert (np.concatenate([first, second]) == rows).all() and (rest == left).all()
    assert (start == packing.empty_rows(1, SEQ_LEN, PAD)).all()


@given(examples(SEQ_LEN), st.integers(1, 4), st.integers(0, 25))
def test_fitting_keeps_every_example_whole(examples, num_open, at):
    left, first = packing.fit_rows(packing.empty_rows(num_open, SEQ_LEN, PAD), examples[:at], pad_id=PAD)
    left, second = packing.fit_rows(left, examples[at:], pad_id=PAD)
    found = segments([*first, *second, *left])
    found.sort(key=lambda segment: segment[packing.TARGETS, 0])
    assert len(found) == len(examples)
    assert all((segment[:3] == example).all() for segment, example in zip(found, examples, strict=True))


def test_fitting_takes_the_row_with_the_least_room():
    examples = [np.full((3, n), n, np.int32) for n in (7, 9, 3, 5)]
    left, rows = packing.fit_rows(packing.empty_rows(2, SEQ_LEN, PAD), examples, pad_id=PAD)
    assert len(rows) == 0
    assert [packing.used(row) for row in left] == [12, 12]


@given(st.integers(0, 60), st.integers(1, 20))
def test_spreading_is_a_permutation_that_parts_neighbours(count, distance):
    order = packing.spread(np.arange(count)[:, None], distance)[:, 0]
    assert sorted(order) == list(range(count))
    if count > 2 * distance > 2:
        assert np.abs(np.diff(np.argsort(order))).min() >= distance // 2


def test_a_batch_has_the_names_and_types_that_training_takes():
    batch = packing.to_batch(packing.empty_rows(2, SEQ_LEN, PAD))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((2, SEQ_LEN), "int32"),
        "targets": ((2, SEQ_LEN), "int32"),
        "loss_weights": ((2, SEQ_LEN), "float32"),
        "segment_ids": ((2, SEQ_LEN), "int32"),
        "positions": ((2, SEQ_LEN), "int32"),
    }
