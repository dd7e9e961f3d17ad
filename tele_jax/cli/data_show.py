"""`tele data show`: rows of a cache, or of a page that reads files live, as text."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tele_jax.cli import Outcome, flag, switch
from tele_jax.cli.pages import load_page
from tele_jax.config import check_seed, nearest
from tele_jax.data import describe, live_rows, order
from tele_jax.data.cache import RowCache
from tele_jax.data.documents import too_long_notes
from tele_jax.data.domains import OpenData
from tele_jax.data.sources import Indexes
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.settings import CacheConfig, TrainStage, cache_config
from tele_jax.stages import find_kind, run_config


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "dir DIR", "directory that `tele data cache` wrote; or give --config", Path, nargs="?")
    flag(parser, "--config PAGE", "page of a run or of a cache, whose files are read live")
    flag(parser, "--stage NAME", "stage of the page; default: the first that fine-tunes, or else that trains")
    flag(parser, "--domain NAME", "domain of the rows; default: the first, and of a page all")
    flag(parser, "--row N", "number of the first row in its domain; default: 0", int)
    flag(parser, "--step N", "step of a run to begin at, in the order of that run", int)
    flag(parser, "--batch-size N", "rows in a step of that run; default: 1, or as the page says", int)
    flag(parser, "--seed", "seed of that run; default: 0, or as the page says", int)
    flag(parser, "--count N", "number of rows; default: 1", int, default=1)
    switch(parser, "--tokens", "put a bar between tokens")
    flag(parser, "--color", "colour; default: auto, on a terminal", choices=("auto", "always", "never"), default="auto")


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError for rows that are not there; UserError and DamageError as cache.RowCache and OpenData."""
    if (args.dir is None) == (args.config is None):
        raise UserError("data show: give the directory of a cache, or --config PAGE")
    if args.count < 1 or not (args.batch_size is None or args.batch_size > 0):
        raise UserError("--count and --batch-size must be above 0")
    if args.seed is not None:
        check_seed(args.seed, "--seed")
    if args.config is None and args.stage is not None:
        raise UserError("--stage: is of a page; give --config PAGE")
    stage = None if args.config is None else _stage(args)
    if isinstance(stage, TrainStage) and stage.kind not in ("sft", "pretrain"):
        return _records(args, stage)
    if stage is not None and stage.data.cache is None:
        return _live(args, stage)
    return _cached(args, args.dir if stage is None else Path(stage.data.cache or ""), stage)


def _stage(args: argparse.Namespace) -> TrainStage | CacheConfig:
    """The page's stage, or the settings of the cache that it is for."""
    page = load_page(args.config, args.overrides)
    if "run" not in page:
        return cache_config(page)
    stages = {name: stage for name, stage in run_config(page).stages.items() if isinstance(stage, TrainStage)}
    if args.stage is not None and args.stage not in stages:
        raise UserError(
            f"--stage {args.stage}: no stage that trains on rows; {nearest(args.stage, stages, 'they are')}"
        )
    if not stages:
        raise UserError(f"--config {args.config}: no stage trains on rows")
    first = next((name for name, stage in stages.items() if stage.kind == "sft"), next(iter(stages)))
    found = stages[args.stage or first]
    assert isinstance(found, TrainStage)
    return found


def _number(asked: int | None, stage: object, name: str, default: int) -> int:
    return asked if asked is not None else getattr(stage, name, default)


def _outcome(args: argparse.Namespace, rows: list[tuple[str, Any, list[describe.Segment], int]], head: list[str]):
    color = sys.stdout.isatty() if args.color == "auto" else args.color == "always"
    texts = [describe.render(title, segments, seq_len, color=color) for title, _, segments, seq_len in rows]
    figures = [{**about, "segments": [segment.to_json() for segment in segments]} for _, about, segments, _ in rows]
    return Outcome({"rows": figures, "notes": head}, text="\n".join([*head, *texts]))


def _live(args: argparse.Namespace, stage: TrainStage | CacheConfig) -> Outcome:
    data, first = stage.data, args.row or 0
    if args.domain is not None:
        if args.domain not in data.sources:
            raise UserError(f"--domain {args.domain}: {nearest(args.domain, data.sources, 'the page has')}")
        data = dataclasses.replace(data, sources={args.domain: data.sources[args.domain]})
    if first < 0 or (args.step or 0) < 0:
        raise UserError("--row and --step must not be below 0")
    first += (args.step or 0) * _number(args.batch_size, stage, "batch_size", 1)
    unusable: list[str] = []  # by domain
    opened = OpenData(
        data,
        kind="sft" if stage.kind == "sft" else "pretrain",
        seq_len=stage.seq_len,
        on_rejects=lambda documents: unusable.extend([documents.account()] if documents.num_rejected else []),
    )
    sources = opened.data.sources
    counted = getattr(stage, "epochs", None) is not None or any(source.copies for source in sources.values())
    rows = live_rows.read(
        opened,
        seed=_number(args.seed, stage, "seed", 0),
        first=first,
        count=args.count,
        copies={name: source.copies or 1.0 for name, source in sources.items()} if counted else None,
        packed=getattr(stage, "packed", True),
    )
    found = []
    for number, (row, origins) in enumerate(rows, start=first):
        domains = sorted({domain for domain, _ in origins if domain})
        notes = [origin for _, origin in origins]
        segments = describe.segments(row, opened.vocabulary, notes, tokens=args.tokens)
        title = f"row {number}" + (f" of {', '.join(domains)}" if domains else "")
        found.append((title, {"domains": domains, "row": number}, segments, stage.seq_len))
    return _outcome(args, found, unusable + [line for each in opened.train.values() for line in each.notes()])


