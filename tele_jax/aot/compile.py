"""Ahead-of-time compilation of a job for a TPU slice that is not there, and the choice of what is worth compiling.

Compiled programs are kept in a cache. Meshes, remat policies and microbatches are ranked by formula before.

job = TrainJob(cfg=tele.get_model("tele_flm_52b"), slice=find_slice("v5p:4x4x8"), mesh=MeshConfig(fsdp=64, tensor=2),
               batch_size=64, seq_len=4096)
program = compile_job(job)     # about a minute of a core, whatever the number of layers
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import time
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from tele_jax.aot import hlo, topology
from tele_jax.aot.counts import Counts, count
from tele_jax.aot.jobs import GrowJob, Job, TrainJob
from tele_jax.aot.topology import Slice
from tele_jax.config import as_written, require, written_table
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table, read_json, replacing
from tele_jax.model.spec import count_params
from tele_jax.published import GIB as GIB
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh
from tele_jax.train.compiler_options import refused
from tele_jax.train.step import flops_per_token

FORMAT = 2  # version of the cache's files


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or the memory that the compiler asked for in vain. Bytes and counts are those of one device.

    needed_bytes: HBM in use at the fullest moment, or asked for in vain; usable_bytes: HBM that a program may use.
    """

    fits: bool
    needed_bytes: int
    usable_bytes: int
    held: dict[str, int]  # bytes in use all the while, by kind: parameters, optimizer, ...
    allocated_temporary_bytes: int  # temp_size_in_bytes of jax's memory_analysis()
    host_bytes: int
    device_order: tuple[tuple[int, ...], ...]  # slice, x, y, z, core of the mesh's devices, in order
    compile_seconds: float
    key: str  # of the program before compilation, its mesh, slice and compiler
    counts: Counts | None = None
    from_cache: bool = False

    @property
    def temporary_bytes(self) -> int:
        """Bytes needed beyond those held all the while, activations and gradients included."""
        return self.needed_bytes - sum(self.held.values())


def cache_directory() -> Path:
    """$TELE_PLAN_CACHE, or tele_jax/plan in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("TELE_PLAN_CACHE", Path(base) / "tele_jax" / "plan"))


def compile_job(job: Job, cache: Path | None = None) -> Program:
    """Compiles a job for its slice, or reads the result of an earlier compilation of the program from the cache.

    The cache holds the compiled programs' texts by a hash of the program before compilation, the mesh, the slice and
    the versions of the compiler. A program that does not fit is a result, not an error.

    Raises:
      DamageError: the program's files in the cache cannot be read.
      UserError: shapes that do not divide over the mesh; libtpu is missing.
    """
    mesh, lowered, key = _lowered(job)
    directory = (cache or cache_directory()) / key
    known = (directory / "program.json").exists()
    if not known:
        _store(directory, *_compile(job, mesh, lowered))
    values, text = _read(directory)
    counts = None if text is None else count(hlo.parse(text), job.slice.generation.matrix_unit)
    return Program(**values, key=key, counts=counts, from_cache=known)


def program_key(job: Job) -> str:
    """The hash by which compile_job keeps a job's program; nothing is compiled, it takes a second or two."""
    return _lowered(job)[2]


def _lowered(job: Job) -> tuple[Mesh, jax.stages.Lowered, str]:
    mesh = make_mesh(job.mesh, topology.devices(job.slice))
    lowered = job.lower(mesh)
    versions = {"jax": jax.__version__, "libtpu": topology.require_libtpu()}
    digest = hashlib.sha256(json.dumps([FORMAT, job.slice.name, dataclasses.asdict(job.mesh), versions]).encode())
    digest.update(lowered.as_text().encode())
    if isinstance(job, TrainJob) and job.compiled_with:  # they are not in the text
        digest.update(json.dumps(job.compiled_with, sort_keys=True).encode())
    return mesh, lowered, digest.hexdigest()[:32]


