"""`tele train`: runs the stages of a config in order; started again, it goes on where it was.

Several processes can carry it out together: tele train ... --coordinator-address localhost:1234 --num-processes 2
--process-id 0.
"""

import argparse
import contextlib
import importlib.metadata
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax

from tele_jax import processes
from tele_jax.cli import Outcome, flag, note, of_error, one_line
from tele_jax.cli.pages import load_page
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.model import platforms
from tele_jax.stages import run_config

JOIN_SECONDS = 300  # how long a process waits for the others; or TELE_JOIN_SECONDS
_LOOK_SECONDS = 1.0  # how often a process asks whether another has failed
_GRACE_SECONDS = 3.0  # for its own main thread, which most often finds the same mistake


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--config FILE", "page with get_config(), as in configs/", required=True)
    flag(parser, "--workdir W", "directory of this run alone", _directory, required=True)
    back = "checkpoint of the last stage to go back to; its optimizer, schedule or steps may change from there on"
    flag(parser, "--from STEP", back, _step, dest="from_step")
    place_arguments(parser)
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
    with together(place):
        from tele_jax import report  # what it brings would start threads before set_up
        from tele_jax.train.trainer import Stopped

        try:
            summaries = report.run(config, args.workdir, from_step=args.from_step)
        except Stopped as stopped:
            # 128 and the signal's number: a launcher sees that the run is not finished.
            code = 130 if stopped.interrupted else 143
            return Outcome(error=str(stopped) if processes.is_first() else "", code=code)
        return Outcome({"stages": summaries} if processes.is_first() else None)


# ---- several processes: their flags, how they join, and how they end together ----------------------------------------


def place_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where this process stands among others."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command in each. On TPU slices nothing need be said; elsewhere all three, or the variables.",
    )
    flag(group, "--coordinator-address HOST:PORT", "address of process 0; default: JAX_COORDINATOR_ADDRESS")
    flag(group, "--num-processes N", "number of processes; default: JAX_NUM_PROCESSES, or 1")
    flag(group, "--process-id I", "number of this process, from 0; default: JAX_PROCESS_ID")


@contextlib.contextmanager
def together(place: processes.Place | None) -> Iterator[None]:
    """Joins the other processes. When one of them fails, all end with its exit code, and say why in one line.

    place: what processes.find_place makes of the flags.

    Raises:
      UserError: as processes.start; TELE_JOIN_SECONDS is no time.
    """
    _join(place, _join_seconds())
    if not processes.is_distributed():
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        done.set()
        _end(error)
    done.set()
    watcher.join()


def _join_seconds() -> int:
    text = os.environ.get("TELE_JOIN_SECONDS", str(JOIN_SECONDS))
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UserError(f"TELE_JOIN_SECONDS={text}: is not a number of seconds above 0")
    return int(text)


def _join(place: processes.Place | None, seconds: int) -> None:
    """Joins the others within so many seconds, where JAX would end with a stack trace; raises as processes.start."""

    def give_up() -> None:
        who = "processes of this slice"
        if place is not None:
            who = f"{place.num_processes} processes at {place.coordinator_address}"
        note(f"the {who} did not all come within {seconds} s; start the same command on every worker")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        processes.start(place, timeout=2 * seconds)
    finally:
        timer.cancel()


def _end(error: BaseException) -> None:
    """Ends this process because of an error. An orderly shutdown of JAX would wait for what the others are at."""
    known = of_error(error)
    line, code = (f"{type(error).__name__}: {error}", 1) if known is None else (known.error, known.code)
    if known is None:
        # What is exchanged with a process that has left breaks here: no failure of its own.
        failure = processes.failure_of_others()
        if failure is not None:
            _follow(failure)
        traceback.print_exception(error)
    line, index = one_line(line), jax.process_index()
    if processes.fail(line, code) or index == 0:
        note(line if index == 0 else f"process {index}: {line}")
    _exit(code)


def _watch(done: threading.Event) -> None:
    """Ends this process when another has failed, whatever its main thread waits for."""
    while not done.wait(_LOOK_SECONDS):
        failure = processes.failure_of_others()
        if failure is not None and not done.wait(_GRACE_SECONDS):
            _follow(failure)


def _follow(failure: Table) -> NoReturn:
    """Ends this process as another has ended, which told it."""
    line = f"process {failure['process']} failed: {failure['line']}"
    index = jax.process_index()
    note(line if index == 0 else f"process {index} stops: {line}")
    _exit(failure["code"])


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    processes.leave()
    os._exit(code)
