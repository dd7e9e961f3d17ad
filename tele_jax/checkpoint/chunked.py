"""The one writer of stored leaves: chunk by chunk, by any number of processes, each of which may be killed any time.

    leaves = packed(leaves, chunk_bytes)
    tiles = [tile for name, leaf in leaves.items() for tile in cut("params", name, leaf)]
    write_leaves(dst, meta, tiles, fill, header={"what": "is made of what"}, workers=4)

`fill(tile, start, out)` computes the numbers of one chunk: growth on disk and imports give only that.
"""

import contextlib
import dataclasses
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tele_jax.checkpoint import chunk_files, layout
from tele_jax.checkpoint.chunk_files import allocate, flush
from tele_jax.checkpoint.unfinished import FLUSHING, Tile, Unfinished
from tele_jax.config import require
from tele_jax.errors import DamageError, UserError

# fill(tile, start, out), see `write_leaves`; progress(done bytes, all bytes).
Fill = Callable[[Tile, tuple[int, ...], np.ndarray], None]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Written:
    """Account of a call of `write_leaves`. complete: the checkpoint is there; else other shards have still to finish.

    tiles: of this shard, resumed_tiles of them finished by an earlier call. bytes_written: of chunks, by this call.
    """

    complete: bool
    seconds: float
    bytes_written: int
    tiles: int
    resumed_tiles: int
    workers: int


def write_leaves(
    dst: Path,
    meta: layout.Meta,
    tiles: Sequence[Tile],
    fill: Fill,
    *,
    header: Mapping[str, object],
    workers: int,
    shard: tuple[int, int] = (0, 1),
    resume: bool = True,
    progress: Progress | None = None,
    at_end: Callable[[Path], None] | None = None,
) -> Written:
    """Writes the checkpoint `dst`, which appears when it is complete. A call that was killed is repeated and goes on.

    Args:
      dst: step directory to make; see `new_path`.
      meta: config, step, provenance and the leaves of the checkpoint.
      tiles: all chunks of all leaves, in the order in which they are made.
      fill: fill(tile, start, out) computes the numbers of the chunk whose first entry is at `start` of the leaf, into
        out[tile.leaf.chunks]; what lies beyond the edge of the leaf stays zero. Called by `workers` threads at once. A
        UserError that it raises says that the source can never be read: what was written is then removed.
      header: JSON values that say what is written from what; a call that goes on must have the same.
      workers: threads that compute.
      shard: (i, n), the i-th part of the work, for n processes; the last to finish makes `dst` complete.
      resume: go on with what an earlier call began; False removes that first.
      progress: progress(done bytes, all bytes of this shard), called in this thread after every tile.
      at_end: at_end(directory) is called once before the checkpoint gets its name, by whoever finishes it.

    Raises:
      UserError: `dst` exists; what was begun has another header, or is being written by another process; too little
        disk; as fill raises.
      DamageError: files could not be written; the same call goes on from there.
    """
    began = time.monotonic()
    header = {**header, "number of tiles": len(tiles)}
    report = progress or (lambda done, total: None)
    try:
        with Unfinished(dst, header, meta, tiles, shard=shard, resume=resume) as unfinished:
            mine = _part(tiles, shard)
            left = [number for number in mine if number not in unfinished.done]
            total = sum(tiles[number].nbytes for number in mine)
            done = total - sum(tiles[number].nbytes for number in left)
            report(done, total)
            try:
                with contextlib.closing(_finished_tiles(fill, left, tiles, unfinished.path, workers)) as finished:
                    for number in finished:
                        unfinished.finish(number)
                        done += tiles[number].nbytes
                        report(done, total)
                if at_end is not None and not unfinished.complete:
                    at_end(unfinished.path)
            except UserError:  # of the source: trying again would find the same
                unfinished.discard()
                raise
            complete = unfinished.commit()
    except OSError as error:
        raise DamageError(f"{dst}: could not be finished ({error}); the same call goes on from there") from error
    return Written(
        complete=complete,
        seconds=time.monotonic() - began,
        bytes_written=sum(tiles[number].nbytes for number in left),
        tiles=len(mine),
        resumed_tiles=len(mine) - len(left),
        workers=workers,
    )


