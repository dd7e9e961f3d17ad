"""`tele data clean-train`: models for the stages `quality` and `perplexity` of `tele data clean`."""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tele_jax.clean import ngrams, quality, reading
from tele_jax.errors import UserError
from tele_jax.files import expand

HELP = "train a quality classifier or an n-gram model for `clean`"


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=type(parser))
    classifier = kinds.add_parser("quality", help="a classifier of good against bad documents")
    classifier.add_argument("--good", required=True, nargs="+", metavar="FILE", help="jsonl or text (a paragraph each)")
    classifier.add_argument("--bad", required=True, nargs="+", metavar="FILE", help="the same, of what is to go")
    model = kinds.add_parser("ngrams", help="a Kneser-Ney model of usual text")
    model.add_argument("--order", type=int, default=ngrams.ORDER, metavar="N", help="longest n-gram (5)")
    model.add_argument("files", nargs="+", metavar="FILE", help="jsonl or text (a paragraph each), of one language")
    for action in (classifier, model):
        action.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
        action.add_argument("--field", default="text", help="of jsonl records (text)")
        action.add_argument(
            "--json", metavar="FILE", type=Path, default=argparse.SUPPRESS, help="write the figures to FILE as JSON"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for bad input, before anything is written."""
    return train_quality(args) if args.kind == "quality" else train_ngrams(args)


def train_quality(args: argparse.Namespace) -> dict[str, Any]:
    good, bad = (list(_texts(files, args.field)) for files in (args.good, args.bad))
    trained = quality.train(good, bad)
    trained.classifier.save(args.out)
    figures = {name: getattr(trained, name) for name in ("train_documents", "held_out_documents")}
    figures |= {name: round(getattr(trained, name), 4) for name in ("accuracy", "precision", "recall")}
    print(f"{args.out}: from {len(good):,} good and {len(bad):,} bad documents")
    print(
        f"on {trained.held_out_documents:,} that were held out: accuracy {trained.accuracy:.3f}, "
        f"precision {trained.precision:.3f}, recall {trained.recall:.3f} of the good"
    )
    return figures


def train_ngrams(args: argparse.Namespace) -> dict[str, Any]:
    if not 1 <= args.order <= 7:
        raise UserError(f"--order {args.order}: must be 1 to 7")
    texts = list(_texts(args.files, args.field))
    rest, held_out = [t for i, t in enumerate(texts) if i % 20], texts[::20]
    trained = ngrams.train(rest, order=args.order)
    trained.save(args.out)
    values = sorted(trained.perplexity(text) for text in held_out)
    quantiles = {f"{p}%": values[min(len(values) * p // 100, len(values) - 1)] for p in (5, 25, 50, 75, 95)}
    print(f"{args.out}: {sum(map(len, trained.grams)):,} n-grams from {len(rest):,} documents")
    print("perplexity per token of those held out: " + ", ".join(f"{k} {v:.1f}" for k, v in quantiles.items()))
    return {"documents": len(rest), "ngrams": [len(g) for g in trained.grams], "perplexity": quantiles}


def _texts(patterns: list[str], field: str) -> Iterator[str]:
    for path in expand(patterns, "FILE"):
        try:
            with io.TextIOWrapper(reading.open_stream(path), encoding="utf-8-sig", newline="\n") as file:
                if ".jsonl" not in path:
                    yield from (part for part in file.read().split("\n\n") if part.strip())
                    continue
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _text(line, field, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
        except reading.READ_ERRORS as error:
            raise UserError(f"{path}: cannot be read: {error}") from None


def _text(line: str, field: str, where: str) -> str:
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: no JSON record with a field {field!r}") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is no string")
    return text
