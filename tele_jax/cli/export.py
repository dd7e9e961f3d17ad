"""`tele export SRC DST --format F`: writes a checkpoint as a directory that other programs read."""

import argparse
import os

from tele_jax import checkpoint, convert, tables
from tele_jax.cli import Outcome, Progress, flag, pick, refuse_flags, switch
from tele_jax.convert import FORMATS
from tele_jax.convert.exporting import Exported, outline
from tele_jax.convert.families import LLAMA_LIKE
from tele_jax.data.templates import TEMPLATES
from tele_jax.errors import UserError
from tele_jax.published import PUBLISHED, get_model


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "src SRC", "checkpoint, stage directory or work directory")
    flag(parser, "dst DST", "directory to write; must not exist", nargs="?")
    form = "format; llama is for transformers, gguf (DST/model.gguf) for llama.cpp, which was not tried"
    flag(parser, "--format", form, required=True, choices=FORMATS)
    dtypes = ("bfloat16", "float16", "float32", "float64")
    flag(parser, "--dtype", "dtype to round the values to; default: that of the parameters", choices=dtypes)
    flag(parser, "--max-seq-len N", "context to promise; default: the model's", int)
    known = ", ".join(TEMPLATES)
    chat = f"chat template of a llama or gguf export: {known}; default: as the tokenizer and the checkpoint say"
    flag(parser, "--template NAME", chat, choices=TEMPLATES)
    flag(parser, "--shard-gb G", "most 10^9 bytes of a file; default: 5", float, default=5.0)
    flag(parser, "--memory-gb G", "memory to work in, in 10^9 bytes; default: 1", float, default=1.0)
    flag(parser, "--workers N", "number of threads; default: one a core", int)
    switch(parser, "--peft", "write the adapters (LoRA) of SRC as PEFT reads them, instead of the merged model")
    switch(parser, "--list", "print what would be written, and write nothing; SRC may name a published model")


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError and DamageError as convert.export_checkpoint."""
    if args.list and not args.peft:
        return _list(args)
    if args.template is not None and args.format not in LLAMA_LIKE:
        raise UserError(f"--template {args.template}: only an export as llama or gguf gets a chat template")
    if args.dst is None:
        raise UserError("tele export: DST is missing; see tele export --help")
    if args.peft:
        return _adapters(args)
    how = pick(args, "format", "dtype", "max_seq_len", "template", "shard_gb", "memory_gb", "workers")
    return _outcome(args, convert.export_checkpoint(args.src, args.dst, **how, progress=Progress("export")))


def _adapters(args: argparse.Namespace) -> Outcome:
    why = "adapters are written as they are, whole and in one file; leave it out with --peft"
    defaults = {"shard_gb": 5, "memory_gb": 1, "list": False}
    refuse_flags(args, defaults | dict.fromkeys(("dtype", "max_seq_len", "template", "workers")), why)
    return _outcome(args, convert.export_peft(args.src, args.dst, format=args.format))


def _outcome(args: argparse.Namespace, done: Exported) -> Outcome:
    files = "file" if len(done.shards) == 1 else "files"
    wrote = f"{done.tensors} tensors, {done.bytes_written:,} bytes in {len(done.shards)} {files}, {done.seconds:.1f} s"
    figures = {"format": args.format, "tensors": done.tensors, "bytes": done.bytes_written, "files": done.shards}
    figures |= {"notes": done.notes, "seconds": done.seconds}
    return Outcome(figures, text="\n".join([*done.notes, f"wrote {args.dst}: {wrote}"]))


def _list(args: argparse.Namespace) -> Outcome:
    if args.src in PUBLISHED and not os.path.exists(args.src):
        cfg, provenance = get_model(args.src), ()
    else:
        lazy = checkpoint.open_lazy(args.src)
        cfg, provenance = lazy.cfg, lazy.provenance
    plan = outline(cfg, args.format, dtype=args.dtype, max_seq_len=args.max_seq_len, provenance=provenance)
    rows = [
        (tensor.name, " x ".join(f"{size:,}" for size in tensor.shape) or "a number", f"{tensor.nbytes:,}")
        for tensor in plan.tensors
    ]
    tensors = [{"name": t.name, "shape": list(t.shape), "bytes": t.nbytes} for t in plan.tensors]
    figures = {"format": args.format, "tensors": tensors, "bytes": plan.nbytes, "config": plan.document}
    total = f"{len(plan.tensors)} tensors, {plan.nbytes:,} bytes"
    return Outcome(figures | {"notes": plan.notes}, text="\n".join([tables.text(rows), *plan.notes, total]))