def threads(memory_bytes: float, needed: Mapping[str, int], workers: int | None, overhead_bytes: int) -> int:
    """The number of threads that `memory_bytes` have room for: `workers`, or two a core, half of which wait for disks.

    needed: {leaf: bytes that a thread holds while it makes a chunk of the leaf}. overhead_bytes: used once, beside.

    Raises:
      UserError: there is too little memory for one thread; names the largest leaf.
    """
    require(math.isfinite(memory_bytes), f"memory_gb={memory_bytes / 1e9} is not a number of gigabytes")
    name, each = max(needed.items(), key=lambda item: item[1])
    if memory_bytes - overhead_bytes < each:
        raise UserError(
            f"memory_gb={memory_bytes / 1e9:g} is too little for {name}: a chunk of it, and what it is made of, need "
            f"memory_gb={(each + overhead_bytes) / 1e9:.3f}"
        )
    wanted = 2 * (os.cpu_count() or 1) if workers is None else max(1, workers)
    return min(wanted, int((memory_bytes - overhead_bytes) // each))


def inside(leaf: layout.Leaf, start: Sequence[int], chunk: np.ndarray) -> np.ndarray:
    """The part of a chunk, as a view, that lies inside its leaf."""
    return chunk[tuple(slice(min(n, size - s)) for n, size, s in zip(leaf.chunks, leaf.spec.shape, start, strict=True))]


def _part(tiles: Sequence[Tile], shard: tuple[int, int]) -> list[int]:
    """The numbers of the tiles of one shard: neighbours, for they share chunks of the source; equal bytes."""
    index, count = shard
    ends = np.cumsum([tile.nbytes for tile in tiles])
    owner = (ends - 1) * count // ends[-1]
    return np.flatnonzero(owner == index).tolist()


def _write_tile(fill: Fill, tile: Tile, directory: Path, local: threading.local) -> None:
    """Computes and writes the chunks of a tile, which are a file."""
    leaf, size = tile.leaf, tile.leaf.chunk_bytes
    if not hasattr(local, "buffer") or len(local.buffer) < size:
        local.buffer = allocate(size)  # kept for the next tile: fresh memory is slow to touch
    values = local.buffer[: size - layout.CRC_BYTES].view(leaf.spec.dtype).reshape(leaf.chunks)
    with chunk_files.FileWriter(directory / tile.file, leaf, tile.index) as file:
        for chunk in tile.chunks:
            start = tuple(c * n for c, n in zip(chunk, leaf.chunks, strict=True))
            if inside(leaf, start, values).shape != values.shape:
                values.fill(0)  # a chunk at the edge is stored whole
            fill(tile, start, values)
            file.write(chunk, local.buffer)


def _finished_tiles(
    fill: Fill, numbers: Sequence[int], tiles: Sequence[Tile], directory: Path, workers: int
) -> Generator[int, None, None]:
    """Makes tiles in so many threads, and yields the number of each when its files are on the disk."""
    results: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    computing = ThreadPoolExecutor(workers, "tele_tiles")
    flushing = ThreadPoolExecutor(FLUSHING, "tele_flush")
    local = threading.local()

    def compute(number: int) -> None:
        try:
            _write_tile(fill, tiles[number], directory, local)
            flushing.submit(finish, number)
        except BaseException as error:
            results.put(error)

    def finish(number: int) -> None:
        try:
            flush(directory / tiles[number].file)
            results.put(number)
        except BaseException as error:
            results.put(error)

    try:
        for number in numbers:
            computing.submit(compute, number)
        for _ in numbers:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        computing.shutdown(cancel_futures=True)
        flushing.shutdown()
