"""Handles Ctrl-C while the command `tele` loads its libraries, a second or two: one line, and exit code 130.

Nothing is at work yet. A KeyboardInterrupt would print a page of frames, and some libraries make another error of it.
Other programs that import tele_jax keep their handlers.
"""

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    os.write(2, b"tele: interrupted\n")
    os._exit(130)


def _is_command() -> bool:
    argv = getattr(sys, "argv", None) or [""]
    return os.path.basename(argv[0]) == "tele" and signal.getsignal(signal.SIGINT) is signal.default_int_handler


if _is_command():
    signal.signal(signal.SIGINT, _leave)  # until cli.main takes it
