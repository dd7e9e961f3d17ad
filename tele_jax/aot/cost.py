"""From counts to time: bounds on a compiled step on its slice, tokens per day, chip-hours.

Two bounds, no prediction. `seconds`: each resource runs at its peak, and all of them at the same time. `scheduled`: the
instructions run one after another, as the compiler has ordered them, each at the peak of the resource that it needs
most, and the device waits for every collective that the schedule does not overlap. A real step takes longer than both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tele_jax.aot.compile import GIB, Program
from tele_jax.aot.counts import Collective
from tele_jax.aot.jobs import OnSlice
from tele_jax.aot.topology import Places, Slice

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one step takes at least: by resource, and by the schedule of its instructions.

    waiting_seconds: the part of ici_seconds and dcn_seconds in collectives that nothing overlaps.
    """

    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    work_seconds: float  # of all other instructions, one after another
    waiting_seconds: float
    model_flops: float  # of one device and step

    @property
    def scheduled_seconds(self) -> float:
        """The larger bound of the two: the schedule's, or that of the slowest resource."""
        return max(self.work_seconds + self.waiting_seconds, self.seconds)

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.hbm_seconds, self.ici_seconds, self.dcn_seconds)

    @property
    def limit(self) -> str:
        times = {
            "compute": self.compute_seconds,
            "HBM": self.hbm_seconds,
            "ICI": self.ici_seconds,
            "DCN": self.dcn_seconds,
        }
        return max(times, key=times.get)


def roofline(job: OnSlice, program: Program) -> Roofline:
    """The roofline of a program that was compiled."""
    counts, places = program.counts, Places(job.slice, np.array(program.device_order))
    flops, bandwidth = job.slice.device_flops, job.slice.device_hbm_bandwidth
    ici = dcn = waiting = 0.0
    for collective in counts.collectives:
        over_ici, over_dcn = collective_seconds(collective, places)
        ici += over_ici
        dcn += over_dcn
        waiting += 0.0 if collective.overlapped else over_ici + over_dcn
    return Roofline(
        compute_seconds=counts.flops / flops,
        hbm_seconds=counts.hbm_bytes / bandwidth,
        work_seconds=sum(times * max(work / flops, size / bandwidth) for work, size, times in counts.work),
        waiting_seconds=waiting,
        ici_seconds=ici,
        dcn_seconds=dcn,
        model_flops=job.model_flops / job.slice.num_devices,
    )


def collective_seconds(collective: Collective, places: Places) -> tuple[float, float]:
    """(seconds on ICI, seconds on the network between slices) of all executions of one collective.

    On a torus the work is spread over the dimensions that its devices span; each has two links where the group goes
    round a whole ring, else one. Only bandwidth counts, no latency (jax-ml.github.io/scaling-book/sharding).
    """
    size = len(collective.group)
    if size < 2:
        return 0.0, 0.0
    of = places.of
    if collective.slices > 1:
        return 0.0, received(collective) * collective.times / (of.generation.dcn_bandwidth / of.generation.devices)
    spanned, counts = places.spanned(collective.group)
    slices = counts[0]
    share = received(collective) * collective.times
    torus = [axis for axis in spanned if 1 <= axis <= 3]
    ici = 0.0
    if torus:
        links = sum(_links(of, axis - 1, int(counts[axis])) for axis in torus)
        hops = 1.0
        if collective.kind == "all-to-all":  # data for a device far away passes through those between
            hops = sum(counts[axis] / 4 for axis in torus) / len(torus) * 2
        ici = share / slices * max(hops, 1.0) / (links * of.generation.link_bandwidth / of.generation.devices)
    dcn = share * (slices - 1) / slices / (of.generation.dcn_bandwidth / of.generation.devices) if slices > 1 else 0.0
    return ici, dcn


def _links(of: Slice, axis: int, covered: int) -> int:
    if axis >= len(of.shape):
        return 1
    return 2 if of.rings[axis] and covered == of.shape[axis] and covered > 2 else 1


def received(collective: Collective) -> float:
    """Bytes that each device receives in one execution, by the bandwidth-optimal algorithm."""
    n = len(collective.group)
    if collective.kind == "collective-permute":
        return collective.result_bytes
    if collective.kind == "all-reduce":
        return 2 * collective.result_bytes * (n - 1) / n
    if collective.kind == "reduce-scatter":
        return collective.operand_bytes * (n - 1) / n
    return collective.result_bytes * (n - 1) / n


# ------------------------------------------------------------------------------------------------------------ figures


