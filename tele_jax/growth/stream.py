"""Growth from checkpoint to checkpoint: bounded memory, several threads, several processes, resumable.

    stream(plan, "runs/a/checkpoints/500", "runs/b")                            parameters
    stream(plan, src, dst, opt=True, memory_gb=4, workers=8)                    and optimizer state
    stream(plan, src, dst, shard=(i, n))                                        in each of n processes

The destination has the bits that checkpoint.save would have written of growth.apply and growth.apply_opt. It is made
chunk by chunk. In memory every thread has a chunk of the destination and one of the source (and, of a plan with several
steps, one for each step between them); the last chunks of the source stay there for the next tiles, as many as
memory_gb has room for.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tele_jax.axes import ParamSpec, unflatten
from tele_jax.checkpoint import chunk_files, chunked, layout, locate, packing, unfinished
from tele_jax.errors import UserError, abridged
from tele_jax.files import PathLike, Table
from tele_jax.growth import axis_map, kernel
from tele_jax.growth.axis_map import NEW, AxisMap
from tele_jax.growth.leaf import LeafPlan, LeafStep
from tele_jax.growth.opt_state import grow_state, kinds
from tele_jax.growth.plan import Plan, require_plan

if TYPE_CHECKING:  # they import Orbax and TensorStore, which only the call needs
    from tele_jax.checkpoint import Lazy, LazyArray

_OVERHEAD_BYTES = 96 * 2**20  # XLA, its two programs, and the names of files, beside what is counted
_SLOTS_PER_WORKER = 4  # chunks of the source that stay in memory for the next tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streamed(chunked.Written):
    """The figures of a call of `stream`. bytes_read: chunks of the source, some of them read more than once."""

    bytes_read: int


def stream(
    plan: Plan,
    src: PathLike,
    dst: PathLike,
    *,
    opt: bool = False,
    memory_gb: float = 1.0,
    workers: int | None = None,
    resume: bool = True,
    shard: tuple[int, int] = (0, 1),
    step: int | None = None,
    provenance: Table | None = None,
    chunk_bytes: int | None = None,
    progress: chunked.Progress | None = None,
) -> Streamed:
    """Grows the checkpoint `src` into the checkpoint `dst`, which appears when it is complete.

    A call that was killed, or failed, is repeated with the same arguments (memory_gb, workers and progress may differ):
    it goes on from DST.partial/journal, and gives the same bits.

    Args:
      src: a checkpoint, as checkpoint.open_lazy takes it.
      dst: the step directory to write; must not exist.
      opt: grow the optimizer state as well, as growth.apply_opt does; one that tele_jax trained with.
      memory_gb: 10^9 bytes that may be used above what the process has already.
      workers: threads, by default two a core, for half of them wait for the disk; fewer where memory is short.
      resume: go on with what an earlier call began; False removes that first.
      shard: (i, n), the i-th part of the work, for n processes; the last to finish makes `dst` complete.
      step: of the new checkpoint; that of src by default.
      provenance: further fields of the entry that says how this checkpoint was made.
      chunk_bytes: the largest chunk of the destination, layout.CHUNK_BYTES by default.
      progress: progress(done bytes, all bytes of this shard), called in this thread after every tile.

    Raises:
      UserError: `dst` exists; src is not of plan.src_cfg (names the leaves that differ), or has no optimizer state; too
        little memory for the largest chunk, or too little disk; what was begun belongs to another plan or source; the
        optimizer state is not the trainer's (files do not say which optimizer made it).
      DamageError: a chunk of src is damaged (names leaf and file), or files could not be written.
    """
    if not 0 <= shard[0] < shard[1]:
        raise UserError(f"shard={shard}: must be (i, n) with 0 <= i < n")
    if jax.distributed.is_initialized():  # Orbax would wait for all processes to call this
        raise UserError("growth.stream runs in processes of their own, each with its shard, not under jax.distributed")
    chunk_bytes = layout.CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    lazy = _open(plan, src, opt)
    dst = locate.new_path(dst, lazy.path, "growth from checkpoint to checkpoint")
    jobs = _jobs(plan, lazy, opt, chunk_bytes)
    meta = _meta(plan, lazy, jobs, dst.name, step, provenance)
    workers, slots = _divide_memory(jobs, memory_gb, workers)
    cut = [tile for job in jobs for tile in unfinished.cut(job.item, job.name, job.leaf, job.order)]
    sources = [job.source for job in jobs if not isinstance(job.source, np.ndarray)]
    header = {
        "plan": plan.digest,
        "opt": bool(opt),
        "chunk_bytes": chunk_bytes,
        "source": chunk_files.fingerprint(sources),
        "step": meta.step,
        "provenance": meta.provenance,
    }
    cache = chunk_files.ChunkCache(slots, max(source.leaf.chunk_bytes for source in sources))
    by_leaf = {(job.item, job.name): job for job in jobs}
    written = chunked.write_leaves(
        dst,
        meta,
        cut,
        lambda tile, start, out: by_leaf[tile.item, tile.name].fill(out, start, cache),
        header=header,
        workers=workers,
        shard=shard,
        resume=resume,
        progress=progress,
    )
    return Streamed(bytes_read=cache.bytes_read, **vars(written))


@dataclasses.dataclass(frozen=True)
class Outline:
    """The figures that `stream` would have. Bytes are those of files of chunks.

    bytes_to_read: each chunk of the source once; with little memory some are read again. free_bytes: on the disk on
    which `dst` would lie.
    """

    bytes_to_read: int
    bytes_to_write: int
    disk_bytes: int
    free_bytes: int
    memory_bytes: int
    workers: int


def outline(
    plan: Plan, src: PathLike, dst: PathLike, *, opt: bool = False, memory_gb: float = 1.0, workers: int | None = None
) -> Outline:
    """Outlines what `stream` would do with these arguments; writes nothing and reads no array. Raises as `stream`."""
    lazy = _open(plan, src, opt)
    dst = locate.new_path(dst, lazy.path, "growth from checkpoint to checkpoint")
    jobs = _jobs(plan, lazy, opt, layout.CHUNK_BYTES)
    _meta(plan, lazy, jobs, dst.name, None, None)
    threads, slots = _divide_memory(jobs, memory_gb, workers)
    cut = [tile for job in jobs for tile in unfinished.cut(job.item, job.name, job.leaf, job.order)]
    read = {job.source.name: job.source.leaf for job in jobs if not isinstance(job.source, np.ndarray)}
    of_chunks = max(job.leaf.chunk_bytes + job.bytes_between for job in jobs) + kernel.SCRATCH_BYTES
    return Outline(
        bytes_to_read=sum(math.prod(leaf.grid) * leaf.chunk_bytes for leaf in read.values()),
        bytes_to_write=sum(tile.nbytes for tile in cut),
        disk_bytes=unfinished.disk_bytes(cut),
        free_bytes=unfinished.free_bytes(dst),
        memory_bytes=_OVERHEAD_BYTES + threads * of_chunks + slots * max(leaf.chunk_bytes for leaf in read.values()),
        workers=threads,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One leaf of the destination.

    steps: what makes it, each with the shape of the chunks of what it makes (in memory only, but for the last).
    values: all of the leaf, where it is small and computed already; then source is None.
    """

    item: str
    name: str
    leaf: layout.Leaf
    maps: list[AxisMap]  # from the source to the destination
    source: "LazyArray | np.ndarray"  # an array: the values
    steps: tuple[tuple[LeafStep, tuple[int, ...]], ...] = ()

    @property
    def bytes_between(self) -> int:
        """The bytes of the chunks of all steps but the last, which a thread may hold at once."""
        return sum(math.prod(shape) * self.leaf.spec.dtype.itemsize for _, shape in self.steps[:-1])

    def fill(self, out: np.ndarray, start: Sequence[int], cache: chunk_files.ChunkCache) -> None:
        """Computes the chunk of the destination that begins at `start`; see chunked.write_leaves."""
        if isinstance(self.source, np.ndarray):
            part = chunked.inside(self.leaf, start, out)
            part[...] = self.source[tuple(slice(s, s + n) for s, n in zip(start, part.shape, strict=True))]
            return
        source = kernel.Source(self.source.chunks, functools.partial(cache.chunk, self.source))
        kernel.fill_after(out, self.steps, start, source)

    def order(self, chunk: tuple[int, ...]) -> Any:
        """Sorts chunks so that those that need the same chunk of the source follow each other.

        Copies of a layer are made together: along stacked axes, by the source index; new layers come last.
        """
        stacked = len(self.leaf.spec.stack)
        origins = [m.index[c * size] for m, c, size in zip(self.maps, chunk, self.leaf.chunks, strict=False)][:stacked]
        return [(o == NEW, o) for o in origins], chunk[stacked:], chunk[:stacked]


