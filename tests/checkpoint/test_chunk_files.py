"""Chunk files read and written without TensorStore: the same bytes, past the page cache or not; each read once."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tele_jax import checkpoint
from tele_jax.axes import ParamSpec
from tele_jax.checkpoint import chunk_files, layout
from tele_jax.errors import DamageError
from tests.checkpoint.trees import CFG

SHAPE = (3, 700, 500)  # chunks of 1.4 MB, which is not a whole number of pages


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    path = tmp_path_factory.mktemp("chunk_files") / "0"
    values = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    spec = {"w": ParamSpec(SHAPE, np.dtype(np.float32), ("layers",), ("embed",), ("mlp",))}
    checkpoint.save(path, CFG, {"w": values}, spec=spec)
    return checkpoint.open_lazy(path).params["w"]


def refuse(monkeypatch, name, allowed):
    """os.open or os.write fail on files opened with O_DIRECT, as on a file system that has none."""
    original = getattr(os, name)

    def refusing(first, *args):
        if (name == "open" and args[0] & os.O_DIRECT) or (name == "write" and not allowed()):
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(first, *args)

    monkeypatch.setattr(os, name, refusing)


@pytest.mark.parametrize("refused", [None, "open", "write"])
def test_a_chunk_is_written_as_tensorstore_writes_it(refused, array, tmp_path, monkeypatch):
    size = array.leaf.chunk_bytes
    assert size > 2**20 and size % 4096
    buffer = chunk_files.allocate(size)
    buffer[: size - 4] = array[1].reshape(-1).view(np.uint8)
    if refused:
        answers = iter([False, True, True])
        refuse(monkeypatch, refused, lambda: next(answers))
    file = tmp_path / "deeper" / "c"
    chunk_files.write_chunk(file, buffer, size)
    assert file.read_bytes() == (array.path / layout.chunk_key((1, 0, 0))).read_bytes()
    chunk_files.write_chunk(file, buffer, 16)
    assert file.stat().st_size == 16


def test_other_failures_are_not_hidden(tmp_path):
    with pytest.raises(OSError, match="directory"):
        chunk_files.write_chunk(tmp_path, chunk_files.allocate(2**21), 2**21)


def test_each_chunk_is_read_once_by_all_threads(array):
    cache = chunk_files.ChunkCache(4, array.leaf.chunk_bytes)
    barrier = threading.Barrier(4)

    def read(_):
        barrier.wait()
        with cache.chunk(array, (2, 0, 0)) as values:
            return np.array_equal(values[0], array[2])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert cache.bytes_read == array.leaf.chunk_bytes


def test_the_chunk_that_was_not_used_longest_makes_room(array):
    cache = chunk_files.ChunkCache(2, array.leaf.chunk_bytes)
    read = 0
    for index, is_read in [(0, 1), (1, 1), (0, 0), (2, 1), (0, 0), (1, 1), (2, 1)]:
        with cache.chunk(array, (index, 0, 0)) as values:
            np.testing.assert_array_equal(values[0], array[index])
        read += is_read * array.leaf.chunk_bytes
        assert cache.bytes_read == read


def test_a_damaged_chunk_is_refused_and_its_room_given_back(array):
    file = Path(array.path) / layout.chunk_key((1, 0, 0))
    whole = file.read_bytes()
    cache = chunk_files.ChunkCache(1, array.leaf.chunk_bytes)
    damages = [(whole[:-5] + b"x" + whole[-4:], "checksum"), (whole[:-1], "1,400,003 bytes, expected 1,400,004")]
    try:
        for damaged, message in damages:
            file.write_bytes(damaged)
            with (
                pytest.raises(DamageError, match=f"params/w: damaged: {file}: .*{message}"),
                cache.chunk(array, (1, 0, 0)),
            ):
                pass
    finally:
        file.write_bytes(whole)
    with cache.chunk(array, (1, 0, 0)) as values:
        np.testing.assert_array_equal(values[0], array[1])
