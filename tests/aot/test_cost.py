"""The roofline by hand: which links a group of devices uses, and which resource limits a step."""

import dataclasses
import itertools

import numpy as np
import pytest

import tele_jax as tele
from tele_jax.aot import compile as compiling
from tele_jax.aot import cost
from tele_jax.aot.compile import Program
from tele_jax.aot.counts import Collective, Counts
from tele_jax.aot.jobs import TrainJob
from tele_jax.aot.topology import Places, find_slice
from tele_jax.errors import UserError
from tele_jax.settings import MeshConfig

CFG = tele.get_model("tele_flm_52b")


def job(mesh=None, topology="v5p:4x4x8", batch_size=64, cfg=CFG, **more):
    mesh = mesh or MeshConfig(fsdp=64, tensor=2)
    return TrainJob(cfg=cfg, slice=find_slice(topology), mesh=mesh, batch_size=batch_size, seq_len=4096, **more)


def places(topology, slices=1):
    of = find_slice(topology, slices)
    sizes = of.shape + (1,) * (3 - len(of.shape))
    cores = range(of.generation.devices)
    return Places(of, np.array(list(itertools.product(range(slices), *map(range, sizes), cores))))


def collective(kind, group, result, operand=0, times=1):
    return Collective(kind, times, operand, result, tuple(group), "", None)


@pytest.mark.parametrize(
    ("topology", "group", "kind", "received", "links"),
    [
        ("v5p:4x4x8", range(8), "all-gather", 7 / 8, 2),  # one whole ring
        ("v5p:4x4x8", range(32), "all-gather", 31 / 32, 4),  # two rings
        ("v5p:4x4x8", range(128), "all-gather", 127 / 128, 6),
        ("v5p:4x4x8", range(2), "all-reduce", 2 / 2, 1),  # neighbours, half a ring and less
        ("v5p:2x2x4", range(4), "all-gather", 3 / 4, 1),  # no wraparound in a slice as small
        ("v5e:16x16", range(256), "all-gather", 255 / 256, 4),
    ],
)
def test_collectives_use_the_links_of_the_dimensions_they_span(topology, group, kind, received, links):
    where = places(topology)
    ici, dcn = cost.collective_seconds(collective(kind, group, 10**9, times=3), where)
    assert ici == pytest.approx(3 * 1e9 * received / (links * where.of.generation.link_bandwidth))
    assert dcn == 0


def test_a_reduce_scatter_receives_its_operand_and_a_single_device_nothing():
    where = places("v5p:4x4x8")
    scatter = collective("reduce-scatter", range(8), result=10**8, operand=8 * 10**8)
    assert cost.collective_seconds(scatter, where)[0] == pytest.approx(7e8 / 200e9)
    assert cost.collective_seconds(collective("all-reduce", [3], 10**9), where) == (0.0, 0.0)


def test_groups_over_slices_use_the_network_between_them():
    where = places("v5p:2x2x1", slices=2)
    ici, dcn = cost.collective_seconds(collective("all-reduce", [0, 4], 10**9), where)
    assert ici == 0 and dcn == pytest.approx(2 * 0.5 * 1e9 * 0.5 / 6.25e9)


def program(counts, **more):
    order = tuple(map(tuple, places("v5p:4x4x8").at.tolist()))
    values = dict(needed_bytes=40 * 2**30, usable_bytes=100 * 2**30, held=dict(parameters=2**30, optimizer=2 * 2**30))
    values |= dict(fits=True, allocated_temporary_bytes=0, host_bytes=0, compile_seconds=1.0, key="")
    return Program(**{**values, **more}, device_order=order, counts=counts)


def test_the_schedule_adds_what_runs_one_after_another():
    overlapped, waited = (
        dataclasses.replace(collective("all-gather", range(8), 10**9), overlapped=free) for free in (True, False)
    )
    work = ((459e12, 1e9, 2.0), (1e12, 2.765e12, 1.0))  # twice a second of compute, once a second of HBM
    both = Counts(2 * 459e12 + 1e12, 0, 2.765e12 + 2e9, 0, 0, (overlapped, waited), (), work)
    f = cost.figures(job(), program(both))
    gather = 1e9 * 7 / 8 / (2 * 100e9)  # one whole ring of two links
    assert f["seconds"]["waiting"] == pytest.approx(gather)
    assert f["seconds"]["scheduled"] == pytest.approx(3.0 + gather)
    assert f["seconds"]["step"] == pytest.approx(2 + 1 / 459)
    assert f["scheduled_bound"] == pytest.approx(f["compute_bound"] * (2 + 1 / 459) / (3.0 + gather))