@dataclasses.dataclass(frozen=True, eq=False)
class _Grown:
    """A stored leaf, of a parameter or of a moment, after some steps."""

    stored: "LazyArray"
    steps: tuple[LeafStep, ...]

    @classmethod
    def after(cls, step: LeafStep, source: "LazyArray | _Grown") -> "_Grown":
        before = source if isinstance(source, _Grown) else cls(source, ())
        return cls(before.stored, (*before.steps, step))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.steps[-1].shape


def _open(plan: Plan, src: PathLike, opt: bool) -> "Lazy":
    from tele_jax.checkpoint import open_lazy, read

    require_plan(plan, "stream: plan")
    locate.local_path(src)
    lazy = open_lazy(src)
    lines = read.config_differences(lazy.cfg, plan.src_cfg, "in the plan")
    lines += read.differences({name: array.leaf.spec for name, array in lazy.items["params"].items()}, plan.src_spec)
    if lines:
        raise UserError(f"{lazy.path}: not a checkpoint of the model that the plan grows: " + abridged(lines, ";\n  "))
    if opt and lazy.opt_state is None:
        raise UserError(f"{lazy.path}: holds no optimizer state to grow")
    return lazy


def _jobs(plan: Plan, lazy: "Lazy", opt: bool, chunk_bytes: int) -> list[_Job]:
    """The jobs of all leaves of the destination: parameters, then optimizer state."""
    jobs = {(job.item, job.name): job for job in _all_jobs(plan, lazy, opt, chunk_bytes)}
    leaves = packing.packed({key: job.leaf for key, job in jobs.items()}, chunk_bytes)
    return [dataclasses.replace(job, leaf=leaves[key]) for key, job in jobs.items()]


