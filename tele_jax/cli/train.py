"""`tele train`: run the stages of a config in order; started again, it goes on where it was."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tele_jax.cli import several

HELP = "run the stages of a config: pretrain, grow, fine-tune"
OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a page with get_config(), as in configs/")
    parser.add_argument("--workdir", required=True, type=Path, metavar="W", help="where the run lives")
    several.arguments(parser)
    parser.epilog = "--config.STAGE.KEY=VALUE changes a value of the config, as often as wanted"


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tele_jax.cli.pages import load_page
    from tele_jax.processes import find_place
    from tele_jax.run import run_config

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

    from tele_jax.processes import on_tpu
    from tele_jax.train import memory

    platforms = jax.config.jax_platforms
    others = on_tpu() or importlib.metadata.entry_points(group="jax_plugins")
    if platforms == "cpu" or (not platforms and not others):
        memory.keep_freed()


def _run(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    from tele_jax import processes, report
    from tele_jax.train import loop

    try:
        summaries = loop.run(config, args.workdir)
    except loop.Stopped as stopped:
        if processes.is_first():
            print(stopped, file=sys.stderr)
        raise SystemExit(143) from None  # 128 + SIGTERM: a launcher sees that the run is not finished
    if processes.is_first():
        print(report.write(args.workdir, summaries))
    else:
        args.json = None
    return {"stages": summaries}
