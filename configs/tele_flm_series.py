"""Tele-FLM 52B -> 102B -> 1T: three stages of pretraining with two growths between them (arXiv 2407.02783).

    tele train --config configs/tele_flm_series.py --workdir W --config.pretrain_52b.data.cache=CACHE ...
    tele train --config configs/tele_flm_series.py:102b --workdir runs/102b     one stage, from runs/52b; so 52b and 1t

Published: the sizes and tokens of every stage (2.0T, 0.3T, 15.7B), growth by Masked Structural Growth in width and
depth with layers chosen by distance, the multipliers. Every stage reads on in the cache where the one before ended.
Where a stage has a slice of its own, run them one by one: each grows what the one before left (launch/README.md).
`tele grow` grows the checkpoints themselves, on one machine (--stage grow_102b).
Ours: learning rates after growth (1.5e-4 and 1.0e-4 at the start, each a little below the stage before, as FLM-101B's
stages had them, arXiv 2309.03852), the short new warm-up, the ramp of the masks (a few hundred steps: the last stage
has 2,852), the metric of the distance, and what configs/tele_flm_52b.py says.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from tele_jax.config import to_dict
from tele_jax.errors import UserError
from tele_jax.published import get_model

LENGTH = 4_096
SIZES = ("num_layers", "num_heads", "num_kv_heads", "embed_dim", "mlp_dim", "padded_vocab_size")


class Part(NamedTuple):
    stages: tuple[str, ...]
    mesh: dict[str, int]
    batch_size: int = 1_344  # sequences a step; published for 52B
    microbatches: int = 1
    remat: str = "full"
    before: str | None = None  # the part whose run it goes on from


# A part alone has the mesh, batch, parts and remat policy that docs/scale.md has for it on TPU v5p.
PARTS = {
    None: Part(("pretrain_52b", "grow_102b", "pretrain_102b", "grow_1t", "pretrain_1t"), dict()),
    "52b": Part(("pretrain_52b",), dict(fsdp=512, tensor=2), 1_536, remat="products"),  # v5p:8x8x16
    "102b": Part(("grow_102b", "pretrain_102b"), dict(fsdp=256, tensor=4), 1_536, 2, "products", "52b"),  # v5p:8x8x16
    "1t": Part(("grow_1t", "pretrain_1t"), dict(fsdp=256, tensor=8), 1_536, 6, "products", "102b"),  # v5p:8x16x16
}
MUP = ("input_mult", "output_mult", "mup_base_width", "matrix_init_std")


def get_config(name: str | None = None) -> ConfigDict:
    if name not in PARTS:
        raise UserError(f"configs/tele_flm_series.py:{name}: the parts are 52b, 102b and 1t")
    part = PARTS[name]
    tokens_per_step = part.batch_size * LENGTH
    data = dict(tokenizer="tokenizer.model", cache="CACHE")
    batch = dict(batch_size=part.batch_size, seq_len=LENGTH, microbatches=part.microbatches, checkpoint_every=500)

    def growth(to: str) -> dict:
        larger = get_model(to)
        model = {field: getattr(larger, field) for field in (*SIZES, *MUP)} | dict(remat=part.remat)
        return dict(kind="grow", policy="msg", layers="distance", model=model)

    def pretraining(tokens: float, learning_rate: float, ramp: int) -> dict:
        # At base width 256, which these models have, the matrix-like rate is 32 times that at 52B's width.
        rates = dict(learning_rate=learning_rate, matrix_learning_rate=32 * learning_rate)
        return dict(
            kind="pretrain",
            data=data,
            steps=round(tokens / tokens_per_step),
            optimizer=dict(**rates, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_norm=1.0, new_warmup_steps=ramp),
            schedule=dict(kind="cosine", warmup=200, final=0.1),
            mask_ramp=ramp,
            **batch,
        )

    config = ConfigDict()
    config.run = part.stages
    if part.before is not None:
        config.start = f"runs/{part.before}"
    config.mesh = dict(data=1, fsdp=1, tensor=1) | part.mesh
    config.pretrain_52b = dict(
        kind="pretrain",
        model=to_dict(get_model("tele_flm_52b")) | dict(remat=part.remat),
        data=data,
        steps=round(2.0e12 / tokens_per_step),
        optimizer=dict(
            learning_rate=1.5e-4, matrix_learning_rate=2.4e-3, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_norm=1.0
        ),
        schedule=dict(kind="cosine", unit="tokens", warmup=2_000 * tokens_per_step, total=2_500_000_000_000, final=0.1),
        **batch,
    )
    config.grow_102b = growth("tele_flm_102b")
    config.pretrain_102b = pretraining(0.3e12, 1.5e-4, ramp=1_000)
    config.grow_1t = growth("tele_flm_1t")
    config.pretrain_1t = pretraining(15.7e9, 1.0e-4, ramp=500)
    for other in set(PARTS[None].stages) - set(part.stages):
        del config[other]
    return config
