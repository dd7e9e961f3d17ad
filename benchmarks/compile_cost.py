"""Compile time and compiler memory of the training step do not grow with the number of layers.

    python benchmarks/compile_cost.py [--topology v5e:2x2] [--layers 10 64 140] [--write FILE]  # needs [tpu]

Each number of layers is compiled in a process of its own, one after the other; prints JSON, and writes it to FILE
(benchmarks/compile_cost.json is what docs/scale.md has). Exits with 1 where a ratio is above its bound. Processor time
is compared, not the time on the clock, which depends on what else the machine does.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BOUND = 1.3
CHILD = "--one"


def one(topology: str, layers: int) -> dict:
    """Compiles one step in this process: seconds of processor time and the most memory it held."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    import tele_jax as tele
    from tele_jax.aot.topology import devices, find_slice
    from tele_jax.settings import MeshConfig, OptimizerConfig
    from tele_jax.sharding import make_mesh
    from tele_jax.train.optimizer import optimizer
    from tele_jax.train.step import lower_step

    cfg = tele.ModelConfig(
        num_layers=layers, embed_dim=512, num_heads=4, mlp_dim=1344, vocab_size=8192, max_seq_len=512
    )
    of = find_slice(topology)
    mesh = make_mesh(MeshConfig(fsdp=of.num_devices // 2, tensor=2), devices(of))
    tx = optimizer(cfg, OptimizerConfig(learning_rate=1e-3), lambda step: jnp.float32(1.0))
    lowered = lower_step(cfg, tx, mesh, batch_size=of.num_devices, seq_len=512)
    before = resource.getrusage(resource.RUSAGE_SELF)
    text = lowered.compile().as_text()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "layers": layers,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "peak_gib": round(after.ru_maxrss / 2**20, 3),
        "program_characters": len(text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 64, 140])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument(CHILD, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args.topology, args.one)))
        return
    runs = []
    for layers in args.layers:
        command = [sys.executable, __file__, "--topology", args.topology, CHILD, str(layers)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    ratios = {
        key: round(max(r[key] for r in runs) / min(r[key] for r in runs), 3) for key in ("cpu_seconds", "peak_gib")
    }
    found = {
        "machine": machine(),
        "topology": args.topology,
        "ratios": ratios,
        "bound": BOUND,
        "ok": max(ratios.values()) <= BOUND,
        "runs": runs,
    }
    print(json.dumps(found, indent=2))
    if args.write:
        args.write.write_text(json.dumps(found, indent=2) + "\n")
    if not found["ok"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
