"""`tele data stats`: what a cache holds, what a run would see of it, and whether it is intact."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tele_jax.errors import DamageError, UserError

if TYPE_CHECKING:
    from tele_jax.data.cache import Manifest

HELP = "what a cache holds: sizes, shares, lengths, tokens per byte"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="what `tele data cache` wrote")
    parser.add_argument(
        "--tokens", type=float, metavar="N", help="of a run, for the epochs it makes; default: as many as the cache has"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the picture (DIR/stats.png)")
    parser.add_argument("--verify", action="store_true", help="read every shard and compare its checksum")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError and DamageError as cache.RowCache, and DamageError for a checksum that differs."""
    from tele_jax.data import stats
    from tele_jax.data.cache import RowCache

    cache = RowCache(args.dir)
    if args.tokens is not None and not 0 < args.tokens < float("inf"):
        raise UserError(f"--tokens {args.tokens:g}: must be above 0 and finite")
    manifest = cache.manifest
    print(f"{args.dir}: {manifest.kind} rows of {manifest.seq_len} tokens, {manifest.vocab_size:,} ids\n")
    print(table(manifest))
    rows = sum(cache.rows.values()) if args.tokens is None else max(1, round(args.tokens / manifest.seq_len))
    simulated = stats.simulate(manifest)
    epochs = stats.epochs(manifest, rows)
    print(
        f"\nA run of {rows:,} rows, {rows * manifest.seq_len:,} tokens; shares counted in {stats.SIMULATED_ROWS:,}:\n"
    )
    body = [
        (name, f"{100 * rate:.4f}%", f"{100 * simulated[name]:.4f}%", f"{epochs[name]:.3f}")
        for name, rate in stats.shares(manifest).items()
    ]
    print(aligned([("domain", "share asked", "share drawn", "epochs"), *body]))
    print("\nTokens of a document, half of them have at most, nine in ten at most (within a factor of 2):\n")
    body = [
        (name, *(f"{2 * stats.length_quantile(domain.counts, q) - 1:,}" for q in (0.5, 0.9)))
        for name, domain in manifest.domains.items()
    ]
    print(aligned([("domain", "half", "nine in ten"), *body]))
    if args.verify:
        _verify(cache)
    if importlib.util.find_spec("matplotlib") is None:
        print("\nno picture: matplotlib is missing; pip install 'tele_jax[plots]'")
    else:
        print(f"\n{_picture(manifest, args)}")
    return {
        "kind": manifest.kind,
        "seq_len": manifest.seq_len,
        "digest": manifest.digest,
        "rows_of_run": rows,
        "domains": {
            name: {
                **vars(domain.counts),
                "tokens_per_byte": stats.tokens_per_byte(domain.counts),
                "share": stats.shares(manifest)[name],
                "share_drawn": simulated[name],
                "epochs": epochs[name],
            }
            for name, domain in manifest.domains.items()
        },
    }


def _picture(manifest: "Manifest", args: argparse.Namespace) -> str:
    """Draws it; says where it is, or why there is none: a cache may be read-only, and its figures are wanted still."""
    from tele_jax.data import stats

    picture = args.plot or args.dir / "stats.png"
    try:
        stats.plot(manifest, picture)
    except ValueError as error:  # no format that matplotlib knows
        raise UserError(f"--plot {picture}: {error}") from None
    except OSError as error:
        if args.plot:
            raise
        return f"no picture: {picture}: {error.strerror}; --plot FILE puts it elsewhere"
    return f"picture: {picture}"


def _verify(cache: Any) -> None:
    from tqdm import tqdm

    total = sum(len(domain.shards) for domain in cache.manifest.domains.values())
    damaged = []
    for shard, problem in tqdm(cache.verify(), total=total, unit="shard", disable=not sys.stderr.isatty()):
        if problem:
            damaged.append(f"{cache.path / shard.file}: {problem}")
            print(f"DAMAGED {damaged[-1]}")
    if damaged:
        raise DamageError(f"{len(damaged)} of {total} shards are damaged; remove the cache and make it again")
    print(f"\nverified: {total:,} shards hold what was written")


def table(manifest: "Manifest") -> str:
    """One line per domain, and one of their sums."""
    from tele_jax.data import stats
    from tele_jax.data.cache import Counts

    head = ("domain", "documents", "rejected", "text bytes", "tokens", "tokens/byte", "rows", "filled", "shards")
    every = {name: (domain.counts, len(domain.shards)) for name, domain in manifest.domains.items()}
    if len(every) > 1:
        sums = sum((domain.counts for domain in manifest.domains.values()), Counts())
        every["all"] = (sums, sum(number for _, number in every.values()))
    body = [
        (
            name,
            f"{counts.documents:,}",
            f"{counts.rejected:,}",
            f"{counts.text_bytes:,}",
            f"{counts.tokens:,}",
            f"{stats.tokens_per_byte(counts):.4f}",
            f"{counts.rows:,}",
            f"{100 * counts.tokens / (counts.rows * manifest.seq_len):.2f}%",
            f"{number:,}",
        )
        for name, (counts, number) in every.items()
    ]
    return aligned([head, *body])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns of one width: the first left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )
