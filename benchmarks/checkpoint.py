"""How long a save holds a training loop up, how fast checkpoints are written and read, and how many files they are.

    JAX_PLATFORMS=cpu python benchmarks/checkpoint.py [--dir DIR] [--layers 8] [--repeats 3]

A model of the shapes below, float32, with both moments of Adam, on 8 simulated devices (fsdp 4, tensor 2): saved by a
Manager as a training run saves it, loaded onto another mesh, and one layer of every leaf read alone. Files that are
read are in the page cache; a save is timed until it is complete. Prints JSON: seconds and processor seconds, median of
the repeats, and bytes per second. `probe` writes as many bytes into one file, and reads them, in the same run.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
from machine import machine

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings

SHAPE = dict(embed_dim=1024, num_heads=8, head_dim=128, mlp_dim=2816, vocab_size=16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where the checkpoints go; a temporary directory by default")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint_", dir=args.dir) as directory:
        print(json.dumps({"machine": machine(), **measure(Path(directory), args.layers, args.repeats)}, indent=2))


def measure(directory: Path, layers: int, repeats: int) -> dict[str, Any]:
    cfg = tele.ModelConfig(num_layers=layers, **SHAPE)
    shardings = param_shardings(tele.spec(cfg), make_mesh(MeshConfig(fsdp=4, tensor=2)))
    generator = np.random.default_rng(0)
    host = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), tele.spec(cfg))
    params = jax.tree.map(jax.device_put, host, shardings)
    state = {"mu": params, "nu": params}
    num_bytes = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    other = make_mesh(MeshConfig(fsdp=8))
    runs: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        work()
        runs.setdefault(name, []).append((time.perf_counter() - began, time.process_time() - cpu))

    def one_layer(path: Path) -> None:
        lazy = checkpoint.open_lazy(path)
        for item in ("params", "opt_state"):
            for array in lazy.items[item].values():
                _ = array[layers // 2] if array.axes[:1] == ("layers",) else None

    for step in range(repeats):
        with checkpoint.Manager(directory / "checkpoints", keep=1) as manager:
            began = time.perf_counter(), time.process_time()
            timed("save, loop held up", lambda manager=manager, step=step: manager.save(step, cfg, params, state))
            manager.wait()
            runs.setdefault("save, until complete", []).append(
                (time.perf_counter() - began[0], time.process_time() - began[1])
            )
        path = directory / "checkpoints" / str(step)
        timed("load onto another mesh", lambda path=path: jax.block_until_ready(checkpoint.load(path, other).params))
        timed("one layer of every leaf", lambda path=path: one_layer(path))
        probe = directory / "probe"
        timed("probe: write", lambda probe=probe: write(probe, num_bytes))
        timed("probe: read", lambda probe=probe: probe.read_bytes())
    files = [file for file in path.rglob("*") if file.is_file()]
    figures = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in found), 3),
            "cpu_seconds": round(statistics.median(cpu for _, cpu in found), 3),
            "bytes_per_second": round(num_bytes / statistics.median(seconds for seconds, _ in found)),
        }
        for name, found in runs.items()
    }
    del figures["one layer of every leaf"]["bytes_per_second"], figures["save, loop held up"]["bytes_per_second"]
    return {"bytes": num_bytes, "leaves": 3 * len(jax.tree.leaves(params)), "files": len(files), **figures}


def write(path: Path, num_bytes: int) -> None:
    block = np.random.default_rng(1).bytes(2**24)
    with path.open("wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
