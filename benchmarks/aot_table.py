"""The tables of docs/scale.md: every published model on slices that it fits, each row from a compilation.

    python benchmarks/aot_table.py                       # compiles what is missing; needs the extra [tpu], and an hour
    python benchmarks/aot_table.py --only 1t tpu7x       # rows whose names hold all of these words
    python benchmarks/aot_table.py --stale               # marks rows whose program has changed since; compiles nothing
    python benchmarks/aot_table.py --page docs/scale.md  # writes the page from what was compiled; compiles nothing

Every row goes into benchmarks/aot_table.json as soon as it is there: a run that was stopped goes on where it was. A row
is compiled again where the program, the compiler or the settings changed (`tele plan`'s cache knows), not otherwise.
The comparison with MaxText on the page is what benchmarks/aot_vs_maxtext.py wrote to benchmarks/aot_vs_maxtext.json.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

STORE, MAXTEXT, COST = (HERE / f"{name}.json" for name in ("aot_table", "aot_vs_maxtext", "compile_cost"))
SEQ_LEN = 4096

# model, slice, mesh, sequences a step, microbatches, remat. Batches are the multiples of 512 nearest to the published
# 1,344 sequences of 4,096 tokens that the meshes divide; TeleChat's were not published.
TRAIN = [
    ("tele_flm_52b", "v5p:8x8x16", dict(fsdp=512, tensor=2), 1536, 1, "products"),
    ("tele_flm_102b", "v5p:8x8x16", dict(fsdp=256, tensor=4), 1536, 2, "products"),
    ("tele_flm_1t", "v5p:8x16x16", dict(fsdp=256, tensor=8), 1536, 6, "products"),
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
    # The settings of the comparison with MaxText.
    ("tele_flm_52b", "v5p:4x4x8", dict(fsdp=64, tensor=2), 64, 1, "full"),
    ("tele_flm_1t", "v5p:8x16x16", dict(fsdp=512, tensor=4), 512, 1, "full"),
]
# small, large, slice, mesh: where the large model is trained
GROW = [
    ("tele_flm_52b", "tele_flm_102b", "v5p:8x8x16", dict(fsdp=256, tensor=4)),
    ("tele_flm_102b", "tele_flm_1t", "v5p:8x16x16", dict(fsdp=256, tensor=8)),
]
# model, slice, mesh, rows of 4,096 tokens
DECODE = [
    ("tele_flm_52b", "v5p:2x2x2", dict(tensor=8), 32),
    ("tele_flm_1t", "v5p:2x4x4", dict(tensor=32), 8),
    ("telechat_7b", "v5e:2x2", dict(tensor=4), 8),
]


# --------------------------------------------------------------------------------------------------------------- jobs


def names() -> dict[str, tuple[str, tuple]]:
    """Name of every row -> (kind, row)."""
    mesh = lambda sizes: ",".join(f"{axis}={size}" for axis, size in sizes.items())  # noqa: E731
    return {
        **{f"train {m} {s} {mesh(a)} {b}/{n} {r}": ("train", (m, s, a, b, n, r)) for m, s, a, b, n, r in TRAIN},
        **{f"grow {m} {to} {s} {mesh(a)}": ("grow", (m, to, s, a)) for m, to, s, a in GROW},
        **{f"decode {m} {s} {mesh(a)} {b}": ("decode", (m, s, a, b)) for m, s, a, b in DECODE},
    }


def job_of(kind: str, row: tuple) -> Any:
    import tele_jax as tele
    from tele_jax.aot import jobs, topology
    from tele_jax.settings import MeshConfig

    cfg = tele.get_model(row[0])
    place = lambda name, mesh: dict(slice=topology.find_slice(name), mesh=MeshConfig(**mesh))  # noqa: E731
    if kind == "train":
        _, slice_name, mesh, batch, parts, remat = row
        sizes = dict(batch_size=batch, microbatches=parts, seq_len=SEQ_LEN)
        return jobs.TrainJob(cfg=dataclasses.replace(cfg, remat=remat), **sizes, **place(slice_name, mesh))
    if kind == "grow":
        _, to, slice_name, mesh = row
        plan = tele.growth.plan(cfg, tele.get_model(to), policy="exact", layers="uniform")
        return jobs.GrowJob(plan=plan, **place(slice_name, mesh))
    _, slice_name, mesh, batch = row
    return jobs.DecodeJob(cfg=cfg, batch_size=batch, seq_len=SEQ_LEN, **place(slice_name, mesh))


def compiled(kind: str, row: tuple) -> dict[str, Any]:
    """The figures of one row; from tele plan's cache where the same program was compiled before."""
    from tele_jax.aot import cost
    from tele_jax.aot.compile import compile_job
    from tele_jax.published import STAGE_TOKENS

    job = job_of(kind, row)
    figures = cost.figures(job, compile_job(job), STAGE_TOKENS.get(row[0]) if kind == "train" else None)
    figures.pop("from_cache")
    more = {"to": row[1]} if kind == "grow" else {}
    return {"model": row[0], **more, **figures, "versions": versions()}


