"""TPU slices by name, their devices as libtpu describes them on a machine without any, and their names at Google.

find_slice("v5p:8x16x16")     # or "v5p-4096", Google's name: the number of TensorCores, of chips for v5e and v6e
devices(slice)                # devices for make_mesh; needs the extra [tpu]
gke_names(slice)              # node labels and machine types, for the launchers (launch/)
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
from tele_jax.published import GENERATIONS, Generation
from tele_jax.sharding import Device

_ALIASES = {"v5": "v5p", "v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "7x": "tpu7x"}
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
KNOWN = "v4:4x4x8, v5e:16x16, v5p:8x16x16, v6e:16x16, tpu7x:8x16x16, or by Google's names as v5p-4096 or v6e-256"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Equal TPU slices of one generation; shape: chips of one slice along each dimension of its torus."""

    generation: Generation
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def dimensions(self) -> str:
        """The shape as Google writes it, such as 8x16x16."""
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        one = f"{self.generation.name}:{self.dimensions}"
        return one if self.num_slices == 1 else f"{self.num_slices} x {one}"

    @property
    def chips(self) -> int:
        return self.num_slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.chips * self.generation.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """True for each dimension with wraparound links. 3D slices have them from one cube of 4x4x4 on."""
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
    if match is None or generation is None:
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


def devices(of: Slice) -> list[Device]:
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
        found = topologies.get_topology_desc(f"{of.generation.name}:{of.dimensions}", "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {of.name!r}: libtpu says: {error}; known are {KNOWN}") from None
    assert len(found) == of.num_devices, (len(found), of)
    return found


@dataclasses.dataclass(frozen=True)
class Places:
    """Places of the devices of a mesh: `at` is int[devices, 5] of slice, three coordinates, core on the chip."""

    of: Slice
    at: np.ndarray

    def spanned(self, group: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Returns (columns of `at` in which the devices of a group differ, how many values each column has there)."""
        places = self.at[np.asarray(group)]
        counts = np.array([len(np.unique(places[:, axis])) for axis in range(places.shape[1])])
        return [axis for axis in range(places.shape[1]) if counts[axis] > 1], counts


def places(of: Slice, in_order: Sequence[Device]) -> Places:
    rows = [(getattr(d, "slice_index", 0), *d.coords, getattr(d, "core_on_chip", 0)) for d in in_order]
    return Places(of, np.array(rows))


# Names of a generation at Google Cloud: accelerator type, its runtime version (None: not in the Cloud TPU API), GKE's
# accelerator label and machine type. Looked up in November 2026, not tried on a cloud account:
# - accelerator types and runtime versions: docs.cloud.google.com/tpu/docs/runtimes, which also says that the Cloud TPU
#   API (`gcloud compute tpus`) has no TPU7x and later, only Compute Engine and GKE have;
# - node labels and machine types: xpk 1.16.0, system_characteristics.py, and the GKE pages on TPUs.
_CLOUD_NAMES = {
    "v4": ("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-4t"),
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    "v5p": ("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t"),
    "v6e": ("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t"),
    "tpu7x": ("tpu7x", None, "tpu7x", "tpu7x-standard-4t"),
}
# Chips a host of these machine types. The Cloud TPU API may put 8 chips of a small v5e or v6e slice in one host.
CHIPS_PER_HOST = 4


def tpu_api_names(of: Slice) -> dict[str, str]:
    """The accelerator_type, such as "v5p-256", and runtime_version that `gcloud compute tpus` asks for.

    Raises:
      UserError: the Cloud TPU API has no such slice.
    """
    prefix, runtime_version, _, _ = _CLOUD_NAMES[of.generation.name]
    if runtime_version is None:
        raise UserError(
            f"topology {of.name}: the Cloud TPU API has no {of.generation.name}; launch/gke_jobset.sh and xpk.sh have"
        )
    kind = f"{prefix}-{math.prod(of.shape) * of.generation.cores}"
    usual = find_slice(kind).dimensions
    require(
        usual == of.dimensions,
        f"topology {of.name}: the accelerator type {kind} is a slice of {usual}, and the Cloud TPU API asks by "
        f"accelerator type; take {of.generation.name}:{usual}, or launch/gke_jobset.sh for this shape",
    )
    return {"accelerator_type": kind, "runtime_version": runtime_version}


def gke_names(of: Slice) -> dict[str, str | int]:
    """The names by which GKE and xpk are asked for a slice; hosts and chips_per_host are those of one slice.

    Raises:
      UserError: a slice of less than a whole host.
    """
    chips = math.prod(of.shape)
    require(chips % CHIPS_PER_HOST == 0, f"topology {of.name}: {chips} chips are no whole hosts of {CHIPS_PER_HOST}")
    prefix, _, accelerator, machine_type = _CLOUD_NAMES[of.generation.name]
    return {
        "gke_accelerator": accelerator,
        "gke_topology": of.dimensions,
        "machine_type": machine_type,
        "xpk_type": f"{prefix}-{of.dimensions}",
        "hosts": chips // CHIPS_PER_HOST,
        "chips_per_host": CHIPS_PER_HOST,
    }
