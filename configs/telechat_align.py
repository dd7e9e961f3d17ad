"""Alignment in the way of TeleChat (arXiv 2401.03804): fine-tuning, a reward model on pairs of answers, and PPO.

    tele train --config configs/telechat_align.py:telechat --workdir W --config.start=BASE

BASE is a checkpoint of ours, made by `tele import`; dialogues, pairs and prompts are files of these folders, named as
below. Published are the three stages and the numbers of the fine-tuning (configs/sft.py). No number of the reward model
or of PPO was published: all are ours, near those that the field uses at 7B (InstructGPT, arXiv 2203.02155).

The same in small, on sums: a pair is the right answer and another number. The first command writes the files that the
second reads; on two free cores both take about a minute.

    python configs/telechat_align.py runs/telechat_align
    tele train --config configs/telechat_align.py:toy --workdir runs/telechat_align/run
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tele_jax.errors import UserError

TOY, VOCAB = Path("runs/telechat_align"), 384


def telechat(config: ConfigDict) -> None:
    config.start = "BASE"
    config.mesh = dict(data=1, fsdp=64, tensor=1)

    def data(name: str, file_format: str) -> dict:
        source = dict(files=(f"{name}/train.jsonl",), format=file_format)
        if name != "dialogues":
            source["validation_files"] = (f"{name}/validation.jsonl",)
        return dict(tokenizer="tokenizer.model", sources={name: source})

    optimizer = dict(beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=1e-4, clip_norm=1.0)
    config.sft = dict(
        kind="sft",
        data=data("dialogues", "dialogues"),
        epochs=2,
        batch_size=64,
        seq_len=4_096,
        neftune_alpha=5.0,
        optimizer=dict(optimizer, learning_rate=3e-5),
        schedule=dict(kind="cosine", warmup_share=0.1, final=0.0),
        checkpoint_every=500,
    )
    config.reward = dict(
        kind="reward",
        data=data("pairs", "pairs"),
        epochs=1,
        batch_size=128,
        seq_len=4_096,
        centre=0.01,
        optimizer=dict(optimizer, learning_rate=9e-6),
        schedule=dict(kind="cosine", warmup_share=0.05, final=0.1),
        eval_every=100,
        keep_best="accuracy/pairs",
    )
    config.ppo = dict(
        kind="ppo",
        after="sft",
        data=data("prompts", "prompts"),
        reward=dict(model="reward"),
        reference="sft",
        steps=1_000,
        batch_size=128,
        seq_len=4_096,
        rollout_prompts=512,
        max_new_tokens=1_024,
        rollout_epochs=2,
        kl_coef=0.02,
        kl_target=6.0,
        max_kl=0.05,
        optimizer=dict(optimizer, learning_rate=1e-6),
        schedule=dict(kind="constant", warmup=20),
        remat="full",
        eval_every=100,
    )


def toy(config: ConfigDict) -> None:
    if not (TOY / "tokenizer.model").exists():
        raise UserError(f"{TOY}: has no tokenizer.model; run `python configs/telechat_align.py {TOY}` first")

    def data(name: str, file_format: str) -> dict:
        files = dict(files=(str(TOY / f"{name}.jsonl"),), validation_files=(str(TOY / f"{name}_held_out.jsonl"),))
        return dict(tokenizer=str(TOY / "tokenizer.model"), sources={name: dict(files, format=file_format)})

    shared: dict[str, Any] = dict(seq_len=32, log_every=10, checkpoint_every=100)
    config.sft = dict(
        kind="sft",
        model=dict(
            num_layers=2, embed_dim=96, num_heads=4, head_dim=24, mlp_dim=256, vocab_size=VOCAB, max_seq_len=64,
            dtype="float32", remat="none",
        ),
        data=data("dialogues", "dialogues"),
        steps=60,
        batch_size=128,
        packed=False,
        optimizer=dict(learning_rate=2e-3),
        schedule=dict(kind="constant", warmup=10),
        **shared,
    )  # fmt: skip
    config.reward = dict(
        kind="reward",
        data=data("pairs", "pairs"),
        steps=150,
        batch_size=64,
        centre=0.01,
        optimizer=dict(learning_rate=1e-3),
        schedule=dict(kind="linear", warmup=10, final=0.0),
        **shared,
    )
    config.ppo = dict(
        kind="ppo",
        after="sft",
        data=data("prompts", "prompts"),
        reward=dict(model="reward"),
        reference="sft",
        steps=40,
        batch_size=256,
        rollout_prompts=512,
        max_new_tokens=4,
        rollout_epochs=2,
        kl_coef=0.1,
        kl_target=1.0,
        optimizer=dict(learning_rate=3e-4),
        schedule=dict(kind="linear", warmup=4, final=0.1),
        eval_every=20,
        samples_every=5,
        **shared,
    )


RECIPES = {recipe.__name__: recipe for recipe in (telechat, toy)}


def get_config(recipe: str = "telechat") -> ConfigDict:
    if recipe not in RECIPES:
        raise UserError(f"configs/telechat_align.py:{recipe}: recipes are {', '.join(RECIPES)}")
    config = ConfigDict()
    config.run = ("sft", "reward", "ppo")
    RECIPES[recipe](config)
    return config


def write(directory: Path) -> None:
    """Writes sums of numbers below 20 as dialogues, pairs and prompts, a tenth of them held out, and a tokenizer."""
    from tele_jax.data.vocabulary_training import train_vocabulary

    rng = random.Random(0)
    sums = [(f"{a} + {b} =", a + b) for a in range(20) for b in range(20)]
    rng.shuffle(sums)
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, part in (("", sums[40:]), ("_held_out", sums[:40])):
        lines: dict[str, list[dict]] = {"dialogues": [], "pairs": [], "prompts": []}
        for question, answer in part:
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": str(answer)}]
            lines["dialogues"].append({"messages": said})
            lines["prompts"].append({"prompt": question, "answer": answer})
            for wrong in rng.sample([n for n in range(39) if n != answer], 10):
                lines["pairs"].append({"prompt": question, "chosen": str(answer), "rejected": str(wrong)})
        for name, records in lines.items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (directory / f"{name}{suffix}.jsonl").write_text(text)
    texts = [f"{question} {answer}" for question, answer in sums]
    made = train_vocabulary(texts, preset="telechat_12b", vocab_size=VOCAB, character_coverage=1.0)
    (directory / "tokenizer.model").write_bytes(made.model)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else TOY)