def versions() -> str:
    import jax

    from tele_jax.aot.topology import require_libtpu

    return f"jax {jax.__version__}, libtpu {require_libtpu()}"


# --------------------------------------------------------------------------------------------------------------- page


def table(head: str, rows: list[str]) -> str:
    return f"| {head} |\n{'|---' * (head.count('|') + 1)}|\n" + "\n".join(f"| {row} |" for row in rows)


def title(f: dict) -> str:
    name = f"{f['model']} to {f['to']}" if "to" in f else f["model"]
    return f"{name}{' *' if f.get('stale') else ''}"


def place(f: dict) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in f["mesh"].items() if size > 1)
    return f"{f['topology']} ({f['chips']:,}) | {mesh}"


def memory(f: dict, *kinds: str) -> str:
    gib = {name: (size or 0) / 2**30 for name, size in f["hbm"].items()}
    parts = " + ".join(f"{gib[name]:.1f}" for name in kinds)
    return f"{parts} = {gib['needed']:.1f} | {gib['usable']:.1f}, {f['margin']:.0%}"


def times(f: dict) -> str:
    seconds = f["seconds"]
    parts = ", ".join(f"{seconds[name]:.3g}" for name in ("compute", "hbm", "ici"))
    return f"{seconds['step']:.3g} ({parts}) | {f['limit']} | {seconds['scheduled']:.3g}, {seconds['waiting']:.3g}"


TRAIN_HEAD = (
    "model | slice (chips) | mesh | batch x parts | remat | HBM, GiB: parameters + optimizer + activations + rest | "
    "of, free | step at least, s: all overlapped (compute, HBM, ICI) | by | as scheduled, of which waiting | "
    "model FLOPs over peak at most: all overlapped, as scheduled"
)
TIME_HEAD = (
    "model | slice (chips) | stage: tokens | all overlapped: model FLOPs over peak, days at least | "
    "as scheduled: waits, share of the step | model FLOPs over peak, days at least | chip-hours at least | "
    "published utilisation of comparable runs | days at it | chip-hours at it"
)


def train_line(f: dict) -> str:
    kinds = ("parameters", "optimizer", "activations", "temporaries")
    head = f"{title(f)} | {place(f)} | {f['batch_size']:,} x {f['microbatches']} | {f['remat']} | {memory(f, *kinds)}"
    if not f["fits"]:
        return f"{head} | does not fit" + " |" * 3
    return f"{head} | {times(f)} | {f['compute_bound']:.1%}, {f['scheduled_bound']:.1%}"


def time_line(f: dict) -> str:
    """Days and chip-hours of a stage: all overlapped, as scheduled, at the utilisation that others have published."""
    spans = lambda form: " to ".join(form(one) for one in reversed(f.get("published", ())))  # noqa: E731
    days, hours = spans(lambda one: f"{one['days']:.1f}"), spans(lambda one: f"{one['chip_hours']:,.0f}")
    shares = " to ".join(f"{share:.1%}" for share in reversed(f.get("published_mfu", ())))
    seconds = f["seconds"]
    overlapped = f"{f['compute_bound']:.1%}, {f['days'] * seconds['step'] / seconds['scheduled']:.1f}"
    waits = f"{seconds['waiting']:.3g} s, {seconds['waiting'] / seconds['scheduled']:.1%}"
    scheduled = f"{waits} | {f['scheduled_bound']:.1%}, {f['days']:.1f} | {f['chip_hours']:,.0f}"
    return (
        f"{title(f)} | {f['topology']} ({f['chips']:,}) | {f['stage_tokens'] / 1e12:.4g}e12 | {overlapped} | "
        f"{scheduled} | {shares or 'none published'} | {days or '-'} | {hours or '-'}"
    )


def waiting(rows: list[dict]) -> str:
    """Of every generation, the part of the time on links in which the device waits, from the least row to the most."""
    found: dict[str, list[float]] = {}
    for f in rows:
        if f["fits"] and f["seconds"]["ici"]:
            share = f["seconds"]["waiting"] / f["seconds"]["ici"]
            found.setdefault(f["topology"].partition(":")[0], []).append(share)
    return ", ".join(f"{name} {min(shares):.0%} to {max(shares):.0%}" for name, shares in found.items())


GROW_HEAD = (
    "growth | slice (chips) | mesh | HBM, GiB: parameters + optimizer + grown parameters + grown optimizer + rest | "
    "of, free | at least, s: all overlapped (compute, HBM, ICI) | by | as scheduled, of which waiting"
)


