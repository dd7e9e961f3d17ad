"""Tokens per second of our training step, against torch with the same weights, batches and optimizer, and MaxText.

    JAX_PLATFORMS=cpu python benchmarks/train_step.py [--turns 5] [--steps 4] [--threads 2] [--maxtext-python P]

A Llama of 8.5 million parameters in float32: 8 layers, embed 256, mlp 704, vocabulary 8,192, batches of 8 x 512 tokens;
AdamW with clipping by global norm. Each library has a process of its own, pinned to the same cores, and waits while
another one works; they take turns. Ours is the step of tele_jax/train/step.py with what the loop feeds it (segment ids,
positions, loss weights), plain and behind growth masks. torch is `transformers` with sdpa attention, eager and through
torch.compile, with foreach or fused AdamW, whichever is fastest. MaxText has its own weights; it runs with its layers
in a loop, written out, and tuned (MAXTEXT_TUNED), and the fastest counts; it is left out where --maxtext-python does
not say what Python has it.

That the work is the same is checked: ours and torch start from the same weights, and losses are printed step by step.
Prints JSON: tokens per second (medians over the turns), and the ratio of ours to theirs in every turn, of seconds and
of processor seconds. Needs `[hf]`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

SHAPE = dict(num_layers=8, embed_dim=256, num_heads=4, head_dim=64, mlp_dim=704, vocab_size=8192, max_seq_len=512)
ROWS, LENGTH, BATCHES = 8, 512, 4
ADAM = dict(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)

# A variant prepares itself and returns what takes one batch and returns the loss before its update.
Variants = dict[str, Callable[[], Callable[[dict[str, np.ndarray]], float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=2, help="cores for each")
    parser.add_argument("--default-allocator", action="store_true", help="freed memory goes back, for all alike")
    parser.add_argument("--maxtext-python", metavar="P", help="the python of an environment with MaxText 0.2.5")
    parser.add_argument("--child", choices=tuple(LIBRARIES), help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.child:
        if not args.default_allocator:
            keep_freed_memory()
        serve(LIBRARIES[args.child], Path(args.weights))
    else:
        print(json.dumps({"machine": machine(), **measure(args)}, indent=2))


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, SHAPE["vocab_size"], (BATCHES, ROWS, LENGTH + 1), dtype=np.int32)
    return [{"tokens": row[:, :-1].copy(), "targets": row[:, 1:].copy()} for row in rows]


# --------------------------------------------------------------------------------------------- taking turns


def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "model": SHAPE,
        "batch": [ROWS, LENGTH],
        "dtype": "float32",
        "threads": len(os.sched_getaffinity(0)),
        "allocator": "default" if args.default_allocator else "keeps freed memory",
    }
    with tempfile.TemporaryDirectory(prefix="train_step_") as directory:
        weights = Path(directory) / "llama"
        children = {"ours": Child("ours", sys.executable, weights, args)}  # first: it makes the weights
        children["torch"] = Child("torch", sys.executable, weights, args)
        if args.maxtext_python:
            children["maxtext"] = Child("maxtext", args.maxtext_python, weights, args)
        else:
            result["maxtext"] = "left out: --maxtext-python does not say where it is installed"
        result["libraries"] = {name: child.hello["library"] for name, child in children.items()}
        runs = [(name, variant) for name, child in children.items() for variant in child.hello["variants"]]
        first = {f"{n}.{v}": children[n].ask({"variant": v, "steps": 2}) for n, v in runs}
        result["not_available"] = {run: answer["error"] for run, answer in first.items() if "error" in answer}
        runs = [(name, variant) for name, variant in runs if "error" not in first[f"{name}.{variant}"]]
        result["losses"] = {run: answer["losses"] for run, answer in first.items() if "losses" in answer}
        turns, loads = [], []
        for turn in range(args.turns):
            order = runs if turn % 2 == 0 else runs[::-1]
            turns.append({f"{n}.{v}": children[n].ask({"variant": v, "steps": args.steps}) for n, v in order})
            loads.append(round(os.getloadavg()[0], 1))
        for child in children.values():
            child.end()
    result["load_average"] = loads
    return result | summary(turns, args.steps * ROWS * LENGTH)


def summary(turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Rates, and ratios of ours to the fastest variant of every other library."""

    def median(run: str, key: str) -> float:
        return statistics.median(turn[run][key] for turn in turns)

    def ratios(run: str, other: str) -> dict[str, Any]:
        of = {key: [turn[other][key] / turn[run][key] for turn in turns] for key in ("seconds", "cpu_seconds")}
        return {
            "seconds": round(statistics.median(of["seconds"]), 3),
            "cpu_seconds": round(statistics.median(of["cpu_seconds"]), 3),
            "of_every_turn": [round(ratio, 3) for ratio in of["seconds"]],
        }

    fastest = {}
    for run in turns[0]:
        library = run.split(".")[0]
        if library not in fastest or median(run, "seconds") < median(fastest[library], "seconds"):
            fastest[library] = run
    return {
        "tokens_per_second": {run: round(tokens / median(run, "seconds")) for run in turns[0]},
        "tokens_per_cpu_second": {run: round(tokens / median(run, "cpu_seconds")) for run in turns[0]},
        "ours_over": {run: ratios("ours.plain", run) for name, run in fastest.items() if name != "ours"},
        "cost_of_masks": ratios("ours.plain", "ours.masked"),
    }


