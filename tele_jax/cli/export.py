"""`tele export SRC DST --format F`: a checkpoint of ours becomes a directory that other programs read."""

import argparse
import os
from typing import Any

from tele_jax.errors import UserError

HELP = "write a checkpoint for other programs to read"


def arguments(parser: argparse.ArgumentParser) -> None:
    from tele_jax.convert import FORMATS
    from tele_jax.data.templates import TEMPLATES

    parser.add_argument("src", metavar="SRC", help="checkpoint, stage directory or work directory")
    parser.add_argument("dst", metavar="DST", nargs="?", help="the directory to write; must not exist")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="llama runs in transformers with nothing of ours installed; vLLM and llama.cpp were not tried",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "float64"),
        help="of the files; by default that of the parameters. Given, it rounds where it has to",
    )
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="the context to promise; by default the model's")
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        metavar="NAME",
        help=f"how dialogues are written, for the chat template of a llama export: {', '.join(TEMPLATES)}; default: as "
        "the tokenizer and the checkpoint say",
    )
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="G", help="10^9 bytes a file at most (default 5)"
    )
    parser.add_argument("--memory-gb", type=float, default=1.0, metavar="G", help="10^9 bytes to work in (default 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads; by default one a core")
    parser.add_argument(
        "--list",
        action="store_true",
        help="write nothing: print the tensors that would be written; SRC may be the name of a published model",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints what was written, or would be, and returns it.

    Raises:
      UserError, DamageError: as convert.export_checkpoint.
    """
    from tele_jax import convert
    from tele_jax.cli.progress import Progress

    if args.list:
        return _list(args)
    if args.template is not None and args.format != "llama":
        raise UserError(f"--template {args.template}: only an export as llama gets a chat template")
    if args.dst is None:
        raise UserError("tele export: DST is missing; see tele export --help")
    done = convert.export_checkpoint(
        args.src,
        args.dst,
        format=args.format,
        dtype=args.dtype,
        max_seq_len=args.max_seq_len,
        template=args.template,
        shard_gb=args.shard_gb,
        memory_gb=args.memory_gb,
        workers=args.workers,
        progress=Progress("export"),
    )
    for note in done.notes:
        print(note)
    print(
        f"wrote {args.dst}: {done.tensors} tensors, {done.bytes_written:,} bytes in {len(done.shards)} "
        f"{'file' if len(done.shards) == 1 else 'files'}, {done.seconds:.1f} s"
    )
    return {
        "format": args.format,
        "tensors": done.tensors,
        "bytes": done.bytes_written,
        "files": done.shards,
        "notes": done.notes,
        "seconds": done.seconds,
    }


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from tele_jax import checkpoint, get_model
    from tele_jax.convert.exporting import outline
    from tele_jax.published import PUBLISHED

    if args.src in PUBLISHED and not os.path.exists(args.src):
        cfg, provenance = get_model(args.src), ()
    else:
        lazy = checkpoint.open_lazy(args.src)
        cfg, provenance = lazy.cfg, lazy.provenance
    plan = outline(cfg, args.format, dtype=args.dtype, max_seq_len=args.max_seq_len, provenance=provenance)
    width = max(len(tensor.name) for tensor in plan.tensors)
    for tensor in plan.tensors:
        shape = " x ".join(f"{size:,}" for size in tensor.shape) or "a number"
        print(f"{tensor.name:{width}}  {shape:>20}  {tensor.nbytes:>18,}")
    for note in plan.notes:
        print(note)
    print(f"{len(plan.tensors)} tensors, {plan.nbytes:,} bytes")
    return {
        "format": args.format,
        "tensors": [{"name": t.name, "shape": list(t.shape), "bytes": t.nbytes} for t in plan.tensors],
        "bytes": plan.nbytes,
        "config": plan.document,
        "notes": plan.notes,
    }