def _all_jobs(plan: Plan, lazy: "Lazy", opt: bool, chunk_bytes: int) -> list[_Job]:
    """The jobs before chunks are put into files."""
    stored = lazy.items["params"]
    leaves = {name: _Grown(stored[plan.sources[name]], plan.leaf_steps(name)) for name in plan.dst_spec}
    jobs = [_job("params", name, plan.dst_spec[name], grown, chunk_bytes) for name, grown in leaves.items()]
    if not opt:
        return jobs
    state = unflatten(lazy.items["opt_state"])
    grown_state = grow_state(plan, state, _Grown.after, kinds(plan, state))
    for name, grown in sorted(layout.named_leaves(grown_state).items()):
        if isinstance(grown, _Grown):
            jobs.append(_job("opt_state", name, _owner(plan, name, grown.shape), grown, chunk_bytes))
        elif grown is lazy.items["opt_state"].get(name):
            leaf = _stored(_owner(plan, name, grown.shape), grown, chunk_bytes)
            maps = [axis_map.identity(str(dimension), size) for dimension, size in enumerate(grown.shape)]
            unchanged = LeafStep(LeafPlan(), tuple(maps))
            jobs.append(_Job("opt_state", name, leaf, maps, grown, ((unchanged, leaf.chunks),)))
        else:
            values = np.asarray(grown)
            leaf = _stored(ParamSpec(values.shape, values.dtype), lazy.items["opt_state"][name], chunk_bytes)
            jobs.append(_Job("opt_state", name, leaf, [], values))
    return jobs


def _owner(plan: Plan, name: str, shape: tuple[int, ...]) -> ParamSpec:
    """The parameter that a leaf of the optimizer state belongs to, or one without axes; `_stored` sets the dtype."""
    return plan.dst_spec.get(layout.matching_param(name, shape, plan.dst_spec) or "") or ParamSpec(shape, np.float32)


def _job(item: str, name: str, spec: ParamSpec, grown: _Grown, chunk_bytes: int) -> _Job:
    """The job of a grown leaf; spec: that of the parameter that the leaf belongs to."""
    made = [_stored(dataclasses.replace(spec, shape=s.shape), grown.stored, chunk_bytes) for s in grown.steps]
    steps = tuple((step, leaf.chunks) for step, leaf in zip(grown.steps, made, strict=True))
    first, *others = (step.maps for step in grown.steps)
    maps = [functools.reduce(AxisMap.compose, along) for along in zip(first, *others, strict=True)]
    return _Job(item, name, made[-1], maps, grown.stored, steps)


def _stored(spec: ParamSpec, source: "LazyArray", chunk_bytes: int) -> layout.Leaf:
    spec = dataclasses.replace(spec, dtype=source.dtype)
    shape = layout.chunk_shape(spec.shape, spec.dtype.itemsize, stacked=len(spec.stack), limit=chunk_bytes)
    return layout.Leaf(spec, shape, source.leaf.scalar)


def _meta(plan: Plan, lazy: "Lazy", jobs: list[_Job], name: str, step, provenance) -> layout.Meta:
    entry = {"stage": name, "kind": "grow", "policy": plan.policy, "seed": plan.seed, "plan": plan.digest}
    items: dict[str, Table] = {}
    for job in jobs:
        items.setdefault(job.item, {})[job.name] = job.leaf
    meta = layout.Meta(
        cfg=plan.dst_cfg,
        step=lazy.step if step is None else int(step),
        provenance=(*lazy.provenance, entry | dict(provenance or {})),
        items=items,
        versions=layout.package_versions(),
    )
    layout.meta_to_json(meta)  # raises before anything is written
    return meta


def _divide_memory(jobs: list[_Job], memory_gb: float, workers: int | None) -> tuple[int, int]:
    """(threads, chunks of the source in memory). Every thread has a chunk of the destination and one of the source."""
    chunk = max(job.leaf.chunk_bytes for job in jobs)
    of_source = max(job.source.leaf.chunk_bytes for job in jobs if not isinstance(job.source, np.ndarray))
    between = max(job.bytes_between for job in jobs)
    beside = between + kernel.SCRATCH_BYTES
    needed = {f"{job.item}/{job.name}": job.leaf.chunk_bytes + of_source + beside for job in jobs}
    workers = chunked.threads(memory_gb * 1e9, needed, workers, _OVERHEAD_BYTES)
    slots = int(memory_gb * 1e9 - _OVERHEAD_BYTES - workers * (chunk + beside)) // of_source
    return workers, min(slots, _SLOTS_PER_WORKER * workers)
