"""How fast greedy generation is, against `transformers` generate with the same weights, dtype and threads.

    JAX_PLATFORMS=cpu python benchmarks/decode.py [--batch 1 8] [--repeats 5] [--prompt 128] [--new 128] [--threads 2]

A random Llama of 110 million parameters in float32. Each library has a process of its own and waits while the other one
works; both are pinned to the same cores. The first call of each (compilation, thread pools, page faults) is not timed;
then they take turns. What is timed is the whole call: prompt, all new tokens, result on the host. Prints JSON: tokens
per second (medians over the turns), the ratio of every turn, and how many of the tokens are the same. On a machine that
others use as well, look at --threads 1 and the ratio of processor seconds: threads that wait for each other suffer more
from neighbours than one that does not. Needs `[hf]`.
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

from machine import machine

SHAPE = dict(num_layers=12, embed_dim=768, num_heads=12, head_dim=64, mlp_dim=2048, vocab_size=16384, max_seq_len=2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens drawn for every prompt")
    parser.add_argument("--threads", type=int, help="cores for each; all by default")
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.child:
        serve({"ours": ours, "theirs": theirs}[args.child](Path(args.weights)))
    else:
        print(json.dumps({"machine": machine(), **measure(args)}, indent=2))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"model": SHAPE, "dtype": "float32", "threads": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(prefix="decode_") as directory:
        weights = Path(directory) / "llama"
        names = ("ours", "theirs")
        # Ours first: it makes the weights.
        children = {name: Child(name, weights, args.threads) for name in names}
        result |= {name: child.hello for name, child in children.items()}
        for batch in args.batch:
            job = {"batch": batch, "prompt": args.prompt, "new": args.new}
            first = {name: child.ask(job) for name, child in children.items()}
            same = [a == b for mine, other in zip(*(first[n]["tokens"] for n in names)) for a, b in zip(mine, other)]
            turns, loads = [], []
            for turn in range(args.repeats):
                order = names if turn % 2 == 0 else names[::-1]
                turns.append({name: children[name].ask(job) for name in order})
                loads.append(os.getloadavg()[0])
            rate = {n: batch * args.new / statistics.median(turn[n]["seconds"] for turn in turns) for n in names}
            ratios = {
                key: [round(turn["theirs"][key] / turn["ours"][key], 3) for turn in turns]
                for key in ("seconds", "cpu_seconds")
            }
            result[f"batch_{batch}"] = {
                "first_call_seconds": {name: round(first[name]["seconds"], 2) for name in names},
                "tokens_per_second": {name: round(rate[name], 1) for name in names},
                "ratio": statistics.median(ratios["seconds"]),
                "ratio_of_every_turn": ratios["seconds"],
                "ratio_of_cpu_seconds": statistics.median(ratios["cpu_seconds"]),
                "same_tokens": f"{sum(same)} of {len(same)}",
                "load_average": [round(load, 1) for load in loads],
            }
        for child in children.values():
            child.end()
    return result


class Child:
    """A process that generates when asked, one JSON line for another."""

    def __init__(self, name: str, weights: Path, threads: int | None):
        command = [sys.executable, __file__, "--child", name, "--weights", str(weights)]
        command += ["--threads", str(threads)] if threads else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = json.loads(self._process.stdout.readline())

    def ask(self, job: dict[str, int]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(library: tuple[dict[str, Any], Any]) -> None:
    import numpy as np

    hello, generate = library
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not come between
    print(json.dumps(hello), file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompts = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (job["batch"], job["prompt"]))
        begin, cpu = time.perf_counter(), time.process_time()
        tokens = generate(prompts, job["new"])
        times = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(times | {"tokens": tokens}), file=out, flush=True)


def ours(weights: Path) -> tuple[dict[str, Any], Any]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import jax

    import tele_jax as tele
    from tele_jax import checkpoint, convert
    from tele_jax.inference.generate import prepare

    cfg = tele.ModelConfig(**SHAPE, dtype="float32")
    params = tele.init(cfg, jax.random.key(0))
    checkpoint.save(weights.with_name("checkpoint"), cfg, params)
    convert.export_checkpoint(weights.with_name("checkpoint"), weights, format="llama")
    params = prepare(cfg, params)

    def generate(prompts: Any, new: int) -> list[list[int]]:
        return tele.generate(cfg, params, prompts.tolist(), max_new_tokens=new)

    return {"library": f"tele_jax on jax {jax.__version__}", "parameters": tele.count_params(cfg)}, generate


def theirs(weights: Path) -> tuple[dict[str, Any], Any]:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None, use_cache=True)

    @torch.inference_mode()
    def generate(prompts: Any, new: int) -> list[list[int]]:
        rows = torch.from_numpy(prompts)
        output = model.generate(rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=new)
        return output[:, rows.shape[1] :].tolist()

    hello = {
        "library": f"transformers {transformers.__version__} on torch {torch.__version__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention": model.config._attn_implementation,
    }
    return hello, generate


if __name__ == "__main__":
    main()
