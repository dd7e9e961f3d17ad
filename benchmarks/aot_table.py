"""The table of docs/scale.md: every published model on slices that it fits, each row from a compilation.

    python benchmarks/aot_table.py --write docs/scale.md        # needs the extra [tpu]; about an hour of one core
    python benchmarks/aot_table.py --rows 0 1 2                 # some rows, as JSON

Compiled programs are kept (tele plan's cache), so that a second run is quick and rows can be added one at a time.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

import tele_jax as tele
from tele_jax.published import STAGE_TOKENS
from tele_jax.run import MeshConfig
from tele_jax.scale import cost, topology
from tele_jax.scale.compile import Job, compile_job

# model, slice, mesh, sequences a step, microbatches, remat. Batches are the multiples of 512 nearest to the published
# 1,344 sequences of 4,096 tokens that the meshes divide; TeleChat's were not published.
ROWS = [
    ("tele_flm_52b", "v5p:8x8x16", dict(fsdp=512, tensor=2), 1536, 1, "products"),
    ("tele_flm_102b", "v5p:8x8x16", dict(fsdp=256, tensor=4), 1536, 2, "products"),
    ("tele_flm_1t", "v5p:8x16x16", dict(fsdp=512, tensor=4), 1536, 1, "full"),
    ("tele_flm_52b", "v6e:16x16", dict(fsdp=128, tensor=2), 1536, 2, "full"),
    ("tele_flm_102b", "v6e:16x16", dict(fsdp=64, tensor=4), 1536, 4, "full"),
    ("tele_flm_52b", "tpu7x:4x8x8", dict(fsdp=256, tensor=2), 1536, 1, "attention"),
    ("tele_flm_102b", "tpu7x:8x8x8", dict(fsdp=512, tensor=2), 1536, 1, "attention"),
    ("tele_flm_1t", "tpu7x:8x16x16", dict(fsdp=512, tensor=8), 1536, 1, "attention"),
    ("telechat_7b", "v5p:4x4x8", dict(fsdp=128), 1024, 1, "attention"),
    ("telechat_12b", "v5p:4x4x8", dict(fsdp=128), 1024, 1, "attention"),
    ("telechat_7b", "v6e:16x16", dict(fsdp=256), 1024, 1, "attention"),
    ("telechat_12b", "v6e:16x16", dict(fsdp=256), 1024, 1, "full"),
    ("telechat_7b", "tpu7x:4x4x8", dict(fsdp=256), 1024, 1, "attention"),
    ("telechat_12b", "tpu7x:4x4x8", dict(fsdp=256), 1024, 1, "attention"),
    # The settings that MaxText was compiled with for comparison, see benchmarks/aot_vs_maxtext.py.
    ("tele_flm_52b", "v5p:4x4x8", dict(fsdp=64, tensor=2), 64, 1, "full"),
    ("tele_flm_1t", "v5p:8x16x16", dict(fsdp=512, tensor=4), 512, 1, "full"),
]


def row(model: str, slice_name: str, mesh: dict, batch: int, microbatches: int, remat: str) -> dict:
    cfg = tele.get_model(model)
    job = Job(
        cfg=dataclasses.replace(cfg, remat=remat),
        slice=topology.find_slice(slice_name),
        mesh=MeshConfig(**mesh),
        batch_size=batch,
        seq_len=min(4096, cfg.max_seq_len),
        microbatches=microbatches,
    )
    return {"model": model, **cost.figures(job, compile_job(job), STAGE_TOKENS.get(model))}


HEAD = (
    "| model | slice (chips) | mesh | batch x parts | remat | HBM, GiB: parameters + optimizer + activations + rest | "
    "of, free | step, s | limit | utilisation | tokens a day | stage | chip-hours |\n" + "|---" * 13 + "|"
)


def line(f: dict) -> str:
    """One row of the table; what is bounded by the roofline says so in the text around it."""
    gib = {name: (size or 0) / 2**30 for name, size in f["hbm"].items()}
    parts = " + ".join(f"{gib[name]:.1f}" for name in ("parameters", "optimizer", "activations", "temporaries"))
    mesh = ", ".join(f"{axis} {size}" for axis, size in f["mesh"].items() if size > 1)
    memory = f"{parts} = {gib['needed']:.1f} | {gib['usable']:.1f}, {f['margin']:.0%}"
    head = f"| {f['model']} | {f['topology']} ({f['chips']:,}) | {mesh} | {f['batch_size']:,} x {f['microbatches']} "
    head += f"| {f['remat']} | {memory} "
    if "seconds" not in f:
        return head + "| does not fit |" + " |" * 5
    seconds, tokens = f["seconds"], f["tokens_per_day"]
    times = f"{seconds['step']:.2f} ({seconds['compute']:.2f}, {seconds['hbm']:.2f}, {seconds['ici']:.2f})"
    stage = f"{f['days']:.1f} days | {f['chip_hours']:,.0f} |" if "days" in f else "| |"
    return f"{head}| {times} | {f['limit']} | {f['utilisation_bound']:.1%} | {tokens / 1e9:.1f}e9 | {stage}"


def page(rows: list[dict]) -> str:
    versions = f"jax {jax.__version__}, libtpu {topology.require_libtpu()}"
    return f"""# Pod scale, on paper

Written by `python benchmarks/aot_table.py --write docs/scale.md`; not by hand. Each row is a compilation of the real
training step ({versions}) for a slice that was not there: parameters and Adam's moments in float32, products in
bfloat16, sequences of 4,096 tokens. `tele plan` gives the same for any other model, slice, mesh and batch.

- HBM is that of one device at the fullest moment of the step; v5p and v6e have a device a chip, tpu7x two.
  Activations are what layers keep for the backward pass, the rest gradients and temporaries.
- A step takes at least the largest of (compute, HBM, ICI): the FLOPs, bytes and collectives of the compiled program,
  loops multiplied out, at the peak figures of the chip (tele_jax/scale/topology.py). It is a bound and no forecast:
  nothing here has run on a TPU. Utilisation counts model FLOPs, what is computed again does not count.
- Tokens a day, days and chip-hours follow from that bound; the tokens of the stages are those published.

{HEAD}
{chr(10).join(line(f) for f in rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), metavar="I")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for index in args.rows:
        rows.append(row(*ROWS[index]))
        print(json.dumps(rows[-1]), flush=True)
    if args.write:
        args.write.write_text(page(rows))


if __name__ == "__main__":
    main()
