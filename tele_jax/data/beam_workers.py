"""Keeps Beam's worker processes from outliving the command that started them, however it ends.

Beam's DirectRunner starts workers as processes of their own, and waits for them; killed, it leaves them behind at work.
A worker imports this module first, and waits in a thread for a lock that the command holds: whatever ends the command
frees it.
"""

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator

VARIABLE = "TELE_BEAM_COMMAND"  # path of the file that the command has locked
OPTION = f"--beam_plugins={__name__}"  # for Beam: its workers import this module


@contextlib.contextmanager
def ending_with_us() -> Iterator[None]:
    """Workers of a pipeline with OPTION that are started inside end with this process."""
    with tempfile.NamedTemporaryFile(prefix="tele_beam_") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.environ[VARIABLE] = held.name
        try:
            yield
        finally:
            del os.environ[VARIABLE]


def _end_with(path: str) -> None:
    with contextlib.suppress(OSError), open(path) as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # comes when the command has ended
        with contextlib.suppress(OSError):
            os.unlink(path)
    os._exit(0)


if VARIABLE in os.environ:  # this is a worker
    threading.Thread(target=_end_with, args=(os.environ[VARIABLE],), daemon=True).start()
