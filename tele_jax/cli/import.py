"""`tele import SRC DST`: a released checkpoint becomes one of ours."""

import argparse
from collections.abc import Mapping
from typing import Any

HELP = "read a released checkpoint"


def arguments(parser: argparse.ArgumentParser) -> None:
    from tele_jax.convert import FORMATS

    parser.add_argument("src", metavar="SRC", help="directory with config.json and *.safetensors, as released")
    parser.add_argument("dst", metavar="DST", help="where the checkpoint goes; must not exist")
    parser.add_argument("--format", choices=FORMATS, help="what SRC must be; by default what its config.json says")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float64"),
        help="of the parameters; by default that of the files, so that an export gives back the same bits",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the embedding from N on are padding; by default what the tokenizer in SRC says (llama: all rows)",
    )
    parser.add_argument(
        "--rope-tables",
        choices=("float32", "float16"),
        default="float32",
        help="float16 rounds rotary tables as TeleChat's released code does",
    )
    parser.add_argument("--memory-gb", type=float, default=1.0, metavar="G", help="10^9 bytes to work in (default 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads; by default two a core")
    parser.add_argument(
        "--start-over", action="store_true", help="do not go on with an import that was interrupted: remove it first"
    )


def _drawing(generation: Mapping[str, Any]) -> str:
    """A line on how the model will generate by default; nothing where its release does not say."""
    sampling = generation["sampling"]
    if generation["do_sample"]:
        return "generates as released: samples, " + ", ".join(f"{key} {value:g}" for key, value in sampling.items())
    if "repetition_penalty" in sampling:
        return f"generates as released: the likeliest token, repetition penalty {sampling['repetition_penalty']:g}"
    return ""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints what was read, and returns it.

    Raises:
      UserError, DamageError: as convert.import_checkpoint.
    """
    from tele_jax import convert, count_params
    from tele_jax.cli.progress import Progress
    from tele_jax.config import to_dict

    done = convert.import_checkpoint(
        args.src,
        args.dst,
        format=args.format,
        dtype=args.dtype,
        vocab_size=args.vocab_size,
        rope_tables=args.rope_tables,
        memory_gb=args.memory_gb,
        workers=args.workers,
        resume=not args.start_over,
        progress=Progress("import"),
    )
    release = done.release
    cfg = release.cfg
    print(
        f"{release.format}: {cfg.num_layers} layers, embed {cfg.embed_dim:,}, {cfg.num_heads} heads of {cfg.head_dim} "
        f"({cfg.num_kv_heads} of keys), mlp {cfg.mlp_dim:,}, vocabulary {cfg.vocab_size:,}; "
        f"{count_params(cfg):,} parameters in {cfg.param_dtype}"
    )
    for note in release.notes:
        print(note)
    names = [file.name for file in release.files]
    print(f"beside the weights: {', '.join(names)}" if names else "no tokenizer in SRC: name one to generate and chat")
    if line := _drawing(release.generation):
        print(line)
    if done.resumed_tiles:
        print(f"{done.resumed_tiles} of {done.tiles} parts were there from an import that was interrupted")
    print(f"wrote {args.dst}: {done.bytes_written:,} bytes in {done.seconds:.1f} s")
    return {
        "format": release.format,
        "config": to_dict(cfg),
        "parameters": count_params(cfg),
        "files": names,
        "notes": release.notes,
        "generation": release.generation,
        "seconds": done.seconds,
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "resumed_parts": done.resumed_tiles,
        "parts": done.tiles,
        "workers": done.workers,
    }