def grow_line(f: dict) -> str:
    kinds = ("parameters", "optimizer", "grown parameters", "grown optimizer", "temporaries")
    head = f"{title(f)} | {place(f)} | {memory(f, *kinds)}"
    return f"{head} | {times(f)}" if f["fits"] else f"{head} | does not fit | |"


DECODE_HEAD = (
    "model | slice (chips) | mesh | rows | HBM, GiB: parameters + cache + rest | of, free | "
    "step at least, s: all overlapped (compute, HBM, ICI) | by | as scheduled, of which waiting | "
    "tokens a second at most"
)


def decode_line(f: dict) -> str:
    head = f"{title(f)} | {place(f)} | {f['batch_size']} | {memory(f, 'parameters', 'cache', 'temporaries')}"
    return f"{head} | {times(f)} | {f['tokens_per_day'] / 86400:,.0f}" if f["fits"] else f"{head} | does not fit | | |"


def best(rows: list[dict]) -> str:
    """Of every Tele-FLM stage, the row with the highest bound by its schedule, and what stands between it and 100%."""
    lines = []
    for model in ("tele_flm_52b", "tele_flm_102b", "tele_flm_1t"):
        fitting = [f for f in rows if f["model"] == model and f["fits"]]
        if fitting:
            f = max(fitting, key=lambda f: f["scheduled_bound"])
            again = (f["flops"]["matmul"] + f["flops"]["attention"]) / f["flops"]["model"] - 1
            lines.append(
                f"- {model}: on {f['topology']} with remat {f['remat']} a step of {f['batch_size']:,} sequences takes "
                f"at least {f['seconds']['scheduled']:.3g} s as scheduled ({f['seconds']['step']:.3g} s if all "
                f"overlapped): {f['scheduled_bound']:.1%} of the peak at most. The program computes {again:.1%} more "
                f"than the model FLOPs, and waits {f['seconds']['waiting']:.3g} s for collectives."
            )
    return "\n".join(lines)


def cost_of_layers() -> str:
    if not COST.exists():
        return ""
    found = json.loads(COST.read_text())
    head = "layers | processor seconds to compile | memory of the compiler, GiB | characters of the program"
    rows = [
        f"{run['layers']} | {run['cpu_seconds']} | {run['peak_gib']} | {run['program_characters']:,}"
        for run in found["runs"]
    ]
    ratios = found["ratios"]
    return f"""
## Layers

Written by `benchmarks/compile_cost.py`: a step with embed 512 for {found["topology"]}. The most over the least:
{ratios["cpu_seconds"]:.3f} of the time, {ratios["peak_gib"]:.3f} of the memory.

{table(head, rows)}
"""


def against_maxtext() -> str:
    if not MAXTEXT.exists():
        return ""
    rows = []
    results = json.loads(MAXTEXT.read_text())
    units = {
        "temporary_bytes": ("temporaries at the fullest moment, GiB", 2**30),
        "allocated_temporary_bytes": ("set aside for temporaries in all, GiB", 2**30),
        "flops": ("FLOPs, e12", 1e12),
        "matmul_flops": ("of which matrix products, e12", 1e12),
        "hbm_bytes": ("HBM bytes, GB", 1e9),
        "collective_bytes": ("results of collectives, GB", 1e9),
    }
    for result in results.values():
        case = result["case"]
        mesh = ", ".join(f"{axis} {size}" for axis, size in case["mesh"].items())
        where = f"{case['model']}, {case['slice']}, {mesh}, {case['sequences']} sequences"
        for key, (name, unit) in units.items():
            our, their, tuned = (result[which][key] / unit for which in ("ours", "maxtext", "tuned"))
            ratios = f"{our / their:.3f} | {our / tuned:.3f}"
            rows.append(f"{where} | {name} | {our:,.2f} | {their:,.2f} | {tuned:,.2f} | {ratios}")
            where = ""
    compiler = next(iter(results.values()))["versions"]
    return f"""
## Against MaxText

Written by `benchmarks/aot_vs_maxtext.py`: both steps compiled by jax {compiler["jax"]} and libtpu {compiler["libtpu"]},
read by the same counter, loops multiplied out; a device and a step. MaxText {compiler["maxtext"]} on the same
dimensions, mesh and batch: `remat_policy=full`, `attention=flash`, AdamW, float32 parameters, bfloat16 products, all
else by default; *tuned* with
{", ".join(f"`{name}`" for name in tuned_settings(results))} as well.

{table("case | figure | tele_jax | MaxText | tuned | ours over MaxText | over tuned", rows)}
"""


