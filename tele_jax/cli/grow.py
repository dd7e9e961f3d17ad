"""`tele grow`: grows a checkpoint into a larger one, verifies it, and writes the receipt beside it."""

import argparse
import re
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tele_jax import checkpoint
from tele_jax.checkpoint.locate import local_path, new_path
from tele_jax.cli import Outcome, Progress, flag, pick, switch
from tele_jax.cli.pages import load_page
from tele_jax.config import ModelConfig, from_dict, require
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import FailedError, UserError
from tele_jax.files import Table, read_bytes
from tele_jax.growth import receipt as receipts
from tele_jax.inference.chat import find_tokenizer
from tele_jax.processes import find_place
from tele_jax.settings import GrowStage

VERIFY_SHAPE = (4, 128)  # rows and tokens of random ids to verify on, where no text is given


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "src SRC", "checkpoint, stage directory or work directory to grow")
    flag(parser, "dst DST", "directory of the grown checkpoint; must not exist")
    flag(parser, "--config FILE", "page with a growth stage, or with a growth alone")
    flag(parser, "--stage NAME", "growth stage of the page; default: the only one")
    flag(parser, "--policy", "policy: exact, msg, copy, stack, interleave, random; default: the page's")
    flag(parser, "--layers", "uniform, last, middle, distance, or ids such as 0,1,1,2; default: the page's")
    flag(parser, "--seed", "seed of the fresh values; default: the page's", int)
    switch(parser, "--opt", "grow the optimizer state as well; SRC must hold one")
    flag(parser, "--text FILE", "UTF-8 text to verify on; default: random tokens", Path)
    memory = "memory in 10^9 bytes; models that do not fit are verified part by part, without logits; default: 4"
    flag(parser, "--memory-gb G", memory, float, default=4.0)
    flag(parser, "--workers N", "number of threads that write; default: two a core", int)
    shard = "the I-th of N processes that write one checkpoint; default: JAX_PROCESS_ID/JAX_NUM_PROCESSES, or 0/1"
    flag(parser, "--shard I/N", shard)
    switch(parser, "--dry-run", "print the plan, bytes to read and write, disk, memory and verification; write nothing")
    check = "compare a DST that was grown before with SRC and with its receipt; write nothing, take no growth flags"
    switch(parser, "--check", check)


def run(args: argparse.Namespace) -> Outcome:
    """Raises UserError and FailedError as growth.receipt.grow_stored."""
    if args.memory_gb <= 0:
        raise UserError(f"--memory-gb {args.memory_gb:g}: must be above 0")
    if args.check:
        return _check(args, local_path(args.dst))
    if args.config is None:
        raise UserError("--config FILE is needed: it says what to grow SRC into")
    dst = new_path(args.dst, checkpoint.open_lazy(args.src).path, "growth from checkpoint to checkpoint")
    if dst.exists():
        raise UserError(f"{dst}: exists already, and checkpoints are never overwritten; choose another DST")
    stage, where = read_stage(load_page(args.config, args.overrides), args)
    cfg = checkpoint.open_lazy(args.src).cfg
    tokens, verified_on = _tokens(args, cfg)
    try:
        files = (Path(find_tokenizer(args.src)),)
    except UserError:
        files = ()  # a checkpoint from elsewhere may come without; chat and generate then ask for one
    how = pick(args, "src", "opt", "memory_gb", "workers") | {"shard": _shard(args.shard), "verified_on": verified_on}
    request = receipts.Request(dst=dst, stage=stage, where=where, tokens=tokens, files=files, **how)
    if stage.layers == "distance" and args.text is None:
        print("note: layers are chosen by what they do to random tokens; --text FILE gives better scores")
    _say_without_effect(args, stage, cfg, request)
    if args.dry_run:
        return Outcome(receipts.outline(request, print))
    receipt = receipts.grow_stored(request, print, Progress("grow"))
    if receipt is None:
        return Outcome({})
    lines = [_summary(receipt, dst)]
    if receipt["masked"]:
        lines.append(
            "its masks are closed: it is the model from before the growth until a run opens them, "
            f"--config.start={dst} with mask_ramp above 0 in the first stage"
        )
    return Outcome(receipt, text="\n".join(lines))


