"""Ahead-of-time compilation of a job for a TPU slice that is not there, with a cache of the compiled programs.

job = TrainJob(cfg=tele.get_model("tele_flm_52b"), slice=find_slice("v5p:4x4x8"), mesh=MeshConfig(fsdp=64, tensor=2),
               batch_size=64, seq_len=4096)
program = compile_job(job)     # about a minute of a core, whatever the number of layers
"""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import time
import typing
import zlib
from pathlib import Path

import jax
from jax.sharding import Mesh

from tele_jax.aot import hlo, topology
from tele_jax.aot.counts import Counts, count
from tele_jax.aot.jobs import Job
from tele_jax.chips import GIB as GIB
from tele_jax.config import as_written, written_table
from tele_jax.errors import DamageError
from tele_jax.files import Table, read_json, replacing
from tele_jax.sharding import make_mesh

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
    return Program(**values, key=key, counts=count(hlo.parse(text)) if text is not None else None, from_cache=known)


def program_key(job: Job) -> str:
    """The hash by which compile_job keeps a job's program; nothing is compiled, it takes a second or two."""
    return _lowered(job)[2]


def _lowered(job: Job) -> tuple[Mesh, jax.stages.Lowered, str]:
    mesh = make_mesh(job.mesh, topology.devices(job.slice))
    lowered = job.lower(mesh)
    versions = {"jax": jax.__version__, "libtpu": topology.require_libtpu()}
    digest = hashlib.sha256(json.dumps([FORMAT, job.slice.name, dataclasses.asdict(job.mesh), versions]).encode())
    digest.update(lowered.as_text().encode())
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
