"""Published figures of TPU chips, one row of a table for each generation; `peak_flops` gives that of a JAX device."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """Figures of one chip. FLOPs are bfloat16, dense. Bandwidths in bytes/s; a link's is that of one direction."""

    name: str
    device_kinds: tuple[str, ...]  # names that jax.Device.device_kind has for it
    peak_flops: float
    hbm_bytes: float
    usable_hbm_bytes: float  # of one device, as libtpu 0.0.42.1 says when a program needs more
    hbm_bandwidth: float
    link_bandwidth: float  # of one ICI link; a chip has two for each dimension of its torus
    dcn_bandwidth: float  # one chip's part of the network between slices
    dimensions: int  # of the torus
    largest: tuple[int, ...]  # slice that can be asked for
    cores: int  # TensorCores a chip, by which Google's names of v4, v5p and tpu7x count
    devices: int  # JAX devices a chip: two cores are one device where they have their HBM in common (megacore)
    ring: int  # a dimension has wraparound links where its size is a multiple of this
    source: str
    published_mfu: tuple[tuple[float, str], ...] = ()  # model FLOPs over the peak, as measured by others, and on what


# ICI: Google gives the sum over links of both directions, e.g. 1,200 GB/s for the six links of a v5p, 100 GB/s each
# way; v4's from arXiv 2304.01433. DCN: v4's from jax-ml.github.io/scaling-book/tpus, 25 GB/s a host of four chips.
# HBM: the compiler lets a program use another amount than the nominal capacity.
# MFU: MaxText's table of optimized models (maxtext.readthedocs.io, reference/models/tiering): dense models in bfloat16.
_MFU = {
    "v5p": ((0.654, "Llama 2 70B, 512 chips, sequences of 4,096"),),
    "v6e": (
        (0.438, "Llama 2 70B, 256 chips, sequences of 4,096"),
        (0.5033, "Llama 3.1 70B, 256 chips, sequences of 8,192"),
    ),
}
_KINDS = {
    "v4": ("TPU v4",),
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "tpu7x": ("TPU7x",),
}
GENERATIONS = {
    name: Generation(
        name,
        _KINDS[name],
        *figures,  # pyright: ignore[reportArgumentType] - a row of the table, in the order of the fields
        source=f"cloud.google.com/tpu/docs/{name}",
        published_mfu=_MFU.get(name, ()),
    )
    for name, *figures in (
        # name    FLOP/s   HBM        usable, a device HBM B/s   link   DCN      torus and largest; cores, devices, ring
        ("v4",    275e12,  32 * GIB,  30.75 * GIB,     1.2e12,   50e9,  6.25e9,  3, (16, 16, 16), 2, 1, 4),
        ("v5e",   197e12,  16 * GIB,  15.75 * GIB,     819e9,    50e9,  3.125e9, 2, (16, 16), 1, 1, 16),
        ("v5p",   459e12,  95 * GIB,  95.74 * GIB,     2.765e12, 100e9, 6.25e9,  3, (16, 16, 24), 2, 1, 4),
        ("v6e",   918e12,  32 * GIB,  31.25 * GIB,     1.638e12, 100e9, 12.5e9,  2, (16, 16), 1, 1, 16),
        ("tpu7x", 2307e12, 192 * GIB, 94.75 * GIB,     7.38e12,  100e9, 12.5e9,  3, (16, 24, 24), 2, 2, 4),
    )
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device, by its device_kind; None where no figure is published (a CPU).

    >>> peak_flops("TPU v5p")
    459000000000000.0
    """
    found = (g.peak_flops / g.devices for g in GENERATIONS.values() if device_kind in g.device_kinds)
    return next(found, None)
