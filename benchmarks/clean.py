"""Cleaning of at least 100 MB of real text with planted duplicates, spam, other languages and broken encodings.

    python benchmarks/clean.py --work DIR [--scale 1.0]

Prints JSON: recall of the planted copies and false positives of deduplication alone, ours and datatrove's on the same
files; what the whole pipeline does with everything planted; throughput per core (bytes of text per second of CPU time,
Beam included). It needs pip, npm, apt-get, and the package datatrove with spacy for the comparison.
"""

import argparse
import gzip
import json
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, os.getcwd())

import clean_corpus
from machine import machine

THRESHOLD = 0.7
NAMES = ("code", "en", "zh", "exact", "near", "url", "spam", "other", "broken")


def grams(text: str, n: int = 5) -> set[int]:
    """Shingles by Python's own means: nothing of tele_jax."""
    tokens = clean_corpus.TOKEN.findall(text.lower())
    return {hash(tuple(tokens[i : i + n])) for i in range(len(tokens) - n + 1)}


def jaccard(a: set[int], b: set[int]) -> float:
    """Exact similarity of two sets."""
    return len(a & b) / max(len(a | b), 1)


def page(root: Path, stages: tuple[str, ...], names: tuple[str, ...]) -> dict:
    """A config: real sources have the lowest ranks and keep their copies. Only real code declares its language."""
    sources = {
        name: dict(
            files=(str(root / f"{name}.jsonl"),),
            format="jsonl",
            domain=name,
            rank=names.index(name),
            language="code" if name == "code" else None,
        )
        for name in names
    }
    if "extract" in stages:
        sources["html"] = dict(files=(str(root / "html/*.html"),), format="html", domain="html")
    return dict(sources=sources, stages=stages)


