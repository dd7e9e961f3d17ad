"""Ahead-of-time compilation of a job for a slice that is not there, and what was compiled before read back.

job = Job(cfg=tele.get_model("tele_flm_52b"), slice=find_slice("v5p:4x4x8"), mesh=MeshConfig(fsdp=64, tensor=2),
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
from typing import Any

import jax
from jax.sharding import Mesh

from tele_jax.aot import counts as counting
from tele_jax.aot import hlo, topology
from tele_jax.aot.counts import Counts
from tele_jax.aot.jobs import OnSlice
from tele_jax.config import as_written, written_table
from tele_jax.errors import DamageError
from tele_jax.files import parse_json, replacing
from tele_jax.sharding import make_mesh

GIB = 2**30
FORMAT = 2  # of what the cache holds


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or why there is none. Bytes and counts are those of one device.

    needed_bytes: of HBM at its fullest, or what the compiler asked for in vain; usable_bytes: what a program may use.
    """

    fits: bool
    needed_bytes: int
    usable_bytes: int
    held: dict[str, int]  # bytes by kind that are there all the while: parameters, optimizer, ...
    allocated_temporary_bytes: int  # what jax's memory_analysis() gives as temp_size_in_bytes
    host_bytes: int
    device_order: tuple[tuple[int, ...], ...]  # slice, x, y, z, core of the mesh's devices, in order
    compile_seconds: float
    key: str  # of the program before compilation, its mesh, slice and compiler
    counts: Counts | None = None
    from_cache: bool = False

    @property
    def temporary_bytes(self) -> int:
        """Needed beyond what is held all the while, activations and gradients included."""
        return self.needed_bytes - sum(self.held.values())


def cache_directory() -> Path:
    """$TELE_PLAN_CACHE, or tele_jax/plan in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("TELE_PLAN_CACHE", Path(base) / "tele_jax" / "plan"))


def compile_job(job: OnSlice, cache: Path | None = None) -> Program:
    """Compiles a job for its slice, or reads what the same program gave before.

    The cache holds the compiled programs' texts by a hash of the program before compilation, the mesh, the slice and
    the versions of the compiler. A program that does not fit is a result, not an error.

    Raises:
      DamageError: what the cache holds of this program cannot be read.
      UserError: as make_mesh, partition_spec and topology.devices do: shapes that do not divide, libtpu missing.
    """
    mesh, lowered, key = _lowered(job)
    directory = (cache or cache_directory()) / key
    known = (directory / "program.json").exists()
    if not known:
        _store(directory, *_compile(job, mesh, lowered))
    values, text = _read(directory)
    counts = None if text is None else counting.count(hlo.parse(text))
    return Program(**values, key=key, counts=counts, from_cache=known)


def program_key(job: OnSlice) -> str:
    """The hash that compile_job keeps a job's program by, without compiling it: a second or two."""
    return _lowered(job)[2]


def _lowered(job: OnSlice) -> tuple[Mesh, jax.stages.Lowered, str]:
    mesh = make_mesh(job.mesh, topology.devices(job.slice))
    lowered = job.lower(mesh)
    return mesh, lowered, _key(job, lowered)


def _store(directory: Path, values: dict[str, Any], text: str | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if text is not None:
        with replacing(directory / "program.hlo.gz") as temporary:
            temporary.write_bytes(gzip.compress(text.encode(), 6))
    with replacing(directory / "program.json") as temporary:  # last: with it, the program is there
        temporary.write_text(json.dumps(values))


def _read(directory: Path) -> tuple[dict[str, Any], str | None]:
    described, file = str(directory / "program.json"), directory / "program.hlo.gz"
    fields = {n: hint for n, hint in typing.get_type_hints(Program).items() if n not in ("key", "counts", "from_cache")}
    try:
        values = written_table(parse_json(Path(described).read_bytes(), described), described, fields, required=fields)
        values = {name: as_written(hint, values[name], f"{described}: {name}") for name, hint in fields.items()}
        return values, gzip.decompress(file.read_bytes()).decode() if file.exists() else None
    except (DamageError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamageError(f"{directory}: damaged ({error}); delete it, and the program is compiled again") from None


def _key(job: OnSlice, lowered: jax.stages.Lowered) -> str:
    versions = {"jax": jax.__version__, "libtpu": topology.require_libtpu()}
    digest = hashlib.sha256(json.dumps([FORMAT, job.slice.name, dataclasses.asdict(job.mesh), versions]).encode())
    digest.update(lowered.as_text().encode())
    return digest.hexdigest()[:32]


def _compile(job: OnSlice, mesh: Mesh, lowered: jax.stages.Lowered) -> tuple[dict[str, Any], str | None]:
    """The fields of a Program without its counts, and the text of the compiled program."""
    values: dict[str, Any] = {
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
        missing = {"fits": False, "needed_bytes": needed, "allocated_temporary_bytes": 0, "host_bytes": 0}
        return {**values, **missing, "compile_seconds": time.monotonic() - began}, None
    memory = compiled.memory_analysis()
    needed = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    values |= {
        "fits": needed <= values["usable_bytes"],
        "needed_bytes": needed,
        "allocated_temporary_bytes": memory.temp_size_in_bytes,
        "host_bytes": memory.host_temp_size_in_bytes,
        "compile_seconds": time.monotonic() - began,
    }
    # The code of Pallas kernels is most of the text, and nothing is read from it.
    return values, re.sub(r'"body":"[^"]*"', '"body":""', compiled.as_text())


def _needed(message: str) -> int | None:
    """Bytes that a program asked for, from the compiler's message that it does not fit; None for another failure."""
    match = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message
    )
    return match and int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]])