def tuned_settings(results: dict) -> list[str]:
    """Settings that the tuned column has and the other has not."""
    first = next(iter(results.values()))
    return [setting for setting in first["tuned"]["settings"] if setting not in first["maxtext"]["settings"]]


def page(store: dict[str, dict]) -> str:
    found = {kind: [store[name] for name in names() if name in store and name.startswith(kind)] for kind in KINDS}
    compilers = sorted({f["versions"] for rows in found.values() for f in rows})
    stale = any(f.get("stale") for rows in found.values() for f in rows)
    marked = (
        "\n- Rows with * are of the program as it was before its last change, not compiled again since: before the\n"
        "  options of the compiler, the gradient of the head that is reduced once, and the padding in the bound."
        if stale
        else ""
    )
    tables = {kind: table(KINDS[kind][0], [KINDS[kind][1](f) for f in rows]) for kind, rows in found.items()}
    return f"""# Pod scale, on paper

After this page you can choose a slice, a mesh and a batch for a published model, and bound its memory, its time and its
chip-hours.

Written by `python benchmarks/aot_table.py --page docs/scale.md`; not by hand. Each row is a compilation of the real
program ({"; ".join(compilers)}) for a slice that was not there: parameters and Adam's moments in float32, products in
bfloat16, sequences of 4,096 tokens. `tele plan` gives the same for other models, slices, meshes and
batches, where their shapes divide.

- HBM is that of one device at the fullest moment; v5p and v6e have a device a chip, tpu7x two. Activations are what
  layers keep for the backward pass, the rest gradients and temporaries.
- Two bounds on the time of a step, both from the FLOPs, bytes and collectives of the compiled program, loops multiplied
  out, at the peak figures of the chip (tele_jax/published.py). *All overlapped*: the largest of compute, HBM and
  ICI, as if all three were busy from the first to the last moment. *As scheduled*: the instructions one after another,
  as the compiler has ordered them, each at the peak of the resource that it needs most; for a collective that no other
  work overlaps the device waits. Of the time on ICI it waits: {waiting(found["train"])}.
- A product whose sizes are no multiples of a matrix unit (128 wide to v5p, 256 on v6e and tpu7x) takes the time of
  those that are: attention with heads of 128 takes twice its FLOPs on v6e and tpu7x, with heads of 160 everywhere 1.6
  times.
- Steps of training are compiled with the compiler's own options, as runs are (tele_jax/train/compiler_options.py).
- Neither is a forecast: a real step of that program takes longer than both, as far as what is counted is right, and
  nothing here has run on a TPU. All figures of steps are compiled or derived, none is measured. Model FLOPs over peak
  counts model FLOPs; what is computed again does not count.
- Days stand three times: with all overlapped, as scheduled, and at the utilisation that MaxText publishes of dense
  models of this size on the same chip (65.4% on v5p, 43.8% to 50.3% on v6e: maxtext.readthedocs.io, "Optimized models
  tiering"; none is published for tpu7x); chip-hours by the last two. The third is the better guess of a budget, and
  where its days are fewer than those as scheduled, the program of that row cannot reach the published utilisation. The
  tokens of the stages are those published.{marked}

## Training

{tables["train"]}

{best(found["train"])}

## Days and chip-hours of the published stages

{table(TIME_HEAD, [time_line(f) for f in found["train"] if f["fits"] and "days" in f])}

## Growth

What a run does between two stages, on the mesh of the second: policy exact, with optimizer state. Both models are there
until the growth is verified.

{tables["grow"]}

## Decoding

A token for every row, against a cache of 4,096 tokens that is full; parameters in bfloat16.

{tables["decode"]}
{cost_of_layers()}{against_maxtext()}"""


KINDS = {"train": (TRAIN_HEAD, train_line), "grow": (GROW_HEAD, grow_line), "decode": (DECODE_HEAD, decode_line)}


def write(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose names hold all of these")
    parser.add_argument("--stale", action="store_true", help="mark rows whose program has changed, and stop")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page from what is stored, and stop")
    args = parser.parse_args()
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    if args.page:
        write(args.page, page(store))
        return
    import jax

    jax.config.update("jax_platforms", "cpu")
    for name, (kind, row) in names().items():
        if all(word in name for word in args.only):
            print(f"{name} ...", file=sys.stderr, flush=True)
            store = json.loads(STORE.read_text()) if STORE.exists() else {}
            if args.stale and name in store:
                from tele_jax.aot.compile import program_key

                store[name]["stale"] = program_key(job_of(kind, row)) != store[name]["program"]
            elif not args.stale:
                store[name] = compiled(kind, row)
            write(STORE, json.dumps(store, indent=1) + "\n")
            print(json.dumps({name: store.get(name)}), flush=True)


if __name__ == "__main__":
    main()
