"""Saves three steps and is killed on the way; run by test_manager.py, never imported.

python -m tests.checkpoint.killed WORK KILLS: saves into WORK/all undisturbed, counting what it does to the file system
once step 1 is complete; then, KILLS times, into WORK/<i> from a fork that ends itself by SIGKILL at the i-th part of
that count. Prints, as JSON, the count and what each of them left.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.checkpoint import host_leaves
from tests.checkpoint.trees import CFG

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


class Events:
    """Counts file-system events below a directory once `armed`, and ends the process at the one asked for."""

    def __init__(self, directory: Path, fatal: int | None):
        self.directory, self.fatal, self.count, self.armed = str(directory), fatal, 0, False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.armed and event in EVENTS and str(args[0]).startswith(self.directory):
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def values(step: int) -> dict:
    specs = tele.axes.flatten(tele.spec(CFG))
    return tele.axes.unflatten({name: np.full(spec.shape, step, np.float32) for name, spec in specs.items()})


def save_three(directory: Path, fatal: int | None) -> int:
    events = Events(directory, fatal)
    write_array = host_leaves._write

    async def counted(*what):
        # TensorStore writes behind Python's back; the moments before and after each array count as well.
        events("open", (directory,))
        await write_array(*what)
        events("open", (directory,))

    host_leaves._write = counted
    with checkpoint.Manager(directory, keep=1) as manager:
        for step in (1, 2, 3):
            manager.save(step, CFG, values(step), {"mu": values(step)})
            manager.wait()
            events.armed = True
    return events.count


def in_a_fork(directory: Path, fatal: int | None) -> int | None:
    """Forked before JAX starts its threads, so that importing is paid once. The count, or None where killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(save_three(directory, fatal)).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    count = os.read(reader, 100)
    assert os.WIFSIGNALED(status) == (not count), status
    return int(count) if count else None


if __name__ == "__main__":
    work, kills = Path(sys.argv[1]), int(sys.argv[2])
    total = in_a_fork(work / "all", None)
    for i in range(kills):
        assert in_a_fork(work / str(i), 1 + i * (total - 1) // (kills - 1)) is None
    left = [sorted(os.listdir(work / str(i))) for i in range(kills)]
    print(json.dumps({"events": total, "left": left}))
