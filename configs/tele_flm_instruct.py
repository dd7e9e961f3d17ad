"""Tele-FLM fine-tuned on 30,735 dialogues, "less is more" (arXiv 2407.02783).

    tele data cache --config configs/data/YOUR_DIALOGUES.py --out CACHE
    tele train --config configs/tele_flm_instruct.py --workdir W --config.start=BASE --config.sft.data.cache=CACHE

Published: 30,735 samples, length 2,048, learning rate 2.7e-5 falling linearly to 1e-9. Recalled, not printed: 4 epochs,
batch 128, weight decay 0.1, clip 1.0. Ours: the betas, no warm-up, and that dialogues are packed: the published count
of steps (4 x 30,735 / 128 = 960) is kept, so that a batch sees more than 128 dialogues where they are short.
BASE is a checkpoint of ours: that of a run, or one made by `tele import`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.run = ("sft",)
    config.start = "BASE"
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    config.sft = dict(
        kind="sft",
        data=dict(tokenizer="tokenizer.model", cache="CACHE"),
        steps=4 * 30_735 // 128,
        batch_size=128,
        seq_len=2_048,
        # Both groups at 2.7e-5: the matrix-like one stands at the base model's muP width 512, 16 times as high.
        optimizer=dict(learning_rate=2.7e-5, matrix_learning_rate=16 * 2.7e-5, beta1=0.9, beta2=0.95, weight_decay=0.1),
        schedule=dict(kind="linear", final=1e-9 / 2.7e-5),
        checkpoint_every=240,
    )
    return config
