"""`tele data cache`: text into packed rows that can be read at random (data/caching.py)."""

import argparse
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

from tele_jax.errors import UserError

HELP = "tokenise and pack text into rows that can be read at random"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a page with get_config(), as in configs/data/")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the cache; not there yet")
    parser.add_argument(
        "--runner", default="DirectRunner", metavar="NAME", help="of Apache Beam (DirectRunner), or serial: no Beam"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes of the DirectRunner (one for every core, and for every shard)",
    )
    parser.add_argument("beam", nargs="*", metavar="-- BEAM_OPTION", help="options of Beam or the runner, after --")
    parser.epilog = "--config.KEY=VALUE changes a value of the page. Started again, it keeps the shards that are done."


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError and FailedError as caching.make."""
    from tqdm import tqdm

    from tele_jax.cli.data_stats import table
    from tele_jax.cli.pages import load_page
    from tele_jax.data import caching
    from tele_jax.settings import cache_config

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be above 0")
    config = cache_config(load_page(args.config, args.overrides))
    began = time.perf_counter()
    bar = tqdm(desc=args.out.name, unit="shard", disable=not sys.stderr.isatty())
    said = [began]

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if bar.disable and time.perf_counter() - said[0] > 30:
            said[0] = time.perf_counter()
            print(f"{done} of {total} shards", file=sys.stderr)

    with bar:
        manifest = caching.make(
            config,
            args.out,
            runner=args.runner,
            workers=args.workers,
            options=args.beam,
            progress=progress,
            say=lambda line: print(f"tele: {line}", file=sys.stderr),
            load_tasks=functools.partial(load_page, os.path.abspath(args.config)),
        )
    seconds = time.perf_counter() - began
    print(table(manifest))
    total = sum(domain.counts.text_bytes for domain in manifest.domains.values())
    print(f"\n{args.out}: {total / 1e6:,.1f} MB of text in {seconds:.1f} s, {total / seconds / 1e6:.2f} MB/s")
    for name, domain in manifest.domains.items():
        if domain.counts.rejected:
            files = args.out / name / "*.rejected.jsonl"
            print(f"WARNING: {name}: {domain.counts.rejected:,} documents cannot be used; which and why: {files}")
        if domain.counts.held_out:
            print(f"WARNING: {name}: {domain.counts.held_out:,} documents are held out as well (validation_files)")
        if domain.counts.shortened:
            print(f"{name}: {domain.counts.shortened:,} dialogues were longer than a row and lost their oldest turns")
    return {
        "seconds": round(seconds, 3),
        "text_bytes_per_second": round(total / seconds),
        "cores": len(os.sched_getaffinity(0)),
        "digest": manifest.digest,
        "domains": {name: vars(domain.counts) for name, domain in manifest.domains.items()},
    }
