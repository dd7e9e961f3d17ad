"""TPU slices by name, their hardware figures, and their devices as libtpu describes them on a machine without any.

find_slice("v5p:8x16x16")     # or "v5p-4096", Google's name: the number of TensorCores, of chips for v5e and v6e
devices(slice)                # what jax.make_mesh takes; needs the extra [tpu]
"""

import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from packaging.requirements import Requirement

from tele_jax.config import require
from tele_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """Figures of one chip. FLOPs are bfloat16, dense. Bandwidths in bytes/s; a link's is that of one direction."""

    name: str
    peak_flops: float
    hbm_bytes: float
    usable_hbm_bytes: float  # of one device, as libtpu 0.0.42.1 says when a program needs more
    hbm_bandwidth: float
    link_bandwidth: float  # of one ICI link; a chip has two a dimension of its torus
    dcn_bandwidth: float  # of one chip's share of the network between slices
    dimensions: int  # of the torus
    largest: tuple[int, ...]  # slice that can be asked for
    cores: int  # TensorCores a chip, by which Google's names of v4, v5p and tpu7x count
    devices: int  # JAX devices a chip: two cores are one device where they share their HBM (megacore)
    ring: int  # a dimension has wraparound links where its size is a multiple of this
    source: str
    published_mfu: tuple[tuple[float, str], ...] = ()  # model FLOPs over the peak, as measured by others, and on what


