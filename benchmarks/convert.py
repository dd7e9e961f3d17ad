"""How fast a release is imported, and exported again, against `cp -r` of it, and how much memory that takes.

    JAX_PLATFORMS=cpu python benchmarks/convert.py [--dir DIR] [--repeats 5] [--memory-gb 1.0]

Makes a checkpoint like TeleChat-7B's with 7 of its 30 layers (4.4 GB in bfloat16, random, in shards of 2 GB), and then,
in turns, imports it, exports what was imported, and copies the release. All find what they read in the page cache as
far as the machine has memory for it, and are timed until the last byte is on the disk. Then the same with one layer,
for the memory: chunks stay as large. Prints JSON. Needs 14 GB in DIR.
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

LAYERS = {"full": 7, "one_layer": 1}
BLOCK = 64 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the files go; a temporary directory by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-gb", type=float, default=1.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process of its own does
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"make": make, "convert": convert}[args.child](**json.loads(sys.stdin.read()))))
        return
    with tempfile.TemporaryDirectory(prefix="convert_", dir=args.dir) as directory:
        print(json.dumps({"machine": machine(), **measure(Path(directory), args)}, indent=2))


def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    how = {"memory_gb": args.memory_gb, "workers": args.workers}
    sizes = {}
    for size in LAYERS:
        src, ck, out, copy = (directory / f"{size}_{name}" for name in ("src", "ck", "out", "copy"))
        child("make", size=size, src=str(src))
        runs = []
        for _ in range(args.repeats if size == "full" else 2):
            for path in (ck, out, copy):
                shutil.rmtree(path, ignore_errors=True)
            read_all(src)
            run = {"import": child("convert", what="import", src=str(src), dst=str(ck), **how)}
            read_all(src)
            run["cp_seconds"] = copy_seconds(src, copy)
            shutil.rmtree(copy)
            read_all(ck)
            run["export"] = child("convert", what="export", src=str(ck), dst=str(out), **how)
            run["same_bytes"] = same_weights(src, out)
            run["load_average"] = round(os.getloadavg()[0], 2)
            runs.append(run)
            print(f"{size}: {run}", file=sys.stderr)
        sizes[size] = {"bytes": tree_bytes(src), "cp_bytes_per_second": speed(src, runs, lambda run: run["cp_seconds"])}
        for task in ("import", "export"):
            seconds = lambda run, task=task: run[task]["seconds"]  # noqa: E731
            sizes[size][task] = {
                "bytes_per_second": speed(src, runs, seconds),
                "ratio_to_cp": round(statistics.median(run["cp_seconds"] / seconds(run) for run in runs), 3),
                "peak_gib_above_interpreter": max(run[task]["peak_gib_above_interpreter"] for run in runs),
            }
        sizes[size]["runs"] = runs
        for path in (src, ck, out):
            shutil.rmtree(path)
    return {
        "import_ratio_to_cp": sizes["full"]["import"]["ratio_to_cp"],
        "import_peak_gib_above_interpreter": sizes["full"]["import"]["peak_gib_above_interpreter"],
        "targets": {"import_ratio_to_cp": ">= 0.7", "import_peak_gib_above_interpreter": "<= 1"},
        "cores": len(os.sched_getaffinity(0)),
        **how,
        **sizes,
    }


def child(task: str, **values: Any) -> dict[str, Any]:
    """Runs a task in an interpreter of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--child", task]
    done = subprocess.run(command, input=json.dumps(values), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make(size: str, src: str) -> dict[str, Any]:
    """Random numbers of both signs between 2^-8 and 2^-4."""
    import numpy as np

    import tele_jax as tele
    from tele_jax.convert import exporting, files

    cfg = tele.get_model("telechat_7b").replace(num_layers=LAYERS[size])
    plan = exporting.outline(cfg, "telechat", dtype="bfloat16")
    Path(src).mkdir()
    (Path(src) / "config.json").write_text(json.dumps(plan.document))
    stored = files.create(Path(src), files.split(plan.tensors, 2 * 10**9))
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**16, BLOCK // 2, np.uint16)
    bits = (bits & 0x807F) | (generator.integers(119, 123, BLOCK // 2, np.uint16) << 7)
    for tensor in stored.values():
        with tensor.file.open("r+b") as stream:
            stream.seek(tensor.offset)
            left = tensor.nbytes
            while left:
                part = np.roll(bits, left % 9973)[: left // 2]
                stream.write(part.tobytes())
                left -= part.nbytes
    return {}


def convert(what: str, src: str, dst: str, **how: Any) -> dict[str, Any]:
    import jax

    from tele_jax import checkpoint
    from tele_jax.checkpoint import saving  # noqa: F401  brings Orbax
    from tele_jax.convert import exporting, importing

    jax.devices()
    checkpoint.open_lazy  # noqa: B018  brings the rest
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    began, cpu = time.perf_counter(), time.process_time()
    if what == "import":
        figures = importing.import_checkpoint(src, dst, **how)
    else:
        figures = exporting.export_checkpoint(src, dst, format="telechat", **how)
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_gib_above_interpreter": round((memory("VmHWM") - before) / 2**30, 3),
        "interpreter_gib": round(before / 2**30, 3),
        "bytes_written": figures.bytes_written,
    }


def same_weights(src: Path, out: Path) -> bool:
    """Whether all tensors have the same bytes, wherever they lie."""
    from tele_jax.convert import files

    mine, theirs = files.read_directory(src), files.read_directory(out)
    return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)


def _same(a: Any, b: Any) -> bool:
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        return a.nbytes == b.nbytes and all(
            left.read(n) == right.read(n) for n in [BLOCK] * (a.nbytes // BLOCK) + [a.nbytes % BLOCK]
        )


def speed(src: Path, runs: list[dict[str, Any]], seconds: Any) -> int:
    return round(tree_bytes(src) / statistics.median(map(seconds, runs)))


if __name__ == "__main__":
    main()