def _say_without_effect(
    args: argparse.Namespace, stage: GrowStage, cfg: ModelConfig, request: receipts.Request
) -> None:
    """Says which flags of the command line change nothing."""
    larger = cfg.replace_from(stage.model, f"{request.where}.model")
    deeper = larger.num_layers != cfg.num_layers
    if args.layers is not None and not deeper:
        print(f"note: --layers {args.layers} has no effect: the number of layers stays {cfg.num_layers}")
    plan = receipts.plan_of(cfg, stage, request.where)
    drawn = any(leaf.fill == "normal" and plan.tally(name)["fresh"] for name, leaf in plan.leaves.items())
    if args.seed is not None and not drawn:
        print(f"note: --seed {args.seed} has no effect: policy {plan.policy} draws nothing here")
    wholly = receipts.verifies_wholly(plan, checkpoint.open_lazy(args.src), args.memory_gb)
    if args.text is not None and not wholly and not (stage.layers == "distance" and deeper):
        print("note: --text has no effect: logits are not compared, which needs more --memory-gb")


def _check(args: argparse.Namespace, dst: Path) -> Outcome:
    names = ("config", "stage", "policy", "layers", "seed", "opt", "workers", "shard", "dry_run")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]
    where = f"--check compares {dst} with the plan and the receipt in it"
    given += args.overrides
    require(not given, f"{where}, and grows nothing: leave out {', '.join(given)}")
    tokens, verified_on = _tokens(args, checkpoint.open_lazy(args.src).cfg)
    report = receipts.recheck(args.src, dst, tokens, args.memory_gb)
    print(f"{report}\nverified on {verified_on}")
    if not report.ok:
        raise FailedError(f"{dst}: is not what its receipt promises")
    return Outcome(report.to_json())


def _summary(receipt: Table, dst: Path) -> str:
    name, worst = max(receipt["parts"].items(), key=lambda item: item[1])
    if receipt["max_abs"] is None:
        number = len(receipt["parts"])
        how = f"verified part by part: {number} parts differ by {worst:.3g} of their output at most ({name})"
        asked = receipt["absolute_tolerance"]
        untested = "" if asked is None else f", so that tolerance={asked:g} was not applied"
        return f"{how}; logits were not compared, which needs more --memory-gb{untested}; wrote {dst}"
    return f"verified on {receipt['verified_on']}: logits moved by {receipt['max_abs']:.3g} at most; wrote {dst}"


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        place = find_place({})
        return (0, 1) if place is None else (place.process_id, place.num_processes)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 <= shard[0] < shard[1]:
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, for example 0/4")
    return shard


def read_stage(page: ConfigDict, args: argparse.Namespace) -> tuple[GrowStage, str]:
    """The growth stage of the page, with the command line's changes, and its name for messages."""
    is_growth = lambda table: hasattr(table, "get") and table.get("kind") == "grow"  # noqa: E731
    tables: Table = {name: table for name, table in page.items() if is_growth(table)}
    if args.stage is not None:
        if args.stage not in tables:
            raise UserError(
                f"--stage {args.stage}: not a growth stage of {args.config}; it has {', '.join(tables) or 'none'}"
            )
        name = args.stage
    elif len(tables) == 1:
        name = next(iter(tables))
    elif "model" in page:
        name, tables = "", {"": page}
    else:
        found = f"several growth stages ({', '.join(tables)}); choose with --stage" if tables else "no growth stage"
        raise UserError(f"--config {args.config}: {found}")
    values = {"kind": "grow", **{key: value for key, value in tables[name].items()}}
    for key in ("policy", "seed"):
        if getattr(args, key) is not None:
            values[key] = getattr(args, key)
    if args.layers is not None:
        values["layers"] = args.layers
        if re.fullmatch(r"\d+(,\d+)*", args.layers):
            values["layers"] = tuple(int(i) for i in args.layers.split(","))
    where = f"config.{name}" if name else "config"
    return from_dict(GrowStage, values, where), where


def _tokens(args: argparse.Namespace, cfg: ModelConfig) -> tuple[np.ndarray, str]:
    """Tokens int32[B, S] to verify on, and what they are."""
    rows, length = VERIFY_SHAPE
    length = length if cfg.rope.ntk is not None else min(length, cfg.max_seq_len)
    if args.text is None:
        return np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, length), np.int32), "random tokens, seed 0"
    try:
        text = read_bytes(args.text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{args.text}: not UTF-8 at byte {error.start}") from None
    vocabulary = load_vocabulary(find_tokenizer(args.src))
    if vocabulary.vocab_size > cfg.vocab_size:
        raise UserError(f"{args.src}: its tokenizer has {vocabulary.vocab_size} ids, its model {cfg.vocab_size}")
    ids = vocabulary.encode(text)[: rows * length]
    if len(ids) < 3:
        raise UserError(f"{args.text}: too short to verify on, {len(ids)} tokens")
    length = min(length, len(ids))
    rows = len(ids) // length
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length), str(args.text)