def _store(directory: Path, values: Table, text: str | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if text is not None:
        with replacing(directory / "program.hlo.gz") as file:
            file.write_bytes(gzip.compress(text.encode(), 6))
    with replacing(directory / "program.json") as file:  # last: with this file a program counts as known
        file.write_text(json.dumps(values))


def _read(directory: Path) -> tuple[Table, str | None]:
    described, file = str(directory / "program.json"), directory / "program.hlo.gz"
    fields = {n: hint for n, hint in typing.get_type_hints(Program).items() if n not in ("key", "counts", "from_cache")}
    try:
        values = written_table(read_json(described), described, fields, required=fields)
        values = {name: as_written(hint, values[name], f"{described}: {name}") for name, hint in fields.items()}
        return values, gzip.decompress(file.read_bytes()).decode() if file.exists() else None
    except (DamageError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamageError(f"{directory}: damaged ({error}); delete it, and the program is compiled again") from None


def _compile(job: Job, mesh: Mesh, lowered: jax.stages.Lowered) -> tuple[Table, str | None]:
    """The fields of a Program without its counts, and the text of the compiled program."""
    values: Table = {
        "usable_bytes": int(job.slice.generation.usable_hbm_bytes),
        "held": job.held(mesh),
        "device_order": topology.places(job.slice, list(mesh.devices.flat)).at.tolist(),
    }
    began = time.monotonic()
    try:
        with refused():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        values |= {"fits": False, "needed_bytes": needed, "allocated_temporary_bytes": 0, "host_bytes": 0}
        return values | {"compile_seconds": time.monotonic() - began}, None
    memory = compiled.memory_analysis()
    assert memory is not None  # compilers for TPUs give one
    needed = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    values |= {
        "fits": needed <= values["usable_bytes"],
        "needed_bytes": needed,
        "allocated_temporary_bytes": memory.temp_size_in_bytes,
        "host_bytes": memory.host_temp_size_in_bytes,
        "compile_seconds": time.monotonic() - began,
    }
    # The code of Pallas kernels is most of the text, and nothing is read from it.
    return values, re.sub(r'"body":"[^"]*"', '"body":""', compiled.as_text() or "")


def _needed(message: str) -> int | None:
    """Reads the bytes asked for from the compiler's message that a program does not fit; None for another failure."""
    match = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message
    )
    return match and int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]])


# ---- what is worth compiling: meshes, remat policies and microbatches, ranked by formula -----------------------------

REMAT = ("products", "attention", "full")
MICROBATCHES = (1, 2, 4, 8, 16)
MARGIN = 0.1  # part of the usable HBM that a chosen plan leaves free
# Per two FLOPs of a forward pass: of the matrix products (backward 4, and again all but the last of a block), and of
# the attention kernel (backward 5, for it makes its weights again), which visits some 1.15 times the unmasked half.
_PRODUCTS = {"none": 6.0, "products": 6.0, "attention": 7.7, "full": 7.7, "offload": 7.7}
_ATTENTION = {"none": 7 * 1.15, "products": 7 * 1.15, "attention": 7 * 1.15, "full": 9 * 1.15, "offload": 7 * 1.15}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of HBM on one device and seconds of a step, by formula."""

    bytes: float
    seconds: float


def candidates(job: TrainJob) -> list[TrainJob]:
    """Every mesh, remat policy and number of microbatches whose shapes divide and that fits by estimate, fastest first.

    Raises:
      UserError: none of them does.
    """
    found = [(estimate(c), c) for c in _variations(job)]
    require(bool(found), f"no mesh of {job.slice.num_devices} devices divides this model and batch; change batch_size")
    usable = _room(job.slice)
    fitting = [(e.seconds, e.bytes, i, c) for i, (e, c) in enumerate(found) if e.bytes <= usable]
    if not fitting:
        least = min(e.bytes for e, _ in found)
        raise UserError(
            f"by estimate no mesh, remat policy or number of microbatches fits {job.slice.name}: at least "
            f"{least / 2**30:,.0f} GiB a device of {usable / 2**30:,.0f}; {larger(job.slice, least)}, or compile one "
            "of them with --mesh"
        )
    return [c for *_, c in sorted(fitting)]


def _variations(job: TrainJob) -> Iterator[TrainJob]:
    devices = job.slice.num_devices
    for mesh, remat, parts in itertools.product(meshes(devices, job.slice.num_slices), REMAT, MICROBATCHES):
        if job.batch_size % parts or job.seq_len % mesh.tensor:
            continue
        candidate = dataclasses.replace(job, cfg=job.cfg.replace(remat=remat), mesh=mesh, microbatches=parts)
        with contextlib.suppress(UserError):
            candidate.check()
            yield candidate


def meshes(devices: int, num_slices: int = 1) -> list[MeshConfig]:
    """All meshes of `devices` devices with tensor at most 32 and data a multiple of the number of slices."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    return [
        MeshConfig(data=data, fsdp=devices // data // tensor, tensor=tensor)
        for tensor in divisors
        if tensor <= 32
        for data in divisors
        if devices % (data * tensor) == 0 and data % num_slices == 0
    ]


