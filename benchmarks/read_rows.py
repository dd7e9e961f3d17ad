"""How fast rows are read from a cache, at random, in the order of a run; against Grain on the same files.

    JAX_PLATFORMS=cpu python benchmarks/read_rows.py [--text DIR] [--tokenizer FILE] [--seconds 5]

On one core. `feed` is RowFeed.read: which rows, reading, decompressing, checking, and the five arrays of a batch of
16. `grain` is Grain's own pipeline over the same ArrayRecord files, with the same decoding of a row: source, shuffle,
repeat, mix, map, batch. They take turns; figures are tokens per second of processor time, the median of the turns.
Then the time to go to a step and read its batch, from step 10 to 10**9, and what the index alone costs. DIR and FILE
as in tokenize_text.py. Prints JSON. Needs grain: pip install 'tele_jax[benchmarks]'.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from tokenize_text import prepare

BATCH = 16
RATES = {"en": 0.45, "zh": 0.3, "code": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="of every measurement")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="read_rows_") as directory:
        text, tokenizer = prepare(Path(directory), args.text, args.tokenizer)
        found = measure(Path(directory), text, tokenizer, args.seconds)
        print(json.dumps({"machine": machine(), **found}, indent=2))


def measure(directory: Path, text: Path, tokenizer: Path, seconds: float) -> dict[str, Any]:
    import grain

    from tele_jax.data import cache, caching, order
    from tele_jax.data.feed import RowFeed
    from tele_jax.settings import CacheConfig, DataConfig, SourceConfig

    sources = {
        name: SourceConfig(files=(str(text / name / "train.jsonl"),), format="jsonl", rate=rate)
        for name, rate in RATES.items()
        if (text / name / "train.jsonl").exists()
    }
    rates = {name: source.rate for name, source in sources.items()}
    opened = {}
    for seq_len in (4096, 2048, 512):
        out = directory / f"rows_{seq_len}"
        config = CacheConfig(data=DataConfig(tokenizer=str(tokenizer), sources=sources), seq_len=seq_len)
        caching.make(config, out, runner="serial")
        opened[seq_len] = cache.RowCache(out)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    lengths = {}
    for seq_len, rows in opened.items():
        feed = RowFeed(rows, rates, batch_size=BATCH, seed=0)
        theirs = iter(grains(grain, rows, rates))
        tasks = {"feed": lambda step, feed=feed: feed.read(step), "grain": lambda step, theirs=theirs: next(theirs)}
        lengths[seq_len] = {
            name: {"cpu": round(BATCH * seq_len / cpu / 1e6, 1), "wall": round(BATCH * seq_len / wall / 1e6, 1)}
            for name, (cpu, wall) in in_turns(tasks, seconds).items()
        }
        print(f"seq_len {seq_len}: {lengths[seq_len]}", file=sys.stderr)
    feed = RowFeed(opened[4096], rates, batch_size=BATCH, seed=0)
    seeks = {}
    for step in (10, 1_000_000, 1_000_000_000) * 30:
        began = time.perf_counter()
        fresh = RowFeed(opened[4096], rates, batch_size=BATCH, seed=0)
        fresh.restore(feed.state().replace(b'"batches": 0', b'"batches": %d' % step))
        fresh.read(step)
        seeks.setdefault(step, []).append(time.perf_counter() - began)
    near = {"rates": [1, 1.0099], "asked": round(1 / 2.0099, 6)}
    mixed = grain.MapDataset.mix(
        [grain.MapDataset.range(1).map(lambda _, i=i: i).repeat() for i in range(2)], [1, 1.0099]
    )
    near["grain"] = sum(mixed[i] == 0 for i in range(100_000)) / 100_000
    ours = order.Order(("a", "b"), (1, 1), (1, 1.0099), 0)
    near["ours"] = float((ours.locate(np.arange(100_000))[0] == 0).mean())
    large = order.Order(("a", "b", "c"), (10**8, 10**8, 10**8), (0.45, 0.3, 0.25), 0)
    began = time.process_time()
    large.locate(np.arange(1_000_000))
    return {
        "targets": {"million_tokens_per_second_per_core": ">= 20"},
        "million_tokens_per_second_per_core": lengths[4096]["feed"]["cpu"],
        "million_tokens_per_second_by_seq_len": lengths,
        "milliseconds_to_go_to_a_step_and_read_it": {
            step: round(1e3 * statistics.median(times), 3) for step, times in seeks.items()
        },
        "microseconds_per_row_of_the_index_alone": round(time.process_time() - began, 3),
        "share_of_the_first_of_two_domains": near,
        "rows": {seq_len: sum(rows.rows.values()) for seq_len, rows in opened.items()},
        "load_average": os.getloadavg()[0],
    }


def grains(grain: Any, rows: Any, rates: dict[str, float]) -> Any:
    """Grain's way to the same batches."""
    from tele_jax.data import packing

    manifest = rows.manifest
    dtype = packing.id_type(manifest.vocab_size)
    domains = []
    for name in rates:
        files = [str(rows.path / shard.file) for shard in manifest.domains[name].shards]
        source = grain.sources.ArrayRecordDataSource(files)
        domains.append(grain.MapDataset.source(source).seed(len(domains)).shuffle().repeat())

    def decode(record: bytes) -> dict[str, np.ndarray]:
        batch = packing.from_records([record], manifest.seq_len, dtype, manifest.pad_id)
        return {name: column[0] for name, column in batch.items()}

    mixed = grain.MapDataset.mix(domains, list(rates.values())).map(decode).batch(BATCH)
    return mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


def in_turns(tasks: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, tuple[float, float]]:
    """(processor, wall) seconds a batch of each, the median of turns of a tenth of the time."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    step = 0
    for _ in range(10):
        for name, task in tasks.items():
            count, cpu, wall = 0, time.process_time(), time.perf_counter()
            while time.process_time() - cpu < seconds / 10:
                task(step)
                step, count = step + 1, count + 1
            turns[name].append(((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count))
    return {name: tuple(map(statistics.median, zip(*found))) for name, found in turns.items()}


if __name__ == "__main__":
    main()
