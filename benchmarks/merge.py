"""How fast `tele merge` writes, against `cp -r` of the two checkpoints that it reads, and how much memory it takes.

    JAX_PLATFORMS=cpu python benchmarks/merge.py [--dir DIR] [--repeats 5] [--memory-gb 1.0] [--layers 43]

Makes two checkpoints of 2 GB (random, float32; 43 layers), merges them by each method, and copies both, in turns. All
find what they read in the page cache, and are timed until the last byte is on the disk. Each merge runs in a process of
its own; its time is that of the call, without the start of Python. Prints JSON. Needs 11 GB in DIR.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from files import copy_seconds, memory, read_all, tree_bytes
from machine import machine

WAYS = {
    "linear": {},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"scale": 0.4},
    "ties": {"density": 0.2},
    "passthrough": {"slices": ((0, 0, 1), (1, 0, 1))},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the files go; a temporary directory by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process of its own does: save or merge
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"save": save, "merge": merge}[args.child](**json.loads(sys.stdin.read()))))
        return
    with tempfile.TemporaryDirectory(prefix="merge_", dir=args.dir) as directory:
        print(json.dumps({"machine": machine(), **measure(Path(directory), args)}, indent=2))


def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    sources = [directory / name for name in "ab"]
    for seed, source in enumerate(sources):
        child("save", path=str(source), seed=seed, layers=args.layers)
    read = sum(map(tree_bytes, sources))
    dst, copies = directory / "dst", [directory / f"copy_{name}" for name in "ab"]
    found: dict[str, Any] = {"source_bytes_of_both": read, "memory_gb": args.memory_gb, "layers": args.layers}
    for method, how in WAYS.items():
        if method == "passthrough":
            how = {"slices": ((0, 0, args.layers // 2), (1, args.layers // 2, args.layers))}
        runs = []
        for _ in range(args.repeats):
            for path in (dst, *copies):
                shutil.rmtree(path, ignore_errors=True)
            for source in sources:
                read_all(source)
            values = {"sources": [*map(str, sources)], "dst": str(dst), "memory_gb": args.memory_gb}
            run = child("merge", **values, workers=args.workers, method=method, how=how)
            pairs = zip(sources, copies, strict=True)
            run["cp_seconds"] = sum(copy_seconds(source, copy) for source, copy in pairs)
            run["load_average"] = os.getloadavg()[0]
            runs.append(run)
            print(f"{method}: {run}", file=sys.stderr)
        found[method] = {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "cp_seconds": statistics.median(run["cp_seconds"] for run in runs),
            "speed_of_cp": round(statistics.median(run["cp_seconds"] / run["seconds"] for run in runs), 3),
            "peak_bytes_above_start": max(run["peak_bytes_above_start"] for run in runs),
            "runs": runs,
        }
    return found


def child(task: str, **values: Any) -> dict[str, Any]:
    """Runs a task in an interpreter of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--child", task]
    done = subprocess.run(command, input=json.dumps(values), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def save(path: str, seed: int, layers: int) -> dict[str, Any]:
    import jax
    import numpy as np

    import tele_jax as tele

    sizes = {"embed_dim": 1024, "num_heads": 8, "head_dim": 128, "mlp_dim": 2304, "vocab_size": 16384}
    cfg, generator = tele.ModelConfig(num_layers=layers, **sizes), np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), tele.spec(cfg))
    tele.checkpoint.save(path, cfg, params)
    return {}


def merge(sources: list[str], dst: str, method: str, how: dict[str, Any], **limits: Any) -> dict[str, Any]:
    from tele_jax.growth.merge_stored import merge_stored
    from tele_jax.growth.merging import Recipe

    base = {"base": sources[0]} if method in ("task_arithmetic", "ties") else {}
    before, began = memory("VmRSS"), time.perf_counter()
    figures, _ = merge_stored(Recipe(method=method, **how), sources, dst, **base, **limits)
    seconds = round(time.perf_counter() - began, 3)
    peak = memory("VmHWM") - before
    return {"seconds": seconds, "workers": figures.workers, "peak_bytes_above_start": peak}


if __name__ == "__main__":
    main()
