"""A LoRA pair on a real small model: 300 dialogues at random of a pool with planted defects, against 300 by form.

    tele data fetch pool --out runs/pool
    python benchmarks/selection.py --pool runs/pool --work runs/selection
    JAX_PLATFORMS=cpu python benchmarks/lora_pair.py --model CKPT --pool runs/pool --selection runs/selection --work DIR

CKPT is an import of SmolLM2-135M-Instruct (benchmarks/real_model.py writes the release), which knows English alone: the
dialogues are those of the pool's English categories. "form" is at random among what is left after the form rules and
without copies. Both arms have the same steps, tokens and rate, rank 8 on attention and MLP, and two seeds. Judged is
the loss on the answers of held-out dialogues without defects, in bits per byte, the mean over categories; the interval
(95%) of the difference resamples dialogues in pairs. DIR/pair.json keeps finished arms, and a second call goes on.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from selection import CHINESE

from tele_jax import tables
from tele_jax.data import dialogue
from tele_jax.inference.chat import find_tokenizer

COUNT, SEEDS, STEPS, ROWS, LENGTH, RATE, RESAMPLES = 300, 2, 30, 4, 256, 5e-4, 10_000
HELD_OUT, LONGEST = 12, 600  # dialogues of every category; characters of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the imported checkpoint")
    parser.add_argument("--pool", type=Path, required=True, help="what `tele data fetch pool` wrote")
    parser.add_argument("--selection", type=Path, required=True, help="the --work of benchmarks/selection.py")
    parser.add_argument("--work", type=Path, required=True, help="directory of this study")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = (args.selection / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = json.loads((args.selection / "chosen.json").read_text())
    english = [i for i, row in enumerate(rows) if json.loads(row)["category"] not in CHINESE]
    arms = {"random": english, "form": sorted({*english} & {*chosen["form"]})}
    planted = {*english} - {*chosen["without defect"]}
    out = args.work / "pair.json"
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"bits": {}, "defects": {}}
    texts = held_out(args.pool)
    if "base" not in done["bits"]:
        done["bits"]["base"] = judge(args.model, texts)
    for seed in range(SEEDS):
        for name, numbers in arms.items():
            if (key := f"{name} / {seed}") not in done["bits"]:
                drawn = np.random.default_rng(seed).permutation(numbers)[:COUNT].tolist()
                done["defects"][key] = len(planted & {*drawn})
                adapter = train(args.model, [rows[i] for i in drawn], args.work / "run", seed)
                done["bits"][key] = judge(adapter, texts)
                out.write_text(json.dumps(done | {"machine": machine()}) + "\n")
    print(table(done, texts))


def held_out(pool: Path) -> list[dict[str, Any]]:
    """The first HELD_OUT dialogues of every English category that are short enough."""
    found = []
    for path in sorted(pool.glob("*/validation.jsonl")):
        if path.parent.name not in (*CHINESE, "reading"):
            records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            short = [each for each in records if len(json.dumps(each["messages"])) < LONGEST]
            found += short[:HELD_OUT]
    return found


def train(model: Path, lines: list[str], work: Path, seed: int) -> Path:
    """Trains adapters on the dialogues and returns the directory with their checkpoint."""
    import tele_jax as tele

    shutil.rmtree(work, ignore_errors=True)
    work.parent.joinpath("chosen.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    source = {"files": (str(work.parent / "chosen.jsonl"),), "format": "dialogues"}
    stage = dict(
        kind="sft",
        lora=dict(rank=8, alpha=16.0, targets=("attn", "mlp")),
        data=dict(tokenizer=find_tokenizer(model), sources={"chosen": source}),
        steps=STEPS, batch_size=ROWS, seq_len=LENGTH, seed=seed, remat="none",
        optimizer=dict(learning_rate=RATE), schedule=dict(kind="cosine", warmup=3, final=0.0),
    )  # fmt: skip
    tele.run({"run": ("sft",), "start": str(model), "sft": stage}, work)
    return work / "sft"


def judge(checkpoint: Path, texts: list[dict[str, Any]]) -> list[float]:
    """Bits of the answer of every dialogue, its end included."""
    import tele_jax as tele
    from tele_jax.eval import model as models

    model, pairs = models.load(checkpoint), []
    for text in texts:
        tokens, weights = dialogue.render(text["messages"], model.vocabulary, template=model.template)
        first = next(i for i, weight in enumerate(weights) if weight)
        pairs.append((tokens[:first], tokens[first:]))
    prompts, answers = map(list, zip(*pairs, strict=True))
    scores = tele.score(model.cfg.replace(remat="none"), model.params, prompts, answers)
    return [-score.logprob / math.log(2) for score in scores]


def table(done: dict[str, Any], texts: list[dict[str, Any]]) -> str:
    categories = np.array([text["category"] for text in texts])
    sizes = np.array([len(text["messages"][-1]["content"].encode()) for text in texts], np.float64)
    groups = [np.flatnonzero(categories == name) for name in np.unique(categories)]

    def mean(key: str, parts: list[np.ndarray]) -> float:
        bits = np.mean([found for name, found in done["bits"].items() if name.startswith(key)], axis=0)
        return float(np.mean([bits[part].sum() / sizes[part].sum() for part in parts]))

    rng = np.random.default_rng(0)
    draws = [[rng.choice(group, len(group)) for group in groups] for _ in range(RESAMPLES)]
    lines = [("base", "", f"{mean('base', groups):.4f}", "")]
    for arm, other in (("random", "base"), ("form", "random")):
        low, high = np.quantile([mean(arm, draw) - mean(other, draw) for draw in draws], (0.025, 0.975))
        away = f"{mean(arm, groups) - mean(other, groups):+.4f} ({low:+.4f} to {high:+.4f}) of {other}"
        seeds = [f"{mean(f'{arm} / {seed}', groups):.4f}" for seed in range(SEEDS)]
        defects = ", ".join(str(done["defects"][f"{arm} / {seed}"]) for seed in range(SEEDS))
        lines.append((f"{arm} {COUNT}", defects, f"{mean(arm, groups):.4f} ({', '.join(seeds)})", away))
    header = ("arm", "defects, by seed", "bits per byte (by seed)", "difference")
    each = [(name, str(len(group))) for name, group in zip(np.unique(categories), groups, strict=True)]
    return f"{tables.text(lines, header)}\n\n{tables.text(each, ('category', 'held-out dialogues'))}"


if __name__ == "__main__":
    main()
