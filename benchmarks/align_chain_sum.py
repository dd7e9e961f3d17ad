"""Reinforcement learning that a reader can check: one-digit sums of reasoning-gym, learned by GRPO and by PPO.

    JAX_PLATFORMS=cpu python benchmarks/align_chain_sum.py --work DIR [--seeds 3] [--arms grpo ppo random]

A small model is fine-tuned on sums for a few steps, so that at most 30% of its likeliest answers are right. Then
replies of its own are rewarded: 1 where reasoning-gym's verifier takes the answer as it is, else 0 (the verifier itself
gives a part where the answer is a part of the reply). `random` is GRPO whose rewards are drawn at random: a gain there
would not come from rewards. Judged is the share of right answers over all 200 questions that the generator can ask (0
to 9, two terms, + and -), by the likeliest tokens: the model sees them all in training, and is not asked for others.
KL is that of the policy that drew against the fine-tuned model, in nats a reply. DIR/RUN are work directories,
DIR/align_chain_sum.json and .png the figures; a second call goes on with what is not complete.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine

import tele_jax as tele
from tele_jax import tables
from tele_jax.data.vocabulary_training import train_vocabulary
from tele_jax.train import metrics

MODEL = dict(
    num_layers=2, embed_dim=128, num_heads=4, head_dim=32, mlp_dim=384, max_seq_len=64, dtype="float32", remat="none",
)  # fmt: skip
VOCAB, SUMS = 480, dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
SFT_STEPS, ROLLOUTS, PROMPTS, ANSWERS, BATCH = 55, 100, 64, 16, 256
RATES = {"grpo": 3e-4, "ppo": 3e-4, "random": 3e-4}
BAND = 2.0  # nats a reply
REWARDS = '''"""Rewards of benchmarks/align_chain_sum.py."""
import random
import reasoning_gym

verify = reasoning_gym.get_score_answer_fn("chain_sum")

def exact(prompt, reply, record):
    return float(verify(reply.strip(), record) == 1.0)

def chance(prompt, reply, record):
    return float(random.random() < 0.5)
'''


def write_files(work: Path) -> None:
    """Questions and answers of the generator, the rewards, and a tokenizer trained on the questions."""
    import reasoning_gym

    def entries(size: int, seed: int) -> list[dict[str, Any]]:
        made = reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **SUMS)
        return [{"prompt": entry["question"], **entry} for entry in made]

    train = entries(4_000, 1)
    every = list({entry["prompt"]: entry for entry in entries(8_000, 2_000_000)}.values())
    assert len(every) == 200
    talks = [
        {"messages": [dict(role="user", content=e["question"]), dict(role="assistant", content=e["answer"])]}
        for e in train
    ]
    for name, lines in {"prompts": train, "every": every, "talks": talks}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [f"{entry['question']} {entry['answer']}" for entry in train]
    model = train_vocabulary(texts, preset="telechat_12b", vocab_size=VOCAB, character_coverage=1.0).model
    (work / "tokenizer.model").write_bytes(model)
    (work / "chain_sum_rewards.py").write_text(REWARDS)


def page(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """The run of an arm: fine-tuning, and then replies that are rewarded."""
    shared = {"tokenizer": str(work / "tokenizer.model")}
    talks = {"talks": {"files": (str(work / "talks.jsonl"),), "format": "dialogues"}}
    sums = {"files": (str(work / "prompts.jsonl"),), "validation_files": (str(work / "every.jsonl"),)}
    fine_tuning = dict(
        kind="sft", model=MODEL | {"vocab_size": VOCAB}, data={**shared, "sources": talks}, steps=SFT_STEPS,
        batch_size=128, seq_len=48, packed=False, seed=seed, optimizer=dict(learning_rate=2e-3),
        schedule=dict(kind="constant", warmup=10),
    )  # fmt: skip
    learned = dict(
        kind="ppo" if arm == "ppo" else "grpo", data={**shared, "sources": {"sums": {**sums, "format": "prompts"}}},
        reward=dict(function=f"chain_sum_rewards:{'chance' if arm == 'random' else 'exact'}"),
        steps=ROLLOUTS * PROMPTS * ANSWERS // BATCH, batch_size=BATCH, seq_len=48, rollout_prompts=PROMPTS,
        answers=ANSWERS, max_new_tokens=5, seed=seed, kl_coef=0.02, samples_every=25, log_every=4, eval_every=40,
        checkpoint_every=100, optimizer=dict(learning_rate=RATES[arm]),
        schedule=dict(kind="linear", warmup=4, final=0.05),
    )  # fmt: skip
    if arm == "random":  # its replies are judged by the rewards of the others
        learned["evaluation_reward"] = dict(function="chain_sum_rewards:exact")
    return {"run": ("sft", arm), "sft": fine_tuning, arm: learned}


def figures(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """Runs an arm where it is not complete, and returns its figures."""
    run, began = work / f"{arm}_{seed}", time.perf_counter()
    finished = (run / arm / "summary.json").exists()
    tele.run(page(work, arm, seed), run)
    lines = metrics.read(run / arm / "metrics" / "metrics.jsonl")
    scores = {line["step"] * BATCH: line["eval/reward/sums"] for line in lines if "eval/reward/sums" in line}
    curves = {name: {line["step"] * BATCH: line[name] for line in lines if name in line} for name in CURVES}
    seconds = json.loads((run / "seconds.json").read_text()) if finished else round(time.perf_counter() - began)
    (run / "seconds.json").write_text(json.dumps(seconds))
    reached = [samples for samples, score in scores.items() if score >= 0.9]
    return {"exact_match": scores, **curves, "seconds": seconds, "samples_to_90": min(reached, default=None)}


CURVES = ("reward", "kl_sequence", "entropy", "clip_fraction", "reply_tokens", "cut_share")


def table(found: dict[str, Any]) -> str:
    """The first and last figures of every arm and seed."""
    rows = []
    for name, one in found.items():
        first, last = (list(one["exact_match"].values())[end] for end in (0, -1))
        kl, tail = list(one["kl_sequence"].values()), list(one["reward"].values())[-5:]
        at = one["samples_to_90"]
        cells = [name, f"{first:.1%}", f"{last:.1%}", f"{sum(tail) / len(tail):.2f}", f"{max(kl):.2f}"]
        rows.append([*cells, f"{at:,}" if at else "never", f"{one['seconds']}"])
    head = ["arm / seed", "before", "after", "reward of draws", "largest KL", "draws to 90%", "seconds"]
    return tables.text(head, rows)


def picture(found: dict[str, Any], path: Path) -> None:
    """Exact match and KL over replies drawn, a line for each run."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = {"grpo": "tab:blue", "ppo": "tab:orange", "random": "tab:gray"}
    for name, one in found.items():
        arm, _, seed = name.partition(" / ")
        for ax, what in zip(axes, ("exact_match", "kl_sequence"), strict=True):
            label = arm if seed == "0" else None
            ax.plot([int(x) for x in one[what]], list(one[what].values()), color=colours[arm], label=label)
    axes[0].set(xlabel="replies drawn", ylabel="exact match, all 200 questions", ylim=(0, 1))
    axes[1].set(xlabel="replies drawn", ylabel="KL from the fine-tuned model, nats a reply")
    axes[1].axhline(BAND, color="black", linewidth=0.8, linestyle=":")
    axes[0].legend(frameon=False)
    plt.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of this study")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--arms", nargs="+", choices=RATES, default=list(RATES), help="default: all")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.model").exists():
        write_files(work)
    sys.path.insert(0, str(work))
    out, found = work / "align_chain_sum.json", {}
    for arm in args.arms:
        for seed in range(args.seeds):
            found[f"{arm} / {seed}"] = figures(work, arm, seed)
            out.write_text(json.dumps({"runs": found, "machine": machine()}, indent=1) + "\n")
    print(table(found))
    picture(found, work / "align_chain_sum.png")


if __name__ == "__main__":
    main()
