"""Which row comes when: shares, epochs and permutations, on the index alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tele_jax.data import order

PUBLISHED = (75.21, 9.81, 7.17, 2.87, 2.12, 0.99, 1.04, 0.62, 0.14, 0.02, 0.02)
ROWS = 1_000_000
GOLDEN = [[0, 1, 1, 2, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 30, 25000000], [778, 764, 817, 2369698247, 637, 397, 569, 21]]


def key(number):
    return np.random.default_rng(number).integers(0, 1 << 64, order.ROUNDS, np.uint64)


def make(rates, rows=None, seed=0):
    names = tuple(f"domain {i}" for i in range(len(rates)))
    return order.Order(names, tuple(rows or [1000 + i for i in range(len(rates))]), tuple(rates), seed)


@pytest.mark.parametrize(
    "rates", [PUBLISHED, (1.0, 1.0099), (1e-9, 1.0), (1.0,), tuple(1 + 0.01 * i for i in range(40)), (3, 1e6, 7)]
)
def test_spreads_over_a_million_rows_are_the_rates(rates):
    share = np.array(list(make(rates).counts(ROWS).values())) / ROWS
    wanted = np.array(rates) / sum(rates)
    assert np.abs(share - wanted).max() < 1e-3, "the 0.1% that is asked for"
    assert np.abs(share - wanted).max() <= (len(rates) + 1) / ROWS, "a row per domain is what rounding explains"


@settings(max_examples=30)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.integers(0, 1 << 35))
def test_spreads_hold_in_any_stretch_of_a_run(rates, start):
    stretch = 20_000
    domain, _, _ = make(rates).locate(np.arange(start, start + stretch))
    counts = np.bincount(domain, minlength=len(rates))
    assert np.abs(counts - stretch * np.array(rates) / sum(rates)).max() <= 2 * len(rates) + 1


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 3000))
def test_a_domains_rows_are_counted_without_gaps(rates, number):
    weights = order.integer_weights(rates)
    domain, before = order.mixture(np.arange(number), weights)
    for i in range(len(rates)):
        assert before[domain == i].tolist() == list(range((domain == i).sum()))


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=30))
def test_integer_weights_add_up_and_forget_no_domain(rates):
    weights = order.integer_weights(rates)
    assert sum(weights) == order.WEIGHT_SUM and min(weights) >= 1
    exact = np.array(rates) / sum(rates) * order.WEIGHT_SUM
    assert np.abs(np.array(weights) - np.maximum(exact, 1)).max() <= len(rates)


@given(st.integers(1, 3000), st.integers(0, 100))
def test_a_permutation_has_every_row_once(size, number):
    assert sorted(order.permute(np.arange(size), size, key(number)).tolist()) == list(range(size))


@given(st.integers(1, 1 << 40), st.integers(0, 100), st.data())
def test_a_place_has_the_same_row_whatever_is_asked_with_it(size, number, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = order.permute(places, size, key(number))
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() == [int(order.permute(np.array([i]), size, key(number))[0]) for i in places]


def test_permutations_look_random():
    size, number = 1000, 2000
    drawn = np.stack([order.permute(np.arange(size), size, key(i)) for i in range(number)])
    # Chi-square over ten equal bins, 9 degrees of freedom, at every place: mean 9, and its error over 1,000 places.
    bins = np.stack([np.bincount(drawn[:, i] // 100, minlength=10) for i in range(size)])
    chi_square = ((bins - number / 10) ** 2 / (number / 10)).sum(axis=1)
    assert abs(chi_square.mean() - 9) < 5 * np.sqrt(18 / size)
    follow = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    assert abs(follow) < 5 / np.sqrt(size * number)
    assert abs((np.abs(np.diff(drawn, axis=1)) == 1).mean() - 2 / size) < 5 * np.sqrt(2 / size / (size * number))


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    o = make((5, 3, 1), rows=(70, 11, 1))
    domain, epoch, row = o.locate(np.arange(2000))
    assert o.counts(2000) == {name: (domain == i).sum() for i, name in enumerate(o.domains)}
    for i, size in enumerate(o.rows):
        rows, epochs = row[domain == i], epoch[domain == i]
        assert (epochs == np.arange(len(rows)) // size).all()
        whole = rows[: len(rows) // size * size].reshape(-1, size)
        assert len(whole) > 5 and (np.sort(whole, axis=1) == np.arange(size)).all()
        assert size == 1 or len({tuple(each) for each in whole.tolist()}) > 5


def test_seeds_and_domains_do_not_go_in_step():
    one, other = (make((1, 1), rows=(500, 500), seed=seed).locate(np.arange(1000)) for seed in (0, 1))
    assert (one[0] == other[0]).all(), "the mixture has no seed"
    assert (one[2] == other[2]).mean() < 0.02
    assert (one[2][one[0] == 0] == one[2][one[0] == 1]).mean() < 0.02


def test_the_order_of_a_page_does_not_matter():
    a = order.Order(("x", "y", "z"), (10, 20, 30), (1.0, 2.0, 4.0), 3)
    b = order.Order(("z", "x", "y"), (30, 10, 20), (4.0, 1.0, 2.0), 3)
    index = np.arange(500)
    assert a.counts(1000) == b.counts(1000)
    named = [
        [(o.domains[d], e, r) for d, e, r in zip(*(c.tolist() for c in o.locate(index)), strict=True)] for o in (a, b)
    ]
    assert named[0] == named[1]


def test_any_part_of_a_run_is_the_same_as_cut_out_of_the_whole():
    o = make(PUBLISHED)
    whole = o.locate(np.arange(10_000))
    places = np.random.default_rng(0).integers(0, 10_000, 300)
    assert all((part == all_[places]).all() for part, all_ in zip(o.locate(places), whole, strict=True))


def test_the_order_is_the_one_that_runs_were_started_with():
    """Written down once: if this fails, order.VERSION has to be raised, and runs that are under way cannot go on."""
    o = order.Order(("code", "en", "zh"), (1000, 2000, 3_000_000_000), (0.25, 0.45, 0.3), 7)
    domain, epoch, row = o.locate(np.array([0, 1, 2, 3, 4, 5, 123_456, 10**11]))
    assert domain.tolist() == GOLDEN[0] and epoch.tolist() == GOLDEN[1] and row.tolist() == GOLDEN[2]


def test_beyond_the_last_row_of_a_run_is_an_error():
    with pytest.raises(ValueError, match="are not all in the"):
        make((1, 2)).locate(np.array([order.MAX_ROWS]))


def test_epochs_are_rows_over_rows():
    assert make((1, 3), rows=(100, 600)).epochs(4000) == {"domain 0": 10.0, "domain 1": 5.0}
