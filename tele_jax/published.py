"""Published figures: models (sizes, multipliers, vocabularies), one line each, and TPU chips, one row a generation.

A value that nobody published is marked "ours" with the reason. Numbers and their sources: docs/facts.md.
"""

import dataclasses
import math

from tele_jax.config import ModelConfig, Ntk, Rope, nearest, require
from tele_jax.errors import UserError
from tele_jax.files import Table

# Tele-FLM (arXiv 2404.16645, 2407.02783): init std and learning rates transfer back to muP base width 256, where the
# matrix-like std is 0.024; the vector-like std of 4e-3 is the same at every width.
_TELE_FLM = dict(
    **dict(head_dim=128, vocab_size=80_000, max_seq_len=4096, rms_eps=1e-5),
    **dict(init_std=4e-3, matrix_init_std=0.024, mup_base_width=256),
)
# The base model was released with output_mult 0.5 and mup_scale_factor 16, its width over that of the proxy. It is the
# same model as 1.0 / 32 at base width 256, the form of the later releases: in muP a matrix-like std or learning rate
# at base width 512 is that at 256 divided by sqrt(2), or by 2.
_TELE_FLM_BASE = _TELE_FLM | dict(output_mult=0.5, mup_base_width=512, matrix_init_std=0.024 / math.sqrt(2))
# TeleChat (arXiv 2401.03804): the init std was not published; 0.02 is ours, the usual value.
_TELECHAT = dict(max_seq_len=8192, rms_eps=1e-5, output_biases=True, init_std=0.02)
_NTK_7B = Rope(ntk=Ntk(original_length=4096))
_NTK_12B = Rope(ntk=Ntk(original_length=8192))
# TeleChat-52B: beyond 4,096 positions the base is multiplied by alpha itself, without factor on cos and sin.
_NTK_52B = Rope(ntk=Ntk(original_length=4096, trained_length=4096, base="linear", attention_slope=0.0))

PUBLISHED: dict[str, Table] = {
    # The proxy's effective multiplier is the transferred one, 1/32 * 8192/512.
    "tele_flm_proxy": _TELE_FLM_BASE | dict(num_layers=64, num_heads=4, embed_dim=512, mlp_dim=1_344),
    "tele_flm_52b": _TELE_FLM_BASE
    | dict(num_layers=64, num_heads=64, embed_dim=8_192, mlp_dim=21_824, padded_vocab_size=80_384),
    "tele_flm_52b_instruct": _TELE_FLM
    | dict(num_layers=64, num_heads=64, embed_dim=8_192, mlp_dim=21_824, padded_vocab_size=80_896),
    # The 102B was not released: the padded vocabulary is ours, the base model's.
    "tele_flm_102b": _TELE_FLM
    | dict(num_layers=80, num_heads=80, embed_dim=10_240, mlp_dim=27_264, padded_vocab_size=80_384),
    "tele_flm_1t": _TELE_FLM
    | dict(num_layers=140, num_heads=160, embed_dim=20_480, mlp_dim=98_304, padded_vocab_size=81_920, output_mult=2.0),
    # The 1B's vocabulary is not published; 160,256 is ours, that of the 7B.
    "telechat_1b": _TELECHAT
    | dict(num_layers=16, num_heads=32, head_dim=64, embed_dim=2_048, mlp_dim=5_460, vocab_size=160_256, rope=_NTK_7B),
    # The 3B's mlp is not published (12,288 fits the name), nor whether its embedding is tied: ours, as in the 7B.
    "telechat_3b": _TELECHAT
    | dict(
        num_layers=14,
        num_heads=16,
        head_dim=256,
        embed_dim=4_096,
        mlp_dim=12_288,
        vocab_size=160_256,
        rope=_NTK_7B,
        tie_embeddings=True,
    ),
    "telechat_7b": _TELECHAT
    | dict(
        num_layers=30,
        num_heads=32,
        head_dim=128,
        embed_dim=4_096,
        mlp_dim=12_288,
        vocab_size=160_256,
        rope=_NTK_7B,
        tie_embeddings=True,
    ),
    "telechat_12b": _TELECHAT
    | dict(
        num_layers=38, num_heads=32, head_dim=160, embed_dim=5_120, mlp_dim=12_288, vocab_size=120_000, rope=_NTK_12B
    ),
    "telechat_52b": _TELE_FLM
    | dict(num_layers=64, num_heads=64, embed_dim=8_192, mlp_dim=21_824, padded_vocab_size=80_896, rope=_NTK_52B),
}

