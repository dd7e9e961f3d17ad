"""`tele import SRC DST`: reads a released checkpoint and writes it in the format of tele_jax."""

import argparse
from collections.abc import Mapping
from typing import Any

from tele_jax import convert, count_params
from tele_jax.cli import Outcome, Progress, flag, pick, refuse_flags, switch
from tele_jax.config import to_dict
from tele_jax.convert import FORMATS


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "src SRC", "directory with config.json and *.safetensors, as released, or a GGUF file")
    flag(parser, "dst DST", "where the checkpoint goes; must not exist")
    flag(parser, "--base CKPT", "SRC is an adapter (LoRA) that PEFT wrote, for this checkpoint")
    flag(parser, "--format", "format that SRC must have; default: what its config.json says", choices=FORMATS)
    dtypes = ("bfloat16", "float32", "float64")
    flag(parser, "--dtype", "dtype of the parameters; default: that of the files, whose bits stay", choices=dtypes)
    rows = "rows of the embedding that are no padding; default: as the tokenizer in SRC says (llama: all)"
    flag(parser, "--vocab-size N", rows, int)
    rope = "dtype that rotary tables are rounded to, float16 in TeleChat's released code; default: float32"
    flag(parser, "--rope-tables", rope, choices=("float32", "float16"), default="float32")
    flag(parser, "--memory-gb G", "memory to work in, in 10^9 bytes; default: 1", float, default=1.0)
    flag(parser, "--workers N", "number of threads; default: two a core", int)
    switch(parser, "--start-over", "remove what an interrupted import left, instead of going on with it")


def _drawing(generation: Mapping[str, Any]) -> str:
    """A line on how the model will generate by default; empty where its release does not say."""
    sampling = generation["sampling"]
    if generation["do_sample"]:
        return "generates as released: samples, " + ", ".join(f"{key} {value:g}" for key, value in sampling.items())
    if "repetition_penalty" in sampling:
        return f"generates as released: the likeliest token, repetition penalty {sampling['repetition_penalty']:g}"
    return ""


def _adapters(args: argparse.Namespace) -> Outcome:
    refuse_flags(args, {"dtype": None, "vocab_size": None, "rope_tables": "float32"}, "that of --base; leave it out")
    no_effect = "has no effect on an adapter, which is read at once; leave it out with --base"
    refuse_flags(args, {"memory_gb": 1, "workers": None, "start_over": False}, no_effect)
    lora = convert.import_peft(args.src, args.dst, base=args.base, format=args.format)
    line = f"adapters of rank {lora.rank}, scale {lora.scale:g}, of {', '.join(lora.targets)}; base {args.base}"
    return Outcome({"lora": to_dict(lora), "base": args.base}, text=f"{line}\nwrote {args.dst}")


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError and DamageError as convert.import_checkpoint."""
    if args.base is not None:
        return _adapters(args)
    how = pick(args, "format", "dtype", "vocab_size", "rope_tables", "memory_gb", "workers")
    progress = Progress("import")
    done = convert.import_checkpoint(args.src, args.dst, **how, resume=not args.start_over, progress=progress)
    release, cfg = done.release, done.release.cfg
    names = [*(file.name for file in release.files), *release.documents]
    lines = [
        f"{release.format}: {cfg.num_layers} layers, embed {cfg.embed_dim:,}, {cfg.num_heads} heads of {cfg.head_dim} "
        f"({cfg.num_kv_heads} of keys), mlp {cfg.mlp_dim:,}, vocabulary {cfg.vocab_size:,}; "
        f"{count_params(cfg):,} parameters in {cfg.param_dtype}",
        *release.notes,
        f"beside the weights: {', '.join(names)}" if names else "no tokenizer in SRC: name one to generate and chat",
        _drawing(release.generation),
        f"{done.resumed_tiles} of {done.tiles} parts were there from an import that was interrupted"
        if done.resumed_tiles
        else "",
        f"wrote {args.dst}: {done.bytes_written:,} bytes in {done.seconds:.1f} s",
    ]
    figures = {"format": release.format, "config": to_dict(cfg), "parameters": count_params(cfg), "files": names}
    figures |= {"notes": release.notes, "generation": release.generation, "workers": done.workers}
    figures |= {name: getattr(done, name) for name in ("seconds", "bytes_read", "bytes_written")}
    figures |= {"resumed_parts": done.resumed_tiles, "parts": done.tiles}
    return Outcome(figures, text="\n".join(filter(None, lines)))
