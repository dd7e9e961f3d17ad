"""Verdicts on programs that a model wrote: they run in processes that are cut off from everything; see confine.py."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tele_jax.errors import FailedError, UserError
from tele_jax.eval import confine
from tele_jax.files import Table

LONGEST_VERDICT = 1 << 16
ADVICE = "run it on Linux 5.13 or newer, or give --unsafe-without-isolation where nothing can be harmed"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of each of the two processes.

    Attributes:
      cpu: seconds of processor time; wall time may be four times that and two seconds, since other work runs as well.
      memory: bytes of address space.
      file_size: bytes of a file; in mode "namespaces", of all files together.
    """

    cpu: int = 5
    memory: int = 1 << 29
    file_size: int = 1 << 24


def find_mode() -> str:
    """The strongest of confine.MODES that this system allows: "namespaces" or "landlock".

    Raises:
      UserError: it allows neither; says why.
    """
    reasons = []
    for mode in ("namespaces", "landlock"):
        try:
            with _started(_request("probe", mode, Limits()), "verdict") as (_, verdict):
                found = _read(verdict, time.monotonic() + 60)
        except OSError as error:
            found = {"unconfined": str(error)}
        if found == {}:
            return mode
        reasons.append(f"{mode}: {(found or {}).get('unconfined', 'no answer')}")
    raise UserError(f"code of a model cannot be isolated on this system ({'; '.join(reasons)}); {ADVICE}")


def judge(program: str, helpers: str, tests: str, entry_point: str, *, mode: str, limits: Limits) -> str:
    """Runs tests on a program, and returns why it fails, or "" where it passes.

    Args:
      program: source that defines `entry_point`. What it prints is dropped.
      helpers: source that the tests may call functions of: the prompt and its canonical solution.
      tests: source that defines check(candidate), which raises where a candidate is wrong.
      mode: one of confine.MODES.

    Raises:
      UserError: helpers and tests do not run by themselves.
      FailedError: a process could not be confined.

    Arguments and results of the candidate are copied between the two processes. They are None, numbers, texts, bytes,
    and lists, tuples, sets and dicts of these.
    """
    deadline = time.monotonic() + 4 * limits.cpu + 2
    asked = {"source": program, "entry_point": entry_point}
    with contextlib.ExitStack() as stack:
        ends = [os.pipe(), os.pipe()]
        handles = [handle for pipe in ends for handle in pipe]
        try:
            (calls, call), (results, result) = ends
            answer = _request("answer", mode, limits) | asked | {"read": calls, "write": result}
            process, _ = stack.enter_context(_started(answer))
            check = _request("tests", mode, limits) | asked | {"source": helpers, "tests": tests}
            check |= {"read": results, "write": call}
            _, verdict = stack.enter_context(_started(check, "verdict"))
        finally:
            for handle in handles:
                os.close(handle)
        found = _read(verdict, deadline)
        if found is None:
            return "out of time" if time.monotonic() >= deadline else "the tests ended without a verdict"
        for kind, error in (("broken", UserError), ("unconfined", FailedError)):
            if kind in found:
                raise error(f"the tests of {entry_point} do not run: {found[kind]}")
        reason = str(found["reason"])
        if found.get("ended"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                reason += _how_it_ended(process.wait(timeout=1))
        return reason


def _how_it_ended(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number in (signal.SIGKILL, signal.SIGXCPU):
        return ": out of processor time"
    return f": exit code {code}" if number <= 0 else f": signal {number}"


def _request(role: str, mode: str, limits: Limits) -> Table:
    return {"role": role, "mode": mode, **dataclasses.asdict(limits)}


@contextlib.contextmanager
def _started(request: Table, *pipes: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Starts confine.py, and yields the process and the end to read of its pipe "verdict" (-1 without); then kills it.

    The process has no environment, no input, no output, no terminal, and no open file but those of its request.
    """
    read, write = os.pipe() if pipes else (-1, -1)
    with contextlib.ExitStack() as stack:
        if pipes:
            stack.callback(os.close, read)
            request = request | {"verdict": write}
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tele_eval_code_"))
        file = stack.enter_context(tempfile.TemporaryFile())
        file.write(json.dumps(request | {"directory": directory}).encode())
        file.seek(0)
        passed = [request[name] for name in ("read", "write", "verdict") if name in request]
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(Path(confine.__file__).resolve())]
        how: Table = {"stdin": file, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        how |= {"env": {"PYTHONHASHSEED": "0"}, "cwd": "/", "pass_fds": passed, "start_new_session": True}
        try:
            process = subprocess.Popen[bytes](command, **how)
        finally:
            if pipes:
                os.close(write)
        try:
            yield process, read
        finally:
            if process.returncode is None or request["mode"] == "none":  # else nothing can be left of its group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(handle: int, deadline: float) -> Table | None:
    """The JSON that comes out of a pipe until its end; None where it is none, too long, or late."""
    data = b""
    while len(data) < LONGEST_VERDICT:
        if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        part = os.read(handle, LONGEST_VERDICT)
        if not part:
            break
        data += part
    try:
        return json.loads(data)
    except ValueError:
        return None
