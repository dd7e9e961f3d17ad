"""`tele tokenizer train` and `tele tokenizer inspect`."""

import argparse
import sys
import time
from pathlib import Path

from tele_jax import tables
from tele_jax.cli import Outcome, flag, switch
from tele_jax.config import check_seed
from tele_jax.data import vocabulary_training
from tele_jax.data.vocabulary import Vocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Table, expand, require_regular

# Tokens per UTF-8 byte over the Tele-FLM report's weighting of domains (arXiv 2404.16645).
PUBLISHED = {"Tele-FLM, 80,000": 0.261, "GPT-4": 0.291, "Llama-3": 0.251, "Llama-2": 0.356}


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    sub = actions.add_parser("train", help="train a SentencePiece BPE with the published options and special ids")
    flag(sub, "--preset", "model whose special ids it has", required=True, choices=vocabulary_training.PRESETS)
    flag(sub, "--vocab-size N", "number of ids, special ones included", int, required=True)
    flag(sub, "--out FILE", "model file to write", Path, required=True)
    switch(sub, "--force", "replace a different file that is there already")
    flag(sub, "--input-bytes N", "bytes to sample at most, about; default: 100000000", int, default=100_000_000)
    flag(sub, "--seed", "seed of the sample; default: 0", int, default=0)
    coverage = "character coverage; default: 1.0 as published, lowered where the characters do not fit"
    flag(sub, "--character-coverage X", coverage, float)
    flag(sub, "inputs INPUT", "UTF-8 text or .jsonl files; patterns, ** too", nargs="+")
    sub = actions.add_parser("inspect", help="show special ids, size, and tokens per byte on texts")
    flag(sub, "file FILE", "SentencePiece model, or JSON file of `tokenizers`")
    flag(sub, "--input-bytes N", "bytes to sample of every INPUT; default: 10000000", int, default=10_000_000)
    flag(sub, "inputs INPUT", "UTF-8 text or .jsonl files; one line per INPUT", nargs="*")


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError for a bad input, before anything is written."""
    if args.input_bytes <= 0:
        raise UserError(f"--input-bytes {args.input_bytes}: must be above 0")
    check_seed(getattr(args, "seed", 0), "--seed")
    return train(args) if args.action == "train" else inspect(args)


def train(args: argparse.Namespace) -> Outcome:
    start = time.monotonic()
    if args.out.exists():  # whether it is the same model is known later, but no other thing is replaced
        require_regular(args.out, "--out ")
    texts = list(vocabulary_training.sample_texts(args.inputs, max_bytes=args.input_bytes, seed=args.seed))
    print(f"training {args.preset}, {args.vocab_size:,} ids, on {len(texts):,} pieces of text ...", file=sys.stderr)
    trained = vocabulary_training.train_vocabulary(
        texts, preset=args.preset, vocab_size=args.vocab_size, character_coverage=args.character_coverage
    )
    vocabulary = vocabulary_training.write_vocabulary(trained, args.out, preset=args.preset, force=args.force)
    figures = {"file": str(args.out), "preset": args.preset, "vocab_size": vocabulary.vocab_size}
    figures |= {"sha256": vocabulary.sha256, "input_bytes": trained.num_bytes}
    figures |= {"character_coverage": trained.character_coverage, "seconds": round(time.monotonic() - start, 1)}
    text = f"{args.out}: {vocabulary.vocab_size:,} ids from {trained.num_bytes:,} bytes, {figures['seconds']} s"
    if trained.character_coverage < 1:
        text += (
            f"\ncharacter coverage {trained.character_coverage:.6f} instead of the published 1.0: so many ids do not "
            "hold all characters and enough merges; rare characters are spelled in bytes"
        )
    return Outcome(figures, text)


def inspect(args: argparse.Namespace) -> Outcome:
    vocabulary = load_vocabulary(args.file)
    presets = [name for name in vocabulary_training.PRESETS if not vocabulary_training.misplaced(vocabulary, name)]
    special = {"unk": vocabulary.unk_id, "bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    for name in ("user", "bot", "end", "system"):
        try:
            special[name] = vocabulary.id_of(f"<_{name}>")
        except UserError:
            special[name] = -1
    figures = {"file": args.file, "sha256": vocabulary.sha256, "vocab_size": vocabulary.vocab_size}
    figures |= {"special_ids_of": presets, "special": special, "published_tokens_per_byte": PUBLISHED}
    figures["inputs"] = [_measure(vocabulary, pattern, args.input_bytes) for pattern in args.inputs]
    ids = [(f"  {name}", *((i, vocabulary.piece(i)) if i >= 0 else ("none", ""))) for name, i in special.items()]
    rows = [(row["input"], f"{row['bytes']:,}", f"{row['tokens_per_byte']:.3f}") for row in figures["inputs"]]
    rows += [(name, "published", f"{value:.3f}") for name, value in PUBLISHED.items()]
    lines = [
        f"{args.file}: {vocabulary.vocab_size:,} ids, sha256 {vocabulary.sha256}",
        f"special ids as in the preset: {', '.join(presets) or 'none'}",
        tables.text(ids, align="lrl"),
        "",
        tables.text(rows, ("input", "bytes", "tokens per byte")),
        "published figures: weighted over the domains of that report, another text than yours",
    ]
    return Outcome(figures, text="\n".join(lines))


def _measure(vocabulary: Vocabulary, pattern: str, max_bytes: int) -> Table:
    num_bytes = num_tokens = 0
    for text in vocabulary_training.sample_texts([pattern], max_bytes=max_bytes, seed=0):
        num_bytes += len(text.encode())
        num_tokens += len(vocabulary.encode(text))
    files = len(expand([pattern], "INPUT"))
    ratio = num_tokens / num_bytes
    return {"input": pattern, "files": files, "bytes": num_bytes, "tokens": num_tokens, "tokens_per_byte": ratio}
