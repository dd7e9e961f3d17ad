"""From a checkpoint of ours, or from arrays, to a release: every chunk is read once, and goes where it belongs.

The files are made in full size under DST.partial, filled piece by piece, and renamed to DST when all is on the disk.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import Params, flatten, require_arrays
from tele_jax.checkpoint import chunk_files, layout, locate
from tele_jax.config import ModelConfig, require
from tele_jax.convert import beside, configs, families, gguf, gguf_tokenizer, region
from tele_jax.convert.families import FORMATS, LLAMA_LIKE, Part, Tensor
from tele_jax.convert.files import DTYPES, Files, Stored, create, split
from tele_jax.data.templates import release_of
from tele_jax.errors import DamageError, UserError, abridged
from tele_jax.files import PathLike, Table, new_directory
from tele_jax.model.adapters import merge_tile
from tele_jax.model.spec import flat_spec

if TYPE_CHECKING:
    from tele_jax.checkpoint import Lazy

SHARD_GB = 5.0  # of numbers in a file, as transformers cuts them
_BLOCK_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Exported:
    """The result of an export. shards: files of weights. notes: one line each, for the user."""

    cfg: ModelConfig
    seconds: float
    tensors: int
    bytes_written: int
    shards: list[str]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of a leaf: `start` and `shape` over all its axes; read() gives its values while it is open."""

    leaf: str
    axes: tuple[str, ...]
    stacked: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], contextlib.AbstractContextManager[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Outline:
    """A description of what an export will write. document: config.json, or metadata of GGUF in its words."""

    format: str
    folded: families.Folded
    tensors: list[Tensor]
    document: Table
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def outline(
    cfg: ModelConfig,
    format: str,
    *,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    provenance: Sequence[Table] = (),
) -> Outline:
    """Translates config and tensor list.

    Args:
      dtype: of the file: bfloat16, float16, float32 or float64; by default that of the parameters.
      max_seq_len: the context that the config promises; by default the model's.
      provenance: of the checkpoint; where it was imported from the same format, keys and names are those of then.

    Raises:
      UserError: the format cannot express the model exactly.
      DamageError: the provenance of an import is not what was written.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r}: not one of {', '.join(FORMATS)}")
    names = [known.name for known in DTYPES.values()]
    if dtype is not None and dtype not in names:
        raise UserError(f"dtype {dtype!r}: not one of {', '.join(names)}")
    if max_seq_len is not None:
        cfg = cfg.replace(max_seq_len=max_seq_len)
    folded = families.fold(cfg, format)
    target = jnp.dtype(cfg.param_dtype if dtype is None else dtype)
    if format == "gguf" and target.name == "float64":
        raise UserError("format gguf: llama.cpp runs float32, float16 and bfloat16; choose one with --dtype")
    if not folded.is_exact and dtype is None and target.itemsize < 4:
        factors = ", ".join(f"{leaf} by {factor:g}" for leaf, factor in folded.factors.items())
        raise UserError(
            f"format {format}: has no multipliers, and multiplying {factors} would round in {target.name}; "
            f"--dtype float32 keeps them, --dtype {target.name} rounds to nearest"
        )
    release = release_of(provenance)
    if release is not None and not {"format", "config"} <= release.keys():
        raise DamageError("provenance: damaged, the import has no format or no config")
    family = "llama" if format == "gguf" else format
    known = release if release is not None and release["format"] == family else {}
    constants = known.get("constants", {})
    tensors = [
        dataclasses.replace(tensor, constant=constants.get(tensor.name, tensor.constant))
        for tensor in families.expected(folded.cfg, format, target, _prefix(known, folded.cfg))
    ]
    document = configs.write(folded.cfg, family, target, release)
    return Outline(format, folded, tensors, document, _notes(cfg, folded, format))


def _prefix(known: Mapping[str, Any], cfg: ModelConfig) -> str | None:
    """The prefix of telechat's names: that of the import, where the embedding is tied, or is not, as it was then."""
    if not known or configs.read(configs.Keys(known["config"], "config.json"), known["format"]).tie_embeddings != (
        cfg.tie_embeddings
    ):
        return None
    return known.get("prefix", "")


def _notes(cfg: ModelConfig, folded: families.Folded, format: str) -> list[str]:
    notes = [f"folded: {leaf} is multiplied by {factor:g}" for leaf, factor in folded.factors.items()]
    if folded.cfg.padded_vocab_size < cfg.padded_vocab_size:
        notes.append(f"left out: rows {cfg.vocab_size:,} to {cfg.padded_vocab_size - 1:,} of the vocabulary, padding")
    if cfg.rope.ntk is not None and format in (*LLAMA_LIKE, "tele_flm"):
        notes.append(
            f"rotary base {cfg.rope_length_factors(1)[0]:,.1f}, exact up to {cfg.max_seq_len:,} tokens; beyond "
            f"{cfg.rope.ntk.trained_length:,} this model changes it, which {format} cannot"
        )
    return notes


def export_checkpoint(
    src: PathLike,
    dst: PathLike,
    *,
    format: str,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    template: str | None = None,
    shard_gb: float = SHARD_GB,
    memory_gb: float = 1.0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes a checkpoint of ours as a directory that is like a release; it appears when it is complete.

    Args:
      src: a checkpoint, as checkpoint.open_lazy takes it; adapters are merged into their base on the way.
      dst: the directory to write; must not exist. Format gguf writes one file, model.gguf, in it.
      format, dtype, max_seq_len: as `outline` takes them.
      template: name of the dialogue template that a llama or gguf export gets (beside.py); by default that of the
        tokenizer or of the release.
      shard_gb: 10^9 bytes of numbers in a file, at most, unless a tensor has more.
      memory_gb: 10^9 bytes that may be used above what the process has already.
      workers: threads, by default as many as cores; fewer where memory is short.
      progress: progress(done bytes, all bytes), called in this thread.

    Raises:
      UserError: `dst` exists or cannot be made; the format cannot express the model; numbers become infinite in dtype;
        src is in the middle of a growth behind masks.
      DamageError: a chunk of src is damaged, or has numbers that are not finite; writing failed. Nothing is left
        after either, but for directories above dst.
    """
    from tele_jax.checkpoint import adapted, open_lazy
    from tele_jax.growth.masks import require_unmasked

    locate.local_path(src, "an export")
    lazy = open_lazy(src)
    dst = locate.new_path(dst, lazy.path, "an export")
    require_unmasked(lazy.provenance, str(src))
    plan = outline(lazy.cfg, format, dtype=dtype, max_seq_len=max_seq_len, provenance=lazy.provenance)
    bottom, upon = adapted.unfold(lazy)
    arrays = bottom.items["params"]
    largest = max(array.leaf.chunk_bytes for array in arrays.values())
    # A merge holds a chunk of bfloat16 in float32 and its product besides, and the result.
    threads = _threads(largest * (6 if upon else 1), memory_gb, workers)
    buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(threads):
        buffers.put(chunk_files.allocate(largest))
    pieces = [piece for array in arrays.values() for piece in _chunks_of(array, buffers, upon)]
    files_beside = beside.find_beside(Path(os.fspath(lazy.path)), programs=beside.comes_from(lazy.provenance, format))
    documents: Table = {}
    if format == "gguf":
        cfg = plan.folded.cfg
        documents, ids, notes = gguf_tokenizer.of_checkpoint(files_beside, lazy.provenance, cfg, template)
        files_beside, plan = [], dataclasses.replace(plan, document=plan.document | ids, notes=plan.notes + notes)
    elif format == "llama" and (template is not None or not beside.is_a_release_of(lazy.provenance, format)):
        made = beside.ready_to_chat(files_beside, lazy.provenance, plan.folded.cfg.max_seq_len, template)
        files_beside, documents, ids, notes = made
        plan = dataclasses.replace(plan, document=plan.document | ids, notes=plan.notes + notes)
    return write(dst, plan, pieces, files_beside, documents, shard_gb=shard_gb, workers=threads, progress=progress)


def _threads(largest: int, memory_gb: float, workers: int | None) -> int:
    each = largest + 2 * region.SCRATCH_BYTES
    require(math.isfinite(memory_gb), f"memory_gb={memory_gb} is not a number of gigabytes")
    if memory_gb * 1e9 < each:
        raise UserError(f"memory_gb={memory_gb:g} is too little for the largest chunk: it needs {each / 1e9:.3f}")
    return min((os.cpu_count() or 1) if workers is None else max(1, workers), int(memory_gb * 1e9 // each))


def _chunks_of(array: Any, buffers: queue.SimpleQueue, upon: Sequence["Lazy"]) -> Iterator[Piece]:
    """The chunks of a leaf, with the adapters in the checkpoints `upon` merged into them."""
    leaf, spec = array.leaf, array.leaf.spec
    name = array.name.removeprefix("params/")
    merges = [
        (own.items["adapters"][f"{name}.a"].read(), own.items["adapters"][f"{name}.b"].read(), own.adapter.lora.scale)
        for own in upon
        if own.adapter is not None and f"{name}.a" in own.items["adapters"]
    ]
    for index in itertools.product(*map(range, leaf.grid)):
        start = tuple(i * n for i, n in zip(index, leaf.chunks, strict=True))
        shape = tuple(min(n, whole - s) for n, whole, s in zip(leaf.chunks, spec.shape, start, strict=True))

        @contextlib.contextmanager
        def read(index=index, shape=shape, start=start) -> Iterator[np.ndarray]:
            buffer = buffers.get()
            try:
                chunk_files.read_chunk(array, index, buffer)
                values = buffer[: leaf.chunk_bytes - layout.CRC_BYTES].view(spec.dtype).reshape(leaf.chunks)
                values = values[tuple(slice(n) for n in shape)]
                for merge in merges:
                    values = merge_tile(spec, values, start, *merge)
                yield values
            finally:
                buffers.put(buffer)

        yield Piece(name, spec.axes, len(spec.stack), start, shape, read)


def write(
    dst: PathLike,
    plan: Outline,
    pieces: Sequence[Piece],
    files_beside: Sequence[Path],
    documents: Mapping[str, Any] | None = None,
    *,
    shard_gb: float,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes weights, config.json, the files beside, and documents by name. Raises as export_checkpoint.

    documents: tables of JSON by file name; for format gguf the metadata of the tokenizer.
    """
    began = time.monotonic()
    require(0 < shard_gb < math.inf, f"shard_gb={shard_gb:g} must be above 0, and finite")
    target = locate.local_path(dst, "an export")
    as_gguf = plan.format == "gguf"
    shards = {gguf.SINGLE: plan.tensors} if as_gguf else split(plan.tensors, int(shard_gb * 1e9))
    report = progress or (lambda done, total: None)
    with _making(target, plan.nbytes) as directory:
        if as_gguf:
            stored = gguf.create(directory / gguf.SINGLE, plan.tensors, plan.document, documents or {})
        else:
            stored = create(directory, shards)
        with Files(os.O_RDWR) as files, ThreadPoolExecutor(workers, "tele_export") as pool:
            _write_constants(files, stored, plan.tensors)
            places = {(part.leaf, part.layer): (part, stored[t.name]) for t in plan.tensors for part in t.parts}
            jobs = {pool.submit(_write_piece, files, piece, places, plan.folded): piece for piece in pieces}
            sizes = {job: np.prod(piece.shape, dtype=float) for job, piece in jobs.items()}
            done, total = 0.0, sum(sizes.values())
            try:
                for job in as_completed(jobs):
                    job.result()
                    done += sizes[job]
                    report(int(plan.nbytes * done / total), plan.nbytes)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if not as_gguf:
            (directory / "config.json").write_text(json.dumps(plan.document, indent=2) + "\n")
            beside.copy(files_beside, directory)
            beside.write(documents or {}, directory)
    return Exported(
        cfg=plan.folded.cfg,
        seconds=time.monotonic() - began,
        tensors=len(plan.tensors),
        bytes_written=plan.nbytes,
        shards=list(shards),
        notes=plan.notes,
    )


def _write_piece(
    files: Files, piece: Piece, places: Mapping[tuple[str, int | None], tuple[Part, Stored]], folded: families.Folded
) -> None:
    axes, start = piece.axes[piece.stacked :], piece.start[piece.stacked :]
    # Rows of the vocabulary that are padding end here.
    shape = [
        min(n, folded.cfg.axis_sizes[a] - s) for a, s, n in zip(axes, start, piece.shape[piece.stacked :], strict=True)
    ]
    if min(shape) <= 0:
        return
    with piece.read() as values:
        layers = range(piece.start[0], piece.start[0] + piece.shape[0]) if piece.stacked else [None]
        for i, layer in enumerate(layers):
            part, stored = places[piece.leaf, layer]
            inside = (values[i] if piece.stacked else values)[tuple(slice(n) for n in shape)]
            where = piece.leaf if layer is None else f"{piece.leaf} of layer {layer}"
            region.write(files, stored, part, axes, start, inside, folded.factors.get(piece.leaf, 1.0), where)


def _write_constants(files: Files, stored: Mapping[str, Stored], tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.parts or tensor.constant == 0.0:
            continue  # a file begins as zeros
        values = np.full((1, max(1, int(np.prod(tensor.shape)))), tensor.constant, np.float64).astype(tensor.dtype)
        files.write(stored[tensor.name].file, np.array([stored[tensor.name].offset]), values.view(np.uint8))


@contextlib.contextmanager
def _making(dst: Path, nbytes: int) -> Iterator[Path]:
    """Yields a directory with space for `nbytes`, which becomes `dst` when the body ends."""
    try:
        with new_directory(dst, "export") as directory:
            free = shutil.disk_usage(directory).free
            if free < nbytes + 1024 * _BLOCK_BYTES:
                raise UserError(f"{dst}: {nbytes:,} bytes are to be written, but the disk has only {free:,} free")
            yield directory
    except OSError as error:
        raise DamageError(f"{dst}: could not be written ({error})") from error


def save_hf(
    path: PathLike,
    cfg: ModelConfig,
    params: Params,
    *,
    format: str,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    shard_gb: float = SHARD_GB,
    provenance: Sequence[Table] = (),
) -> Exported:
    """Writes parameters as a directory that is like a release: config.json and *.safetensors.

    path: must not exist.  params: nested dict of arrays (jax, or numpy), as spec(cfg) describes it.
    format, dtype, max_seq_len, provenance: as `outline` takes them. A tokenizer is for the caller to add.

    Raises:
      UserError: `path` exists; params are not those of cfg; the format cannot express the model; numbers become
        infinite in dtype.
      DamageError: numbers that are not finite.
    """
    from tele_jax.checkpoint import read  # brings Orbax
    from tele_jax.growth.masks import require_unmasked

    specs, leaves = flat_spec(cfg), flatten(params)
    require_arrays(leaves, "params")
    if problems := read.differences(leaves, specs, "given"):
        raise UserError("params: not what the config describes: " + abridged(problems, ";\n  "))
    require_unmasked(provenance, "params")
    plan = outline(cfg, format, dtype=dtype, max_seq_len=max_seq_len, provenance=provenance)
    pieces = []
    for name, spec in specs.items():
        for layer in range(spec.shape[0]) if spec.stack else [None]:
            start = (0,) * len(spec.shape) if layer is None else (layer, *[0] * (len(spec.shape) - 1))
            shape = spec.shape if layer is None else (1, *spec.shape[1:])
            read_piece = functools.partial(_of_array, leaves[name], layer)
            pieces.append(Piece(name, spec.axes, len(spec.stack), start, shape, read_piece))
    return write(path, plan, pieces, (), shard_gb=shard_gb, workers=os.cpu_count() or 1)


@contextlib.contextmanager
def _of_array(array: Any, layer: int | None) -> Iterator[np.ndarray]:
    if layer is None:
        yield np.asarray(array)
    elif isinstance(array, jax.Array):  # with an index that is data, a program is compiled once and not once a layer
        yield np.asarray(jax.lax.dynamic_slice_in_dim(array, np.int32(layer), 1))
    else:
        yield np.asarray(array[layer : layer + 1])
