"""Bounds on the time of a compiled step on its slice, and all figures of `tele plan`: memory, tokens a day, chip-hours.

Two bounds, no prediction. `step`: each resource runs at its peak, and all of them at the same time. `scheduled`: the
instructions run one after another, as the compiler has ordered them, each at the peak of the resource that it needs
most, and the device waits for every collective that the schedule does not overlap. A real step takes longer than both.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tele_jax import tables
from tele_jax.aot.compile import Program
from tele_jax.aot.counts import Collective
from tele_jax.aot.jobs import Job
from tele_jax.aot.topology import Places, Slice
from tele_jax.files import Table
from tele_jax.published import GIB

DAY = 86_400.0
RESOURCES = {"compute": "compute", "hbm": "HBM", "ici": "ICI", "dcn": "DCN"}
Figures = Table


def bounds(job: Job, program: Program) -> dict[str, float]:
    """Least seconds of one execution: by resource, `step` for all overlapped, `scheduled` for the compiler's order.

    `waiting` is the part of `ici` and `dcn` in collectives that nothing overlaps.
    """
    counts, places = program.counts, Places(job.slice, np.array(program.device_order))
    assert counts is not None  # the program fits
    flops, bandwidth = job.slice.device_flops, job.slice.device_hbm_bandwidth
    ici = dcn = waiting = 0.0
    for collective in counts.collectives:
        over_ici, over_dcn = collective_seconds(collective, places)
        ici += over_ici
        dcn += over_dcn
        waiting += 0.0 if collective.overlapped else over_ici + over_dcn
    compute = (counts.flops + counts.padding_flops) / flops
    by_resource = {"compute": compute, "hbm": counts.hbm_bytes / bandwidth, "ici": ici, "dcn": dcn}
    work = sum(times * max(work / flops, size / bandwidth) for work, size, times in counts.work)
    step = max(by_resource.values())
    return {"step": step, **by_resource, "scheduled": max(work + waiting, step), "waiting": waiting}


def collective_seconds(collective: Collective, places: Places) -> tuple[float, float]:
    """Returns (seconds on ICI, seconds on the network between slices) of all executions of one collective.

    On a torus the work is spread over the dimensions that its devices span; each has two links where the group goes
    round a whole ring, else one. Only bandwidth counts, no latency (jax-ml.github.io/scaling-book/sharding).
    """
    size = len(collective.group)
    if size < 2:
        return 0.0, 0.0
    of, nbytes = places.of, collective.received_bytes * collective.times
    dcn_bandwidth = of.generation.dcn_bandwidth / of.generation.devices
    if collective.slices > 1:
        return 0.0, nbytes / dcn_bandwidth
    spanned, counts = places.spanned(collective.group)
    slices = counts[0]
    torus = [axis for axis in spanned if 1 <= axis <= 3]
    ici = 0.0
    if torus:
        links = sum(_links(of, axis - 1, int(counts[axis])) for axis in torus)
        hops = 1.0
        if collective.kind == "all-to-all":  # data for a device far away passes through those between
            hops = sum(counts[axis] / 4 for axis in torus) / len(torus) * 2
        ici = nbytes / slices * max(hops, 1.0) / (links * of.generation.link_bandwidth / of.generation.devices)
    return ici, nbytes * (slices - 1) / slices / dcn_bandwidth


def _links(of: Slice, axis: int, covered: int) -> int:
    if axis >= len(of.shape):
        return 1
    return 2 if of.rings[axis] and covered == of.shape[axis] and covered > 2 else 1


def figures(job: Job, program: Program, tokens: float | None = None) -> Figures:
    """All figures of `tele plan`, as plain values. tokens: number in the whole stage, where known."""
    result: Figures = {
        "kind": job.kind,
        "program": program.key,
        "topology": job.slice.name,
        "chips": job.slice.chips,
        "devices": job.slice.num_devices,
        "mesh": dataclasses.asdict(job.mesh),
        **job.settings,
        "fits": program.fits,
        "margin": 1 - program.needed_bytes / program.usable_bytes,
        "hbm": _memory(job, program),
        "host_bytes": program.host_bytes,
        "compile_seconds": program.compile_seconds,
        "from_cache": program.from_cache,
    }
    counts = program.counts
    if counts is None:
        return result
    seconds, model_flops = bounds(job, program), job.model_flops / job.slice.num_devices
    result |= {
        "flops": {
            "matmul": counts.matmul_flops,
            "attention": counts.kernel_flops,
            "padding": counts.padding_flops,
            "model": model_flops,
        },
        "hbm_bytes": counts.hbm_bytes,
        "collective_bytes": counts.collective_bytes,
        "received_bytes": counts.received_bytes,
        "collectives": _by_kind(counts.collectives),
        "seconds": seconds,
        "limit": RESOURCES[max(RESOURCES, key=lambda name: seconds[name])],
    }
    # At the peak of the slice a step of the model's FLOPs alone would take `ideal` seconds.
    return result | (_rates(job, seconds, model_flops / job.slice.device_flops, tokens) if job.tokens else {})


def _memory(job: Job, program: Program) -> dict[str, int | None]:
    """Bytes of HBM by kind. Activations are 0 where the compiler wrote out a short loop: then they are temporaries."""
    train = job.kind == "train"
    saved = (program.counts.saved_bytes or None) if program.counts and train else None
    activations = {"activations": saved} if train else {}
    head = {"usable": program.usable_bytes, "needed": program.needed_bytes}
    return {**head, **program.held, **activations, "temporaries": program.temporary_bytes - (saved or 0)}


def _rates(job: Job, seconds: dict[str, float], ideal: float, tokens: float | None) -> Figures:
    """Tokens a day, and days and chip-hours of the stage: at most by the bound, and at the utilisation of others."""
    rate = job.tokens * DAY / seconds["scheduled"]
    result: Figures = {
        "compute_bound": ideal / seconds["step"],
        "scheduled_bound": ideal / seconds["scheduled"],
        "tokens_per_day": rate,
    }
    if job.kind != "train":
        return result
    mfu = [mfu for mfu, _ in job.slice.generation.published_mfu]
    rates = [job.tokens * DAY / (ideal / each) for each in mfu]
    if mfu:
        result |= {"published_mfu": mfu, "tokens_per_day_published": rates}
    if tokens is not None:
        result |= {"stage_tokens": tokens, **_duration(tokens, rate, job.slice.chips)}
        result |= {"published": [_duration(tokens, each, job.slice.chips) for each in rates]} if mfu else {}
    return result


def _duration(tokens: float, tokens_per_day: float, chips: int) -> dict[str, float]:
    days = tokens / tokens_per_day
    return {"days": days, "chip_hours": days * 24 * chips}


def _by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for c in collectives:
        if len(c.group) < 2:
            continue
        over = f"{c.slices} slices" if c.slices > 1 else len(c.group)
        entry = found.setdefault(f"{c.kind} over {over}", {"times": 0, "result_bytes": 0.0, "received_bytes": 0.0})
        entry["times"] += c.times
        entry["result_bytes"] += c.times * c.result_bytes
        entry["received_bytes"] += c.times * c.received_bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["received_bytes"]))


def table(f: Figures) -> str:
    """The figures as a table for people."""
    hbm = f["hbm"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in f["mesh"].items() if size > 1) or "one device"
    over = f"does not fit: {_gib(hbm['needed'] - hbm['usable'])} too much"
    verdict = f"fits, with {f['margin']:.0%} to spare" if f["fits"] else over
    cached = ", from the cache" if f["from_cache"] else ""
    rows = [
        ("slice", f"{f['topology']}, {f['chips']:,} chips; mesh {mesh}"),
        _WORK[f["kind"]](f),
        ("HBM a device", f"{_gib(hbm['needed'])} of {_gib(hbm['usable'])}: {verdict}"),
        *_memory_rows(f),
        *(_bound_rows(f) if "flops" in f else []),
        *(_stage_rows(f) if "days" in f else []),
        ("compiled", f"in {f['compile_seconds']:.0f} s{cached}{_options(f)}"),
    ]
    return tables.text(rows, align="ll")


def _options(f: Figures) -> str:
    if "compiled_with" not in f:
        return ""
    return (
        f", with {len(f['compiled_with'])} options of the compiler" if f["compiled_with"] else ", with its own options"
    )


_WORK = {
    "train": lambda f: (
        "batch",
        f"{f['batch_size']:,} x {f['seq_len']:,} tokens in {f['microbatches']} parts; remat {f['remat']}"
        + (f"; masks on {', '.join(f['masks'])}" if f["masks"] else ""),
    ),
    "decode": lambda f: ("decoding", f"one token for each of {f['batch_size']:,} rows of {f['seq_len']:,} tokens"),
    "grow": lambda f: (
        "growth",
        f"policy {f['policy']}, {'with' if f['optimizer_state'] else 'without'} optimizer state; both models are there",
    ),
}


def _memory_rows(f: Figures) -> list[tuple[str, str]]:
    hbm, remarks = f["hbm"], {"activations": ", saved for the backward pass"}
    if f["kind"] == "train":
        remarks["temporaries"] = ", gradients" + (" included" if hbm["activations"] else " and activations included")
    kinds = [name for name, size in hbm.items() if name not in ("usable", "needed") and size is not None]
    host = [("  on the host", _gib(f["host_bytes"]))] if f["host_bytes"] else []
    return [(f"  {name}", _gib(hbm[name]) + remarks.get(name, "")) for name in kinds] + host


def _bound_rows(f: Figures) -> list[tuple[str, str]]:
    flops, seconds = f["flops"], f["seconds"]
    by_resource = ", ".join(f"{text} {seconds[name]:.4g}" for name, text in RESOURCES.items())
    rows = [
        ("FLOPs a device", f"{flops['matmul']:.4g} of matrix products, {flops['attention']:.3g} of attention, as many "
                           f"as {flops['padding']:.3g} lost to padding; model FLOPs {flops['model']:.4g}"),
        ("traffic", f"HBM {f['hbm_bytes'] / 1e9:,.0f} GB; collectives receive {f['received_bytes'] / 1e9:,.1f} GB, "
                    f"with results of {f['collective_bytes'] / 1e9:,.1f} GB"),
        *((f"  {kind}", f"{c['times']:,.0f} times, {c['received_bytes'] / 1e9:,.1f} GB received")
          for kind, c in list(f["collectives"].items())[:6]),
        ("growth at least" if f["kind"] == "grow" else "step at least",
         f"{seconds['step']:.4g} s: {by_resource}; limited by {f['limit']}, all overlapped"),
        ("  as scheduled", f"{seconds['scheduled']:.4g} s, of which {seconds['waiting']:.4g} in collectives that "
                           "nothing overlaps"),
    ]  # fmt: skip
    if "tokens_per_day" in f:
        most = f"{f['compute_bound']:.1%} of the peak if all overlaps, {f['scheduled_bound']:.1%} as scheduled"
        rows.append(("model FLOPs", f"at most {most}"))
        rows.append(("tokens a day", f"at most {f['tokens_per_day'] / 1e9:,.2f} billion"))
    return rows


def _stage_rows(f: Figures) -> list[tuple[str, str]]:
    length = lambda one: f"{one['days']:,.2f} days, {one['chip_hours']:,.0f} chip-hours"  # noqa: E731
    others = zip(f.get("published_mfu", ()), f.get("published", ()), strict=True)
    return [
        ("stage", f"{f['stage_tokens'] / 1e9:,.1f} billion tokens: at least {length(f)}"),
        *(("", f"at {mfu:.1%}, as published of comparable runs: {length(one)}") for mfu, one in others),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"
