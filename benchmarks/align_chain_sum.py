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
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine

import tele_jax as tele
from tele_jax import tables
from tele_jax.train import metrics

RATE, BAND = 4e-4, 3.0  # BAND: nats a reply
# Rollouts of 1,024 replies, and what an arm changes of the toy of the page. PPO needs a larger kl_coef, since with 0.01
# its replies lose their variety too early; one reply to each of many prompts, since it does not compare those to one
# prompt as GRPO does; and values that are learned as fast as the policy, which is what its advantages stand on.
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "grpo": (320, {"kl_coef": 0.01}),
    "ppo": (480, dict(kl_coef=0.06, rollout_prompts=1024, answers=1, value_coef=1.0, value_clip=None)),
    "random": (320, {"kl_coef": 0.01}),
}
REWARDS = '''"""Rewards of benchmarks/align_chain_sum.py."""
import random
import reasoning_gym

verify = reasoning_gym.get_score_answer_fn("chain_sum")

def exact(prompt, reply, record):
    return float(verify(reply.strip(), record) == 1.0)

def chance(prompt, reply, record):
    return float(random.random() < 0.5)
'''


def recipe(work: Path) -> Any:
    """The page configs/reasoning_grpo.py, whose toy has its files in a directory."""
    path = Path(__file__).parents[1] / "configs" / "reasoning_grpo.py"
    found = importlib.util.spec_from_file_location("reasoning_grpo", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.TOY = work
    return module


def page(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """The run of an arm: the toy of the page, for longer, with a reward of 0 or 1."""
    config = recipe(work).get_config("toy").to_dict()
    learned = config.pop("grpo")
    rows, (rollouts, changes) = learned["rollout_prompts"] * learned["answers"], ARMS[arm]
    learned |= changes | {
        "kind": "ppo" if arm == "ppo" else "grpo",
        "reward": {"function": f"chain_sum_rewards:{'chance' if arm == 'random' else 'exact'}"},
        "evaluation_reward": {"function": "chain_sum_rewards:exact"},
        "steps": rollouts * rows // learned["batch_size"],
        "seed": seed,
        "optimizer": {"learning_rate": RATE},
        "eval_every": 40,
        "samples_every": 50,
    }
    return {"run": ("sft", arm), "sft": config["sft"] | {"seed": seed}, arm: learned}


def figures(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """Runs an arm where it is not complete, and returns its figures."""
    run, began = work / f"{arm}_{seed}", (time.perf_counter(), time.process_time())
    finished = (run / arm / "summary.json").exists()
    tele.run(page(work, arm, seed), run)
    rows = page(work, arm, seed)[arm]["batch_size"]
    lines = metrics.read(run / arm / "metrics" / "metrics.jsonl")
    scores = {line["step"] * rows: line["eval/reward/sums"] for line in lines if "eval/reward/sums" in line}
    curves = {name: {line["step"] * rows: line[name] for line in lines if name in line} for name in CURVES}
    spent = [round(now - before) for now, before in zip((time.perf_counter(), time.process_time()), began, strict=True)]
    seconds, cpu = json.loads((run / "seconds.json").read_text()) if finished else spent
    (run / "seconds.json").write_text(json.dumps([seconds, cpu]))
    reached = [samples for samples, score in scores.items() if score >= 0.9]
    return {
        "exact_match": scores,
        **curves,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "samples_to_90": min(reached, default=None),
    }


CURVES = ("reward", "kl_sequence", "entropy", "clip_fraction", "reply_tokens", "cut_share")


def table(found: dict[str, Any]) -> str:
    """The first and last figures of every arm and seed."""
    rows = []
    for name, one in found.items():
        first, last = (list(one["exact_match"].values())[end] for end in (0, -1))
        kl, tail = list(one["kl_sequence"].values()), list(one["reward"].values())[-5:]
        at = one["samples_to_90"]
        cells = [name, f"{first:.1%}", f"{last:.1%}", f"{sum(tail) / len(tail):.2f}", f"{max(kl):.2f}"]
        rows.append([*cells, f"{at:,}" if at else "never", f"{one['seconds']}", f"{one['cpu_seconds']}"])
    head = ["arm / seed", "before", "after", "reward of draws", "largest KL", "draws to 90%", "seconds", "of processor"]
    return tables.text(rows, head)


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
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.model").exists():
        recipe(work).write(work)
        (work / "chain_sum_rewards.py").write_text(REWARDS)
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
