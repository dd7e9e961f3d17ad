"""Alignment in the way of TeleChat2: fine-tuning, then DPO on pairs of answers.

    tele train --config configs/telechat2_align.py:telechat2 --workdir W --config.start=BASE

BASE is a checkpoint of ours, made by `tele import`; dialogues and pairs are files of the folders dialogues and pairs,
named as below. Published is that TeleChat2 was fine-tuned and then trained with DPO, and the numbers of its
fine-tuning (configs/sft.py). Every number of DPO is ours: it starts near those that the field uses at 7B (beta 0.1,
learning rate 5e-7, one epoch), with a little cross entropy on the chosen answers, so that these stay likely.

The same run in small, on numbers: which of two is larger. The first command writes the files that the second reads;
on two cores both take less than a minute.

    python configs/telechat2_align.py runs/telechat2_align
    tele train --config configs/telechat2_align.py:toy --workdir runs/telechat2_align/run
"""

import json
import random
import sys
from pathlib import Path

from ml_collections import ConfigDict

from tele_jax.errors import UserError

TOY = Path("runs/telechat2_align")
KINDS = {"single": 1.42, "multi": 1.2, "math": 1.78, "code": 1.0, "role": 1.24, "tool": 1.01}  # TeleChat2's weights


def telechat2(config: ConfigDict) -> None:
    config.start = "BASE"
    config.mesh = dict(data=4, fsdp=16, tensor=1)
    talk = {
        name: dict(files=(f"dialogues/{name}.jsonl",), format="dialogues", copies=copies)
        for name, copies in KINDS.items()
    }
    pairs = dict(files=("pairs/train.jsonl",), validation_files=("pairs/validation.jsonl",), format="pairs")
    optimizer = dict(beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=1e-4, clip_norm=1.0)
    config.sft = dict(
        kind="sft",
        data=dict(tokenizer="tokenizer.model", sources=talk),
        epochs=1,
        batch_size=64,
        seq_len=8_192,
        optimizer=dict(optimizer, learning_rate=3e-5),
        schedule=dict(kind="cosine", warmup_share=0.05, final=0.0),
        checkpoint_every=500,
    )
    config.dpo = dict(
        kind="dpo",
        data=dict(tokenizer="tokenizer.model", sources=dict(pairs=pairs)),
        epochs=1,
        batch_size=128,
        seq_len=4_096,
        beta=0.1,
        sft_weight=0.05,
        optimizer=dict(optimizer, learning_rate=5e-7),
        schedule=dict(kind="linear", warmup_share=0.1, final=0.0),
        eval_every=100,
        keep_best="accuracy/pairs",
    )


def toy(config: ConfigDict) -> None:
    if not (TOY / "tokenizer.model").exists():
        raise UserError(f"{TOY}: has no tokenizer.model; run `python configs/telechat2_align.py {TOY}` first")

    def data(name: str, file_format: str) -> dict:
        files, held_out = (str(TOY / f"{name}.jsonl"),), (str(TOY / f"{name}_held_out.jsonl"),)
        source = dict(files=files, validation_files=held_out, format=file_format)
        return dict(tokenizer=str(TOY / "tokenizer.model"), sources={name: source}, eval_bytes=10_000)

    shared = dict(batch_size=32, seq_len=48, log_every=20, checkpoint_every=100)
    config.sft = dict(
        kind="sft",
        model=dict(
            num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=160, vocab_size=512, max_seq_len=128,
            dtype="float32", remat="none",
        ),
        data=data("dialogues", "dialogues"),
        steps=150,
        optimizer=dict(learning_rate=3e-3),
        schedule=dict(kind="cosine", warmup=10),
        **shared,
    )  # fmt: skip
    config.dpo = dict(
        kind="dpo",
        data=data("pairs", "pairs"),
        steps=60,
        beta=0.1,
        sft_weight=0.05,
        optimizer=dict(learning_rate=5e-4),
        schedule=dict(kind="linear", warmup=6),
        **shared,
    )


RECIPES = {recipe.__name__: recipe for recipe in (telechat2, toy)}


def get_config(recipe: str = "telechat2") -> ConfigDict:
    if recipe not in RECIPES:
        raise UserError(f"configs/telechat2_align.py:{recipe}: recipes are {', '.join(RECIPES)}")
    config = ConfigDict()
    config.run = ("sft", "dpo")
    RECIPES[recipe](config)
    return config


def write_toy(out: Path, seed: int = 0) -> None:
    """Writes dialogues whose answers are right half of the time, pairs of right and wrong answers, and a tokenizer."""
    from tele_jax.data import vocabulary_training

    rng, numbers = random.Random(seed), range(100)
    questions = [(a, b) for a in numbers for b in numbers if a != b]
    rng.shuffle(questions)
    out.mkdir(parents=True, exist_ok=True)
    texts = []
    for name, asked in (
        ("dialogues", questions[:4000]),
        ("pairs", questions[4000:8000]),
        ("held_out", questions[8000:]),
    ):
        records = {"dialogues": [], "pairs": []}
        for a, b in asked:
            question, right, wrong = f"Which is larger, {a} or {b}?", str(max(a, b)), str(min(a, b))
            answer = rng.choice((right, wrong))
            records["pairs"].append({"prompt": question, "chosen": right, "rejected": wrong})
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            records["dialogues"].append({"messages": said})
            texts.append(f"{question} {answer}\n")
        for kind in records if name == "held_out" else (name,):
            file = out / (f"{kind}_held_out.jsonl" if name == "held_out" else f"{name}.jsonl")
            file.write_text("".join(json.dumps(record) + "\n" for record in records[kind]))
    trained = vocabulary_training.train_vocabulary(texts, preset="telechat_12b", vocab_size=400)
    vocabulary_training.write_vocabulary(trained, out / "tokenizer.model", preset="telechat_12b")


if __name__ == "__main__":
    write_toy(Path(sys.argv[1]) if len(sys.argv) > 1 else TOY)
