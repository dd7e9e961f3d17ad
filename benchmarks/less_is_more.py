"""Does a selection of dialogues teach more than as many dialogues at random? Arms of equal tokens and steps.

    tele data fetch quickstart --out runs/quickstart/text
    tele train --config benchmarks/less_is_more.py --workdir runs/less_is_more/base
    tele data fetch pool --out runs/pool
    python benchmarks/selection.py --pool runs/pool --model runs/less_is_more/base --work runs/less_is_more/selection
    python benchmarks/less_is_more.py --runs runs/less_is_more --pool runs/pool

The base model has 11 million parameters and is pretrained on the text of the quickstart. The pool has 20,000 dialogues,
half of them with planted defects (benchmarks/selection.py). An arm fine-tunes the base on what a method chose, for the
same number of steps and tokens, with three seeds of the choice and of the order. Judged is the loss on the answers of
held-out dialogues without defects, in bits per byte, the mean over eight sorts of dialogues. The interval (95%) of an
arm minus "random" of the same N resamples held-out dialogues and seeds in pairs. arms.json keeps finished arms, and a
second call goes on. Arms:

    pool                all 20,000, defects and all, as far as the steps reach
    random, ...         methods of `tele sft select`; "form" drops what breaks a rule, and copies
    clean               at random among those without a defect, which only the one who planted them knows
    maths 25%           "form + random", but a quarter are problems of maths
"""

import argparse
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from ml_collections import ConfigDict

TEXT, TOKENIZER = Path("runs/quickstart/text"), "runs/quickstart/tokenizer.model"
SEEDS, STEPS, ROWS, LENGTH, RATE, HELD_OUT, RESAMPLES = 3, 32, 12, 256, 1e-3, 540, 2_000
METHODS = (
    "random", "stratified", "longest", "form + random", "form + hashed, k_centre", "form + states, nearest",
    "form + difficulty + states, nearest", "form + easiest 80% + random", "clean", "maths 25%",
)  # fmt: skip
CURVE = ("random", "form + random", "clean")
MATHS = "maths"


