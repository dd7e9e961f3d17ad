"""What Google Cloud calls a slice, for the launchers (launch/): accelerator types, images, node labels.

The shape of a slice, its chips and its limits are topology.py's; here are only names. Looked up in November 2026, not
tried on a cloud account:

- accelerator types and runtime versions: docs.cloud.google.com/tpu/docs/runtimes, which also says that the Cloud TPU
  API (`gcloud compute tpus`) has no TPU7x and later, only Compute Engine and GKE have;
- node labels and machine types: xpk 1.16.0, system_characteristics.py, and the GKE pages on TPUs.
"""

import dataclasses
import math

from tele_jax.aot.topology import Slice, find_slice
from tele_jax.errors import UserError

CHIPS_PER_HOST = 4  # of the machine types below; the Cloud TPU API may put 8 chips of a small v5e or v6e slice in one


@dataclasses.dataclass(frozen=True)
class Names:
    """Of one generation. `runtime_version` is None where the Cloud TPU API does not have it."""

    prefix: str
    runtime_version: str | None
    gke_accelerator: str
    machine_type: str


NAMES = {
    "v4": Names("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-4t"),
    "v5e": Names("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    "v5p": Names("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t"),
    "v6e": Names("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t"),
    "tpu7x": Names("tpu7x", None, "tpu7x", "tpu7x-standard-4t"),
}


def tpu_api_names(of: Slice) -> dict[str, str]:
    """What `gcloud compute tpus` asks for: accelerator_type, such as "v5p-256", and runtime_version.

    Raises:
      UserError: the Cloud TPU API has no such slice.
    """
    names, shape = NAMES[of.generation.name], _shape(of)
    if names.runtime_version is None:
        raise UserError(
            f"topology {of.name}: the Cloud TPU API has no {of.generation.name}; launch/gke_jobset.sh and xpk.sh have"
        )
    kind = f"{names.prefix}-{math.prod(of.shape) * of.generation.cores}"
    usual = _shape(find_slice(kind))
    if usual != shape:
        raise UserError(
            f"topology {of.name}: the accelerator type {kind} is a slice of {usual}, and the Cloud TPU API asks by "
            f"accelerator type; take {of.generation.name}:{usual}, or launch/gke_jobset.sh for this shape"
        )
    return {"accelerator_type": kind, "runtime_version": names.runtime_version}


def gke_names(of: Slice) -> dict[str, str | int]:
    """What GKE and xpk ask for; hosts and chips_per_host are those of one slice.

    Raises:
      UserError: a slice of less than a whole host.
    """
    names, chips = NAMES[of.generation.name], math.prod(of.shape)
    if chips % CHIPS_PER_HOST:
        raise UserError(f"topology {of.name}: {chips} chips are no whole hosts of {CHIPS_PER_HOST}")
    return {
        "gke_accelerator": names.gke_accelerator,
        "gke_topology": _shape(of),
        "machine_type": names.machine_type,
        "xpk_type": f"{names.prefix}-{_shape(of)}",
        "hosts": chips // CHIPS_PER_HOST,
        "chips_per_host": CHIPS_PER_HOST,
    }


def _shape(of: Slice) -> str:
    return "x".join(map(str, of.shape))
