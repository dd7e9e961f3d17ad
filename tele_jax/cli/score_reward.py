"""`tele score-reward CKPT FILE --out SCORES`: scores answers with a reward model."""

import argparse
from pathlib import Path

from tele_jax import checkpoint
from tele_jax.align.scoring import score_file
from tele_jax.cli import Outcome, Progress, flag
from tele_jax.cli.generate import open_mesh
from tele_jax.data.templates import TEMPLATES, choose
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.inference.chat import find_tokenizer


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "ckpt CKPT", "checkpoint of a reward model, its stage directory or work directory")
    flag(parser, "file FILE", "JSON lines or a JSON array: pairs, rankings, dialogues, or texts {'text': ...}")
    flag(parser, "--out SCORES", "new file: the scores of each record, a line for each", Path, required=True)
    flag(parser, "--tokenizer FILE", "default: tokenizer.model or tokenizer.json in or above the checkpoint")
    form = f"format of dialogues: {', '.join(TEMPLATES)}; default: as the tokenizer and the checkpoint say"
    flag(parser, "--template NAME", form, choices=TEMPLATES)
    flag(parser, "--max-tokens N", "most tokens of a sequence; default: the context of the model", int)
    flag(parser, "--batch-size N", "sequences at once; default: 16", int, default=16)
    flag(parser, "--mesh AXIS=N,...", "devices to spread the work over, as in tele generate; default: one device")
    parser.epilog = (
        "the interval of the accuracy counts as many trials as there are pairs and rankings; "
        "examples: tele score-reward runs/W/reward pairs.jsonl --out scores.jsonl --json figures.json; "
        "tele score-reward runs/W/reward dialogues.jsonl --out scores.jsonl --batch-size 64 --mesh data=8"
    )


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError and DamageError as scoring.score_file."""
    for name in ("max_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.out.exists():
        raise UserError(f"--out {args.out}: is there already; name a new file")
    model = checkpoint.open_lazy(args.ckpt)
    vocabulary = load_vocabulary(find_tokenizer(args.ckpt, args.tokenizer))
    vocabulary = vocabulary.with_template(choose(vocabulary, args.template, model.provenance).name)
    how = {"max_tokens": args.max_tokens or model.cfg.max_seq_len, "batch_size": args.batch_size}
    progress = Progress("score", unit="sequences")
    figures = score_file(args.file, args.out, model, vocabulary, **how, mesh=open_mesh(args.mesh), progress=progress)
    text = f"{figures['records']:,} records: mean score {figures['mean']:.4f}, deviation {figures['std']:.4f}"
    if "accuracy" in figures:
        low, high = figures["interval"]
        accuracy = f"accuracy {figures['accuracy']:.4f}, 95% interval {low:.4f} to {high:.4f}"
        text += f"\n{figures['pairs']:,} pairs: {accuracy}"
    return Outcome(figures, f"{text}\nwrote {args.out}")
