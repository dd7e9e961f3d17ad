"""`tele grow`: grow a checkpoint into a larger one, verify it, and write the receipt beside it."""

import argparse
import re
from pathlib import Path
from typing import Any

from tele_jax.errors import FailedError, UserError

HELP = "grow a checkpoint into a larger one"
OVERRIDES = True
VERIFY_SHAPE = (4, 128)  # rows and tokens of random ids to verify on, where no text is given


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint, stage directory or work directory to grow")
    parser.add_argument("dst", metavar="DST", help="where the grown checkpoint goes; must not exist")
    parser.add_argument("--config", metavar="FILE", help="a page with a growth stage, or with a growth alone")
    parser.add_argument("--stage", metavar="NAME", help="which growth stage of the page, where it has several")
    parser.add_argument("--policy", help="instead of the page's: exact, msg, copy, stack, random")
    parser.add_argument(
        "--layers", help="instead of the page's: uniform, last, middle, distance, or ids such as 0,1,1,2"
    )
    parser.add_argument("--seed", type=int, help="instead of the page's: of the fresh values")
    parser.add_argument("--opt", action="store_true", help="grow the optimizer state as well; SRC must hold one")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to verify on; random tokens without it")
    parser.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        metavar="G",
        help="10^9 bytes to work in (default 4); models that do not fit are verified part by part, without logits",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads that write; by default two a core")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="the I-th of N processes that write one checkpoint together; by default as JAX_PROCESS_ID and "
        "JAX_NUM_PROCESSES say, else 0/1",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done: the plan, bytes to read and write, disk, memory, what is verified; write nothing",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="DST is there already: compare it and SRC with its receipt, and verify it again",
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from tele_jax import checkpoint
    from tele_jax.checkpoint.locate import local_path, new_path
    from tele_jax.cli.pages import load_page
    from tele_jax.cli.progress import Progress
    from tele_jax.growth import stored
    from tele_jax.inference.chat import find_tokenizer

    if args.memory_gb <= 0:
        raise UserError(f"--memory-gb {args.memory_gb:g}: must be above 0")
    if args.check:
        args.dst = local_path(args.dst)
        return _check(args)
    if args.config is None:
        raise UserError("--config FILE is needed: it says what to grow SRC into")
    args.dst = new_path(args.dst, checkpoint.open_lazy(args.src).path, "growth from checkpoint to checkpoint")
    if args.dst.exists():
        raise UserError(f"{args.dst}: exists already, and checkpoints are never overwritten; choose another DST")
    stage, where = _stage(load_page(args.config, args.overrides), args)
    cfg = checkpoint.open_lazy(args.src).cfg
    tokens, verified_on = _tokens(args, cfg)
    try:
        files = (Path(find_tokenizer(args.src)),)
    except UserError:
        files = ()  # a checkpoint from elsewhere may come without; chat and generate then ask for one
    request = stored.Request(
        src=args.src,
        dst=args.dst,
        stage=stage,
        where=where,
        tokens=tokens,
        verified_on=verified_on,
        opt=args.opt,
        memory_gb=args.memory_gb,
        workers=args.workers,
        shard=_shard(args.shard),
        files=files,
    )
    if stage.layers == "distance" and args.text is None:
        print("note: layers are chosen by what they do to random tokens; --text FILE gives better scores")
    _say_without_effect(args, stage, cfg, request)
    if args.dry_run:
        return stored.outline(request, print)
    receipt = stored.grow(request, print, Progress("grow"))
    if receipt is not None:
        print(_summary(receipt, args.dst))
        if receipt["masked"]:
            print(
                "its masks are closed: it is the model from before the growth until a run opens them, "
                f"--config.start={args.dst} with mask_ramp above 0 in the first stage"
            )
    return receipt


def _say_without_effect(args: argparse.Namespace, stage: Any, cfg: Any, request: Any) -> None:
    """Says which flags of the command line change nothing."""
    from tele_jax import checkpoint
    from tele_jax.growth import receipt as receipts
    from tele_jax.growth import stored

    larger = cfg.replace_from(stage.model, f"{request.where}.model")
    deeper = larger.num_layers != cfg.num_layers
    if args.layers is not None and not deeper:
        print(f"note: --layers {args.layers} has no effect: the number of layers stays {cfg.num_layers}")
    how = "uniform" if stage.layers == "distance" else stage.layers
    plan = receipts.plan_of(cfg, larger, stage, layers=how)
    drawn = any(leaf.fill == "normal" and plan.tally(name)["fresh"] for name, leaf in plan.leaves.items())
    if args.seed is not None and not drawn:
        print(f"note: --seed {args.seed} has no effect: policy {plan.policy} draws nothing here")
    wholly = stored.verifies_wholly(plan, checkpoint.open_lazy(args.src), args.memory_gb)
    if args.text is not None and not wholly and not (stage.layers == "distance" and deeper):
        print("note: --text has no effect: logits are not compared, which needs more --memory-gb")


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from tele_jax import checkpoint
    from tele_jax.growth import stored

    tokens, verified_on = _tokens(args, checkpoint.open_lazy(args.src).cfg)
    report = stored.recheck(args.src, args.dst, tokens, args.memory_gb)
    print(f"{report}\nverified on {verified_on}")
    if not report.ok:
        raise FailedError(f"{args.dst}: is not what its receipt promises")
    return report.to_json()


def _summary(receipt: dict[str, Any], dst: Path) -> str:
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
        from tele_jax.processes import find_place

        place = find_place({})
        return (0, 1) if place is None else (place.process_id, place.num_processes)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 <= shard[0] < shard[1]:
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, for example 0/4")
    return shard


def _stage(page: Any, args: argparse.Namespace) -> tuple[Any, str]:
    """The growth stage of the page, with the command line's changes, and its name for messages."""
    from tele_jax.config import from_dict
    from tele_jax.settings import GrowStage

    tables = {name: table for name, table in page.items() if getattr(table, "get", lambda _: None)("kind") == "grow"}
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


def _tokens(args: argparse.Namespace, cfg: Any) -> tuple[Any, str]:
    import numpy as np

    rows, length = VERIFY_SHAPE
    if args.text is None:
        return np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, length), np.int32), "random tokens, seed 0"
    from tele_jax.data.vocabulary import load_vocabulary
    from tele_jax.files import read_bytes
    from tele_jax.inference.chat import find_tokenizer

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
