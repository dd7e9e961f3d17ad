"""How fast `tele data cache` tokenises, against SentencePiece's own batch encode of the same documents.

    JAX_PLATFORMS=cpu python benchmarks/tokenize_text.py [--text DIR] [--tokenizer FILE] [--repeats 5]

Per domain, on one core, in turns: `sentencepiece` encodes all documents, which are in memory, in one call;
`tokenise` makes examples of them, as the cache does; `shard` does the whole work of a worker: reads the file, parses
it, shuffles, tokenises, packs, compresses, checksums and writes rows of 4,096. Figures are of processor time, the best
of the repeats, since others may use the machine. DIR is what `tele data fetch` wrote; without it the text is fetched,
and without FILE a vocabulary of 32,000 is trained. Prints JSON. (As tokenize.py this file would hide Python's module
of that name from everything that runs in this directory.)
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

SEQ_LEN = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenize_") as directory:
        text, tokenizer = prepare(Path(directory), args.text, args.tokenizer)
        found = measure(Path(directory), text, tokenizer, args.repeats)
        print(json.dumps({"machine": machine(), **found}, indent=2))


def prepare(directory: Path, text: Path | None, tokenizer: Path | None, vocab_size: int = 32_000) -> tuple[Path, Path]:
    """(text, tokenizer), made in the directory where they are not given."""
    from tele_jax import corpora
    from tele_jax.data import vocabulary_training

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if text is None:
        text = directory / "text"
        corpora.fetch("quickstart", text, say=say)
    if tokenizer is None:
        tokenizer = directory / "tokenizer.model"
        say(f"training {vocab_size} ids ...")
        texts = vocabulary_training.sample_texts([f"{text}/*/train.jsonl"], max_bytes=20_000_000, seed=0)
        trained = vocabulary_training.train_vocabulary(texts, preset="tele_flm", vocab_size=vocab_size)
        vocabulary_training.write_vocabulary(trained, tokenizer, preset="tele_flm")
    return text, tokenizer


def measure(directory: Path, text: Path, tokenizer: Path, repeats: int) -> dict[str, Any]:
    import sentencepiece

    from tele_jax.data import encode, shards
    from tele_jax.data.vocabulary import load_vocabulary
    from tele_jax.settings import CacheConfig, DataConfig, SourceConfig

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    vocabulary = load_vocabulary(tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    domains, totals = {}, {}
    for domain in ("en", "zh", "code"):
        file = text / domain / "train.jsonl"
        if not file.exists():
            continue
        source = SourceConfig(files=(str(file),), format="jsonl")
        data = DataConfig(tokenizer=str(tokenizer), sources={domain: source})
        config = CacheConfig(data=data, seq_len=SEQ_LEN, shard_bytes=1 << 40)
        (unit,) = shards.plan(config)
        documents = list(shards._Reader(unit, seed=0).documents())
        texts = [document.content for document in documents]
        number = iter(range(1_000_000))

        def tokenise(config=config, documents=documents):
            for block in encode.blocks(documents, shards.BLOCK_BYTES):
                encode.encode(block, vocabulary, config.kind, config.seq_len, piece_bytes=shards.PIECE_BYTES)

        def shard(config=config, unit=unit, number=number):
            shards.write_unit(unit, config, vocabulary, directory / f"out{next(number)}")

        tasks = {
            "sentencepiece": lambda texts=texts: processor.encode(texts, num_threads=1),
            "tokenise": tokenise,
            "shard": shard,
        }
        seconds = in_turns(tasks, repeats)
        num_bytes = sum(len(each.encode()) for each in texts)
        domains[domain] = {"documents": len(texts), "bytes": num_bytes, **figures(seconds, num_bytes)}
        for name, value in seconds.items():
            totals[name] = totals.get(name, 0.0) + value
        print(f"{domain}: {domains[domain]}", file=sys.stderr)
    everything = figures(totals, sum(domain["bytes"] for domain in domains.values()))
    return {"targets": {"tokenise_ratio": ">= 0.9"}, **everything, "domains": domains, "repeats": repeats}


def in_turns(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least seconds of processor time of each."""
    least = dict.fromkeys(tasks, float("inf"))
    for _ in range(repeats):
        for name, task in tasks.items():
            began = time.process_time()
            task()
            least[name] = min(least[name], time.process_time() - began)
    return least


def figures(seconds: dict[str, float], num_bytes: int) -> dict[str, Any]:
    speeds = {f"{name}_mb_per_second": round(num_bytes / value / 1e6, 2) for name, value in seconds.items()}
    ratios = {f"{name}_ratio": round(seconds["sentencepiece"] / seconds[name], 3) for name in ("tokenise", "shard")}
    return {**ratios, **speeds}


if __name__ == "__main__":
    main()