def get_config() -> ConfigDict:
    """The page of the base model."""
    rates = {"en": 0.45, "zh": 0.35, "code": 0.2}

    def source(domain: str) -> dict[str, Any]:
        files = {"files": (str(TEXT / domain / "train.jsonl"),)}
        return files | {"validation_files": (str(TEXT / domain / "validation.jsonl"),), "format": "jsonl"}

    config = ConfigDict()
    config.run = ("base",)
    config.base = dict(
        kind="pretrain",
        model=dict(
            num_layers=8, embed_dim=288, num_heads=9, head_dim=32, mlp_dim=864, vocab_size=4096, max_seq_len=512,
            mup_base_width=64, matrix_init_std=0.08, dtype="float32", remat="none",
        ),
        data=dict(
            tokenizer=TOKENIZER,
            sources={name: dict(rate=rate, **source(name)) for name, rate in rates.items()},
            eval_bytes=60_000,
        ),
        steps=1_200,
        batch_size=16,
        seq_len=256,
        log_every=20,
        eval_every=400,
        checkpoint_every=200,
        optimizer=dict(learning_rate=6e-3),
        schedule=dict(kind="cosine", warmup=50, final=0.1),
    )  # fmt: skip
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="directory of base and selection")
    parser.add_argument("--pool", type=Path, required=True, help="what `tele data fetch pool` wrote")
    args = parser.parse_args()
    out, selection = args.runs / "arms.json", args.runs / "selection"
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"arms": {}}
    study = Study(args.runs / "base", args.pool)
    rows = (selection / "pool.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    chosen = json.loads((selection / "chosen.json").read_text())
    if "base" not in done["arms"]:
        done["arms"]["base"] = study.judge(study.params)
    for seed in range(SEEDS):
        for name, numbers in arms(chosen, rows, seed):
            key = f"{name} / {seed}"
            if key not in done["arms"]:
                done["arms"][key] = study.train([rows[i] for i in numbers], args.runs / "chosen.jsonl", seed)
                out.write_text(json.dumps(done | {"machine": machine()}) + "\n")
                print(f"{key}: {np.mean(list(study.by_category(done['arms'][key]).values())):.4f}", flush=True)
    print(table(study, done["arms"]))


def arms(chosen: dict[str, Any], rows: list[str], seed: int) -> list[tuple[str, list[int]]]:
    """(name with N, numbers of the chosen rows) of every arm of a seed."""
    rng = np.random.default_rng(seed)
    clean, form = (rng.permutation(chosen[name]).tolist() for name in ("without defect", "form"))
    maths = [i for i in form if json.loads(rows[i])["category"] == MATHS]
    found = [("pool 20000", list(range(len(rows))))]
    for count in (300, 1_000, 3_000):
        for method in METHODS if count == 1_000 else CURVE:
            if method == "clean":
                numbers = clean[:count]
            elif method == "maths 25%":
                others = [i for i in form if i not in set(maths)]
                numbers = maths[: count // 4] + others[: count - count // 4]
            elif f"{method} {count}" not in chosen and count >= 1_000:
                continue  # needs a model, and the selection was made without
            else:  # of 300, the first of a random order of the 1,000
                numbers = chosen[f"{method} {max(count, 1_000)}"][seed]
                numbers = rng.permutation(numbers).tolist()[:count] if count < 1_000 else numbers
            found.append((f"{method} {count}", numbers))
    return found


class Study:
    """The base model, the step, and the held-out dialogues."""

    def __init__(self, base: Path, pool: Path):
        import jax

        import tele_jax as tele
        from tele_jax.settings import MeshConfig
        from tele_jax.sharding import make_mesh
        from tele_jax.stages import sft
        from tele_jax.train.optimizer import optimizer, schedule
        from tele_jax.train.step import make_step

        loaded = tele.checkpoint.load(base, items=("params",))
        self.cfg, self.params = loaded.cfg, jax.tree.map(np.asarray, loaded.params)
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        stage = self.stage(["any"], 0)
        self.tx = optimizer(self.cfg, stage.optimizer, schedule(stage.schedule, STEPS, 1))
        loss = functools.partial(sft.loss, stage)
        self.step = make_step(self.cfg, self.tx, self.mesh, batch_size=ROWS, loss=loss)
        self.held_out = self.read(pool)

    def stage(self, files: list[str], seed: int) -> Any:
        from tele_jax.stages import read_stage

        data = {"tokenizer": TOKENIZER, "sources": {"chosen": {"files": files, "format": "dialogues"}}}
        table = {"kind": "sft", "data": data, "optimizer": {"learning_rate": RATE, "weight_decay": 0.1}, "seed": seed}
        table |= {"schedule": {"kind": "linear", "warmup": 3, "final": 0.0}}
        return read_stage({**table, "batch_size": ROWS, "seq_len": LENGTH, "steps": STEPS}, "config.sft")

    def read(self, pool: Path) -> list[tuple[str, int, dict[str, np.ndarray]]]:
        """(category, bytes of the answers, row) of as many held-out dialogues of every sort that fit a row."""
        from tele_jax.data import dialogue, packing
        from tele_jax.data.vocabulary import load_vocabulary

        vocabulary, found = load_vocabulary(TOKENIZER), []
        paths = [path for path in sorted(pool.glob("*/validation.jsonl")) if path.parent.name != "reading"]
        for path in paths:
            count = 0
            for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
                record = json.loads(line)
                tokens, weights = dialogue.render(record["messages"], vocabulary)
                if len(tokens) - 1 > LENGTH or count >= HELD_OUT // len(paths):
                    continue
                example = np.array([tokens[:-1], tokens[1:], weights[1:]], np.int32)
                row = packing.fit_rows(packing.empty_rows(1, LENGTH, 3), [example], pad_id=3)[0]
                said = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
                found.append((record["category"], len("".join(said).encode()), packing.to_batch(row)))
                count += 1
        return found

    def judge(self, params: Any) -> list[float]:
        """Bits of the answers of every held-out dialogue."""
        bits: list[float] = []
        for i in range(0, len(self.held_out), ROWS):
            rows = [row for _, _, row in self.held_out[i : i + ROWS]]
            rows += [rows[-1]] * (ROWS - len(rows))
            batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            sums = _sums(self.cfg, params, batch)
            bits += (np.asarray(sums, np.float64) / math.log(2)).tolist()
        return bits[: len(self.held_out)]

    def train(self, lines: list[str], file: Path, seed: int) -> list[float]:
        import jax

        from tele_jax.data import sources
        from tele_jax.sharding import put_batch
        from tele_jax.stages import sft
        from tele_jax.train.step import state_shardings

        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        feed = sft.batches(self.stage([str(file)], seed), sources.Indexes()).feed()
        shardings, opt_shardings = state_shardings(self.cfg, self.tx, self.mesh)
        params = jax.device_put(self.params, shardings)
        opt_state = jax.device_put(self.tx.init(params), opt_shardings)
        for _ in range(STEPS):
            params, opt_state, _ = self.step(params, opt_state, put_batch(next(feed), self.mesh, ROWS))
        feed.close()
        os.unlink(file)
        return self.judge(params)

    def by_category(self, bits: list[float]) -> dict[str, float]:
        """Bits per byte of every sort of dialogues."""
        sums: dict[str, list[float]] = {}
        for (category, size, _), value in zip(self.held_out, bits, strict=True):
            total = sums.setdefault(category, [0.0, 0.0])
            total[0] += value
            total[1] += size
        return {name: total / size for name, (total, size) in sorted(sums.items())}


@functools.cache
def _compiled() -> Any:
    import jax

    from tele_jax.model.loss import token_losses

    return jax.jit(lambda cfg, p, b: (token_losses(cfg, p, b) * b["loss_weights"]).sum(axis=1), static_argnums=0)


def _sums(cfg: Any, params: Any, batch: dict[str, np.ndarray]) -> Any:
    return _compiled()(cfg, params, batch)


def table(study: Study, found: dict[str, list[float]]) -> str:
    """Bits per byte of every arm, and its difference to random of the same N with an interval."""
    from tele_jax import tables

    categories = np.array([category for category, _, _ in study.held_out])
    sizes = np.array([size for _, size, _ in study.held_out], np.float64)
    names = list(dict.fromkeys(key.partition(" / ")[0] for key in found if key != "base"))
    rng = np.random.default_rng(0)
    groups = [np.flatnonzero(categories == name) for name in np.unique(categories)]
    draws = [(rng.integers(SEEDS, size=SEEDS), [rng.choice(g, len(g)) for g in groups]) for _ in range(RESAMPLES)]

    def mean(bits: np.ndarray, seeds: Any, parts: list[np.ndarray]) -> float:
        return float(np.mean([bits[seeds][:, part].sum() / (len(seeds) * sizes[part].sum()) for part in parts]))

    lines = []
    bits = {name: np.array([found[f"{name} / {seed}"] for seed in range(SEEDS)]) for name in names}
    for name in names:
        count = name.rsplit(" ", 1)[1]
        baseline = bits.get(f"random {count}", bits["random 1000"])
        whole = mean(bits[name], np.arange(SEEDS), groups)
        away = [mean(bits[name], *draw) - mean(baseline, *draw) for draw in draws]
        low, high = np.quantile(away, (0.025, 0.975))
        difference = whole - mean(baseline, np.arange(SEEDS), groups)
        spread = [mean(bits[name][[seed]], [0], groups) for seed in range(SEEDS)]
        maths = np.flatnonzero(categories == MATHS)
        lines.append((
            name, f"{whole:.4f}", f"{difference:+.4f} ({low:+.4f} to {high:+.4f})",
            f"{min(spread):.4f}-{max(spread):.4f}", f"{mean(bits[name], np.arange(SEEDS), [maths]):.4f}",
        ))  # fmt: skip
    base = np.array([found["base"]])
    of_base = f"{mean(base, [0], groups):.4f}"
    lines.insert(
        0, ("base, not fine-tuned", of_base, "", "", f"{mean(base, [0], [np.flatnonzero(categories == MATHS)]):.4f}")
    )
    return tables.text(lines, ("arm, N", "bits per byte", "minus random", "over seeds", "of maths"))


if __name__ == "__main__":
    main()
