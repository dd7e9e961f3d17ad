"""`tele train`: runs the stages of a config in order; started again, it goes on where it was."""

import argparse
import importlib.metadata
from pathlib import Path

import jax

from tele_jax import processes
from tele_jax.cli import process_group
from tele_jax.cli.pages import load_page
from tele_jax.cli.verb import Outcome, flag
from tele_jax.model import platforms
from tele_jax.stages import run_config


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--config FILE", "page with get_config(), as in configs/", required=True)
    flag(parser, "--workdir W", "directory of this run alone", _directory, required=True)
    back = "checkpoint of the last stage to go back to; its optimizer, schedule or steps may change from there on"
    flag(parser, "--from STEP", back, _step, dest="from_step")
    process_group.arguments(parser)
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


def set_up() -> None:
    """Keeps freed memory where JAX will compute on the CPU; the host of a TPU has other uses for its memory.

    JAX cannot be asked: it would start its threads, and the allocator has to be told before.
    """
    wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] - declared while jax starts
    others = processes.on_tpu() or importlib.metadata.entry_points(group="jax_plugins")
    if wanted == "cpu" or (not wanted and not others):
        platforms.keep_freed()


def run(args: argparse.Namespace) -> Outcome:
    """Raises what train.loop.run raises, except that a run which was stopped is an outcome."""
    place = processes.find_place(vars(args))
    config = run_config(load_page(args.config, args.overrides))
    with process_group.together(place):
        from tele_jax import report  # what it brings would start threads before set_up
        from tele_jax.train.trainer import Stopped

        try:
            summaries = report.run(config, args.workdir, from_step=args.from_step)
        except Stopped as stopped:
            # 128 and the signal's number: a launcher sees that the run is not finished.
            code = 130 if stopped.interrupted else 143
            return Outcome(error=str(stopped) if processes.is_first() else "", code=code)
        return Outcome({"stages": summaries} if processes.is_first() else None)
