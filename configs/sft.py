"""Fine-tuning as published: Tele-FLM's "less is more" (arXiv 2407.02783), TeleChat's (2401.03804) and TeleChat2's.

    tele train --config configs/sft.py:tele_flm --workdir W --config.start=BASE
    tele train --config configs/sft.py:telechat --workdir W --config.start=BASE
    tele train --config configs/sft.py:telechat2 --workdir W --config.start=BASE

BASE is a checkpoint of ours: that of a run, or one made by `tele import`. Dialogues: files of
the folder dialogues, named as below.

Published for Tele-FLM: 30,735 dialogues, length 2,048, learning rate 2.7e-5 falling linearly to 1e-9. Recalled, not
printed: 4 epochs, batch 128, weight decay 0.1, clip 1.0. Ours: the betas, no warm-up. A row holds one dialogue, so that
a batch is 128 dialogues and four epochs are 961 steps; packed=True is faster, with fewer, larger steps.
Published for TeleChat: AdamW 0.9/0.95, eps 1e-5, learning rate 3e-5, cosine, warm-up of a tenth, weight decay 1e-4 (of
kernels and tables alone), clip 1.0, batch 32, length 4,096 or 8,192, several stages, more than 100,000 dialogues, noise
on the embedding (NEFTune), and that the marker of the next question is learned too. Ours: two epochs at 4,096 and one
at 8,192, the size of the noise, and that packed dialogues do not see each other, which the released packing allows.
Published for TeleChat2: one epoch, warm-up of a twentieth, and the weights of its files, given as examples. Ours: what
is left, as for TeleChat.
"""

from ml_collections import ConfigDict

from tele_jax.errors import UserError

KINDS = {"single": 1.42, "multi": 1.2, "math": 1.78, "code": 1.0, "role": 1.24, "tool": 1.01}  # TeleChat2's weights


def dialogues(files: dict[str, float], **options: object) -> dict:
    """Dialogues of several files, each so often in an epoch as its weight says."""
    sources = {
        name: dict(files=(f"dialogues/{name}.jsonl",), format="dialogues", copies=copies)
        for name, copies in files.items()
    }
    return dict(tokenizer="tokenizer.model", sources=sources, dialogues=options)


def tele_flm(config: ConfigDict) -> None:
    config.run = ("sft",)
    config.sft = dict(
        kind="sft",
        data=dialogues({"dialogues": 1.0}),
        epochs=4,
        batch_size=128,
        seq_len=2_048,
        packed=False,
        # Both groups at 2.7e-5: the matrix-like one stands at the base model's muP width 512, 16 times as high.
        optimizer=dict(learning_rate=2.7e-5, matrix_learning_rate=16 * 2.7e-5, beta1=0.9, beta2=0.95, weight_decay=0.1),
        schedule=dict(kind="linear", final=1e-9 / 2.7e-5),
        checkpoint_every=240,
    )


def telechat(config: ConfigDict) -> None:
    config.run = ("sft", "sft_long")
    shared = dict(
        kind="sft",
        batch_size=32,
        neftune_alpha=5.0,
        optimizer=dict(learning_rate=3e-5, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=1e-4, clip_norm=1.0),
        schedule=dict(kind="cosine", warmup_share=0.1, final=0.0),
        checkpoint_every=500,
    )
    config.sft = dict(data=dialogues({"dialogues": 1.0}, next_user=True), epochs=2, seq_len=4_096, **shared)
    config.sft_long = dict(data=dialogues({"long": 1.0}, next_user=True), epochs=1, seq_len=8_192, **shared)


def telechat2(config: ConfigDict) -> None:
    config.run = ("sft",)
    config.sft = dict(
        kind="sft",
        data=dialogues(KINDS),
        epochs=1,
        batch_size=32,
        seq_len=8_192,
        optimizer=dict(learning_rate=3e-5, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=1e-4, clip_norm=1.0),
        schedule=dict(kind="cosine", warmup_share=0.05, final=0.0),
        checkpoint_every=500,
    )


RECIPES = {recipe.__name__: recipe for recipe in (tele_flm, telechat, telechat2)}


def get_config(recipe: str = "tele_flm") -> ConfigDict:
    if recipe not in RECIPES:
        raise UserError(f"configs/sft.py:{recipe}: recipes are {', '.join(RECIPES)}")
    config = ConfigDict()
    config.start = "BASE"
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    RECIPES[recipe](config)
    return config