# ICI: Google gives the sum over links of both directions, e.g. 1,200 GB/s for the six links of a v5p, 100 GB/s each
# way; v4's from arXiv 2304.01433. DCN: v4's from jax-ml.github.io/scaling-book/tpus, 25 GB/s a host of four chips.
# HBM: what the compiler lets a program use is another figure than the nominal capacity.
# MFU: MaxText's table of optimized models (maxtext.readthedocs.io, reference/models/tiering): dense models in bfloat16.
_MFU = {
    "v5p": ((0.654, "Llama 2 70B, 512 chips, sequences of 4,096"),),
    "v6e": (
        (0.438, "Llama 2 70B, 256 chips, sequences of 4,096"),
        (0.5033, "Llama 3.1 70B, 256 chips, sequences of 8,192"),
    ),
}
GENERATIONS = {
    row[0]: Generation(
        *row[:-1], source=f"cloud.google.com/tpu/docs/{row[-1]}", published_mfu=_MFU.get(row[0], ())
    )
    for row in (
        # name    FLOP/s   HBM        usable, a device HBM B/s   link   DCN      torus and largest; cores, devices, ring
        ("v4",    275e12,  32 * GIB,  30.75 * GIB,     1.2e12,   50e9,  6.25e9,  3, (16, 16, 16), 2, 1, 4, "v4"),
        ("v5e",   197e12,  16 * GIB,  15.75 * GIB,     819e9,    50e9,  3.125e9, 2, (16, 16), 1, 1, 16, "v5e"),
        ("v5p",   459e12,  95 * GIB,  95.74 * GIB,     2.765e12, 100e9, 6.25e9,  3, (16, 16, 24), 2, 1, 4, "v5p"),
        ("v6e",   918e12,  32 * GIB,  31.25 * GIB,     1.638e12, 100e9, 12.5e9,  2, (16, 16), 1, 1, 16, "v6e"),
        ("tpu7x", 2307e12, 192 * GIB, 94.75 * GIB,     7.38e12,  100e9, 12.5e9,  3, (16, 24, 24), 2, 2, 4, "tpu7x"),
    )
}  # fmt: skip
_ALIASES = {"v5": "v5p", "v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "7x": "tpu7x"}
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
KNOWN = "v4:4x4x8, v5e:16x16, v5p:8x16x16, v6e:16x16, tpu7x:8x16x16, or by Google's names as v5p-4096 or v6e-256"


@dataclasses.dataclass(frozen=True)
class Slice:
    """So many equal slices of one generation; chips along each dimension of the torus."""

    generation: Generation
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        one = f"{self.generation.name}:{'x'.join(map(str, self.shape))}"
        return one if self.num_slices == 1 else f"{self.num_slices} x {one}"

    @property
    def chips(self) -> int:
        return self.num_slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.chips * self.generation.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Per dimension, whether it has wraparound links. 3D slices have them from one cube of 4x4x4 on."""
        whole = all(size % self.generation.ring == 0 for size in self.shape)
        flat = self.generation.dimensions == 2
        return tuple(size % self.generation.ring == 0 if flat else whole for size in self.shape)

    @property
    def device_flops(self) -> float:
        return self.generation.peak_flops / self.generation.devices

    @property
    def device_hbm_bandwidth(self) -> float:
        return self.generation.hbm_bandwidth / self.generation.devices


def find_slice(name: str, num_slices: int = 1) -> Slice:
    """The slice of a name such as "v5p:8x16x16" or "v5p-4096".

    Raises:
      UserError: an unknown generation (the message lists the known), a shape or size that the generation does not have.
    """
    require(num_slices > 0, f"num_slices={num_slices} must be above 0")
    match = re.fullmatch(r"([a-zA-Z0-9]+)[:=](\d+(?:x\d+)*)|([a-zA-Z0-9]+)-(\d+)", name)
    generation = match and GENERATIONS.get(_ALIASES.get(family := (match[1] or match[3]).lower(), family))
    if generation is None:
        raise UserError(f"topology {name!r}: not known; known are {KNOWN}")
    if match[4]:
        return Slice(generation, _shape_of(generation, int(match[4]), name), num_slices)
    shape = tuple(int(size) for size in match[2].split("x"))
    require(
        len(shape) == generation.dimensions,
        f"topology {name!r}: a slice of {generation.name} has {generation.dimensions} dimensions, "
        f"for example {generation.name}:{'x'.join(map(str, generation.largest))}",
    )
    fits = all(0 < size <= most for size, most in zip(sorted(shape), sorted(generation.largest), strict=True))
    require(
        fits,
        f"topology {name!r}: slices of {generation.name} go from {'x'.join('1' * generation.dimensions)} to "
        f"{'x'.join(map(str, generation.largest))}",
    )
    return Slice(generation, shape, num_slices)


def _shape_of(generation: Generation, count: int, name: str) -> tuple[int, ...]:
    """The usual shape for Google's count of TensorCores (chips where there is one a chip): the most cubic one."""
    chips, rest = divmod(count, generation.cores)
    if generation.dimensions == 2:
        found = [_FLAT[chips]] if chips in _FLAT else []
    elif chips in _SMALL:
        found = [_SMALL[chips]]
    else:
        cubes, uneven = divmod(chips, 64)
        sides = [d for d in range(1, cubes + 1) if uneven == 0 and cubes % d == 0]
        triples = [(a, b, cubes // (a * b)) for a in sides for b in sides if cubes % (a * b) == 0]
        found = [
            tuple(4 * s for s in t) for t in triples if t == tuple(sorted(t)) and 4 * t[2] <= max(generation.largest)
        ]
    if rest or not found:
        counts = ", ".join(str(c * generation.cores) for c in (_FLAT if generation.dimensions == 2 else _SMALL))
        more = "" if generation.dimensions == 2 else f", and multiples of {64 * generation.cores}"
        raise UserError(
            f"topology {name!r}: {generation.name} comes in {counts}{more}; or give the shape, as in {KNOWN}"
        )
    return min(found, key=sum)


# -------------------------------------------------------------------------------------------------- with the compiler


def libtpu_requirement() -> Requirement:
    """The libtpu that the installed jax names."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("jax") or ()]
    return next(r for r in wanted if r.name == "libtpu" and r.marker and r.marker.evaluate({"extra": "tpu"}))


def require_libtpu() -> str:
    """The version of libtpu, which must be the one that jax names.

    Raises:
      UserError: it is missing or of another version; the message says what to install.
    """
    wanted = libtpu_requirement()
    how = f"pip install 'tele_jax[tpu]' installs the one for jax {jax.__version__}, libtpu{wanted.specifier}"
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the TPU compiler, libtpu, is not installed; {how}") from None
    if not wanted.specifier.contains(version):
        raise UserError(
            f"libtpu {version} is not for jax {jax.__version__}, whose programs it cannot be read with; {how}"
        )
    return version


def devices(of: Slice) -> list[jax.Device]:
    """The devices of a slice that is not there, to make a mesh of and to compile for; nothing can run on them.

    Raises:
      UserError: libtpu is missing, of another version, or knows no such slice.
    """
    require_libtpu()
    # libtpu would ask a metadata server that is not there, and say so at length.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # the lock guards hardware, which is not used here
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_LOG_DIR", "disabled"),
    ):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    shape = of.shape + (1,) * (3 - len(of.shape))
    options = {
        "chips_per_host_bounds": tuple(min(size, most) for size, most in zip(shape, (2, 2, 1), strict=True)),
        "num_slices": of.num_slices,
        "wrap": of.rings + (False,) * (3 - len(of.rings)),
    }
    if of.generation.cores > of.generation.devices:
        options["chip_config_name"] = "megacore"
    try:
        name = f"{of.generation.name}:{'x'.join(map(str, of.shape))}"
        found = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {of.name!r}: libtpu says: {error}; known are {KNOWN}") from None
    assert len(found) == of.num_devices, (len(found), of)
    return found


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the devices of a mesh are: int[devices, 5] of slice, three coordinates, core on the chip."""

    of: Slice
    at: np.ndarray

    def spanned(self, group: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """(devices along slice, x, y, z and core that a group covers, how many different places in each)."""
        places = self.at[np.asarray(group)]
        counts = np.array([len(np.unique(places[:, axis])) for axis in range(places.shape[1])])
        return [axis for axis in range(places.shape[1]) if counts[axis] > 1], counts


def places(of: Slice, in_order: Sequence[jax.Device]) -> Places:
    rows = [(getattr(d, "slice_index", 0), *d.coords, getattr(d, "core_on_chip", 0)) for d in in_order]
    return Places(of, np.array(rows))