# Tokens of the stage that trained each (arXiv 2404.16645, 2407.02783, 2401.03804); the others' were not published.
STAGE_TOKENS = {
    "tele_flm_52b": 2.0e12,
    "tele_flm_102b": 0.3e12,
    "tele_flm_1t": 15.7e9,
    "telechat_1b": 2.0e12,
    "telechat_7b": 1.5e12,
    "telechat_12b": 3.0e12,
}


def get_model(name: str) -> ModelConfig:
    """The config of a published model.

    >>> get_model("tele_flm_52b").embed_dim
    8192

    Raises:
      UserError: an unknown name; the message gives the nearest known one, or all.
    """
    require(isinstance(name, str), f"get_model: expected the name of a model, got {type(name).__name__}")
    if name not in PUBLISHED:
        raise UserError(f"unknown model {name!r}; {nearest(name, PUBLISHED, 'known')}")
    return ModelConfig(**PUBLISHED[name])


# ---- TPU chips -------------------------------------------------------------------------------------------------------

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
    matrix_unit: int  # rows and columns of a matrix unit: what is narrower leaves a part of it idle
    source: str
    published_mfu: tuple[tuple[float, str], ...] = ()  # model FLOPs over the peak, as measured by others, and on what


# ICI: Google gives the sum over links of both directions, e.g. 1,200 GB/s for the six links of a v5p, 100 GB/s each
# way; v4's from arXiv 2304.01433. DCN: v4's from jax-ml.github.io/scaling-book/tpus, 25 GB/s a host of four chips.
# HBM: the compiler lets a program use another amount than the nominal capacity.
# Matrix units: 128 x 128 to v5p, 256 x 256 from v6e on (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
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
        # name    FLOP/s   HBM        usable, a device HBM B/s   link   DCN      torus and largest; cores, devices,
        #                                                                        ring, matrix unit
        ("v4",    275e12,  32 * GIB,  30.75 * GIB,     1.2e12,   50e9,  6.25e9,  3, (16, 16, 16), 2, 1, 4, 128),
        ("v5e",   197e12,  16 * GIB,  15.75 * GIB,     819e9,    50e9,  3.125e9, 2, (16, 16), 1, 1, 16, 128),
        ("v5p",   459e12,  95 * GIB,  95.74 * GIB,     2.765e12, 100e9, 6.25e9,  3, (16, 16, 24), 2, 1, 4, 128),
        ("v6e",   918e12,  32 * GIB,  31.25 * GIB,     1.638e12, 100e9, 12.5e9,  2, (16, 16), 1, 1, 16, 256),
        ("tpu7x", 2307e12, 192 * GIB, 94.75 * GIB,     7.38e12,  100e9, 12.5e9,  3, (16, 24, 24), 2, 2, 4, 256),
    )
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device, by its device_kind; None where no figure is published (a CPU).

    >>> peak_flops("TPU v5p")
    459000000000000.0
    """
    generation = find_generation(device_kind)
    return None if generation is None else generation.peak_flops / generation.devices


def find_generation(device_kind: str) -> Generation | None:
    """The generation of a JAX device, by its device_kind; None where it is no known TPU."""
    return next((g for g in GENERATIONS.values() if device_kind in g.device_kinds), None)
