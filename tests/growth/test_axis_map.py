"""The algebra of axis maps: what composing, inverting and regrouping heads must give."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tele_jax.growth import axis_map
from tele_jax.growth.axis_map import NEW, AxisMap

POWERS_OF_TWO = st.integers(-8, 8).map(lambda power: 2.0**power)  # products and inverses of them are exact
ANY_SCALE = st.floats(0.01, 100.0)
SIZES = st.integers(1, 9)


@st.composite
def maps(draw, src_size=None, scales=POWERS_OF_TWO):
    """Any map: entries lost, repeated, new, in any order."""
    src_size = draw(SIZES) if src_size is None else src_size
    index = draw(st.lists(st.integers(NEW, src_size - 1), min_size=1, max_size=12))
    fresh = [i == NEW or draw(st.booleans()) for i in index]
    return axis_map.AxisMap("embed", src_size, index, fresh, *draw(_factors(scales, len(index))))


@st.composite
def growing_maps(draw, scales=POWERS_OF_TWO, src_size=None):
    """A map that keeps every unit of its source, in any order, among new entries and copies."""
    src_size = draw(SIZES) if src_size is None else src_size
    units = [(i, False) for i in range(src_size)]
    units += [(NEW, True)] * draw(st.integers(0, 4))
    units += [(i, True) for i in draw(st.lists(st.integers(0, src_size - 1), max_size=4))]
    units = draw(st.permutations(units))
    return axis_map.AxisMap("mlp", src_size, *zip(*units, strict=True), *draw(_factors(scales, len(units))))


def _factors(values, size):
    vector = st.lists(values, min_size=size, max_size=size)
    return st.tuples(vector, vector)


def same(a: AxisMap, b: AxisMap, relative: float = 0.0) -> None:
    assert a.src_size == b.src_size
    np.testing.assert_array_equal(a.index, b.index)
    np.testing.assert_array_equal(a.fresh, b.fresh)
    np.testing.assert_allclose(a.scale, b.scale, rtol=relative, atol=0)
    np.testing.assert_allclose(a.share, b.share, rtol=relative, atol=0)


def through(m: AxisMap, x: np.ndarray) -> np.ndarray:
    """What a map does to a vector over its axis, with new entries 0."""
    return np.where(m.index == NEW, 0.0, x[m.index] * m.scale)


@given(st.data())
def test_composition_is_associative(data):
    a = data.draw(maps())
    b = data.draw(maps(a.dst_size))
    c = data.draw(maps(b.dst_size))
    same(a.compose(b).compose(c), a.compose(b.compose(c)))


@given(st.data())
def test_composition_is_associative_up_to_rounding_with_any_scales(data):
    a = data.draw(maps(scales=ANY_SCALE))
    b = data.draw(maps(a.dst_size, ANY_SCALE))
    c = data.draw(maps(b.dst_size, ANY_SCALE))
    same(a.compose(b).compose(c), a.compose(b.compose(c)), relative=1e-15)


@given(maps())
def test_the_identity_changes_nothing_on_either_side(m):
    before, after = axis_map.identity("embed", m.src_size), axis_map.identity("embed", m.dst_size)
    assert before.is_identity and after.is_identity
    same(before.compose(m), m)
    same(m.compose(after), m)


@given(st.data())
def test_composing_and_applying_is_applying_twice(data):
    a = data.draw(maps())
    b = data.draw(maps(a.dst_size))
    x = np.random.default_rng(0).standard_normal(a.src_size)
    np.testing.assert_array_equal(through(a.compose(b), x), through(b, through(a, x)))


@given(st.data())
def test_what_is_new_stays_new_and_what_is_fresh_stays_fresh(data):
    a = data.draw(maps())
    b = data.draw(maps(a.dst_size))
    both = a.compose(b)
    for unit, middle in enumerate(b.index):
        assert (both.index[unit] == NEW) == (middle == NEW or a.index[middle] == NEW)
        assert both.fresh[unit] == (b.fresh[unit] or (middle != NEW and a.fresh[middle]))


@given(growing_maps())
def test_growing_and_inverting_is_the_identity(m):
    assert m.compose(m.invert()).is_identity


@given(growing_maps(ANY_SCALE))
def test_growing_and_inverting_undoes_any_scale_up_to_rounding(m):
    same(m.compose(m.invert()), axis_map.identity("mlp", m.src_size), relative=3e-16)


@given(growing_maps())
def test_an_inverse_never_reads_a_fresh_copy(m):
    assert not m.fresh[m.invert().index].any()


@given(st.data())
def test_the_inverse_of_a_composition_is_the_composition_of_the_inverses(data):
    a = data.draw(growing_maps())
    b = data.draw(growing_maps(src_size=a.dst_size))
    same(a.compose(b).compose(b.invert().compose(a.invert())), axis_map.identity("mlp", a.src_size))
    same(a.compose(b).compose(a.compose(b).invert()), axis_map.identity("mlp", a.src_size))


def test_a_map_that_loses_units_has_no_inverse_and_names_them():
    with pytest.raises(ValueError, match=r"embed: units \[1, 3\] of the source are not in the destination"):
        axis_map.AxisMap("embed", 4, [0, 2, NEW]).invert()
    with pytest.raises(ValueError, match=r"units \[0\]"):  # a masked copy is not the unit itself
        axis_map.AxisMap("embed", 1, [0], fresh=[True]).invert()


@given(st.data())
def test_concatenating_puts_maps_side_by_side(data):
    a = data.draw(maps())
    b = data.draw(maps(a.src_size))
    x = np.random.default_rng(0).standard_normal(a.src_size)
    both = a.concatenate(b)
    np.testing.assert_array_equal(through(both, x), np.concatenate([through(a, x), through(b, x)]))
    np.testing.assert_array_equal(both.fresh, np.concatenate([a.fresh, b.fresh]))


@given(st.data())
def test_composition_distributes_over_concatenation(data):
    a = data.draw(maps())
    b, c = data.draw(maps(a.dst_size)), data.draw(maps(a.dst_size))
    same(a.compose(b.concatenate(c)), a.compose(b).concatenate(a.compose(c)))


@given(maps(scales=ANY_SCALE))
def test_json_gives_the_same_map_back(m):
    data = json.loads(json.dumps(m.to_json()))
    same(AxisMap.from_json(data), m)
    assert AxisMap.from_json(data).axis == m.axis


@given(maps())
def test_runs_spell_out_the_index_and_are_as_long_as_they_can_be(m):
    runs = m.runs()
    spelled = [i for start, n in runs for i in ([NEW] * n if start == NEW else range(start, start + n))]
    assert spelled == m.index.tolist()
    assert all(n > 0 for _, n in runs)
    for (start, n), (following, _) in itertools.pairwise(runs):
        assert (start == NEW) != (following == NEW) or (start != NEW and following != start + n)


def test_a_large_map_is_small_in_json():
    m = axis_map.widen("mlp", 27_264, 98_304)
    assert m.to_json()["runs"] == [[0, 27_264], [NEW, 98_304 - 27_264]]
    assert len(json.dumps(m.to_json())) < 200


def test_widen_appends_and_repeat_copies():
    assert axis_map.widen("embed", 3, 5).index.tolist() == [0, 1, 2, NEW, NEW]
    repeated = axis_map.repeat("layers", 2, [0, 1, 1, 0])
    assert repeated.index.tolist() == [0, 1, 1, 0]
    assert repeated.fresh.tolist() == [False, False, True, True]
    assert axis_map.widen("embed", 3, 3).is_identity and axis_map.repeat("layers", 2, [0, 1]).is_identity


HEADS = [(k * g, k, k2 * g2, k2) for k in range(1, 5) for g in range(1, 5) for k2 in range(1, 10) for g2 in range(1, 6)]


def _fits(heads, groups, dst_heads, dst_groups):
    """Every old group of g heads needs at least ceil(g / g') destination groups of its own."""
    return groups * -(-(heads // groups) // (dst_heads // dst_groups)) <= dst_groups


@pytest.mark.parametrize("src_groups", [1, 2, 3, 4])
def test_every_old_head_keeps_the_keys_and_values_it_had(src_groups):
    cases = [case for case in HEADS if case[1] == src_groups and _fits(*case)]
    assert len(cases) > 30
    for n, k, n2, k2 in cases:
        heads, kv_heads = axis_map.grouped_heads(n, k, n2, k2)
        assert (heads.src_size, heads.dst_size, kv_heads.src_size, kv_heads.dst_size) == (n, n2, k, k2)
        assert sorted(heads.index[heads.index != NEW]) == list(range(n))  # each old head exactly once
        for new_head, old_head in enumerate(heads.index):
            if old_head != NEW:
                assert kv_heads.index[new_head // (n2 // k2)] == old_head // (n // k), (n, k, n2, k2)
        assert set(kv_heads.index) >= set(range(k))
        for m in (heads, kv_heads):  # a part of a split group is a copy, but no new unit
            np.testing.assert_array_equal(m.fresh, m.index == NEW)


def test_heads_that_do_not_fit_are_refused():
    refused = [case for case in HEADS if not _fits(*case)]
    assert len(refused) > 30
    for n, k, n2, k2 in refused:
        with pytest.raises(ValueError, match=f"{n} heads in {k} groups do not fit into {n2} heads in {k2} groups"):
            axis_map.grouped_heads(n, k, n2, k2)


def test_a_group_grows_inside_itself():
    heads, kv_heads = axis_map.grouped_heads(4, 2, 6, 2)
    assert heads.index.tolist() == [0, 1, NEW, 2, 3, NEW]
    assert kv_heads.is_identity


def test_whole_new_groups_come_at_the_end():
    heads, kv_heads = axis_map.grouped_heads(4, 2, 6, 3)
    assert heads.index.tolist() == [0, 1, 2, 3, NEW, NEW]
    assert kv_heads.index.tolist() == [0, 1, NEW]


def test_groups_split_into_multi_head_attention_hold_copies():
    heads, kv_heads = axis_map.grouped_heads(4, 2, 4, 4)
    assert heads.is_identity
    assert kv_heads.index.tolist() == [0, 0, 1, 1] and not kv_heads.fresh.any()
    # Groups of three into groups of two: the second part of each has room for a new head.
    heads, kv_heads = axis_map.grouped_heads(6, 2, 8, 4)
    assert heads.index.tolist() == [0, 1, 2, NEW, 3, 4, 5, NEW]
    assert kv_heads.index.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: axis_map.AxisMap("mlp", 2, [0, 2]), "mlp: index outside the source axis of size 2"),
        (lambda: axis_map.AxisMap("mlp", 2, [0, -2]), "mlp: index outside the source axis of size 2"),
        (lambda: axis_map.AxisMap("mlp", 2, [0, NEW], fresh=[False, False]), "mlp: a NEW entry is not marked fresh"),
        (lambda: axis_map.AxisMap("mlp", 2, [0, 1], scale=[1.0]), "mlp: index, fresh.* differ in length"),
        (lambda: axis_map.AxisMap("mlp", 2, [0, 1], fresh=[False]), "mlp: index, fresh.* differ in length"),
        (
            lambda: axis_map.widen("mlp", 2, 3).compose(axis_map.identity("mlp", 2)),
            "mlp: cannot compose 3 with a map of 2",
        ),
        (
            lambda: axis_map.widen("mlp", 2, 3).concatenate(axis_map.widen("mlp", 3, 4)),
            "mlp: sources of size 2 and 3",
        ),
    ],
)
def test_maps_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