def test_the_slowest_resource_limits_the_step():
    compute = Counts(459e12, 0, 1e9, 0, 7 * 2**30, (), ())
    f = cost.figures(job(), program(compute), tokens=86400 * 64 * 4096)
    assert f["limit"] == "compute" and f["seconds"]["step"] == pytest.approx(1.0)
    assert f["margin"] == pytest.approx(0.6)
    assert f["hbm"]["activations"] == 7 * 2**30 and f["hbm"]["temporaries"] == 30 * 2**30
    # A step of a second: so many tokens a day, one day for the stage, 128 chips for 24 hours.
    assert f["tokens_per_day"] == pytest.approx(86400 * 64 * 4096)
    assert f["days"] == pytest.approx(1.0) and f["chip_hours"] == pytest.approx(24 * 128)
    kernels = 64 * (4 * 8192**2 + 3 * 8192 * 21824) + 80384 * 8192
    model = (6 * kernels + 6 * 64 * 8192 * 4096) * 64 * 4096 / 128
    assert f["compute_bound"] == f["scheduled_bound"] == pytest.approx(model / 459e12)
    assert f["published_mfu"] == [0.654]  # of v5p, by MaxText
    assert f["published"][0]["days"] == pytest.approx(model / 459e12 / 0.654)
    memory = Counts(459e12, 0, 2 * 2.765e12, 0, 0, (), ())
    assert cost.figures(job(), program(memory))["limit"] == "HBM"
    network = Counts(459e12, 0, 0, 0, 0, (collective("all-gather", range(128), 10**12 * 128 // 127),), ())
    f = cost.figures(job(), program(network))
    assert f["limit"] == "ICI" and f["seconds"]["ici"] == pytest.approx(1e12 / 600e9, rel=1e-6)


def test_what_does_not_fit_is_said_with_its_size():
    text = cost.table(cost.figures(job(), program(None, fits=False, needed_bytes=150 * 2**30)))
    assert "150.00 GiB of 100.00 GiB: does not fit: 50.00 GiB too much" in text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(mesh=MeshConfig(fsdp=4)), r"mesh data=1 x fsdp=4 x tensor=1 = 4 devices, but v5p:4x4x8 has 128"),
        (dict(mesh=MeshConfig(tensor=128)), r"layers\.attn\.k: kv_heads=64 does not divide over mesh tensor=128"),
        (dict(batch_size=65), r"batch_size=65 \(per microbatch\) does not divide over mesh data x fsdp = 64"),
        (dict(microbatches=3), r"batch_size=64 does not divide into microbatches=3"),
    ],
)
def test_shapes_that_do_not_divide_are_refused_before_anything_is_compiled(changes, match):
    with pytest.raises(UserError, match=match):
        job(**changes).check()


def test_candidates_divide_fit_and_come_fastest_first():
    found = compiling.candidates(job(topology="v5p:8x8x8", mesh=MeshConfig(fsdp=512), batch_size=512))
    seconds = [compiling.estimate(c).seconds for c in found]
    assert len(found) > 20 and seconds == sorted(seconds)
    for candidate in found:
        candidate.check()
        usable = candidate.slice.generation.usable_hbm_bytes
        assert compiling.estimate(candidate).bytes <= (1 - compiling.MARGIN) * usable


def test_a_model_too_large_for_every_slice_says_so():
    large = job(cfg=tele.get_model("tele_flm_1t"), topology="v6e:16x16", mesh=MeshConfig(fsdp=256), batch_size=256)
    with pytest.raises(UserError, match="GiB a device of 28; the largest slice of v6e has 256 chips, which is too few"):
        compiling.candidates(large)


def test_advice_names_the_parts_or_the_slice_that_would_do():
    state = 12 * 2**30
    assert compiling.advice(job(batch_size=512), 140 * 2**30, state).startswith("--microbatches 2 would do")
    assert "a slice of 256 chips would do" in compiling.advice(job(), 150 * 2**30, 100 * 2**30)
