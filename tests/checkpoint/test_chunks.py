"""The grid of chunks: one layer alone, bounded files, and every process its own."""

import json
import math
import shutil

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tele_jax import checkpoint
from tele_jax.axes import flatten
from tele_jax.checkpoint import layout
from tele_jax.errors import DamageError
from tests.checkpoint.trees import CFG, assert_same, chunk_files, params

LIMIT = 4096


@st.composite
def leaves(draw):
    """(shape, number of stacked axes, shard shape): the shard divides the shape, as JAX asks."""
    shape = tuple(draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)))
    shard = tuple(size // draw(st.sampled_from([d for d in (1, 2, 3, 4, 8) if size % d == 0])) for size in shape)
    return shape, draw(st.integers(0, min(2, len(shape) - 1))), shard


@given(leaf=leaves(), itemsize=st.sampled_from([1, 2, 4, 8]))
def test_chunks_are_bounded_and_never_straddle_shards(leaf, itemsize):
    shape, stacked, shard = leaf
    chunk = layout.chunk_shape(shape, itemsize, stacked=stacked, shard=shard, limit=LIMIT)
    assert chunk[:stacked] == (1,) * stacked
    assert math.prod(chunk) * itemsize <= LIMIT
    for size, whole, part in zip(chunk, shape, shard, strict=True):
        assert 1 <= size <= part
        assert part == whole or part % size == 0


@given(leaf=leaves(), itemsize=st.sampled_from([1, 2, 4, 8]))
def test_chunks_are_not_needlessly_small(leaf, itemsize):
    """Where one process writes all, a chunk is everything, or of the order of the limit."""
    shape, stacked, _ = leaf
    chunk = layout.chunk_shape(shape, itemsize, stacked=stacked, limit=LIMIT)
    if (1,) * stacked + shape[stacked:] != chunk:
        assert math.prod(chunk) * itemsize > LIMIT / 3


@pytest.mark.parametrize(
    ("shape", "stacked", "expected"),
    [
        ((80, 8192, 21824), 1, (1, 1366, 21824)),  # 52B gate: 6 files of 119 MB a layer
        ((80_000, 8192), 0, (4000, 8192)),  # its embedding: 20 files of 131 MB
        ((140, 20480, 98304), 1, (1, 336, 98304)),  # 1T: 61 files a layer
        ((64, 5120), 1, (1, 5120)),
        ((), 0, ()),
        ((0, 7), 0, (1, 7)),
    ],
)
def test_chunks_of_real_shapes(shape, stacked, expected):
    assert layout.chunk_shape(shape, 4, stacked=stacked) == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("chunks") / "0"
    checkpoint.save(path, CFG, params(), opt_state=optax.adam(1e-3).init(params()))
    return path


def test_the_stored_grid_has_one_layer_a_chunk(saved):
    specs = checkpoint.open_lazy(saved).params
    for name, array in flatten(specs).items():
        for directory in (saved / "params" / name, saved / "opt_state" / f"0.mu.{name}"):
            stored = json.loads((directory / "zarr.json").read_text())
            stacked = array.axes[0] == "layers"
            assert stored["chunk_grid"]["configuration"]["chunk_shape"] == list(array.shape)  # one file
            assert len(chunk_files(directory, "")) == 1
            codecs = stored["codecs"]
            if stacked:
                assert codecs[0]["configuration"]["chunk_shape"] == [1, *array.shape[1:]]
                codecs = codecs[0]["configuration"]["codecs"]
            assert codecs[-1]["name"] == "crc32c"


@pytest.mark.parametrize("leaf", ["layers.attn.q", "layers.mlp.down", "layers.mlp_norm.scale"])
def test_a_layer_is_read_from_its_own_chunks(saved, tmp_path, leaf):
    """All other chunks of the leaf are made zeros first, so that reading them would be an error."""
    step = tmp_path / "0"
    shutil.copytree(saved, step)
    (file,) = chunk_files(step, f"params/{leaf}")
    array = flatten(checkpoint.open_lazy(step).params)[leaf]
    size = array[1].nbytes + 4
    content = file.read_bytes()
    assert len(content) == 3 * size + 3 * 16 + 4
    file.write_bytes(bytes(size) + content[size : 2 * size] + bytes(size) + content[3 * size :])
    array = flatten(checkpoint.open_lazy(step).params)[leaf]
    assert_same(array[1], np.asarray(flatten(params())[leaf][1]))
    with pytest.raises(DamageError, match=rf"params/{leaf}: damaged: .*[dD]igest"):
        array[2]
