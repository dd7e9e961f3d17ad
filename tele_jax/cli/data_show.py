"""`tele data show`: rows of a cache as text."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tele_jax.config import check_seed
from tele_jax.errors import UserError

HELP = "print rows of a cache as text, with segment borders and loss weights"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="what `tele data cache` wrote")
    parser.add_argument("--domain", metavar="NAME", help="rows of this domain (the first)")
    parser.add_argument("--row", type=int, metavar="N", help="number of the first row in its domain (0)")
    parser.add_argument("--step", type=int, metavar="N", help="instead: rows in the order of a run, from this step on")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="of that run: rows in a step (1)")
    parser.add_argument("--seed", type=int, default=0, help="of that run (0)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="how many rows (1)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for rows that are not there; UserError and DamageError as cache.RowCache."""
    import numpy as np

    from tele_jax.data import looking, order, stats
    from tele_jax.data.cache import RowCache
    from tele_jax.data.vocabulary import load_vocabulary

    cache = RowCache(args.dir)
    if args.count < 1 or args.batch_size < 1:
        raise UserError("--count and --batch-size must be above 0")
    if args.step is None:
        domain, first = args.domain or next(iter(cache.rows)), args.row or 0
        if domain not in cache.rows:
            raise UserError(f"--domain {domain}: {args.dir} has {', '.join(cache.rows)}")
        if not 0 <= first <= first + args.count - 1 < cache.rows[domain]:
            raise UserError(f"--row {first} --count {args.count}: {domain} has the rows 0 to {cache.rows[domain] - 1}")
        places = [(domain, None, row) for row in range(first, first + args.count)]
    else:
        if args.step < 0 or args.domain is not None or args.row is not None:
            raise UserError("--step: not below 0, and without --domain and --row: the order of the run chooses them")
        if (args.step + 1) * args.batch_size + args.count > order.MAX_ROWS:
            raise UserError(
                f"--step {args.step} --batch-size {args.batch_size}: a run has at most {order.MAX_ROWS:,} rows"
            )
        index = args.step * args.batch_size + np.arange(args.count)
        check_seed(args.seed, "--seed")
        located = stats.order(cache.manifest, args.seed).locate(index)
        places = [(list(cache.rows)[d], epoch, row) for d, epoch, row in zip(*(column.tolist() for column in located))]
    batch = cache.read([domain for domain, _, _ in places], [row for _, _, row in places])
    vocabulary = load_vocabulary(cache.tokenizer())
    color = sys.stdout.isatty() if args.color == "auto" else args.color == "always"
    figures = []
    for i, (domain, epoch, row) in enumerate(places):
        segments = looking.segments({name: column[i] for name, column in batch.items()}, vocabulary)
        title = f"{domain}, row {row}" + ("" if epoch is None else f", epoch {epoch}")
        print(looking.render(title, segments, cache.manifest.seq_len, color=color))
        figures.append({"domain": domain, "row": row, "epoch": epoch, "segments": [s.to_json() for s in segments]})
    return {"rows": figures}
