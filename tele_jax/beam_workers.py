"""Ends Beam's worker processes with the command that started them, however it ends.

Beam's DirectRunner starts workers as processes of their own and waits for them; killed, it leaves them at work. A
worker imports this module first and waits in a thread for a file lock that the command holds: whatever ends the command
releases it. Ctrl-C reaches all processes at once; workers leave it to the command.
"""

import contextlib
import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

VARIABLE = "TELE_BEAM_COMMAND"  # path of the file that the command has locked
OPTION = f"--beam_plugins={__name__}"  # makes Beam's workers import this module


@contextlib.contextmanager
def ending_with_us() -> Iterator[None]:
    """Makes workers that a pipeline with OPTION starts in the body end with this process."""
    with tempfile.NamedTemporaryFile(prefix="tele_beam_") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.environ[VARIABLE] = held.name
        hook, threading.excepthook = threading.excepthook, _without_interrupted(threading.excepthook)
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            threading.excepthook = hook


def _without_interrupted(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Wraps a hook for errors of threads: silent where Ctrl-C ended the shell by which Beam starts a worker."""

    def quieter(failure: Any) -> None:
        if not str(failure.exc_value).endswith(("exited with return code -2", "exited with return code 130")):
            hook(failure)

    return quieter


def _end_with(path: str) -> None:
    with contextlib.suppress(OSError), open(path) as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # comes when the command has ended
        with contextlib.suppress(OSError):
            os.unlink(path)
    os._exit(0)


def _fall_silent(number: int, frame: object) -> None:
    """Discards this worker's error output from Ctrl-C on: the command reports it."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


if VARIABLE in os.environ:  # this is a worker
    with contextlib.suppress(ValueError):  # not in its main thread
        signal.signal(signal.SIGINT, _fall_silent)
    threading.Thread(target=_end_with, args=(os.environ[VARIABLE],), daemon=True).start()