def cpu_seconds() -> float:
    """Of this process and its children so far."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def run(config: dict, out: Path) -> tuple[dict, dict]:
    """(report, times) of a run in this process."""
    from tele_jax.clean import pipeline
    from tele_jax.clean.settings import clean_config

    shutil.rmtree(out, ignore_errors=True)
    start, cpu = time.monotonic(), cpu_seconds()
    report = pipeline.clean(
        clean_config(config), str(out), options=["--runner=DirectRunner", "--direct_running_mode=in_memory"]
    )
    times = {"wall_seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1)}
    times["mb_per_cpu_second"] = round(report["stages"][0]["in"]["bytes"] / 1e6 / times["cpu_seconds"], 2)
    return report, times


def survivors(out: Path) -> dict[str, str]:
    """url -> text of a finished run."""
    found = {}
    for path in sorted(out.glob("*/*-of-*.jsonl")):
        with path.open(encoding="utf-8") as file:
            records = map(json.loads, file)
            found |= {r.get("url", r["origin"]): r["text"] for r in records}
    return found


def judge(texts: dict[str, str], kept: set[str], pairs: dict[str, str]) -> dict:
    """Recall of planted pairs and false positives among the others, by exact Jaccard similarity."""
    found = {"exact": [0, 0], "near": [0, 0], "near, similarity >= 0.8": [0, 0], "near, 0.7 to 0.8": [0, 0]}
    for copy, original in pairs.items():
        gone = not (copy in kept and original in kept)
        names = ["exact" if "exact" in copy else "near"]
        if names == ["near"]:
            similarity = jaccard(grams(texts[copy]), grams(texts[original]))
            names += (
                ["near, similarity >= 0.8"] if similarity >= 0.8 else ["near, 0.7 to 0.8"] if similarity >= 0.7 else []
            )
            names.append("near, " + re.match(r"https://(\w+)", original).group(1))
        for name in names:
            count = found.setdefault(name, [0, 0])
            count[0] += gone
            count[1] += 1
    originals = [url for url in texts if url not in pairs]
    dropped = {url: grams(texts[url]) for url in originals if url not in kept}
    # Of every dropped document: the largest similarity to any document that stays, through an inverted index.
    index: dict[int, list[str]] = {}
    for url, shingles in dropped.items():
        for gram in shingles:
            index.setdefault(gram, []).append(url)
    best = Counter()
    for url in kept:
        own = grams(texts[url])
        shared = Counter(u for gram in own for u in index.get(gram, ()))
        for u, count in shared.items():
            best[u] = max(best[u], count / (len(dropped[u]) + len(own) - count))
    exact = {" ".join(clean_corpus.TOKEN.findall(texts[url].lower())) for url in kept}
    wrong = {
        u: best[u] for u in dropped
        if best[u] < THRESHOLD and " ".join(clean_corpus.TOKEN.findall(texts[u].lower())) not in exact
    }  # fmt: skip
    return {
        "recall": {name: round(hit / total, 4) if total else None for name, (hit, total) in found.items()},
        "pairs": {name: total for name, (_, total) in found.items()},
        "originals": len(originals),
        "originals_dropped": len(dropped),
        "false_positives": len(wrong),
        "false_positive_rate": round(len(wrong) / max(len(originals), 1), 6),
        "least_similar": sorted(round(s, 3) for s in wrong.values())[:5],
    }


def datatrove(root: Path, names: tuple[str, ...], work: Path) -> tuple[set[str], dict]:
    """(URLs that stay, times) by datatrove's MinHash as published, 14 buckets of 8, in one process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.typeshelper import Languages

    shutil.rmtree(work, ignore_errors=True)
    (work / "in").mkdir(parents=True)
    for name in names:
        shutil.copy(root / f"{name}.jsonl", work / "in")
    start, cpu = time.monotonic(), cpu_seconds()
    reader = JsonlReader(str(work / "in"))
    steps = (
        [reader, MinhashDedupSignature(f"{work}/sig", language=Languages.english)],
        [MinhashDedupBuckets(f"{work}/sig", f"{work}/buckets")],
        [MinhashDedupCluster(f"{work}/buckets", f"{work}/remove")],
        [JsonlReader(str(work / "in")), MinhashDedupFilter(f"{work}/remove"), JsonlWriter(f"{work}/out")],
    )
    for number, pipeline in enumerate(steps):
        tasks = 14 if number == 1 else 1
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=f"{work}/log{number}").run()
    times = {"wall_seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1)}
    kept = set()
    for path in (work / "out").glob("*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            kept |= {json.loads(line)["metadata"]["url"] for line in file}
    return kept, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real documents")
    args = parser.parse_args()
    clean_corpus.fetch(args.work / "packages")
    root = args.work / "text"
    built = clean_corpus.build(args.work / "packages", root, args.scale)
    result = {
        "machine": machine(),
        "bytes": {name: size for name, (size, _) in built["sizes"].items()},
        "documents": {name: count for name, (_, count) in built["sizes"].items()},
    }
    result["total_mb"] = round(sum(result["bytes"].values()) / 1e6, 1)
    names = ("code", "en", "zh", "exact", "near")
    texts = {}
    for name in names:
        with open(root / f"{name}.jsonl", encoding="utf-8") as file:
            texts |= {r["url"]: r["text"] for r in map(json.loads, file) if r["text"].strip()}
    size = sum(result["bytes"][name] for name in names) / 1e6

    config = page(root, ("duplicates",), names)
    _, times = run(config, args.work / "deduplicated")
    ours = judge(texts, set(survivors(args.work / "deduplicated")), built["pairs"])
    result["duplicates_alone"] = {"mb": round(size, 1), "tele_jax": {**times, **ours}}
    print(json.dumps(result, indent=1), file=sys.stderr)
    try:
        kept, times = datatrove(root, names, args.work / "datatrove")
        times["mb_per_cpu_second"] = round(size / times["cpu_seconds"], 2)
        result["duplicates_alone"]["datatrove"] = {**times, **judge(texts, kept, built["pairs"])}
    except ImportError as error:
        result["duplicates_alone"]["datatrove"] = f"not measured: {error}"

    stages = ("extract", "language", "normalise", "rules", "urls", "duplicates", "paragraphs", "privacy")
    report, times = run(page(root, stages, NAMES), args.work / "cleaned")
    kept = survivors(args.work / "cleaned")
    left = Counter(re.sub(r"https://(\w+)\..*", r"\1", url) for url in kept)
    met = {copy: original for copy, original in built["pairs"].items() if copy in kept or original in kept}
    both = sum(copy in kept and original in kept for copy, original in met.items())
    result["whole"] = {
        **times,
        "stages": {
            s["stage"]: {"in": s["in"], "out": s["out"], "dropped": {e["reason"]: e["documents"] for e in s["dropped"]}}
            for s in report["stages"]
        },
        "planted_left": {
            name: f"{left[name]} of {count}"
            for name, count in result["documents"].items()
            if name not in "code en zh html broken"
        },
        "rejected": report["read"]["broken"]["dropped"],
        "pairs_of_which_one_stays": len(met),
        "pairs_of_which_both_stay": both,
        "recall": round(1 - both / max(len(met), 1), 4),
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
