"""Streams growths that are killed on the way; run by test_stream.py, never imported.

python -m tests.growth.killed WORK [SHARE]: saves WORK/src, streams it undisturbed into WORK/all, counting what that
does to the file system, and then, always from a fork,
  into WORK/chain<i>    again and again, ended by SIGKILL at a random one of these events, until it is complete;
  into WORK/late<i>     once, ended at one of the last events, where it becomes the checkpoint; then undisturbed;
  into WORK/timed<i>    ended from outside after a random time; then undisturbed;
  into WORK/shards      from three processes at once, one of which is killed and started again.
Prints, as JSON, how often each was killed and what is left in WORK. Without SHARE, all of the
kills below are made, 25 and more; the test makes a quarter of them.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.axes import flatten, unflatten
from tele_jax.checkpoint import saving  # noqa: F401  brings Orbax, once for all forks
from tests.checkpoint.trees import CFG
from tests.growth.strategies import GROWTH, flat_spec

DST = CFG.replace(num_layers=5, embed_dim=21, mlp_dim=37, num_heads=6)
HOW = dict(opt=True, chunk_bytes=1500, memory_gb=0.2)
CHAINED_KILLS, LATE_KILLS, TIMED_KILLS = 16, 5, 4


class Events:
    """Counts file-system events in a directory, in all threads, and ends the process at the one asked for."""

    NAMES = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"})

    def __init__(self, directory: Path, fatal: int | None):
        self.directory, self.fatal, self.count, self.lock = str(directory), fatal, 0, threading.Lock()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if event in self.NAMES and str(args[0]).startswith(self.directory):
            with self.lock:
                self.count += 1
                if self.count == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)


def plan() -> growth.Plan:
    for module in ("plan", "policies"):
        GROWTH[module].flat_spec = flat_spec  # evaluates no module: half a second less for every fork
    return growth.plan(CFG, DST, seed=5)


def save(path: Path) -> None:
    generator = np.random.default_rng(0)
    specs = [flatten(tele.spec(CFG))] * 3
    params, mu, nu = (
        unflatten({name: generator.standard_normal(spec.shape, np.float32) for name, spec in leaves.items()})
        for leaves in specs
    )
    born = {axis: np.zeros(size, np.int32) for axis, size in CFG.axis_sizes.items()}
    checkpoint.save(path, CFG, params, opt_state={"count": np.int32(9), "mu": mu, "nu": nu, "born": born})


def stream(work: Path, name: str, fatal: int | None = None, **how) -> int:
    """Events that it took; to be called in a fork."""
    events = Events(work / name, fatal)
    growth.stream(plan(), work / "src", work / name, **HOW, **how)
    return events.count


def fork(function, *args, **kwargs):
    """Begins function(...) in a fork, made before JAX starts its threads; returns a way to wait for its result."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(function(*args, **kwargs)).encode())
        finally:
            os._exit(0)
    os.close(writer)

    def wait():
        _, status = os.waitpid(child, 0)
        result = os.read(reader, 100)
        os.close(reader)
        # With a result it had come to its end, also where a kill from outside met it just then.
        assert result or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status
        return json.loads(result) if result else None

    wait.pid = child
    return wait


def main(work: Path, share: float = 1.0) -> dict:
    chance = random.Random(0)
    chained, late, timed = (math.ceil(share * n) for n in (CHAINED_KILLS, LATE_KILLS, TIMED_KILLS))
    fork(save, work / "src")()
    began = time.monotonic()
    total = fork(stream, work, "all")()
    seconds = time.monotonic() - began

    kills = {"chain": 0, "late": 0, "timed": 0, "shards": 0}
    chain = 0
    while kills["chain"] < chained or not (work / f"chain{chain}").exists():
        chain += (work / f"chain{chain}").exists()
        kills["chain"] += fork(stream, work, f"chain{chain}", chance.randrange(1, total // 2))() is None
    for i in range(late):
        before_end = 3 * i
        # The number of events differs a little from run to run: one that came to its end before its kill begins anew.
        while fork(stream, work, f"late{i}", total - before_end)() is not None:
            shutil.rmtree(work / f"late{i}")
            before_end += 1
        kills["late"] += 1
        if not (work / f"late{i}").exists() or (work / f"late{i}.partial/header.json").exists():
            assert fork(stream, work, f"late{i}")()
    for i in range(timed):
        child = fork(stream, work, f"timed{i}")
        time.sleep(chance.uniform(0.0, seconds))
        os.kill(child.pid, signal.SIGKILL)
        kills["timed"] += child() is None
        if not (work / f"timed{i}").exists():
            assert fork(stream, work, f"timed{i}")()
    children = [fork(stream, work, "shards", total // 6 if i == 1 else None, shard=(i, 3)) for i in range(3)]
    kills["shards"] += [child() is None for child in children].count(True)
    assert not (work / "shards").exists()
    assert fork(stream, work, "shards", shard=(1, 3))()
    return {"kills": kills, "events": total, "left": sorted(os.listdir(work))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(float, sys.argv[2:]))))