def estimate(job: TrainJob) -> Estimate:
    """The memory and the time of a job by the formulas of FSDP with tensor and sequence parallelism.

    Over the 16 programs of training in docs/scale.md (2026-11-29) it gives 0.8 to 1.6 times the memory that was
    compiled, and 1.1 to 1.4 times the time with everything overlapped: good enough to rank by, and no verdict.
    """
    cfg, mesh, generation = job.cfg, job.mesh, job.slice.generation
    params, cut = count_params(cfg), mesh.fsdp * mesh.tensor
    tokens = job.tokens / (mesh.data * mesh.fsdp) / job.microbatches  # of one device group, at a time
    layer = params / cfg.num_layers
    # float32: parameters, two moments, gradients; bfloat16: a copy of the parameters, and of a layer in whole, thrice.
    state = (4 * 4 + 2 + (4 if job.microbatches > 1 else 0)) * params / cut + 3 * 2 * layer / mesh.tensor
    stream = 2 * tokens * cfg.embed_dim / mesh.tensor
    heads = 2 * tokens * cfg.num_heads * cfg.head_dim / mesh.tensor
    kept = cfg.num_layers * _kept(job, stream, heads, 2 * tokens * cfg.mlp_dim / mesh.tensor)
    working = 2 * tokens * (6 * cfg.embed_dim + 5 * cfg.mlp_dim / mesh.tensor) + 4 * heads
    attention = 6.0 * cfg.num_layers * cfg.num_heads * cfg.head_dim * job.seq_len  # model FLOPs of a token
    products = flops_per_token(cfg, job.seq_len) - attention
    flops = (products * _PRODUCTS[cfg.remat] + attention * _ATTENTION[cfg.remat]) / 6
    compute = flops * job.tokens / job.slice.num_devices
    gathers = 2 * params / mesh.tensor * (2.7 * job.microbatches if mesh.fsdp > 1 else 0)
    reduces = 2 * 2 * params / mesh.tensor * job.microbatches if mesh.fsdp > 1 else 0
    exchanged = 9 * cfg.num_layers * 2 * tokens * cfg.embed_dim * job.microbatches * (mesh.tensor > 1)
    link = generation.link_bandwidth / generation.devices
    ici = (gathers + reduces) / (2 * (generation.dimensions - 1) * link) + exchanged / (2 * link)
    over_data = 4 * params / cut * 2 * (mesh.data > 1)
    dcn = over_data / (generation.dcn_bandwidth / generation.devices) if job.slice.num_slices > 1 else 0.0
    ici += 0.0 if dcn else over_data / (2 * link)
    # It is not known here which of them cannot overlap; a tenth of the sum keeps ties apart.
    times = (compute / job.slice.device_flops, ici, dcn)
    return Estimate(state + kept + working, max(times) + 0.1 * sum(times))


def _kept(job: TrainJob, stream: float, heads: float, mlp: float) -> float:
    """Bytes of HBM that a layer keeps for the backward pass, by the remat policy."""
    kv_heads = heads * job.cfg.num_kv_heads / job.cfg.num_heads
    products = 3 * stream + 2 * heads + 2 * kv_heads + 2 * mlp
    kept = {"offload": 0.0, "full": stream, "attention": stream + heads, "products": products}
    return kept.get(job.cfg.remat, products + mlp + heads)


def _room(of: Slice) -> float:
    """Bytes of HBM that a chosen plan may use on one device."""
    return of.generation.usable_hbm_bytes * (1 - MARGIN)


def larger(of: Slice, needed_bytes: float) -> str:
    """The advice for a slice that is too small."""
    times = 2 ** max(1, math.ceil(math.log2(needed_bytes / _room(of))))
    most = math.prod(of.generation.largest)
    chips = of.chips // of.num_slices * times
    if chips <= most:
        return f"a slice of {chips:,} chips would do by estimate"
    return f"the largest slice of {of.generation.name} has {most:,} chips, which is too few; take another generation"


def advice(job: Job, needed_bytes: int, state_bytes: int) -> str:
    """The advice for a job that does not fit: smaller parts of the batch where the state leaves room, else a slice."""
    if isinstance(job, GrowJob):
        return f"{larger(job.slice, needed_bytes)}; or grow the checkpoint with `tele grow`, in bounded memory"
    if not isinstance(job, TrainJob):
        return f"{larger(job.slice, needed_bytes)}; or fewer rows, or fewer tokens"
    usable = _room(job.slice)
    gradients = 2 * state_bytes / 3  # accumulated and new ones, float32 as each third of the state
    ways = job.mesh.data * job.mesh.fsdp
    parts = [m for m in MICROBATCHES if job.batch_size % (m * ways) == 0 and m > job.microbatches]
    for m in parts:
        rest = max(0.0, needed_bytes - state_bytes - gradients / 2) * job.microbatches / m
        if state_bytes + gradients + rest <= usable:
            return f"--microbatches {m} would do by estimate"
    whole = (needed_bytes if job.cfg.remat == "full" else state_bytes + gradients) * 1.0
    return f"{larger(job.slice, max(whole, usable * 1.01))}, or --search for another mesh"
