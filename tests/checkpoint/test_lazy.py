"""Leaves that are read when they are indexed, by numpy's rules."""

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices

from tele_jax import checkpoint
from tele_jax.axes import ParamSpec, flatten
from tele_jax.checkpoint.layout import Leaf
from tele_jax.checkpoint.lazy import LazyArray, basic_index
from tele_jax.errors import DamageError
from tests.checkpoint.trees import CFG, assert_same, params

SHAPE = (4, 5, 3)
VALUES = np.arange(60, dtype=np.int32).reshape(SHAPE)


@pytest.fixture(scope="module")
def lazy(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy") / "3"
    state = optax.adam(1e-3).init(params())
    provenance = [{"stage": "pretrain"}]
    checkpoint.save(path, CFG, params(), opt_state=state, step=3, provenance=provenance, data_state=b"position")
    return checkpoint.open_lazy(path)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    path = tmp_path_factory.mktemp("cube") / "0"
    spec = {"w": ParamSpec(SHAPE, VALUES.dtype, ("layers",), ("embed",), ("mlp",))}
    checkpoint.save(path, CFG, {"w": VALUES}, spec=spec)
    return checkpoint.open_lazy(path).params["w"]


def test_it_says_what_is_there(lazy):
    assert (lazy.cfg, lazy.step, lazy.provenance) == (CFG, 3, ({"stage": "pretrain"},))
    assert lazy.data_state() == b"position"
    q = lazy.params["layers"]["attn"]["q"]
    assert q.shape == (3, 16, 4, 4)
    assert q.axes == ("layers", "embed", "heads", "head_dim")
    assert q.dtype == np.float32
    assert q.chunks == (1, 16, 4, 4)
    assert q.name == "params/layers.attn.q"
    assert q.nbytes == 3 * 16 * 4 * 4 * 4


def test_the_optimizer_state_is_a_tree_with_the_axes_of_the_parameters(lazy):
    assert set(lazy.opt_state["0"]) == {"count", "mu", "nu"}
    for name, array in flatten(lazy.opt_state["0"]["nu"]).items():
        param = flatten(lazy.params)[name]
        assert (array.shape, array.axes, array.chunks) == (param.shape, param.axes, param.chunks)
    assert lazy.opt_state["0"]["count"].axes == ()
    assert lazy.opt_state["0"]["count"][...] == 0


def test_whole_leaves(lazy):
    for name, array in flatten(lazy.params).items():
        assert_same(array.read(), np.asarray(flatten(params())[name]))
        assert_same(np.asarray(array), np.asarray(flatten(params())[name]))


def has_negative_step(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, slice) and (part.step or 1) < 0 for part in parts)


@given(index=basic_indices(SHAPE, allow_newaxis=False))
def test_indexing_is_numpys(cube, index):
    if has_negative_step(index):
        with pytest.raises(IndexError, match="need a step above 0"):
            cube[index]
    else:
        found = np.asarray(cube[index])
        np.testing.assert_array_equal(found, VALUES[index])
        assert found.dtype == VALUES.dtype


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (4, "index 4 is out of bounds for axis 0 with size 4"),
        ((0, -6), "index -6 is out of bounds for axis 1 with size 5"),
        ((0, 0, 0, 0), "too many indices"),
        ((..., ...), "a single ellipsis"),
        ([0, 1], "takes integers and slices, not list"),
        (None, "takes integers and slices, not NoneType"),
        (True, "takes integers and slices, not bool"),
        (0.5, "takes integers and slices, not float"),
    ],
    ids=repr,
)
def test_other_indices_are_refused(cube, index, message):
    with pytest.raises(IndexError, match=message):
        cube[index]


@given(start=st.integers(-9, 9), stop=st.integers(-9, 9), step=st.integers(1, 4), size=st.integers(0, 5))
def test_slices_stay_inside(start, stop, step, size):
    (part,) = basic_index(slice(start, stop, step), (size,))
    assert 0 <= part.start <= part.stop <= size or part.start == part.stop
    assert list(range(size)[part]) == list(range(size)[start:stop:step])


def test_it_prints_as_what_it_is(cube, tmp_path):
    assert repr(cube) == "LazyArray(params/w, int32[4,5,3], axes=('layers', 'embed', 'mlp'), chunks=(1, 5, 3))"
    never_there = LazyArray("params/x", tmp_path, Leaf(ParamSpec((2,), np.dtype("int8")), (2,)))
    with pytest.raises(DamageError, match=r"params/x: damaged: .*zarr.json.* does not exist"):
        never_there[0]
