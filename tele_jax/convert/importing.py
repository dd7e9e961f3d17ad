"""From a release to a checkpoint of ours, chunk by chunk: bounded memory, several threads, resumable.

Chunks are cut along the axis that is the first in the tensor they come from, so that each is one piece of a file.
Those that are finished are noted (checkpoint/chunked.py): an import that was killed goes on where it was.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tele_jax.axes import ParamSpec, unflatten
from tele_jax.checkpoint import chunked, layout, locate, packing, unfinished
from tele_jax.config import ModelConfig, require, to_dict
from tele_jax.convert import beside, region
from tele_jax.convert.families import Part
from tele_jax.convert.files import Files, Stored
from tele_jax.convert.release import Release, open_release
from tele_jax.model.inputs import has_x64
from tele_jax.model.spec import flat_spec

_OVERHEAD_BYTES = 64 * 2**20  # names of files, and what Python and Orbax take beside what is counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported(chunked.Written):
    """The result of an import. bytes_read: bytes of tensors that were read."""

    release: Release
    bytes_read: int


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
      src: directory with config.json and *.safetensors, or a GGUF file.
      dst: the step directory to write; must not exist.
      format, dtype, vocab_size, rope_tables: as `open_release` takes them.
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
    dst = locate.new_path(dst, src, "an import")
    release = open_release(src, format, dtype=dtype, vocab_size=vocab_size, rope_tables=rope_tables)
    chunk_bytes = layout.CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    leaves = {
        name: _leaf(spec, release.parts[name, 0 if spec.stack else None][0], chunk_bytes)
        for name, spec in flat_spec(release.cfg).items()
    }
    leaves = packing.packed(leaves, chunk_bytes)
    meta = layout.Meta(
        cfg=release.cfg,
        step=0,
        provenance=(provenance_entry(release, dst.name),),
        items={"params": leaves},
        versions=layout.package_versions(),
    )
    needed = {name: leaf.chunk_bytes + region.SCRATCH_BYTES for name, leaf in leaves.items()}
    source = release.fingerprint

    def finish(directory: Path) -> None:
        require(release.fingerprint == source, f"{src}: its files changed while they were read; import it again")
        beside.copy(release.files, directory)
        beside.write(release.documents, directory)

    with Files() as files:
        written = chunked.write_leaves(
            dst,
            meta,
            _cut(release, leaves),
            functools.partial(_fill, release, files),
            header={
                "import": release.format,
                "source": source,
                "config": to_dict(release.cfg),
                "chunk_bytes": chunk_bytes,
                "provenance": meta.provenance,
            },
            workers=chunked.threads(memory_gb * 1e9, needed, workers, _OVERHEAD_BYTES),
            resume=resume,
            progress=progress,
            at_end=finish,
        )
    read = sum(stored.nbytes for stored in {stored for _, stored in release.parts.values()})
    return Imported(release=release, bytes_read=read, **vars(written))


def provenance_entry(release: Release, stage: str) -> dict[str, Any]:
    """The entry of a checkpoint's provenance; `exporting` reads config and buffers back from it."""
    entry: dict[str, Any] = {
        "stage": stage,
        "kind": "import",
        "format": release.format,
        "source": release.path.resolve().name,
    }
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


def _cut(release: Release, leaves: dict[str, layout.Leaf]) -> list[unfinished.Tile]:
    """All tiles, in the order in which what they need lies in the files."""
    cut = [tile for name, leaf in leaves.items() for tile in unfinished.cut("params", name, leaf)]

    def place(tile: unfinished.Tile) -> tuple[str, int, tuple[int, ...]]:
        _, stored = _place(release, tile.name, tile.leaf, tile.chunks[0])
        return str(stored.file), stored.offset, tile.chunks[0]

    return sorted(cut, key=place)


def _place(release: Release, name: str, leaf: layout.Leaf, chunk: Sequence[int]) -> tuple[Part, Stored]:
    return release.parts[name, chunk[0] if leaf.spec.stack else None]


def _fill(release: Release, files: Files, tile: unfinished.Tile, start: tuple[int, ...], out: np.ndarray) -> None:
    """Reads the numbers of one chunk, see `chunked.write_leaves`."""
    leaf, stacked = tile.leaf, len(tile.leaf.spec.stack)
    part, stored = _place(release, tile.name, leaf, start)
    out = chunked.inside(leaf, start, out)
    region.read(files, stored, part, leaf.spec.axes[stacked:], list(start[stacked:]), out[0] if stacked else out)


def load_hf(
    path: Any,
    format: str | None = None,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    rope_tables: str = "float32",
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a released checkpoint onto the default device.

        cfg, params = load_hf("TeleChat-7B")
        logits = tele.forward(cfg, params, tokens)

    Arguments as `open_release` takes them. A model that does not fit on one device is imported (`tele import`)
    and loaded onto a mesh (checkpoint.load).

    Raises:
      UserError: as open_release; float64 without jax_enable_x64; numbers that are not finite, named by file and tensor.
    """
    release = open_release(path, format, dtype=dtype, vocab_size=vocab_size, rope_tables=rope_tables)
    require(
        release.cfg.param_dtype != "float64" or has_x64(),
        f'{path}: float64 needs jax.config.update("jax_enable_x64", True), or --dtype float32',
    )
    leaves = {}
    with Files() as files, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, spec in flat_spec(release.cfg).items():
            values = np.empty(spec.shape, spec.dtype)
            layers = range(len(values)) if spec.stack else [None]
            list(pool.map(functools.partial(_read_leaf, release, files, name, values), layers))
            leaves[name] = jax.device_put(values)
    return release.cfg, unflatten(leaves)


def _read_leaf(release: Release, files: Files, name: str, values: np.ndarray, layer: int | None) -> None:
    part, stored = release.parts[name, layer]
    axes = flat_spec(release.cfg)[name].axes[layer is not None :]
    out = values if layer is None else values[layer]
    region.read(files, stored, part, axes, [0] * len(axes), out)
