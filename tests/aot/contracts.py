"""Writes the sharding contracts: how every parameter of every published model lies on three slices.

    python -m tests.aot.contracts

A change to a rule, a model or a default then shows as a diff of tests/aot/contracts/*.json.
"""

import json
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from tele_jax import published
from tele_jax.aot.topology import find_slice
from tele_jax.model.spec import flat_spec
from tele_jax.sharding import MESH_AXES, partition_spec

DIRECTORY = Path(__file__).parent / "contracts"
SLICES = {"v5p:4x4x8": (1, 64, 2), "v6e:16x16": (1, 64, 4), "v5p:8x16x16": (1, 512, 4)}


def contract(model: str) -> dict[str, Any]:
    """{slice: {"mesh", "leaves": {name: [size and mesh axis of each dimension]}, "bytes_per_device"}}; no memory."""
    found = {}
    for name, shape in SLICES.items():
        mesh = AbstractMesh(shape, MESH_AXES)
        assert mesh.size == find_slice(name).num_devices
        leaves, held = {}, 0
        for leaf, spec in flat_spec(published.get_model(model)).items():
            entries = partition_spec(leaf, spec, mesh)
            pairs = list(zip(spec.axes, spec.shape, entries, strict=True))
            leaves[leaf] = " ".join(f"{axis}={size}" + (f"/{cut}" if cut else "") for axis, size, cut in pairs)
            part = 4
            for _, size, cut in pairs:
                part *= size // mesh.shape[cut] if cut else size
            held += part
        found[name] = {"mesh": dict(zip(MESH_AXES, shape, strict=True)), "leaves": leaves, "bytes_per_device": held}
    return found


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for model in published.PUBLISHED:
        (DIRECTORY / f"{model}.json").write_text(json.dumps(contract(model), indent=1) + "\n")
    print(f"wrote {len(published.PUBLISHED)} contracts to {DIRECTORY}")


if __name__ == "__main__":
    main()
