"""Programs that a model writes, and how many of them pass their tests: HumanEval's layout, and its pass@k."""

import collections
import concurrent.futures
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tele_jax import tables
from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.eval import sandbox
from tele_jax.eval.model import ROWS, Leader
from tele_jax.eval.records import Fields, digest, interval, keep, read_lines, resampled_means
from tele_jax.eval.sandbox import Limits
from tele_jax.files import Table

FILE = "humaneval.jsonl"  # in a directory of tasks
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # end a completed function (Codex, arXiv 2107.03374, section 2.3)
CHAT = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{}\n```"
BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
FIELDS: Fields = {name: (str,) for name in ("task_id", "prompt", "entry_point", "test", "canonical_solution")}
SAMPLE: Fields = {"task_id": (str,), "sample": (int,), "completion": (str,)}
VERDICT: Fields = {"task_id": (str,), "sample": (int,), "passed": (bool,), "result": (str,)}


def read_tasks(path: Path) -> list[Table]:
    """The tasks of a file in HumanEval's layout, plain or as gzip.

    Raises:
      UserError: as records.read_lines; a test that defines no check; an empty prompt.
    """
    tasks = read_lines(path, FIELDS, "task_id")
    for task in tasks:
        require("def check(" in task["test"], f"{path}: the test of {task['task_id']} defines no check(candidate)")
        require(bool(task["prompt"].strip()), f"{path}: the prompt of {task['task_id']} is empty")
    return tasks


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k programs passes (arXiv 2107.03374, equation 1).

    >>> pass_at_k(5, 1, 1), pass_at_k(5, 2, 4)
    (0.2, 1.0)
    """
    draws = math.comb(samples, k)
    return (draws - math.comb(samples - passed, k)) / draws


def program_of(task: Table, completion: str, *, chat: bool) -> str:
    """The program that a completion makes of a task.

    chat: the completion is a reply. Its last block of code that defines the function, or else the reply where that
      does, takes the place of the function in the prompt; a reply without the function continues the prompt.
    """
    head = f"def {task['entry_point']}("
    found = [text for text in (completion, *BLOCK.findall(completion)) if head in text] if chat else []
    if not found:
        return task["prompt"] + completion
    return task["prompt"][: task["prompt"].rfind(head)] + found[-1]


def complete(
    leader: Leader,
    tasks: Sequence[Table],
    out: Path,
    about: Table,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    chat: bool,
    **how,
) -> list[Table]:
    """The completions of all tasks, {"task_id", "sample", "completion"}, which out/samples.jsonl keeps as they come.

    chat: asks in the model's dialogue form.
    how: keywords of sampling.sampling. The likeliest tokens are taken for all tasks at once; samples are drawn for one
      task at a time, and depend on the seed and the task_id alone.

    Raises:
      UserError: a prompt that leaves no room for max_new_tokens.
    """
    model, texts = leader.model, [task["prompt"] for task in tasks]
    asked = [[{"role": "user", "content": CHAT.format(text.strip())}] for text in texts] if chat else []
    prompts = [model.prompt(question) for question in asked] if chat else [model.encode(text) for text in texts]
    room = None if model.cfg.rope.ntk else model.cfg.max_seq_len - max_new_tokens
    for task, prompt in zip(tasks, prompts, strict=True):
        long = f"{task['task_id']}: its prompt of {len(prompt)} tokens leaves no room for {max_new_tokens} new ones"
        require(room is None or len(prompt) <= room, f"{long}; give a smaller --max-new-tokens")
    with keep(out / "samples.jsonl", about, SAMPLE) as kept:
        done = {(row["task_id"], row["sample"]) for row in kept.rows}
        wanted = [(i, n) for i in range(len(tasks)) for n in range(samples) if (tasks[i]["task_id"], n) not in done]
        if sampled := bool(how.get("temperature")):
            # A draw depends on its row: the rows of a batch in which one is missing are all drawn again.
            batches = dict.fromkeys((i, n // ROWS) for i, n in wanted)
            groups = [[(i, k * ROWS + n) for n in range(min(ROWS, samples - k * ROWS))] for i, k in batches]
        else:
            groups = [wanted] if wanted else []
        for rows in groups:

            def add(row: int, text: str, rows=rows) -> None:
                i, n = rows[row]
                if rows[row] in wanted:
                    kept.add({"task_id": tasks[i]["task_id"], "sample": n, "completion": text})

            first = [seed, tasks[rows[0][0]]["task_id"], rows[0][1]]
            drawn: Table = how | ({"seed": int(digest(first)[:7], 16)} if sampled else {})
            batch = [prompts[i] for i, _ in rows]
            leader.continue_texts(batch, max_new_tokens=max_new_tokens, stop=() if chat else STOP, on_text=add, **drawn)
        return sorted(kept.rows, key=lambda row: (row["task_id"], row["sample"]))


class _Pool(concurrent.futures.ThreadPoolExecutor):
    """Threads that begin nothing more after an error in the body."""

    def __exit__(self, *error: object) -> None:
        self.shutdown(cancel_futures=error[0] is not None)


def _run(task: Table, program: str, mode: str, limits: Limits) -> str:
    """The reason why a program fails the tests of a task, or ""; raises UserError for tests that do not run."""
    helpers = task["prompt"] + task["canonical_solution"]
    try:
        return sandbox.judge(program, helpers, task["test"], task["entry_point"], mode=mode, limits=limits)
    except UserError as error:
        raise UserError(f"{task['task_id']}: {error}") from None


def check_tests(tasks: Sequence[Table], mode: str, limits: Limits) -> None:
    """Raises UserError, with the task_id, for tests that do not run by themselves, whatever the program."""
    with _Pool(os.cpu_count()) as pool:
        for future in [pool.submit(_run, task, f"{task['entry_point']} = None", mode, limits) for task in tasks]:
            future.result()


def run(
    tasks: Sequence[Table], completions: Sequence[Table], out: Path, *, chat: bool, mode: str, limits: Limits
) -> list[Table]:
    """Runs all programs, as many at a time as there are processors; out/results.jsonl keeps verdicts as they come.

    Returns {"task_id", "sample", "passed", "result"}, result: "passed", or why not.

    Raises:
      UserError: tests of a task that do not run by themselves.
    """
    by_id = {task["task_id"]: task for task in tasks}
    about = {"samples": digest(completions), "tasks": digest(tasks), "isolation": mode}
    about |= {"--seconds": limits.cpu, "--memory": limits.memory}

    def verdict(row: Table) -> Table:
        task = by_id[row["task_id"]]
        reason = _run(task, program_of(task, row["completion"], chat=chat), mode, limits)
        named = {"task_id": row["task_id"], "sample": row["sample"]}
        return named | {"passed": not reason, "result": f"failed: {reason}" if reason else "passed"}

    with keep(out / "results.jsonl", about, VERDICT) as kept, _Pool(os.cpu_count()) as pool:
        done = {(row["task_id"], row["sample"]) for row in kept.rows}
        left = [row for row in completions if (row["task_id"], row["sample"]) not in done]
        for future in concurrent.futures.as_completed([pool.submit(verdict, row) for row in left]):
            kept.add(future.result())
        return sorted(kept.rows, key=lambda row: (row["task_id"], row["sample"]))


def results_of(name: str, model: str, verdicts: Sequence[Table], ks: Sequence[int], settings: Table) -> Table:
    """Figures in the harness's layout of results, which `tele eval table` reads: pass@k of each k, with its interval.

    Args:
      name: of the set of tasks, as "humaneval".
      model: its path.
      verdicts: of `run`, equally many for each task.
    """
    by_task = collections.defaultdict(list)
    for row in verdicts:
        by_task[row["task_id"]].append(row["passed"])
    figures: Table = {"alias": name}
    intervals = {}
    for k in ks:
        values = [pass_at_k(len(passed), sum(passed), k) for passed in by_task.values()]
        samples = resampled_means(values, name)
        figures |= {f"pass@{k},none": float(np.mean(values)), f"pass@{k}_stderr,none": float(samples.std())}
        intervals[f"pass@{k}"] = interval(samples)
    reasons = collections.Counter(row["result"].split(":")[1].strip() for row in verdicts if not row["passed"])
    results: Table = {
        "kind": "code",
        "results": {name: figures},
        "n-shot": {name: 0},
        "config": {"model": model, **settings},
    }
    return results | {"intervals": intervals, "tasks": len(by_task), "failed": dict(reasons.most_common())}


def text_of(results: Table) -> str:
    """The figures of results_of as a table for people, and why programs failed."""
    (figures,) = results["results"].values()
    rows = [
        (name, f"{figures[f'{name},none']:.4f}", f"[{low:.4f}, {high:.4f}]")
        for name, (low, high) in results["intervals"].items()
    ]
    reasons = "".join(f"\n{count} failed: {reason}" for reason, count in results["failed"].items())
    return f"{results['tasks']} tasks\n{tables.text(rows, ('', 'share', '95%'))}{reasons}"
