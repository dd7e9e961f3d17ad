"""`tele train`: run the stages of a config in order; started again, it goes on where it was."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tele_jax.cli import process_group as several

HELP = "run the stages of a config: pretrain, grow, fine-tune"
OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a page with get_config(), as in configs/")
    parser.add_argument("--workdir", required=True, type=_directory, metavar="W", help="directory of the run alone")
    parser.add_argument(
        "--from",
        dest="from_step",
        type=_step,
        metavar="STEP",
        help="go back to this checkpoint of the last stage, and change its optimizer, schedule or steps from there on",
    )
    several.arguments(parser)
    parser.epilog = (
        "--config.STAGE.KEY=VALUE changes a value of the config, as often as wanted. Exit codes: 0 done, 2 a mistake "
        "in the command or config, 1 a failure, 130 after Ctrl-C, 143 after SIGTERM (both saved)."
    )


def _directory(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name is no directory")
    return Path(text)


def _step(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a step")
    return int(text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tele_jax.cli.pages import load_page
    from tele_jax.processes import find_place
    from tele_jax.stages import run_config

    place = find_place(vars(args))
    if args.own_process:
        _keep_freed_memory()
    config = run_config(load_page(args.config, args.overrides))
    with several.together(place):
        return _run(args, config)


def _keep_freed_memory() -> None:
    """Only where JAX will compute on the CPU: the host of a TPU has other uses for its memory, and more threads.

    JAX cannot be asked: it would start its threads, and the allocator has to be told before.
    """
    import importlib.metadata

    import jax

    from tele_jax.model import cpu
    from tele_jax.processes import on_tpu

    platforms = jax.config.jax_platforms
    others = on_tpu() or importlib.metadata.entry_points(group="jax_plugins")
    if platforms == "cpu" or (not platforms and not others):
        cpu.keep_freed()


def _run(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    from tele_jax import processes, report
    from tele_jax.train import loop

    try:
        summaries = loop.run(config, args.workdir, from_step=args.from_step)
    except loop.Stopped as stopped:
        if processes.is_first():
            print(stopped, file=sys.stderr)
        # 128 and the signal's number: a launcher sees that the run is not finished.
        raise SystemExit(130 if stopped.interrupted else 143) from None
    if processes.is_first():
        print(report.write(args.workdir, summaries))
    else:
        args.json = None
    return {"stages": summaries}
