"""Chunks read and written without TensorStore: past the page cache or not; each read once."""

import dataclasses
import errno
import fcntl
import itertools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tele_jax import checkpoint
from tele_jax.axes import ParamSpec
from tele_jax.checkpoint import chunk_files, layout, lazy, packing, read
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


def refuse(monkeypatch, where):
    """O_DIRECT is refused when it is set, or when something is written, as on a file system that has none."""
    control, write, state = fcntl.fcntl, os.pwrite, {"direct": False}

    def set_flags(descriptor, command, flags=0):
        if command == fcntl.F_SETFL:
            if where == "fcntl" and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            state["direct"] = bool(flags & os.O_DIRECT)
        return control(descriptor, command, flags)

    def refusing(*args):
        if where == "pwrite" and state["direct"]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(*args)

    monkeypatch.setattr(fcntl, "fcntl", set_flags)
    monkeypatch.setattr(os, "pwrite", refusing)


@pytest.mark.parametrize("refused", [None, "fcntl", "pwrite"])
@pytest.mark.parametrize("files", [None, (2, 700, 500), (3, 700, 500)])
def test_tensorstore_reads_what_is_written(refused, files, tmp_path, monkeypatch):
    """Large chunks begin at a page; the last file of (2, 700, 500) has an entry for a chunk that does not exist."""
    values = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    leaf = layout.Leaf(ParamSpec(SHAPE, np.dtype(np.float32)), (1, 700, 500), files=files)
    (tmp_path / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "array", "fill_value": 0, **layout.zarr_metadata(leaf)})
    )
    size = leaf.chunk_bytes
    assert size > 2**20 and size % 4096
    if refused:
        refuse(monkeypatch, refused)
    buffer = chunk_files.allocate(size)
    for index in itertools.product(*map(range, leaf.file_grid)):
        path = tmp_path / layout.chunk_key(index)
        with chunk_files.FileWriter(path, leaf, index) as file:
            for chunk in reversed(packing.chunks_of(leaf, index)):  # in any order
                buffer[: size - 4] = values[chunk[0]].reshape(-1).view(np.uint8)
                file.write(chunk, buffer)
        assert path.stat().st_size == packing.file_bytes(leaf, index)
    array = lazy.LazyArray("params/w", epath.Path(tmp_path), leaf)
    np.testing.assert_array_equal(array.read(), values)
    assert not list(read._verify_array(array))
    for chunk in range(3):
        chunk_files.read_chunk(array, (chunk, 0, 0), buffer)
        assert buffer[: size - 4].tobytes() == values[chunk].tobytes()


def test_other_failures_are_not_hidden(tmp_path):
    leaf = layout.Leaf(ParamSpec((4,), np.dtype(np.float32)), (4,))
    with pytest.raises(OSError, match="directory"), chunk_files.FileWriter(tmp_path, leaf, (0,)):
        pass


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
    file = Path(array.path) / layout.chunk_key((0, 0, 0))
    whole = file.read_bytes()
    cache = chunk_files.ChunkCache(1, array.leaf.chunk_bytes)
    middle = 2 * array.leaf.chunk_bytes - 5
    damages = [
        (whole[:-1], "4,200,063 bytes, and no index with its checksum at their end"),
        (whole[:middle] + b"x" + whole[middle + 1 :], "its checksum is not that of its content"),
    ]
    try:
        for damaged, message in damages:
            file.write_bytes(damaged)
            array = dataclasses.replace(array)  # it remembers no index
            with (
                pytest.raises(DamageError, match=f"params/w: damaged: {file}: .*{message}"),
                cache.chunk(array, (1, 0, 0)),
            ):
                pass
    finally:
        file.write_bytes(whole)
    with cache.chunk(array, (1, 0, 0)) as values:
        np.testing.assert_array_equal(values[0], array[1])
