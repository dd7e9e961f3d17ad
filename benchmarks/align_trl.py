"""DPO and reward models by TRL's trainers and by us: the same losses and gradient norms, and seconds a step.

    JAX_PLATFORMS=cpu python benchmarks/align_trl.py [--turns 3] [--steps 20] [--threads 2] [--out FILE]

The Llama of benchmarks/sft.py, 8 million parameters in float32, learns pairs: questions and answers of the quickstart's
dialogues (`tele data fetch quickstart`), each against the answer to another question; batches of 8 pairs, rows of at
most 256 tokens, AdamW 0.9/0.95, weight decay 0.1, clipping by norm 1, rate 1e-4 falling linearly. TRL gets the ids of
our feed, the same weights and the same scalar head, and pads each batch to its longest row. We run twice: `unpacked`,
each answer in a row of its own (rows=16), and `packed`, four answers to a row on average (rows=4); TRL does not pack
pairs. All compute the reference log-probabilities before the steps. Each has a process of its own on the same cores, in
turns. (SFT: benchmarks/sft.py.)

Printed as JSON, for each kind: losses and gradient norms, their differences from TRL's with mean and slope over the
steps; the share of the positions that are tokens; seconds a step at equal tokens (medians over the turns, without the
first three steps; what is compiled was compiled before), by the clock and of processor time, which others on the
machine change less where there is one thread, and the ratios of every turn. Needs `[hf]`, trl 1.16 and datasets.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from sft import SHAPE, SKIPPED, TEXT, TOKENIZER

ROWS, LENGTH, RATE, BETA, CENTRE = 8, 256, 1e-4, 0.1, 0.01
KINDS = ("dpo", "reward")
PACKED = {"unpacked": 2 * ROWS, "packed": ROWS // 2}  # rows of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="times that each library runs")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run")
    parser.add_argument("--threads", type=int, default=2, help="cores for each")
    parser.add_argument("--out", help="file for the JSON")
    parser.add_argument("--child", choices=("trl", *PACKED), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.child:
        run = trl if args.child == "trl" else functools.partial(ours, rows=PACKED[args.child])
        print(json.dumps(run(args.kind, args.directory, args.steps)))
        return
    result: dict[str, Any] = {"machine": machine()}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as directory:
            prepare(kind, Path(directory), args.steps)
            result[kind] = measure(args, kind, directory)
    text = json.dumps(result, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    print(text)


def measure(args: argparse.Namespace, kind: str, directory: str) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], **{name: [] for name in PACKED}}
    for _ in range(args.turns):
        for name, found in runs.items():
            command = [sys.executable, __file__, "--child", name, "--kind", kind, "--directory", directory]
            done = subprocess.run([*command, "--steps", str(args.steps)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    first, steps = {name: found[0] for name, found in runs.items()}, np.arange(args.steps)
    away = {
        name: {key: np.subtract(first[name][key], first["trl"][key]) for key in ("loss", "grad_norm")}
        for name in PACKED
    }
    each = lambda of: {name: {key: float(of(x)) for key, x in found.items()} for name, found in away.items()}  # noqa: E731
    seconds = {name: [np.mean(run["seconds"][SKIPPED:], 0) for run in found] for name, found in runs.items()}
    return {
        **{key: {name: run[key] for name, run in first.items()} for key in ("loss", "grad_norm")},
        "largest_difference": each(lambda values: np.abs(values).max()),
        "mean_difference": each(np.mean),
        "slope_per_step": each(lambda values: np.polyfit(steps, values, 1)[0]),
        "tokens_of_positions": {name: first[name]["tokens"] for name in PACKED},
        "seconds_per_step": {name: named(np.median(values, 0)) for name, values in seconds.items()},
        "speed_to_trl": {name: [named(ratio) for ratio in np.divide(seconds["trl"], seconds[name])] for name in PACKED},
    }


def clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def named(times: np.ndarray) -> dict[str, float]:
    return dict(zip(("wall", "processor"), times.tolist(), strict=True))


def settings(kind: str, pairs: Path, steps: int, rows: int | None = None) -> Any:
    from tele_jax.stages import read_stage

    optimizer = {"learning_rate": RATE, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
    data = {"tokenizer": TOKENIZER, "sources": {"pairs": {"files": [str(pairs)], "format": "pairs"}}}
    table = {"kind": kind, "data": data, "optimizer": optimizer, "batch_size": ROWS, "seq_len": LENGTH, "steps": steps}
    table |= {"rows": rows} | ({"beta": BETA} if kind == "dpo" else {"centre": CENTRE})
    return read_stage({**table, "schedule": {"kind": "linear", "final": 0.0}}, f"config.{kind}")


def config(kind: str) -> Any:
    import tele_jax as tele

    head = {"scalar_head": True} if kind == "reward" else {}
    return tele.ModelConfig(**SHAPE, dtype="float32", remat="none", tie_embeddings=False, **head)


def prepare(kind: str, directory: Path, steps: int) -> None:
    """Writes pairs, the weights that both begin with, and the pairs of every batch as ids for TRL."""
    import jax

    import tele_jax as tele
    from tele_jax import convert

    write_pairs(directory / "pairs.jsonl", 2 * steps * ROWS)
    params = jax.tree.map(np.asarray, tele.init(config(kind), jax.random.key(0)))
    convert.save_hf(directory / "model", config(kind), params, format="llama")
    lines = []
    for batch in batches(opened(settings(kind, directory / "pairs.jsonl", steps)), steps):
        for pair, lengths in enumerate(batch["answer_lengths"].astype(int).tolist()):
            chosen, rejected = (batch["tokens"][batch["segment_ids"] == 1 + 2 * pair + side] for side in (0, 1))
            begin = len(chosen) - lengths[0]  # of the answer
            lines.append({"chosen": chosen.tolist(), "rejected": rejected.tolist(), "begin": begin})
    (directory / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_pairs(path: Path, count: int) -> None:
    """Writes the first dialogues of one turn, as pairs with the answer of another one as the rejected."""
    talks = []
    with open(TEXT, encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            if len(messages) == 2 and sum(len(m["content"]) for m in messages) < 200 and len(talks) < count:
                talks.append([m["content"] for m in messages])
    pairs = [{"prompt": p, "chosen": a, "rejected": talks[i - 7][1]} for i, (p, a) in enumerate(talks)]
    path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs if p["chosen"] != p["rejected"]))


def opened(stage: Any) -> Any:
    """The data that the stage reads."""
    from tele_jax.data import sources
    from tele_jax.stages import find_kind

    return find_kind(stage.kind).batches(stage, sources.Indexes())


def batches(data: Any, steps: int) -> Iterator[dict[str, np.ndarray]]:
    feed = data.feed()
    for _ in range(steps):
        yield next(feed)
    feed.close()


def ours(kind: str, directory: Path, steps: int, rows: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from tele_jax import convert
    from tele_jax.align import reference
    from tele_jax.settings import MeshConfig
    from tele_jax.sharding import make_mesh, put_batch
    from tele_jax.stages import find_kind
    from tele_jax.train.optimizer import optimizer, schedule
    from tele_jax.train.step import make_step

    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))  # for the turns after the first
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    stage, cfg = settings(kind, directory / "pairs.jsonl", steps, rows), config(kind)
    _, params = convert.load_hf(directory / "model")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    unread = getattr(find_kind(kind), "UNREAD", ())
    tx = optimizer(cfg, stage.optimizer, schedule(stage.schedule, steps, 1), unread=unread)
    step = make_step(cfg, tx, mesh, batch_size=ROWS, loss=functools.partial(find_kind(kind).loss, stage))
    data = opened(stage)
    if kind == "dpo":
        known = reference.compute(cfg, params, data.store, data.store.num_answers, mesh, ROWS)
        data.tabulate("reference", known, {})
    opt_state, figures, seconds, made = jax.jit(tx.init)(params), [], [], list(batches(data, steps))
    for batch in {batch["tokens"].shape: batch for batch in made}.values():  # compiles
        step(*jax.tree.map(jnp.copy, (params, opt_state)), put_batch(batch, mesh, ROWS))
    for batch in made:
        begin = clock()
        params, opt_state, found = step(params, opt_state, put_batch(batch, mesh, ROWS))
        figures.append(jax.device_get(found))  # waits
        seconds.append((clock() - begin).tolist())
    found = {key: [float(f[key]) for f in figures] for key in ("loss", "grad_norm")}
    tokens = sum((batch["segment_ids"] > 0).sum() for batch in made) / sum(batch["tokens"].size for batch in made)
    return found | {"seconds": seconds, "tokens": float(tokens)}


def trl(kind: str, directory: Path, steps: int) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    lines = [json.loads(line) for line in (directory / "ids.jsonl").read_text().splitlines()]
    used = {token for line in lines for token in line["chosen"] + line["rejected"]}
    # The reward is read at the last token that is not <pad>: an id that no text has.
    ids = {"<unk>": 0, "<eos>": 1, "<pad>": max(set(range(SHAPE["vocab_size"])) - used)}
    nothing = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=nothing, pad_token="<pad>", eos_token="<eos>")
    seconds: list[list[float]] = []
    norms: list[float] = []  # in float64: torch's own sum in float32 is off by up to 7e-5 of the norm
    apart: list[np.ndarray] = []  # seconds that they took, which do not count

    class Timed(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append((clock() - self.begin - apart[-1]).tolist())

    class InOrder(DPOTrainer if kind == "dpo" else RewardTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            begin = clock()
            squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
            norms.append(float(sum(squares).sqrt()))
            apart.append(clock() - begin)
            return loss

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # ids already

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    how = dict(per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=RATE, lr_scheduler_type="linear")
    how |= dict(adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    how |= dict(optim="adamw_torch", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    how |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, warmup_steps=0)
    where = dict(output_dir=str(directory / "trl"), **how)
    if kind == "dpo":
        model = transformers.LlamaForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
        arguments = DPOConfig(**where, beta=BETA, precompute_ref_log_probs=True)
        rows = [
            {"prompt_ids": x["chosen"][:b], "chosen_ids": x["chosen"][b:], "rejected_ids": x["rejected"][b:]}
            for x in lines
            for b in [x["begin"]]
        ]
    else:
        model = transformers.LlamaForSequenceClassification.from_pretrained(
            directory / "model", dtype=torch.float32, num_labels=1, pad_token_id=ids["<pad>"]
        )
        arguments = RewardConfig(**where, center_rewards_coefficient=CENTRE)
        rows = [{"chosen_ids": x["chosen"], "rejected_ids": x["rejected"]} for x in lines]
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Timed()],
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return {"loss": [line["loss"] for line in logs], "grad_norm": norms, "seconds": seconds}


if __name__ == "__main__":
    main()
