"""How fast growth.stream writes, against `cp -r` of what it wrote, and how much memory it takes.

    JAX_PLATFORMS=cpu python benchmarks/grow_stream.py [--dir DIR] [--repeats 5] [--memory-gb 1.0] [--io tensorstore]

Makes a checkpoint of 2.1 GB (parameters and Adam moments in float32, random), grows it to 4.1 GB with its optimizer
state, and copies the result, in turns. Both find what they read in the page cache, and are timed until the last byte is
on the disk. Then the result is verified (growth.verify_stored), read from the page cache. Then the same at a quarter of
the size, for the memory: layers are left out, chunks stay as large. Prints JSON. Needs 11 GB in DIR.
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

COMMON = dict(embed_dim=1024, num_heads=8, head_dim=128, mlp_dim=2816, vocab_size=16384)
WIDER = dict(embed_dim=1280, num_heads=10, num_kv_heads=10, mlp_dim=3840)
LAYERS = {"full": (11, 14), "quarter": (1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the files go; a temporary directory by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--policy", default="exact")
    parser.add_argument("--io", choices=("direct", "tensorstore"), default="direct", help="what touches chunk files")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process of its own does: save or stream
    args = parser.parse_args()
    if args.child:
        print(
            json.dumps({"save": save, "stream": stream, "verify": verify}[args.child](**json.loads(sys.stdin.read())))
        )
        return
    with tempfile.TemporaryDirectory(prefix="grow_stream_", dir=args.dir) as directory:
        print(json.dumps({"machine": machine(), **measure(Path(directory), args)}, indent=2))


def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    how = {"memory_gb": args.memory_gb, "workers": args.workers, "policy": args.policy, "io": args.io}
    sizes = {}
    for size in LAYERS:
        src, dst, copy = (directory / f"{size}_{name}" for name in ("src", "dst", "copy"))
        child("save", size=size, src=str(src))
        runs = []
        for _ in range(args.repeats if size == "full" else 2):
            for path in (dst, copy):
                shutil.rmtree(path, ignore_errors=True)
            read_all(src)
            run = child("stream", size=size, src=str(src), dst=str(dst), **how)
            read_all(dst)
            run["cp_seconds"] = copy_seconds(dst, copy)
            run["load_average"] = os.getloadavg()[0]
            runs.append(run)
            print(f"{size}: {run}", file=sys.stderr)
        written = tree_bytes(dst)
        verified = child("verify", size=size, src=str(src), dst=str(dst), policy=args.policy)
        sizes[size] = {
            "source_bytes": tree_bytes(src),
            "destination_bytes": written,
            "stream_bytes_per_second": round(written / statistics.median(run["seconds"] for run in runs)),
            "cp_bytes_per_second": round(written / statistics.median(run["cp_seconds"] for run in runs)),
            "ratio": round(statistics.median(run["cp_seconds"] / run["seconds"] for run in runs), 3),
            "peak_bytes_above_interpreter": max(run["peak_bytes_above_interpreter"] for run in runs),
            "verified": verified,
            "runs": runs,
        }
        for path in (src, dst, copy):
            shutil.rmtree(path)
    full, quarter = sizes["full"], sizes["quarter"]
    return {
        "ratio_to_cp": full["ratio"],
        "peak_gib_above_interpreter": round(full["peak_bytes_above_interpreter"] / 2**30, 3),
        "peak_gib_at_a_quarter": round(quarter["peak_bytes_above_interpreter"] / 2**30, 3),
        "targets": {"ratio_to_cp": ">= 0.8", "peak_gib_above_interpreter": "<= 1"},
        "cores": len(os.sched_getaffinity(0)),
        **how,
        **sizes,
    }


def child(task: str, **values: Any) -> dict[str, Any]:
    """Runs a task in an interpreter of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--child", task]
    done = subprocess.run(command, input=json.dumps(values), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def configs(size: str) -> tuple[Any, Any]:
    import tele_jax as tele

    before, after = LAYERS[size]
    src = tele.ModelConfig(num_layers=before, **COMMON)
    return src, src.replace(num_layers=after, **WIDER)


def save(size: str, src: str) -> dict[str, Any]:
    import jax
    import numpy as np

    import tele_jax as tele
    from tele_jax.train.optimizer import AdamState

    cfg, _ = configs(size)
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), tele.spec(cfg))
    born = {axis: np.zeros(size, np.int32) for axis, size in cfg.axis_sizes.items()}
    state = AdamState(np.int32(1000), params, jax.tree.map(np.square, params), born)
    tele.checkpoint.save(src, cfg, params, opt_state=state, step=1000)
    return {}


def stream(size: str, src: str, dst: str, policy: str, io: str, **how: Any) -> dict[str, Any]:
    import jax

    from tele_jax import checkpoint, growth
    from tele_jax.checkpoint import saving  # noqa: F401  brings Orbax

    if io == "tensorstore":
        from tensorstore_chunks import install

        install()
    jax.devices()
    plan = growth.plan(*configs(size), policy=policy)
    checkpoint.open_lazy(src)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    began, cpu = time.perf_counter(), time.process_time()
    figures = growth.stream(plan, src, dst, opt=True, **how)
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_bytes_above_interpreter": memory("VmHWM") - before,
        "interpreter_bytes": before,
        "bytes_read": figures.bytes_read,
        "bytes_written": figures.bytes_written,
        "tiles": figures.tiles,
        "workers": figures.workers,
    }


def verify(size: str, src: str, dst: str, policy: str) -> dict[str, Any]:
    import jax

    from tele_jax import checkpoint, growth

    jax.devices()
    plan = growth.plan(*configs(size), policy=policy)
    old, new = checkpoint.open_lazy(src), checkpoint.open_lazy(dst)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began, cpu = time.perf_counter(), time.process_time()
    report = growth.verify_stored(plan, old, new)
    return {
        "ok": report.ok,
        "levels": report.levels,
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_bytes_above_interpreter": memory("VmHWM") - before,
    }


if __name__ == "__main__":
    main()