class Child:
    """A process that makes steps when asked, one JSON line for another."""

    def __init__(self, name: str, python: str, weights: Path, args: argparse.Namespace):
        command = [python, __file__, "--child", name, "--weights", str(weights), "--threads", str(args.threads)]
        command += ["--default-allocator"] if args.default_allocator else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = json.loads(self._process.stdout.readline())

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(library: Callable[[Path], tuple[str, Variants]], weights: Path) -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not come between
    name, variants = library(weights)
    print(json.dumps({"library": name, "variants": list(variants)}), file=out, flush=True)
    data, ready = batches(), {}
    for line in sys.stdin:
        job = json.loads(line)
        variant = job["variant"]
        try:
            if variant not in ready:
                ready[variant] = variants[variant]()
            begin, cpu = time.perf_counter(), time.process_time()
            losses = [ready[variant](data[i % BATCHES]) for i in range(job["steps"])]
            answer = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
            answer["losses"] = [float(loss) for loss in losses]
        except Exception as error:  # what does not work here is reported and left out
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(answer), file=out, flush=True)


def keep_freed_memory() -> None:
    """Asks the allocator to keep freed memory, as `tele train` does, for every library here."""
    from tele_jax.model.platforms import keep_freed

    keep_freed()


# --------------------------------------------------------------------------------------------- the libraries


def ours(weights: Path) -> tuple[str, Variants]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import jax

    import tele_jax as tele
    from tele_jax import checkpoint, convert
    from tele_jax.settings import MeshConfig, OptimizerConfig
    from tele_jax.sharding import make_mesh, put_batch
    from tele_jax.train.optimizer import optimizer
    from tele_jax.train.step import make_step, state_shardings

    cfg = tele.ModelConfig(**SHAPE, dtype="float32", remat="none")
    checkpoint.save(weights.with_name("checkpoint"), cfg, tele.init(cfg, jax.random.key(0)))
    convert.export_checkpoint(weights.with_name("checkpoint"), weights, format="llama")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer(cfg, OptimizerConfig(**ADAM), lambda step: 1.0)
    step = make_step(cfg, tx, mesh, batch_size=ROWS)
    shardings, opt_shardings = state_shardings(cfg, tx, mesh)
    # All axes masked, by 1 everywhere: the losses are those of the plain model, but the step does not know.
    masks = {axis: np.ones(cfg.axis_sizes[axis], np.float32) for axis in ("embed", "mlp", "heads", "layers")}

    def variant(masks: Any) -> Any:
        def prepare() -> Any:
            params = jax.device_put(tele.init(cfg, jax.random.key(0)), shardings)
            state = [params, jax.device_put(tx.init(params), opt_shardings)]
            whole = dict(
                loss_weights=np.ones((ROWS, LENGTH), np.float32),
                segment_ids=np.ones((ROWS, LENGTH), np.int32),
                positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
            )

            def run(batch: dict[str, np.ndarray]) -> float:
                *state[:], figures = step(*state, put_batch(batch | whole, mesh, ROWS), masks)
                return float(figures["loss"])

            return run

        return prepare

    return f"tele_jax on jax {jax.__version__}", {"plain": variant(None), "masked": variant(masks)}


