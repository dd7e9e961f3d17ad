"""Tele-FLM-52B as it was pretrained (arXiv 2404.16645): 2.0T tokens, 363,301 steps.

    tele data cache --config configs/data/tele_flm.py --out CACHE
    tele train --config configs/tele_flm_52b.py --workdir W --config.pretrain.data.cache=CACHE

Published: sizes, batch, context, AdamW with clip 1.0 and no weight decay, cosine over 2.5T tokens (the stage ends
before the cosine does), warm-up of 2,000 steps, truncated normal init, and the values after the muP transfer: rates of
1.5e-4 for both groups, minimum 1.5e-5, init std 4e-3 (vector-like) and 4.242e-3 (matrix-like), output_mult 1/32. They
stand here at muP's base width 512, as released: 2.4e-3 / 16 = 1.5e-4, 0.024 / sqrt(2) / 4 = 4.243e-3, 0.5 / 16.
Ours: the betas, those of FLM-101B, which has the same code base (arXiv 2309.03852); eps; how often is saved. The mesh
of 896 A800 (tensor 4, pipeline 2, data 112) has no counterpart here: give one that fits your slice.
"""

from ml_collections import ConfigDict

from tele_jax.config import to_dict
from tele_jax.published import get_model

BATCH, LENGTH = 1_344, 4_096  # published: 5,505,024 tokens


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.run = ("pretrain",)
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    config.pretrain = dict(
        kind="pretrain",
        model=to_dict(get_model("tele_flm_52b")),
        data=dict(tokenizer="tokenizer.model", cache="CACHE"),
        steps=round(2.0e12 / (BATCH * LENGTH)),
        batch_size=BATCH,
        seq_len=LENGTH,
        optimizer=dict(
            learning_rate=1.5e-4, matrix_learning_rate=2.4e-3, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_norm=1.0
        ),
        schedule=dict(kind="cosine", unit="tokens", warmup=2_000 * BATCH * LENGTH, total=2_500_000_000_000, final=0.1),
        checkpoint_every=1_000,
    )
    return config
