"""`tele merge`: merges checkpoints of one architecture into one, and writes a receipt beside it."""

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from tele_jax.cli import Outcome, Progress, flag, pick
from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.growth.merge_stored import merge_stored
from tele_jax.growth.merging import METHODS, Recipe
from tele_jax.inference.chat import find_tokenizer


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "srcs SRC", "checkpoints, stage directories or work directories to merge", nargs="+")
    flag(parser, "dst DST", "directory of the merged checkpoint; must not exist")
    flag(parser, "--method", f"method: {', '.join(METHODS)}; default: linear", choices=METHODS, default="linear")
    flag(parser, "--base CKPT", "task_arithmetic, ties: the checkpoint that every SRC was fine-tuned from")
    flag(parser, "--weights W,W,...", "weight of each SRC; linear divides them by their sum; default: 1 each")
    flag(parser, "--t T", "slerp: place between the first SRC (0) and the second (1)", float)
    flag(parser, "--density D", "ties: share of each task vector that is kept; default: 0.2", float)
    flag(parser, "--scale S", "task_arithmetic, ties: factor on the merged task vector; default: 1", float)
    scope = "slerp, ties: angle or threshold of each tensor, or of the model; default: tensor"
    flag(parser, "--scope", scope, choices=("tensor", "model"))
    slices = "passthrough: layers in order, as in 0:0-16,1:8-24: 0 to 15 of the first, 8 to 23 of the second"
    flag(parser, "--slices I:A-B,...", slices)
    flag(parser, "--memory-gb G", "memory in 10^9 bytes; default: 4", float, default=4.0)
    flag(parser, "--workers N", "number of threads; default: two a core", int)


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError and DamageError as growth.merge_stored.merge_stored."""
    if args.memory_gb <= 0:
        raise UserError(f"--memory-gb {args.memory_gb:g}: must be above 0")
    given = {name: value for name, value in pick(args, "t", "density", "scale", "scope").items() if value is not None}
    if args.weights is not None:
        given["weights"] = _weights(args.weights)
    if args.slices is not None:
        given["slices"] = tuple(map(_slice, args.slices.split(",")))
    embedding = given["slices"][0][0] if "slices" in given else 0  # the SRC whose embedding the result has
    files = _tokenizer([*args.srcs[embedding:], *args.srcs[:embedding]])
    how = pick(args, "base", "memory_gb", "workers") | {"copies": files, "progress": Progress("merge")}
    figures, receipt = merge_stored(Recipe(method=args.method, **given), args.srcs, args.dst, **how)
    speed = f"{figures.bytes_written:,} bytes in {figures.seconds:.1f} s with {figures.workers} threads"
    return Outcome(receipt | {"figures": dataclasses.asdict(figures)}, text=f"wrote {args.dst}: {speed}")


def _tokenizer(srcs: Sequence[str]) -> tuple[Path, ...]:
    """The tokenizer of the first SRC that has one; raises UserError where two differ."""
    found = []
    for src in srcs:
        with contextlib.suppress(UserError):  # a checkpoint from elsewhere may come without
            found.append(Path(find_tokenizer(src)))
    for other in found[1:]:
        same = other.name != found[0].name or other.read_bytes() == found[0].read_bytes()
        require(
            same, f"{other}: is another tokenizer than {found[0]}, so that ids mean other tokens; merge models of one"
        )
    return (*found[:1],)


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--weights {text}: expected numbers such as 0.5,0.5") from None


def _slice(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d+):(\d+)-(\d+)", text)
    require(match is not None, f"--slices {text}: expected I:A-B, layers A to B - 1 of the I-th SRC (from 0)")
    assert match is not None  # require has raised
    return tuple(map(int, match.groups()))
