"""Planted defects: what share of a selection they are, for each method of `tele sft select` and each baseline.

    tele data fetch pool --out runs/pool
    JAX_PLATFORMS=cpu python benchmarks/selection.py --pool runs/pool --model CKPT --work DIR [--json FILE]

A pool of 20,000 dialogues of real text, without its long readings, gets labelled defects: 20% near copies (of samples
before them; a word or two changed, in half of them a polite beginning), 10% answers exchanged within their category,
10% answers cut at 30 to 70% of their characters, 10% answers in another language (en or zh) than their question. Every
method selects 1,000 and 3,000 of it with five seeds. A share's interval (95%) resamples the seeds, and within a seed
the samples. clusters: share of the clusters of hashed features with a selected sample; least category: the smallest
category's share of the selection. "difficulty" drops what is above 1, "easiest 80%" the fifth above; "perplexity" the
twentieth at either end. DIR keeps the scores of the model, and a second call goes on;
DIR/chosen.json has the lines of the pool that each method chose. Needs the extra [select].
"""

import argparse
import collections
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from tele_jax import tables
from tele_jax.clean import hashing
from tele_jax.selection import choice, chunks, pipeline, samples
from tele_jax.selection.columns import LEFT
from tele_jax.selection.settings import select_config

KINDS = ("copy", "shuffled", "truncated", "language")
SHARES = {"copy": 0.2, "shuffled": 0.1, "truncated": 0.1, "language": 0.1}
COUNTS, SEEDS, RESAMPLES = (1_000, 3_000), range(5), 2_000
CHINESE = ("idioms", "idiom_origins", "statutes")
POLITE = {"en": ("Please tell me: ", "Hello! ", "Could you answer this? "), "zh": ("请问，", "你好！", "请回答：")}
# name: (stages, method, features, within)
FORM = ("rules", "duplicates")
ARMS = {
    "random": ((), "random", "hashed", "random"),
    "stratified": ((), "stratified", "hashed", "random"),
    "longest": ((), "longest", "hashed", "random"),
    "hashed, random": ((), "clusters", "hashed", "random"),
    "hashed, nearest": ((), "clusters", "hashed", "nearest"),
    "hashed, k_centre": ((), "clusters", "hashed", "k_centre"),
    "states, random": ((), "clusters", "states", "random"),
    "states, nearest": ((), "clusters", "states", "nearest"),
    "states, k_centre": ((), "clusters", "states", "k_centre"),
    "states, hardest": ((), "clusters", "states", "hardest"),
    "difficulty + random": (("difficulty",), "random", "hashed", "random"),
    "difficulty + states, hardest": (("difficulty",), "clusters", "states", "hardest"),
    "easiest 80% + random": (("easiest 80%",), "random", "hashed", "random"),
    "perplexity + random": (("perplexity",), "random", "hashed", "random"),
    "rules + random": (("rules",), "random", "hashed", "random"),
    "form + random": (FORM, "random", "hashed", "random"),
    "form + stratified": (FORM, "stratified", "hashed", "random"),
    "form + longest": (FORM, "longest", "hashed", "random"),
    "form + hashed, random": (FORM, "clusters", "hashed", "random"),
    "form + hashed, k_centre": (FORM, "clusters", "hashed", "k_centre"),
    "form + states, random": (FORM, "clusters", "states", "random"),
    "form + states, nearest": (FORM, "clusters", "states", "nearest"),
    "form + easiest 80% + random": ((*FORM, "easiest 80%"), "random", "hashed", "random"),
    "form + easiest 80% + states, nearest": ((*FORM, "easiest 80%"), "clusters", "states", "nearest"),
    "form + difficulty + random": ((*FORM, "difficulty"), "random", "hashed", "random"),
    "form + difficulty + states, nearest": ((*FORM, "difficulty"), "clusters", "states", "nearest"),
    "form + difficulty + perplexity + states, random": (
        (*FORM, "difficulty", "perplexity"), "clusters", "states", "random"
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="what `tele data fetch pool` wrote")
    parser.add_argument("--model", help="checkpoint; without it the methods that need one are left out")
    parser.add_argument("--work", type=Path, required=True, help="directory of the planted pool and of scores")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    defects = plant(args.pool, args.work / "pool.jsonl", args.samples)
    result = {
        "machine": machine(),
        "samples": args.samples,
        "model": args.model and Path(args.model).name,
        **study(args, defects),
    }
    result["planted"] = dict(collections.Counter(filter(None, defects)))
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


# ---- the pool --------------------------------------------------------------------------------------------------------


def plant(folder: Path, out: Path, count: int) -> list[str]:
    """Writes the pool with its defects, and returns the defect of each sample, or ""."""
    rng = random.Random(0)
    clean = []
    for path in sorted(folder.glob("*/train.jsonl")):
        if path.parent.name != "reading":
            clean += [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    rng.shuffle(clean)
    rows = [(record, "") for record in clean[: round(count * (1 - SHARES["copy"]))]]
    for kind, change in (("shuffled", shuffled), ("truncated", truncated), ("language", translated)):
        plain = [i for i, (_, defect) in enumerate(rows) if not defect]
        rng.shuffle(plain)
        for i, record in change(rng, rows, plain, round(count * SHARES[kind])):
            rows[i] = (record, kind)
    places = rng.sample([i for i, (_, defect) in enumerate(rows) if not defect], count - len(rows))
    order = [(rng.random(), record, defect) for record, defect in rows]
    for i in places:  # behind its original
        order.append((rng.uniform(order[i][0], 1), copied(rng, rows[i][0]), "copy"))
    order.sort(key=lambda row: row[0])
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for _, record, _ in order)
    if not out.exists() or out.read_text(encoding="utf-8") != text:
        out.write_text(text, encoding="utf-8")
    return [defect for _, _, defect in order]


def answered(record: dict, answer: str) -> dict:
    return {**record, "messages": [*record["messages"][:-1], {"role": "assistant", "content": answer}]}


def language(record: dict) -> str:
    chars = hashing.characters(record["messages"][0]["content"])
    return "zh" if 2 * hashing.is_unspaced(chars).sum() > hashing.is_word(chars).sum() else "en"


def shuffled(rng, rows, plain, count):
    """Each answer goes to the next question of its category; yes and no would often stay what they are."""
    chosen = [i for i in plain if rows[i][0]["category"] != "yes_no"][:count]
    by_category = collections.defaultdict(list)
    for i in chosen:
        by_category[rows[i][0]["category"], language(rows[i][0])].append(i)
    for members in by_category.values():
        for i, j in zip(members, [*members[1:], members[0]], strict=True):
            answer = rows[j][0]["messages"][-1]["content"]
            if answer != rows[i][0]["messages"][-1]["content"]:
                yield i, answered(rows[i][0], answer)


def truncated(rng, rows, plain, count):
    long = [i for i in plain if len(rows[i][0]["messages"][-1]["content"]) >= 16]
    for i in long[:count]:
        answer = rows[i][0]["messages"][-1]["content"]
        yield i, answered(rows[i][0], answer[: int(len(answer) * rng.uniform(0.3, 0.7))].rstrip())


def translated(rng, rows, plain, count):
    """Answers of the other language, at least as long as ten characters: a translation is not at hand."""
    answers = {"en": [], "zh": []}
    for record, _ in rows:
        answer = record["messages"][-1]["content"]
        if len(answer) >= 10 and record["category"] in (*CHINESE, "encyclopedia"):
            answers["zh" if record["category"] in CHINESE else "en"].append(answer)
    for i in plain[:count]:
        yield i, answered(rows[i][0], rng.choice(answers["en" if language(rows[i][0]) == "zh" else "zh"]))


def copied(rng, record: dict) -> dict:
    """The dialogue with a word or a Han character changed in its longest message, and perhaps a polite beginning."""
    messages = [dict(message) for message in record["messages"]]
    longest = max(messages, key=lambda message: len(message["content"]))
    words = longest["content"].split(" ")
    for _ in range(rng.choice((1, 2))):
        if len(words) > 4:
            words[rng.randrange(len(words))] = rng.choice(("indeed", "often", "some", "here"))
            longest["content"] = " ".join(words)
        else:
            at = rng.randrange(len(longest["content"]))
            longest["content"] = longest["content"][:at] + rng.choice("也曾或某") + longest["content"][at + 1 :]
    if rng.random() < 0.5:
        messages[0]["content"] = rng.choice(POLITE[language(record)]) + messages[0]["content"]
    return {**record, "messages": messages}


# ---- the study -------------------------------------------------------------------------------------------------------


def config(args: argparse.Namespace, **values: Any):
    page: dict[str, Any] = {"sources": {"pool": {"files": (str(args.work / "pool.jsonl"),)}}, "count": 1, "stages": ()}
    if args.model:
        page["model"] = {"checkpoint": args.model}
    return select_config(page | values)


def study(args: argparse.Namespace, defects: list[str]) -> dict[str, Any]:
    pool, start = samples.index(config(args).sources), time.monotonic()
    labels = np.array([KINDS.index(defect) if defect else -1 for defect in defects])
    seconds: dict[str, float] = {}

    def timed(what: str) -> None:
        seconds[what] = round(time.monotonic() - start - sum(seconds.values()), 1)
        print(f"{what}: {seconds[what]:.1f} s", flush=True)

    def told(what: str, done: int, total: int) -> None:
        print(f"  {what} {done} of {total}", flush=True)

    with chunks.Workers(args.workers) as workers:
        judged = pipeline.Run(config(args, stages=FORM), pool, args.work / "judged", workers, told)
        judged.on_chunks("read")
        form = judged.columns()
        judged.drop_copies(form)
        timed("rules and copies")
        broken = {"rules": form.dropped_by("rules"), "duplicates": form.dropped_by("duplicates")}
        every = pipeline.Run(config(args), pool, args.work / "every", workers, told)
        every.on_chunks("read")
        table = every.columns()
        if args.model:
            every.score(table)
            timed("losses and states")
        left = np.flatnonzero(table.fate == LEFT)
        rows = {}
        for features in ("hashed", "states") if args.model else ("hashed",):
            run = pipeline.Run(config(args, clusters={"features": features}), pool, args.work / "every", workers, told)
            rows[features] = [run.cluster(table, left), table.cluster[left], table.distance[left]]
            timed(f"clusters of {features}")
    hashed_clusters = rows["hashed"][1]
    low, high = np.nanquantile(table.perplexity, (0.05, 0.95)) if args.model else (0, np.inf)
    hardest = np.nanquantile(table.difficulty, 0.8) if args.model else np.inf
    dropped = {
        "rules": broken["rules"][left],
        "duplicates": broken["duplicates"][left],
        "difficulty": ~(table.difficulty[left] <= 1),
        "easiest 80%": ~(table.difficulty[left] <= hardest),
        "perplexity": ~((table.perplexity[left] >= low) & (table.perplexity[left] <= high)),
    }
    names = np.array(table.categories)[table.category[left]]
    found: dict[str, dict[str, Any]] = {}
    form = ~(dropped["rules"] | dropped["duplicates"])
    lines = {"without defect": left[labels[left] == -1].tolist(), "form": left[form].tolist()}
    caught = {
        stage: {kind: round(float(mask[labels[left] == KINDS.index(kind)].mean()), 4) for kind in KINDS}
        | {"clean": round(float(mask[labels[left] == -1].mean()), 4)}
        for stage, mask in dropped.items()
        if args.model or stage in FORM
    }
    centres: dict[tuple, Any] = {}
    for name, (stages, method, features, within) in ARMS.items():
        if features not in rows or (not args.model and set(stages) - set(FORM)):
            continue
        stay = np.flatnonzero(~np.any([dropped[stage] for stage in stages] or [np.zeros(len(left), bool)], axis=0))
        for count in COUNTS:
            chosen = []
            for seed in SEEDS:
                part = Part(rows[features][0], stay)
                cluster, distance = (values[stay] for values in rows[features][1:])
                if method == "clusters":  # of what the stages leave, as in a selection
                    if (features, stages, seed) not in centres:
                        every = part[np.arange(len(stay))]
                        fitted = choice.centres(every, config(args).clusters, seed)
                        centres[features, stages, seed] = choice.assign(every, fitted)
                    cluster, distance = centres[features, stages, seed]
                candidates = choice.Candidates(
                    left[stay], names[stay], table.answer[left][stay], cluster, distance,
                    table.difficulty[left][stay], part,
                )  # fmt: skip
                page = config(args, count=min(count, len(stay)), method=method, seed=seed, clusters={"within": within})
                chosen.append(stay[choice.choose(page, candidates, table.categories)])
            lines[f"{name} {count}"] = [left[each].tolist() for each in chosen]
            found[f"{name} {count}"] = figures(chosen, labels[left], hashed_clusters, names)
        timed(name)
    (args.work / "chosen.json").write_text(json.dumps(lines) + "\n")
    return {"seconds": seconds, "dropped": caught, "left": len(left), "arms": found}


class Part:
    """Features of some rows."""

    def __init__(self, rows: Any, stay: np.ndarray):
        self.rows, self.stay = rows, stay

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self.rows[self.stay[places]]


def figures(chosen: list[np.ndarray], labels: np.ndarray, clusters: np.ndarray, names: np.ndarray) -> dict[str, Any]:
    """Shares with intervals, over selections of one method with several seeds."""
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"samples": len(chosen[0])}
    for i, kind in enumerate((*KINDS, "any")):
        shares = np.array([np.mean(labels[rows] >= 0 if kind == "any" else labels[rows] == i) for rows in chosen])
        seeds = rng.integers(len(chosen), size=(RESAMPLES, len(chosen)))
        drawn = rng.binomial(len(chosen[0]), shares[seeds]).mean(1) / len(chosen[0])
        result[kind] = {"share": float(shares.mean()), "interval": np.quantile(drawn, (0.025, 0.975)).tolist()}
        if kind != "any":
            planted = int((labels == i).sum())
            result[kind]["passes"] = float(np.mean([(labels[rows] == i).sum() for rows in chosen]) / planted)
    every = len(np.unique(clusters))
    result["clusters"] = float(np.mean([len(np.unique(clusters[rows])) / every for rows in chosen]))
    sizes = [np.unique(names[rows], return_counts=True)[1] for rows in chosen]
    everyone = len(np.unique(names))
    result["least_category"] = float(
        np.mean([size.min() / size.sum() if len(size) == everyone else 0 for size in sizes])
    )
    return result


def table(result: dict[str, Any]) -> str:
    stages = [
        (name, *(f"{100 * share:.1f}" for share in shares.values())) for name, shares in result["dropped"].items()
    ]
    header = ("stage", *(f"{kind} %" for kind in (*KINDS, "clean")))
    lines = ["dropped by a stage:", tables.text(stages, header), "", "share of the selection:"]
    rows = []
    for name, found in result["arms"].items():
        cells = []
        for kind in (*KINDS, "any"):
            low, high = found[kind]["interval"]
            cells.append(f"{100 * found[kind]['share']:.1f} ({100 * low:.1f}-{100 * high:.1f})")
        rows.append((name, *cells, f"{100 * found['clusters']:.0f}", f"{100 * found['least_category']:.1f}"))
    header = ("method, N", *(f"{kind} %" for kind in (*KINDS, "any")), "clusters %", "least category %")
    return "\n".join([*lines, tables.text(rows, header)])


if __name__ == "__main__":
    main()
