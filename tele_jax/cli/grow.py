"""`tele grow`: grow a checkpoint into a larger one, verify it, and write the receipt beside it."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tele_jax.errors import UserError

HELP = "grow a checkpoint into a larger one"
OVERRIDES = True
VERIFY_SHAPE = (4, 128)  # rows and tokens of random ids to verify on, where no text is given


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint, stage directory or work directory to grow")
    parser.add_argument("dst", metavar="DST", type=Path, help="where the grown checkpoint goes; must not exist")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a page with a growth stage, or with a growth alone"
    )
    parser.add_argument("--stage", metavar="NAME", help="which growth stage of the page, where it has several")
    parser.add_argument("--policy", help="instead of the page's: exact, msg, copy, stack, random")
    parser.add_argument(
        "--layers", help="instead of the page's: uniform, last, middle, distance, or ids such as 0,1,1,2"
    )
    parser.add_argument("--seed", type=int, help="instead of the page's: of the fresh values")
    parser.add_argument("--opt", action="store_true", help="grow the optimizer state as well; SRC must hold one")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to verify on; random tokens without it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import jax

    from tele_jax import checkpoint
    from tele_jax.chat import find_tokenizer
    from tele_jax.cli.pages import load_page
    from tele_jax.growth.masks import require_unmasked
    from tele_jax.run import MeshConfig
    from tele_jax.sharding import make_mesh
    from tele_jax.train import growing

    if args.dst.exists():
        raise UserError(f"{args.dst}: exists already, and checkpoints are never overwritten; choose another DST")
    stage, where = _stage(load_page(args.config, args.overrides), args)
    require_unmasked(checkpoint.open_lazy(args.src).provenance, args.src)
    loaded = checkpoint.load(args.src)
    if args.opt and loaded.opt_state is None:
        raise UserError(f"{args.src}: holds no optimizer state to grow; leave out --opt")
    tokens, source = _tokens(args, loaded.cfg)
    plan, params, opt_state, receipt = growing.grow(
        loaded.cfg,
        loaded.params,
        loaded.opt_state if args.opt else None,
        stage,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        tokens,
        where,
    )
    print(plan)
    receipt["verified_on"] = source
    entry = growing.provenance_entry(args.dst.name, plan, receipt)
    checkpoint.save(
        args.dst, plan.dst_cfg, params, opt_state=opt_state, provenance=[*loaded.provenance, entry], step=loaded.step
    )
    (args.dst / "growth_receipt.json").write_text(json.dumps(receipt, indent=2) + "\n")
    (args.dst / "plan.json").write_text(json.dumps(plan.to_json(), indent=2) + "\n")
    try:
        tokenizer = Path(find_tokenizer(args.src))
    except UserError:
        tokenizer = None  # a checkpoint from elsewhere may come without; chat and generate then ask for one
    if tokenizer is not None:
        (args.dst / tokenizer.name).write_bytes(tokenizer.read_bytes())
    print(f"verified on {source}: logits moved by {receipt['max_abs']:.3g} at most; wrote {args.dst}")
    return receipt


def _stage(page: Any, args: argparse.Namespace) -> tuple[Any, str]:
    """The growth stage of the page, with the command line's changes, and its name for messages."""
    from tele_jax.config import from_dict
    from tele_jax.run import GrowStage

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
    from tele_jax.chat import find_tokenizer
    from tele_jax.data.vocabulary import load_vocabulary

    try:
        text = args.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{args.text}: not UTF-8 at byte {error.start}") from None
    ids = load_vocabulary(find_tokenizer(args.src)).encode(text)[: rows * length]
    if len(ids) < 3:
        raise UserError(f"{args.text}: too short to verify on, {len(ids)} tokens")
    length = min(length, len(ids))
    rows = len(ids) // length
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length), str(args.text)
