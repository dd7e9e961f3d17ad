"""`tele grow` killed on the way and called again; run by test_grow.py, never imported.

python -m tests.cli.killed_growth WORK: WORK/src and WORK/page.py are there. The command, always in a fork:
  WORK/all/dst      undisturbed
  WORK/again/dst    ended by SIGKILL at one of MOMENTS after another, and then left alone
  WORK/late/dst     ended when all is done but for the lock
  WORK/shards/dst   two processes at once, each with half of the work, one of which is killed and called again
Prints, as JSON, the exit codes, null where it was killed.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from tele_jax.checkpoint import saving  # noqa: F401  brings Orbax, once for all forks
from tele_jax.cli.main import main as tele
from tele_jax.growth import receipt as receipts
from tests.growth.killed import fork
from tests.growth.strategies import GROWTH, flat_spec

# (audit event, part of the path, how many of those are let pass)
MOMENTS = (
    ("open", "/c/", 17),  # a chunk of the grown leaves
    ("os.rename", "checkpoint.orbax-checkpoint-tmp", 0),  # it is to become DST.unverified
    ("os.remove", "dst.unverified.partial/header.json", 0),  # it has, but what it was made with is still there
    ("open", ".growth_receipt.json.tele_jax.tmp", 0),  # verified
    ("os.rename", "dst.unverified", 2),  # after the receipt and the plan: it is to become DST
)
AFTER_ALL = ("os.remove", "dst.unverified.lock", 0)


class Kill:
    """Ends the process at a moment."""

    def __init__(self, directory: Path, moment: tuple[str, str, int]):
        self.directory, (self.event, self.part, self.left) = str(directory), moment
        self.lock = threading.Lock()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if event == self.event and str(args[0]).startswith(self.directory) and self.part in str(args[0]):
            with self.lock:
                self.left -= 1
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)


def grow(work: Path, name: str, moment: tuple[str, str, int] | None = None, *more: str) -> int:
    """The exit code; to be called in a fork."""
    for module in ("check", "plan", "policies"):
        GROWTH[module].flat_spec = flat_spec  # evaluates no module: half a second less for every fork
    receipts._LARGE_TREES = 10**9  # as for models larger than memory: logits are compared in test_grow.py
    (work / name).mkdir(exist_ok=True)
    if moment is not None:
        Kill(work / name, moment)
    where = [str(work / "src"), str(work / name / "dst"), "--config", str(work / "page.py")]
    with (work / name).with_suffix(".txt").open("a") as printed, contextlib.redirect_stdout(printed):
        return tele(["grow", *where, "--opt", *more])


def main(work: Path) -> dict:
    codes = {"all": [fork(grow, work, "all")()]}
    codes["again"] = [fork(grow, work, "again", moment)() for moment in (*MOMENTS, None)]
    codes["late"] = [fork(grow, work, "late", AFTER_ALL)()]
    halves = [fork(grow, work, "shards", (None, MOMENTS[0])[i], "--shard", f"{i}/2") for i in range(2)]
    codes["shards"] = [half() for half in halves]
    codes["shards"].append(fork(grow, work, "shards", None, "--shard", "1/2")())
    return codes


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
