"""TeleChat pretrained (arXiv 2401.03804), for the 1B, 3B, 7B and 12B; fine-tuned: configs/sft.py:telechat.

    tele train --config configs/telechat.py:7b --workdir W --config.pretrain.data.cache=CACHE

Published: sizes, tokens (2T, not published for the 3B, 1.5T, 3T), training length 8,192 (of the 7B and 12B).
Ours: every number of the optimizer (nobody published them: the usual values at these sizes), the batch of 4M tokens,
the 3B's tokens (those of the 1B). Dropout (0.1 in the 7B's config) is not built.
"""

from ml_collections import ConfigDict

from tele_jax.config import to_dict
from tele_jax.errors import UserError
from tele_jax.published import get_model

TOKENS = {"1b": 2.0e12, "3b": 2.0e12, "7b": 1.5e12, "12b": 3.0e12}
LEARNING_RATE = {"1b": 4e-4, "3b": 3e-4, "7b": 3e-4, "12b": 2e-4}  # ours
BATCH, LENGTH = 512, 8_192


def get_config(size: str = "7b") -> ConfigDict:
    if size not in TOKENS:
        raise UserError(f"configs/telechat.py:{size}: sizes are {', '.join(TOKENS)}")
    config = ConfigDict()
    config.run = ("pretrain",)
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    config.pretrain = dict(
        kind="pretrain",
        model=to_dict(get_model(f"telechat_{size}")),
        data=dict(tokenizer="tokenizer.model", cache="CACHE"),
        steps=round(TOKENS[size] / (BATCH * LENGTH)),
        batch_size=BATCH,
        seq_len=LENGTH,
        optimizer=dict(learning_rate=LEARNING_RATE[size], beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=dict(kind="cosine", warmup=2_000, final=0.1),
        checkpoint_every=1_000,
    )
    return config
