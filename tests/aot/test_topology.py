"""Slices by name, and what is wrong with a name."""

import importlib.metadata

import pytest

from tele_jax.aot import topology
from tele_jax.aot.topology import find_slice
from tele_jax.errors import UserError
from tele_jax.published import GENERATIONS


@pytest.mark.parametrize(
    ("name", "shape", "chips", "devices"),
    [
        ("v5p:8x16x16", (8, 16, 16), 2048, 2048),
        ("v5:8x16x16", (8, 16, 16), 2048, 2048),
        ("v5p-4096", (8, 16, 16), 2048, 2048),
        ("v5p-8", (2, 2, 1), 4, 4),
        ("v4-512", (4, 8, 8), 256, 256),
        ("v5litepod-16", (4, 4), 16, 16),
        ("v6e-256", (16, 16), 256, 256),
        ("tpu7x-128", (4, 4, 4), 64, 128),
        ("TPU7x:4x4x8", (4, 4, 8), 128, 256),
    ],
)
def test_names_give_shapes(name, shape, chips, devices):
    found = find_slice(name)
    assert (found.shape, found.chips, found.num_devices) == (shape, chips, devices)


def test_slices_multiply():
    assert find_slice("v6e:16x16", 4).chips == 1024


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("v9:2x2", r"'v9:2x2': not known; known are v4:4x4x8, v5e:16x16, v5p:8x16x16, v6e:16x16, tpu7x:8x16x16"),
        ("pod", "not known; known are v4"),
        ("v5p:4x4", "a slice of v5p has 3 dimensions, for example v5p:16x16x24"),
        ("v6e:32x32", "slices of v6e go from 1x1 to 16x16"),
        ("v5p:0x4x8", "slices of v5p go from 1x1x1 to 16x16x24"),
        ("v5p-100", "v5p comes in 8, 16, 32, 64, and multiples of 128"),
        ("v6e-3", "v6e comes in 1, 4, 8, 16, 32, 64, 128, 256"),
    ],
)
def test_wrong_names_say_what_there_is(name, match):
    with pytest.raises(UserError, match=match):
        find_slice(name)


def test_rings_are_where_the_torus_closes():
    assert find_slice("v5p:4x4x8").rings == (True, True, True)
    assert find_slice("v5p:2x2x4").rings == (False, False, False)
    assert find_slice("v5e:8x16").rings == (False, True)


def test_figures_add_up_to_the_pods_that_google_gives():
    assert 256 * GENERATIONS["v5e"].peak_flops == pytest.approx(50.63e15, rel=0.01)
    assert 256 * GENERATIONS["v6e"].peak_flops == pytest.approx(234.9e15, rel=0.01)
    # Both directions of all links: 400, 800, 1,200 and 1,200 GB/s a chip.
    both = {name: 2 * 2 * g.dimensions * g.link_bandwidth for name, g in GENERATIONS.items()}
    assert [both[n] / 1e9 for n in ("v5e", "v6e", "v5p", "tpu7x")] == [400, 800, 1200, 1200]


def test_a_libtpu_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r"libtpu 0\.0\.1 is not for jax .*pip install 'tele_jax\[tpu\]'.*libtpu==0"):
        topology.require_libtpu()


def test_a_missing_libtpu_names_the_extra(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"libtpu, is not installed; pip install 'tele_jax\[tpu\]'"):
        topology.require_libtpu()
