"""Keeps Beam's worker processes from outliving the command that started them, however it ends.

Beam's DirectRunner starts workers as processes of their own, and waits for them; killed, it leaves them behind at work.
A worker imports this module first, and waits in a thread for a lock that the command holds: whatever ends the command
frees it. Ctrl-C comes to all of them at once, and is left to the command.
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
OPTION = f"--beam_plugins={__name__}"  # for Beam: its workers import this module


@contextlib.contextmanager
def ending_with_us() -> Iterator[None]:
    """Workers of a pipeline with OPTION that are started inside end with this process."""
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
    """A hook for errors of threads that is silent where Ctrl-C ended the shell by which Beam starts a worker."""

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
    """Leaves Ctrl-C to the command: what is taken from this worker then is not worth a page of frames."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


if VARIABLE in os.environ:  # this is a worker
    with contextlib.suppress(ValueError):  # not in its main thread
        signal.signal(signal.SIGINT, _fall_silent)
    threading.Thread(target=_end_with, args=(os.environ[VARIABLE],), daemon=True).start()