def _records(args: argparse.Namespace, stage: TrainStage) -> Outcome:
    """Pairs, with both answers, or prompts, with their records; in the order of the run, or of a domain."""
    batches = find_kind(stage.kind).batches(stage, Indexes())
    first = (args.row or 0) + (args.step or 0) * _number(args.batch_size, stage, "batch_size", 1)
    rates = {name: stage.data.sources[name].rate for name in batches.store.rows}
    if args.domain is not None and args.domain not in rates:
        raise UserError(f"--domain {args.domain}: the stage has {', '.join(rates)}")
    if first < 0:
        raise UserError("--row and --step must not be below 0")
    names, numbers = [args.domain] * args.count, list(range(first, first + args.count))
    if args.domain is None:
        located = order.Order(tuple(rates), tuple(batches.store.rows.values()), tuple(rates.values()), stage.seed)
        domain, _, rows = located.locate(first + np.arange(args.count))
        names, numbers = [list(rates)[i] for i in domain.tolist()], rows.tolist()
    elif first + args.count > batches.store.rows[args.domain]:
        raise UserError(f"--row {first} --count {args.count}: {args.domain} has {batches.store.rows[args.domain]} rows")
    found = []
    for name, number in zip(names, numbers):
        for what, row, note in batches.store.shown(name, number):
            segments = describe.segments(row, batches.vocabulary, [note], tokens=args.tokens)
            title = f"{name}, row {number}, {what}"
            found.append((title, {"domain": name, "row": number, "what": what}, segments, stage.seq_len))
    return _outcome(args, found, [each.account() for each in batches.corpora.values() if each.num_rejected])


def _cached(args: argparse.Namespace, path: Path, stage: TrainStage | CacheConfig | None) -> Outcome:
    cache, found = RowCache(path), []
    places = _places(args, cache, path, stage)
    batch = cache.read([domain for domain, _, _ in places], [row for _, _, row in places])
    vocabulary = load_vocabulary(cache.tokenizer())
    for i, (domain, epoch, row) in enumerate(places):
        row_of = {name: column[i] for name, column in batch.items()}
        segments = describe.segments(row_of, vocabulary, tokens=args.tokens)
        title = f"{domain}, row {row}" + ("" if epoch is None else f", epoch {epoch}")
        found.append((title, {"domain": domain, "row": row, "epoch": epoch}, segments, cache.manifest.seq_len))
    counts = {name: cache.manifest.domains[name].counts for name in dict.fromkeys(domain for domain, _, _ in places)}
    kept = ("split", "shortened", "dropped")
    head = [too_long_notes(name, **{key: getattr(each, key) for key in kept}) for name, each in counts.items()]
    return _outcome(args, found, [line for lines in head for line in lines])


def _places(
    args: argparse.Namespace, cache: RowCache, path: Path, stage: TrainStage | CacheConfig | None
) -> list[tuple[str, int | None, int]]:
    """(domain, epoch, row) of every row that is asked for: some of a domain, or those of a run from a step on."""
    if args.step is None:
        domain, first = args.domain or next(iter(cache.rows)), args.row or 0
        if domain not in cache.rows:
            raise UserError(f"--domain {domain}: {path} has {', '.join(cache.rows)}")
        if not 0 <= first <= first + args.count - 1 < cache.rows[domain]:
            raise UserError(f"--row {first} --count {args.count}: {domain} has the rows 0 to {cache.rows[domain] - 1}")
        return [(domain, None, row) for row in range(first, first + args.count)]
    if args.step < 0 or args.domain is not None or args.row is not None:
        raise UserError("--step: not below 0, and without --domain and --row: the order of the run chooses them")
    size, seed = _number(args.batch_size, stage, "batch_size", 1), _number(args.seed, stage, "seed", 0)
    if (args.step + 1) * size + args.count > order.MAX_ROWS:
        raise UserError(f"--step {args.step} --batch-size {size}: a run has at most {order.MAX_ROWS:,} rows")
    located = describe.run_order(cache.manifest, seed).locate(args.step * size + np.arange(args.count))
    names = list(cache.rows)
    return [(names[d], epoch, row) for d, epoch, row in zip(*(column.tolist() for column in located))]
