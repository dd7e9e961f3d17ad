"""From a release to a checkpoint of ours, chunk by chunk: bounded memory, several threads, resumable.

Chunks are cut along the axis that is the first in the tensor they come from, so that each is one piece of a file.
Those that are finished are noted (checkpoint/chunked.py): an import that was killed goes on where it was.
"""

import contextlib
import dataclasses
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tele_jax.axes import ParamSpec
from tele_jax.checkpoint import chunked, chunks, layout
from tele_jax.config import require, to_dict
from tele_jax.convert import region, sidecar
from tele_jax.convert.families import Part
from tele_jax.convert.files import Files, Stored
from tele_jax.convert.release import Release, open_release
from tele_jax.errors import DamageError, UserError
from tele_jax.model.spec import flat_spec

_TILES_PER_CHUNK_LIMIT = 8  # small chunks are finished together
_OVERHEAD_BYTES = 64 * 2**20  # names of files, and what Python and Orbax take beside what is counted


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did. bytes_read: of tensors. tiles: resumed_tiles of them were finished by an earlier call."""

    release: Release
    seconds: float
    bytes_read: int
    bytes_written: int
    tiles: int
    resumed_tiles: int
    workers: int


def import_checkpoint(
    src: Any,
    dst: Any,
    *,
    format: str | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
    rope_tables: str = "float32",
    memory_gb: float = 1.0,
    workers: int | None = None,
    resume: bool = True,
    chunk_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Reads a released checkpoint into the step directory `dst`, which appears when it is complete.

    A call that was killed is repeated with the same arguments (memory_gb, workers and progress may differ) and goes on.
    Where a tensor of the release turns out to be bad, what was written is removed (directories above dst stay). What is
    refused before that, such as another release than the call began with, leaves what an earlier call wrote.

    Args:
      src: directory with config.json and *.safetensors.
      dst: the step directory to write; must not exist.
      format, dtype, vocab_size, rope_tables: as `release.open_release` takes them.
      memory_gb: 10^9 bytes that may be used above what the process has already.
      workers: threads, by default two a core, for half of them wait for the disk; fewer where memory is short.
      resume: go on with what an earlier call began; False removes that first.
      chunk_bytes: the largest chunk, layout.CHUNK_BYTES by default.
      progress: progress(done bytes, all bytes), called in this thread after every tile.

    Raises:
      UserError: `dst` exists or cannot be made, or what open_release raises; numbers that are not finite, named by file
        and tensor; too little memory for a chunk, or too little disk.
      DamageError: writing failed on the way; what is there is kept, for a call that goes on.
    """
    began = time.monotonic()
    local = dst = chunked.new_path(dst, src, "an import")
    release = open_release(src, format, dtype=dtype, vocab_size=vocab_size, rope_tables=rope_tables)
    chunk_bytes = layout.CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    leaves = {
        name: _leaf(spec, release.parts[name, 0 if spec.stack else None][0], chunk_bytes)
        for name, spec in flat_spec(release.cfg).items()
    }
    meta = layout.Meta(
        cfg=release.cfg,
        step=0,
        provenance=(provenance_entry(release, local.name),),
        items={"params": leaves},
        versions=layout.package_versions(),
    )
    workers = _divide_memory(leaves, memory_gb, workers)
    cut = _cut(release, leaves, chunk_bytes // _TILES_PER_CHUNK_LIMIT)
    header = {
        "import": release.format,
        "source": release.fingerprint,
        "config": to_dict(release.cfg),
        "chunk_bytes": chunk_bytes,
        "provenance": meta.provenance,
        "number of tiles": len(cut),
    }
    try:
        with chunked.Unfinished(dst, header, meta, cut, shard=(0, 1), resume=resume) as unfinished, Files() as files:
            left = [number for number in range(len(cut)) if number not in unfinished.done]
            work = functools.partial(_write_tile, release, cut, files, unfinished.path, threading.local())
            try:
                _run(work, left, cut, unfinished, workers, progress)
                require(
                    unfinished.complete or release.fingerprint == header["source"],
                    f"{src}: its files changed while they were read; import it again",
                )
            except UserError:  # of the release: trying again would find the same
                unfinished.discard()
                raise
            if not unfinished.complete:
                sidecar.copy(release.files, unfinished.path)
            unfinished.commit()
    except OSError as error:
        raise DamageError(f"{dst}: could not be finished ({error}); the same call goes on from there") from error
    return Imported(
        release=release,
        seconds=time.monotonic() - began,
        bytes_read=sum(stored.nbytes for stored in {stored for _, stored in release.parts.values()}),
        bytes_written=sum(cut[number].nbytes for number in left),
        tiles=len(cut),
        resumed_tiles=len(cut) - len(left),
        workers=workers,
    )


def provenance_entry(release: Release, stage: str) -> dict[str, Any]:
    """How the checkpoint was made; `exporting` reads config and buffers back from here."""
    entry = {"stage": stage, "kind": "import", "format": release.format, "source": release.path.resolve().name}
    if release.prefix:
        entry["prefix"] = release.prefix
    if release.constants:
        entry["constants"] = release.constants
    return entry | {"config": dict(release.keys.values), "generation": release.generation}


def _leaf(spec: ParamSpec, part: Part, chunk_bytes: int) -> layout.Leaf:
    stacked = len(spec.stack)
    order = [*range(stacked), *(stacked + i for i in region.cut_order(part, spec.axes[stacked:]))]
    shape = [spec.shape[i] for i in order]
    cut = layout.chunk_shape(shape, spec.dtype.itemsize, stacked=stacked, limit=chunk_bytes)
    return layout.Leaf(spec, tuple(cut[order.index(i)] for i in range(len(order))))


def _divide_memory(leaves: dict[str, layout.Leaf], memory_gb: float, workers: int | None) -> int:
    name, largest = max(leaves.items(), key=lambda item: item[1].chunk_bytes)
    each = largest.chunk_bytes + region.SCRATCH_BYTES
    memory = memory_gb * 1e9 - _OVERHEAD_BYTES
    require(math.isfinite(memory), f"memory_gb={memory_gb} is not a number of gigabytes")
    if memory < each:
        raise UserError(
            f"memory_gb={memory_gb:g} is too little for a chunk of {name}: it needs memory_gb="
            f"{(each + _OVERHEAD_BYTES) / 1e9:.3f}"
        )
    wanted = 2 * (os.cpu_count() or 1) if workers is None else max(1, workers)
    return min(wanted, int(memory // each))


def _cut(release: Release, leaves: dict[str, layout.Leaf], tile_bytes: int) -> list[chunked.Tile]:
    """All tiles, in the order in which what they need lies in the files."""
    cut = [tile for name, leaf in leaves.items() for tile in chunked.cut("params", name, leaf, tile_bytes, lambda c: c)]

    def place(tile: chunked.Tile) -> tuple[str, int, tuple[int, ...]]:
        _, stored = _place(release, tile.name, tile.leaf, tile.chunks[0])
        return str(stored.file), stored.offset, tile.chunks[0]

    return sorted(cut, key=place)


def _place(release: Release, name: str, leaf: layout.Leaf, chunk: Sequence[int]) -> tuple[Part, Stored]:
    return release.parts[name, chunk[0] if leaf.spec.stack else None]


def _run(
    work, left: list[int], cut: list[chunked.Tile], unfinished: chunked.Unfinished, workers: int, progress
) -> None:
    report = progress or (lambda done, total: None)
    total = sum(tile.nbytes for tile in cut)
    done = total - sum(cut[number].nbytes for number in left)
    report(done, total)
    with contextlib.closing(chunked.run(work, left, cut, unfinished.path, workers)) as finished:
        for number in finished:
            unfinished.finish(number)
            done += cut[number].nbytes
            report(done, total)


def _write_tile(
    release: Release, cut: list[chunked.Tile], files: Files, directory: Path, local: threading.local, number: int
) -> None:
    """Reads and writes the chunks of a tile."""
    tile = cut[number]
    leaf, stacked = tile.leaf, len(tile.leaf.spec.stack)
    size = leaf.chunk_bytes
    if not hasattr(local, "buffer") or len(local.buffer) < size:
        local.buffer = chunks.allocate(size)  # kept for the next tile: fresh memory is slow to touch
    values = local.buffer[: size - layout.CRC_BYTES].view(leaf.spec.dtype).reshape(leaf.chunks)
    for chunk, file in zip(tile.chunks, tile.files(), strict=True):
        part, stored = _place(release, tile.name, leaf, chunk)
        start = [c * n for c, n in zip(chunk, leaf.chunks, strict=True)]
        inside = [min(n, whole - s) for n, whole, s in zip(leaf.chunks, leaf.spec.shape, start, strict=True)]
        if tuple(inside) != leaf.chunks:
            values.fill(0)  # a chunk at the edge is stored whole
        out = values[tuple(slice(n) for n in inside)]
        out = out[0] if stacked else out
        region.read(files, stored, part, leaf.spec.axes[stacked:], start[stacked:], out)
        chunks.write_chunk(directory / file, local.buffer, size)
