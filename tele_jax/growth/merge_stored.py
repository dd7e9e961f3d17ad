"""Merging from checkpoint to checkpoint: bounded memory, several threads, resumable, with a receipt (`tele merge`).

    DST.partial/    while it is written; the same call goes on from there after a kill
    DST/            complete, with merge_receipt.json and the tokenizer of the first model

The destination has the bits that checkpoint.save would have written of surgery.merge. Optimizer states are left out.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tele_jax import checkpoint, files
from tele_jax.axes import check_tree
from tele_jax.checkpoint import chunk_files, chunked, layout, locate, packing, unfinished
from tele_jax.checkpoint.lazy import LazyArray
from tele_jax.config import differing_fields, require, to_dict
from tele_jax.files import PathLike, Table
from tele_jax.growth.masks import require_unmasked
from tele_jax.growth.merging import SCRATCH_BYTES, Merger, Recipe, check_dtypes, require_base, result_spec

RECEIPT_FILE = "merge_receipt.json"
_OVERHEAD_BYTES = 96 * 2**20  # names of files, and what Orbax takes to write an empty checkpoint


def merge_stored(
    recipe: Recipe,
    srcs: Sequence[PathLike],
    dst: PathLike,
    *,
    base: PathLike | None = None,
    memory_gb: float = 1.0,
    workers: int | None = None,
    resume: bool = True,
    chunk_bytes: int = layout.CHUNK_BYTES,
    copies: Sequence[Path] = (),
    progress: chunked.Progress | None = None,
) -> tuple[chunked.Written, Table]:
    """Merges checkpoints into the checkpoint `dst`, which appears when it is complete; returns figures and receipt.

    Args:
      srcs, base: checkpoints, as checkpoint.open_lazy takes them.
      dst: the step directory to write; must not exist.
      memory_gb: 10^9 bytes that may be used above what the process has already.
      workers: threads, by default two a core; fewer where memory is short.
      resume: go on with what an earlier call began; False removes that first.
      chunk_bytes: the largest chunk of the destination.
      copies: files that are copied into `dst`, such as the tokenizer.
      progress: progress(done bytes, all bytes), called in this thread.

    Raises:
      UserError: `dst` exists; models that do not fit each other (names the first that differs, and where), or the
        recipe; a model in the middle of a mask ramp; too little memory or disk; what was begun is another merge.
      DamageError: a chunk of a source is damaged (names leaf and file), or files could not be written.
    """
    require_base(recipe, base is not None)
    models = [checkpoint.open_lazy(path) for path in (*srcs, *([] if base is None else [base]))]
    for lazy in models:
        dst = locate.new_path(dst, lazy.path, "a merge of checkpoints")
    target = Path(dst)
    require(not target.exists(), f"{target}: exists already, and checkpoints are never overwritten; choose another DST")
    sources = recipe.sources([lazy.cfg.num_layers for lazy in models[: len(srcs)]])
    first = _require_fit(models, len(srcs), depths=bool(recipe.slices))
    spec = result_spec({name: array.leaf.spec for name, array in first.items["params"].items()}, len(sources))
    leaves = packing.packed({name: _stored(leaf, chunk_bytes) for name, leaf in spec.items()}, chunk_bytes)
    workers = _threads(models, leaves, memory_gb, workers)
    readers = [_Reader(lazy.items["params"], workers) for lazy in models]
    known = [{"path": str(lazy.path), "step": lazy.step, "params": checkpoint.fingerprint(lazy)} for lazy in models]
    named = {"sources": known[: len(srcs)], "base": None if base is None else known[-1]}
    entry = {"stage": target.name, "kind": "merge", **to_dict(recipe), **named}
    meta = layout.Meta(
        cfg=first.cfg.replace(num_layers=len(sources)),
        step=first.step,
        provenance=(*first.provenance, entry),
        items={"params": leaves},
        versions=layout.package_versions(),
    )
    merger = Merger(recipe, readers, sources, spec, workers)

    def fill(tile: unfinished.Tile, start: tuple[int, ...], out: np.ndarray) -> None:
        stacked = len(tile.leaf.spec.stack)  # chunks hold one index of every stacked axis
        part = chunked.inside(tile.leaf, start, out)[(0,) * stacked]
        merger.fill(part[...], tile.name, start[:stacked], start[stacked:])

    receipt = entry | {"src_cfg": to_dict(first.cfg), "dst_cfg": to_dict(meta.cfg)}
    receipt |= {"histories": [list(lazy.provenance) for lazy in models]}

    def finish(directory: Path) -> None:
        written = [
            LazyArray(f"params/{n}", locate.absolute(directory / "params" / n), leaf) for n, leaf in leaves.items()
        ]
        receipt["destination"] = {"params": chunk_files.fingerprint(written)}
        files.write_json(directory / RECEIPT_FILE, receipt)
        for file in copies:
            (directory / file.name).write_bytes(file.read_bytes())

    cut = [tile for name, leaf in leaves.items() for tile in unfinished.cut("params", name, leaf)]
    header = {"merge": entry | {"stage": ""}, "chunk_bytes": chunk_bytes}
    how = {"header": header, "workers": workers, "resume": resume, "progress": progress, "at_end": finish}
    return chunked.write_leaves(target, meta, cut, fill, **how), receipt


def _require_fit(models: Sequence["checkpoint.Lazy"], number: int, *, depths: bool) -> "checkpoint.Lazy":
    """Returns the first model, whose fields and dtypes all others have; depths: the number of layers is free.

    Raises:
      UserError: another architecture, or another dtype; a model behind masks.
    """
    first = models[0]
    for place, lazy in enumerate(models):
        require_unmasked(lazy.provenance, str(lazy.path))
        cfg = lazy.cfg.replace(num_layers=first.cfg.num_layers) if depths and place < number else lazy.cfg
        wrong = [f"{name}={have!r}, not {want!r}" for name, (have, want) in differing_fields(cfg, first.cfg).items()]
        require(not wrong, f"{lazy.path}: is not a model to merge with {first.path}: {'; '.join(wrong)}")
        spec = result_spec({n: a.leaf.spec for n, a in first.items["params"].items()}, lazy.cfg.num_layers)
        arrays = lazy.items["params"]
        check_tree(arrays, spec, f"{lazy.path}: is not a model to merge with {first.path}", dtypes=False)
        check_dtypes(arrays, first.items["params"], str(lazy.path))
    return first


def _stored(spec, chunk_bytes: int) -> layout.Leaf:
    size = np.dtype(spec.dtype).itemsize
    return layout.Leaf(spec, layout.chunk_shape(spec.shape, size, stacked=len(spec.stack), limit=chunk_bytes))


def _threads(models: Sequence["checkpoint.Lazy"], leaves: Mapping[str, layout.Leaf], memory_gb: float, workers) -> int:
    """The number of threads; each has a chunk of the destination, one of every source, and blocks in float64."""
    held = sum(max(array.leaf.chunk_bytes for array in lazy.items["params"].values()) for lazy in models)
    needed = {name: leaf.chunk_bytes + held + SCRATCH_BYTES for name, leaf in leaves.items()}
    return chunked.threads(memory_gb * 1e9, needed, workers, _OVERHEAD_BYTES)


class _Reader:
    """Reads parts of the tensors of a checkpoint as float64, from chunks that stay in memory until others need room."""

    def __init__(self, arrays: Mapping[str, LazyArray], slots: int):
        self._arrays = arrays
        self._cache = chunk_files.ChunkCache(slots, max(array.leaf.chunk_bytes for array in arrays.values()))

    def __call__(self, name: str, index: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        array = self._arrays[name]
        box = [*(slice(i, i + 1) for i in index), *part]
        out = np.empty([b.stop - b.start for b in box], np.float64)
        chunks = (range(b.start // n, -(-b.stop // n)) for b, n in zip(box, array.chunks, strict=True))
        for chunk in itertools.product(*chunks):
            origin = [c * n for c, n in zip(chunk, array.chunks, strict=True)]
            ends = [min(b.stop, o + n) for b, o, n in zip(box, origin, array.chunks, strict=True)]
            begins = [max(b.start, o) for b, o in zip(box, origin, strict=True)]
            there = tuple(slice(s - b.start, e - b.start) for s, e, b in zip(begins, ends, box, strict=True))
            here = tuple(slice(s - o, e - o) for s, e, o in zip(begins, ends, origin, strict=True))
            with self._cache.chunk(array, chunk) as values:
                out[there] = values[here]
        return out.reshape(out.shape[len(index) :])