def theirs(weights: Path) -> tuple[str, Variants]:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)

    def variant(kind: str, compiled: bool) -> Any:
        def prepare() -> Any:
            model = transformers.LlamaForCausalLM.from_pretrained(
                weights, dtype=torch.float32, use_cache=False, attn_implementation="sdpa"
            ).train()
            parameters = list(model.parameters())
            matrices = [p for p in parameters if p.ndim > 1]
            vectors = [p for p in parameters if p.ndim == 1]
            adam = torch.optim.AdamW(
                [{"params": matrices, "weight_decay": ADAM["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
                lr=ADAM["learning_rate"],
                betas=(ADAM["beta1"], ADAM["beta2"]),
                eps=ADAM["eps"],
                **{kind: True},
            )

            def loss_of(tokens: Any, targets: Any) -> Any:
                logits = model(tokens, use_cache=False).logits
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

            loss_of = torch.compile(loss_of) if compiled else loss_of

            def run(batch: dict[str, np.ndarray]) -> float:
                adam.zero_grad(set_to_none=True)
                loss = loss_of(torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["targets"]).long())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, ADAM["clip_norm"], foreach=True)
                adam.step()
                return loss.item()

            return run

        return prepare

    return (
        f"transformers {transformers.__version__} on torch {torch.__version__}",
        {
            "eager_foreach": variant("foreach", False),
            "eager_fused": variant("fused", False),
            "compiled_fused": variant("fused", True),
        },
    )


# The fastest of its remat policies by its own list, and one product for what reads the same input.
MAXTEXT_TUNED = dict(scan_layers=False, remat_policy="minimal_with_context", fused_qkv=True, fused_mlp=True)


def maxtext(weights: Path) -> tuple[str, Variants]:
    del weights  # it draws its own
    from importlib.metadata import version

    import jax
    import maxtext as package
    from flax import nnx
    from flax.linen import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    settings = dict(
        decoder_block="llama2",
        base_num_decoder_layers=SHAPE["num_layers"],
        base_emb_dim=SHAPE["embed_dim"],
        base_num_query_heads=SHAPE["num_heads"],
        base_num_kv_heads=SHAPE["num_heads"],
        head_dim=SHAPE["head_dim"],
        base_mlp_dim=SHAPE["mlp_dim"],
        vocab_size=SHAPE["vocab_size"],
        max_target_length=LENGTH,
        per_device_batch_size=ROWS,
        dtype="float32",
        weight_dtype="float32",
        attention="dot_product",
        remat_policy="minimal",  # keeps every product
        adam_b1=ADAM["beta1"],
        adam_b2=ADAM["beta2"],
        adam_eps=ADAM["eps"],
        adam_weight_decay=ADAM["weight_decay"],
        gradient_clipping_threshold=ADAM["clip_norm"],
        learning_rate=ADAM["learning_rate"],
        steps=1000,
        run_name="train_step",
        base_output_directory=tempfile.gettempdir(),
        hardware="cpu",
        dataset_type="synthetic",
        enable_checkpointing=False,
        enable_tensorboard=False,
        skip_jax_distributed_system=True,
    )

    def variant(**changes: Any) -> Any:
        def prepare() -> Any:
            page = str(Path(package.__file__).parent / "configs" / "base.yml")
            given = [f"{name}={value}" for name, value in (settings | changes).items()]
            config = pyconfig.initialize(["", page, *given])
            _, _, shardings, _, mesh, *_, eval_iterator, state = train_utils.setup_train_loop(config, None)
            graph, state = nnx.split(state)
            of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
            step, _ = train_utils.jit_train_and_eval_step(
                config, graph, mesh, state, shardings, train.train_step, train.eval_step, eval_iterator, of_params
            )
            ones = np.ones((ROWS, LENGTH), np.int32)
            positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
            whole = {f"{side}_segmentation": ones for side in ("inputs", "targets")}
            whole |= {f"{side}_position": positions for side in ("inputs", "targets")}
            held = [state]

            def run(batch: dict[str, np.ndarray]) -> float:
                with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
                    rows = whole | {"inputs": batch["tokens"], "targets": batch["targets"]}
                    placed = jax.device_put(rows, sharding.get_input_data_sharding(config, mesh))
                    held[0], metrics = step(held[0], placed)
                    return float(metrics["scalar"]["learning/lm_loss"])

            return run

        return prepare

    return (
        f"maxtext {version('maxtext')} on jax {jax.__version__}",
        {
            "loop": variant(scan_layers=True),
            "written_out": variant(scan_layers=False),
            "tuned": variant(**MAXTEXT_TUNED),
        },
    )


LIBRARIES = {"ours": ours, "torch": theirs, "maxtext": maxtext}


if __name__ == "__main__":
    main()
