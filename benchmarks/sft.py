"""Fine-tuning by TRL's SFTTrainer and by us: the same losses, and tokens per second with and without packing.

    JAX_PLATFORMS=cpu python benchmarks/sft.py [--turns 3] [--steps 20] [--threads 2] [--out FILE]

A Llama of 8 million parameters in float32 (8 layers, embed 256, mlp 704, vocabulary 4,096) learns the dialogues of the
quickstart (`tele data fetch quickstart`): batches of 16, at most 256 tokens, AdamW 0.9/0.95, weight decay 0.1, clipping
by norm 1, rate 1e-3 falling linearly. Every library has a process of its own on the same cores, one after the other, in
turns. TRL gets the ids and labels of our feed, pads each batch to its longest dialogue, and runs the same optimizer.

Printed as JSON: losses and gradient norms of 20 steps of both and their differences; learned and given tokens per
second (medians over the turns, without the first three steps and those that compile the program of another length), and
the ratios in every turn. Needs `[hf]`, trl 1.16 and datasets.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

SHAPE = dict(num_layers=8, embed_dim=256, num_heads=4, head_dim=64, mlp_dim=704, vocab_size=4096, max_seq_len=256)
ROWS, LENGTH, RATE, SKIPPED = 16, 256, 1e-3, 3
TEXT, TOKENIZER = "runs/quickstart/text/dialogues/train.jsonl", "runs/quickstart/tokenizer.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="times that each library runs")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run")
    parser.add_argument("--threads", type=int, default=2, help="cores for each")
    parser.add_argument("--out", help="file for the JSON")
    parser.add_argument("--child", choices=tuple(LIBRARIES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.child:
        print(json.dumps(LIBRARIES[args.child](Path(args.directory), args.steps)))
        return
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), args.steps)
        result = {"machine": machine(), **measure(args, directory)}
    text = json.dumps(result, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    print(text)


def measure(args: argparse.Namespace, directory: str) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in LIBRARIES}
    for _ in range(args.turns):
        for name, found in runs.items():
            command = [sys.executable, __file__, "--child", name, "--directory", directory, "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = runs["padded"][0], runs["trl"][0]
    away = {key: np.subtract(ours[key], theirs[key]) for key in ("loss", "grad_norm")}
    steps = np.arange(args.steps)
    speeds = {name: [run["tokens_per_second"] for run in found] for name, found in runs.items()}
    return {
        "losses": {"ours": ours["loss"], "trl": theirs["loss"]},
        "grad_norms": {
            "ours": ours["grad_norm"],
            "trl": theirs["grad_norm"],
            "trl as logged": theirs["grad_norm_as_logged"],
        },
        "largest_difference": {key: float(np.abs(values).max()) for key, values in away.items()},
        "mean_difference": {key: float(values.mean()) for key, values in away.items()},
        "slope_per_step": {key: float(np.polyfit(steps, values, 1)[0]) for key, values in away.items()},
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratio_to_trl": {
            name: [a / b for a, b in zip(speeds[name], speeds["trl"], strict=True)] for name in ("padded", "packed")
        },
        "fill": {name: found[0]["fill"] for name, found in runs.items()},
    }


def settings(packed: bool, steps: int) -> Any:
    from tele_jax.stages import read_stage

    source = {"files": [TEXT], "format": "dialogues"}
    optimizer = {"learning_rate": RATE, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
    table = {"kind": "sft", "data": {"tokenizer": TOKENIZER, "sources": {"dialogues": source}}, "optimizer": optimizer}
    table |= {"batch_size": ROWS, "seq_len": LENGTH, "steps": steps, "packed": packed}
    return read_stage({**table, "schedule": {"kind": "linear", "final": 0.0}}, "config.sft")


def feed(packed: bool, steps: int) -> Any:
    from tele_jax.data import sources
    from tele_jax.stages import sft

    return sft.batches(settings(packed, steps), sources.Indexes()).feed()


def prepare(directory: Path, steps: int) -> None:
    """Writes the weights that both begin with, and the dialogues of every batch as ids and labels for TRL."""
    import jax

    import tele_jax as tele
    from tele_jax import convert

    cfg = config()
    params = jax.tree.map(np.asarray, tele.init(cfg, jax.random.key(0)))
    convert.save_hf(directory / "model", cfg, params, format="llama")
    batches, lines = feed(False, steps), []
    for _ in range(steps):
        batch = next(batches)
        for tokens, targets, weights, ids in zip(
            *(batch[n] for n in ("tokens", "targets", "loss_weights", "segment_ids"))
        ):
            used = ids > 0
            labels = [-100, *np.where(weights[used] > 0, targets[used], -100).tolist()]
            lines.append({"input_ids": [int(tokens[0]), *targets[used].tolist()], "labels": labels})
    batches.close()
    (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def config() -> Any:
    import tele_jax as tele

    return tele.ModelConfig(**SHAPE, dtype="float32", remat="none", tie_embeddings=False)


def ours(packed: bool, directory: Path, steps: int) -> dict[str, Any]:
    import functools

    import jax

    from tele_jax import convert
    from tele_jax.settings import MeshConfig
    from tele_jax.sharding import make_mesh, put_batch
    from tele_jax.stages import sft
    from tele_jax.train.optimizer import optimizer, schedule
    from tele_jax.train.step import make_step

    stage = settings(packed, steps)
    cfg, params = convert.load_hf(directory / "model")
    cfg = cfg.replace(remat="none", dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer(cfg, stage.optimizer, schedule(stage.schedule, steps, 1))
    step = make_step(cfg, tx, mesh, batch_size=ROWS, loss=functools.partial(sft.loss, stage))
    opt_state, batches = jax.jit(tx.init)(params), feed(packed, steps)
    figures, seconds, tokens, filled, lengths = [], [], [], [], set()
    for number in range(steps):
        batch = next(batches)
        begin = time.perf_counter()
        placed = put_batch(batch, mesh, ROWS)
        params, opt_state, found = step(params, opt_state, placed)
        figures.append(jax.device_get(found))  # waits
        compiles = batch["tokens"].shape[1] not in lengths
        lengths.add(batch["tokens"].shape[1])
        if number >= SKIPPED and not compiles:
            seconds.append(time.perf_counter() - begin)
        used = batch["segment_ids"] > 0  # [ROWS, S], S as long as the batch needs where it is not packed
        if number >= SKIPPED and not compiles:
            tokens.append(int(used.sum()))
        filled.append(float(used.mean()))
    batches.close()
    return {
        "loss": [float(f["loss"]) for f in figures],
        "grad_norm": [float(f["grad_norm"]) for f in figures],
        "tokens_per_second": sum(tokens) / sum(seconds),
        "fill": statistics.mean(filled),
    }


def trl(directory: Path, steps: int) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    lines = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    nothing = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=nothing, pad_token="<pad>", eos_token="<eos>")
    model = transformers.LlamaForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    seconds: list[float] = []
    norms: list[float] = []  # in float64: torch's own sum in float32 is off by up to 7e-5 of the norm
    apart: list[float] = []  # seconds that they took, which do not count

    class Timed(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.begin - apart[-1])

    class InOrder(SFTTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            begin = time.perf_counter()
            norms.append(float(sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()))
            apart.append(time.perf_counter() - begin)
            return loss

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    how = dict(per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=RATE, lr_scheduler_type="linear")
    how |= dict(adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    how |= dict(optim="adamw_torch", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    how |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, warmup_steps=0, packing=False)
    arguments = SFTConfig(output_dir=str(directory / "trl"), **how)
    trainer = InOrder(
        model, arguments, train_dataset=Dataset.from_list(lines), processing_class=tokenizer, callbacks=[Timed()]
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    batches = [[len(line["input_ids"]) - 1 for line in lines[i : i + ROWS]] for i in range(0, len(lines), ROWS)]
    tokens = [sum(lengths) for lengths in batches]
    return {
        "loss": [line["loss"] for line in logs],
        "grad_norm": norms,
        "grad_norm_as_logged": [line["grad_norm"] for line in logs],
        "tokens_per_second": sum(tokens[SKIPPED:]) / sum(seconds[SKIPPED:]),
        "fill": statistics.mean(sum(lengths) / (ROWS * max(lengths)) for lengths in batches),
    }


LIBRARIES = {
    "trl": trl,
    "padded": lambda directory, steps: ours(False, directory, steps),
    "packed": lambda directory, steps: ours(True, directory, steps),
}


if __name__ == "__main__":
    main()