def figures(job: OnSlice, program: Program, tokens: float | None = None) -> dict[str, Any]:
    """Everything that `tele plan` says, as plain values. tokens: of the whole stage, where known."""
    # 0 where the compiler has written out a short loop over layers: then they are among the temporaries.
    saved = (program.counts.saved_bytes or None) if program.counts and job.kind == "train" else None
    result: dict[str, Any] = {
        "kind": job.kind,
        "program": program.key,
        "topology": job.slice.name,
        "chips": job.slice.chips,
        "devices": job.slice.num_devices,
        "mesh": dataclasses.asdict(job.mesh),
        **job.settings,
        "fits": program.fits,
        "margin": 1 - program.needed_bytes / program.usable_bytes,
        "hbm": {
            "usable": program.usable_bytes,
            "needed": program.needed_bytes,
            **program.held,
            **({"activations": saved} if job.kind == "train" else {}),
            "temporaries": program.temporary_bytes - (saved or 0),
        },
        "host_bytes": program.host_bytes,
        "compile_seconds": program.compile_seconds,
        "from_cache": program.from_cache,
    }
    if program.counts is None:
        return result
    line = roofline(job, program)
    counts = program.counts
    result |= {
        "flops": {"matmul": counts.matmul_flops, "attention": counts.kernel_flops, "model": line.model_flops},
        "hbm_bytes": counts.hbm_bytes,
        "collective_bytes": counts.collective_bytes,
        "collectives": _by_kind(counts.collectives),
        "seconds": {
            "step": line.seconds,
            "compute": line.compute_seconds,
            "hbm": line.hbm_seconds,
            "ici": line.ici_seconds,
            "dcn": line.dcn_seconds,
            "scheduled": line.scheduled_seconds,
            "waiting": line.waiting_seconds,
        },
        "limit": line.limit,
    }
    if not job.tokens:
        return result
    # At the peak of the slice a step of the model's FLOPs alone would take this long.
    ideal = line.model_flops / job.slice.device_flops
    tokens_per_day = job.tokens * DAY / line.scheduled_seconds
    result |= {
        "compute_bound": ideal / line.seconds,
        "scheduled_bound": ideal / line.scheduled_seconds,
        "tokens_per_day": tokens_per_day,
    }
    if job.kind != "train":
        return result
    published = [(ideal / share, share) for share, _ in job.slice.generation.published_mfu]
    if published:
        result["published_mfu"] = [share for _, share in published]
        result["tokens_per_day_published"] = [job.tokens * DAY / seconds for seconds, _ in published]
    if tokens is not None:
        result |= {"stage_tokens": tokens, **_duration(tokens, tokens_per_day, job.slice.chips)}
        if published:
            result["published"] = [
                _duration(tokens, rate, job.slice.chips) for rate in result["tokens_per_day_published"]
            ]
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
        entry["received_bytes"] += c.times * received(c)
    return dict(sorted(found.items(), key=lambda item: -item[1]["received_bytes"]))


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    f, hbm = figures, figures["hbm"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in f["mesh"].items() if size > 1) or "one device"
    verdict = f"fits, with {f['margin']:.0%} to spare" if f["fits"] else f"does not fit: {_over(hbm)} too much"
    rows = [
        ("slice", f"{f['topology']}, {f['chips']:,} chips; mesh {mesh}"),
        _WORK[f["kind"]](f),
        ("HBM a device", f"{_gib(hbm['needed'])} of {_gib(hbm['usable'])}: {verdict}"),
    ]
    remarks = {"activations": ", saved for the backward pass"}
    if f["kind"] == "train":
        remarks["temporaries"] = ", gradients" + (" included" if hbm["activations"] else " and activations included")
    rows += [
        (f"  {name}", _gib(size) + remarks.get(name, ""))
        for name, size in hbm.items()
        if name not in ("usable", "needed") and size is not None
    ]
    if f["host_bytes"]:
        rows.append(("  on the host", _gib(f["host_bytes"])))
    rows += _roofline_rows(f) if "flops" in f else []
    if "days" in f:
        tokens = f"{f['stage_tokens'] / 1e9:,.1f} billion tokens"
        rows.append(("stage", f"{tokens}: at least {f['days']:,.2f} days, {f['chip_hours']:,.0f} chip-hours"))
        for share, one in zip(f.get("published_mfu", ()), f.get("published", ()), strict=True):
            runs = f"at {share:.1%}, as published of comparable runs: {one['days']:,.2f} days, "
            rows.append(("", f"{runs}{one['chip_hours']:,.0f} chip-hours"))
    cached = ", from the cache" if f["from_cache"] else ""
    rows.append(("compiled", f"in {f['compile_seconds']:.0f} s{cached}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _batch(f: dict[str, Any]) -> str:
    return f"{f['batch_size']:,} x {f['seq_len']:,} tokens"


_WORK = {
    "train": lambda f: ("batch", f"{_batch(f)} in {f['microbatches']} parts; remat {f['remat']}"),
    "decode": lambda f: ("decoding", f"one token for each of {f['batch_size']:,} rows of {f['seq_len']:,} tokens"),
    "grow": lambda f: (
        "growth",
        f"policy {f['policy']}, {'with' if f['optimizer_state'] else 'without'} optimizer state; both models are there",
    ),
}


def _roofline_rows(f: dict[str, Any]) -> list[tuple[str, str]]:
    flops, seconds = f["flops"], f["seconds"]
    rows = [
        ("FLOPs a device", f"{flops['matmul']:.4g} of matrix products, {flops['attention']:.3g} of attention; "
                           f"model FLOPs {flops['model']:.4g}"),
        ("traffic", f"HBM {f['hbm_bytes'] / 1e9:,.0f} GB; "
                    f"results of collectives {f['collective_bytes'] / 1e9:,.1f} GB"),
        *((f"  {kind}", f"{c['times']:,.0f} times, {c['received_bytes'] / 1e9:,.1f} GB received")
          for kind, c in list(f["collectives"].items())[:6]),
        ("growth at least" if f["kind"] == "grow" else "step at least",
         f"{seconds['step']:.4g} s: compute {seconds['compute']:.4g}, HBM {seconds['hbm']:.4g}, "
         f"ICI {seconds['ici']:.4g}, DCN {seconds['dcn']:.4g}; limited by {f['limit']}, all overlapped"),
        ("  as scheduled", f"{seconds['scheduled']:.4g} s, of which {seconds['waiting']:.4g} in collectives that "
                           "nothing overlaps"),
    ]  # fmt: skip
    if "tokens_per_day" in f:
        rows += [
            (
                "model FLOPs",
                f"at most {f['compute_bound']:.1%} of the peak if all overlaps, "
                f"{f['scheduled_bound']:.1%} as scheduled",
            ),
            ("tokens a day", f"at most {f['tokens_per_day'] / 1e9:,.2f} billion"),
        ]
    return rows


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"


def _over(hbm: dict[str, Any]) -> str:
    return _gib(hbm["needed"] - hbm["usable"])
