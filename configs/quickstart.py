"""The main job in small: pretrain a Tele-FLM, grow it twice along all four axes, fine-tune it on dialogues.

    tele train --config configs/quickstart.py --workdir runs/quickstart/run

The proportions are near those of Tele-FLM 52B -> 102B -> 1T. Embed and heads grow x 1.25 and x 1.8 (published x 1.25
and x 2: a ratio that is no integer proves more), layers x 1.25 and x 1.6 (x 1.25 and x 1.75), mlp x 1.25 and x 3.24
(x 1.25 and x 3.6, which is 4.8 x embed as here). Text: `tele data fetch quickstart`.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from tele_jax.errors import UserError

TEXT = Path("runs/quickstart/text")
TOKENIZER = "runs/quickstart/tokenizer.model"
# Tele-FLM's pretraining mixes English and Chinese 2 to 1 with a tenth of code (arXiv 2404.16645); shares here are ours,
# nearer to each other, because the corpora are small.
RATES = {"en": 0.45, "zh": 0.3, "code": 0.25}


def get_config() -> ConfigDict:
    manifest = TEXT / "manifest.json"
    if not manifest.exists():
        raise UserError(f"{manifest}: missing; run `tele data fetch quickstart --out {TEXT}` first")
    domains = json.loads(manifest.read_text())["domains"]

    def sources(rates: dict[str, float], file_format: str) -> dict:
        return {
            domain: dict(
                files=(str(TEXT / domain / "train.jsonl"),),
                validation_files=(str(TEXT / domain / "validation.jsonl"),),
                format=file_format,
                rate=rate,
            )
            for domain, rate in rates.items()
            if domain in domains  # without a download there is no Chinese
        }

    pretraining = dict(tokenizer=TOKENIZER, sources=sources(RATES, "jsonl"), eval_bytes=30_000)
    dialogues = dict(tokenizer=TOKENIZER, sources=sources({"dialogues": 1.0}, "dialogues"), eval_bytes=20_000)
    batch = dict(batch_size=16, seq_len=128, log_every=20, eval_every=100, checkpoint_every=50)

    config = ConfigDict()
    config.run = ("small", "grow_medium", "medium", "grow_large", "large", "sft")

    config.small = dict(
        kind="pretrain",
        model=dict(
            num_layers=4, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=170,
            vocab_size=4096, max_seq_len=256, mup_base_width=64, matrix_init_std=0.08, dtype="float32", remat="none",
        ),
        data=pretraining,
        steps=250,
        optimizer=dict(learning_rate=6e-3),
        schedule=dict(kind="constant", warmup=20),
        **batch,
    )  # fmt: skip
    config.grow_medium = dict(
        kind="grow",
        policy="msg",
        model=dict(num_layers=5, embed_dim=80, num_heads=5, mlp_dim=213),
        layers="distance",
        tolerance=1e-4,
    )
    config.medium = dict(
        kind="pretrain",
        data=pretraining,
        steps=120,
        mask_ramp=30,
        optimizer=dict(learning_rate=5e-3, new_warmup_steps=20),
        schedule=dict(kind="constant", warmup=10),
        seed=1,
        **batch,
    )
    config.grow_large = dict(
        kind="grow",
        policy="msg",
        model=dict(num_layers=8, embed_dim=144, num_heads=9, mlp_dim=691),
        layers="distance",
        tolerance=1e-4,
    )
    config.large = dict(
        kind="pretrain",
        data=pretraining,
        steps=50,
        mask_ramp=15,
        optimizer=dict(learning_rate=4e-3, new_warmup_steps=10),
        schedule=dict(kind="wsd", warmup=5, decay=25, final=0.1),
        seed=2,
        **batch,
    )
    config.sft = dict(
        kind="sft",
        data=dialogues,
        steps=25,
        optimizer=dict(learning_rate=2e-3, weight_decay=0.1),
        schedule=dict(kind="linear", warmup=5, final=0.0),
        seed=3,
        **batch,
    )
    return config
