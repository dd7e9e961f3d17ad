"""Functions for several processes that run as one program (jax.distributed): how they meet, agree and stop.

    start(Place("10.0.0.1:1234", num_processes=2, process_id=0))    # on a TPU slice: start(None)
    if is_first(): ...                          # process 0 prints, and writes everything but parts of arrays
    step = from_first(lambda: latest_step())    # the result of process 0, in all
    sizes = from_all(size)                      # [size of process 0, size of process 1, ...], in all
    with StopSignal() as stop: ...              # stop(): SIGTERM or Ctrl-C came to any; True in all at the same call

A single process exchanges nothing and need not start jax.distributed. The worker processes of Beam, at the end of this
file, are not part of such a program; they end with the command that started them.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from tele_jax.config import check_fields
from tele_jax.errors import UserError

VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# A process that sends no heartbeat for so long is taken for dead, and all others end (the default of JAX is 100 s).
HEARTBEAT_SECONDS = 60
_FOREVER_MS = 7 * 24 * 3600 * 1000  # a wait ends earlier by a missing heartbeat, or by `fail` of another process
_LEAVING_SECONDS = 5.0
_FAILURE, _LEFT = "tele_jax/failure", "tele_jax/left"

# Calls are numbered, so that the n-th call of one process meets the n-th calls of the others. The service of JAX lives
# as long as the process, and so do these counters.
_call, _polls = itertools.count(), itertools.count()


@check_fields
@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among the others, as jax.distributed.initialize takes it. No address: no others."""

    coordinator_address: str | None  # host:port of process 0
    num_processes: int
    process_id: int = 0


def find_place(given: Mapping[str, object], environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the place of this process, from the flags given (or None), or else from the environment; see VARIABLES.

    None: there is no value, which on a TPU slice leaves the place to JAX, and elsewhere means one process.

    Raises:
      UserError: some values are missing, or a value is impossible.
    """
    values = {key: environment.get(name) if given.get(key) is None else given[key] for key, name in VARIABLES.items()}
    names = {key: f"--{key.replace('_', '-')} (or {name})" for key, name in VARIABLES.items()}
    if all(value is None for value in values.values()):
        return None
    numbers = {}
    for key in ("num_processes", "process_id"):
        text = str(values[key] or 0)
        if not (text.isascii() and text.isdecimal()):
            raise UserError(f"{names[key]}: {values[key]!r} is not a number from 0")
        numbers[key] = int(text)
    count, number = numbers["num_processes"], numbers["process_id"]
    if count == 1 and number == 0:
        return Place(None, 1)
    if missing := [names[key] for key, value in values.items() if value is None]:
        raise UserError(f"several processes need an address, a number and an id each; missing: {', '.join(missing)}")
    if number >= count:
        raise UserError(f"{names['process_id']} {number}: {count} processes have ids from 0 to {count - 1}")
    address = values["coordinator_address"]
    host, _, port = str(address).rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"{names['coordinator_address']}: {address!r} is not HOST:PORT, a port up to 65535")
    return Place(f"{host}:{port}", **numbers)


def start(place: Place | None, *, timeout: int = 300) -> None:
    """Joins the other processes. It must be called before any other use of JAX.

    timeout: seconds to wait for them; after that JAX ends the process (SIGABRT), and nothing can be raised.

    Raises:
      UserError: JAX does not find the other workers of a TPU slice.
    """
    if not on_tpu() if place is None else place.coordinator_address is None:
        return
    how: dict[str, Any] = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if place is not None:
        how |= dataclasses.asdict(place) | {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**how)
    except (ValueError, OSError, RuntimeError) as error:
        if place is not None:
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the other workers of this TPU slice could not be found ({first}); --num-processes 1 works with the chips "
            "of this one alone"
        ) from error


def on_tpu() -> bool:
    """Tells whether JAX will use the TPUs of this machine, without asking JAX for its devices, which would start it."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] - declared while jax starts
    return running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms)


def _client() -> Any:
    """Returns the key-value store that all processes share, or None for one process.

    JAX has no public name for it; Orbax imports it from here too. The public functions of JAX move arrays between
    devices, and do not work while devices are busy or lost.
    """
    from jax._src import distributed

    return distributed.global_state.client if jax.process_count() > 1 else None


def is_first() -> bool:
    """Tells whether this is process 0; a single process is."""
    return jax.process_index() == 0


def is_distributed() -> bool:
    """Tells whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def from_first(make: Callable[[], Any]) -> Any:
    """Calls make() in process 0, and returns the result, a JSON value, in every process."""
    client = _client()
    if client is None:
        return make()
    key = f"tele_jax/from_first/{next(_call)}"
    if is_first():
        value = make()
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, _FOREVER_MS))


def from_all(value: object) -> list[Any]:
    """Returns the values of all processes, JSON of kilobytes, in the order of the processes, in every process."""
    client = _client()
    if client is None:
        return [value]
    place = f"tele_jax/from_all/{next(_call)}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(value))

    def collect() -> list[Any]:  # in process 0 alone: otherwise the service gets P^2 requests
        keys = [f"{place}/{process}" for process in range(jax.process_count())]
        values = [json.loads(client.blocking_key_value_get(key, _FOREVER_MS)) for key in keys]
        client.key_value_delete(f"{place}/")
        return values

    return from_first(collect)


def barrier() -> None:
    """Waits until all processes have called it."""
    if (client := _client()) is not None:
        client.wait_at_barrier(f"tele_jax/barrier/{next(_call)}", _FOREVER_MS)


class StopSignal(contextlib.AbstractContextManager):
    """A context in which SIGTERM and Ctrl-C do not end the process; stop() tells that one came, to any process.

    Processes have to call stop() equally often: at each call all get the same answer, which stays True once it is. A
    second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._stopped = False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "StopSignal":
        # JAX's preemption service takes SIGTERM where there are several processes, and tells the others.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        with contextlib.suppress(ValueError):  # signals cannot be handled outside the main thread
            for number in numbers:
                self._restore.callback(signal.signal, number, signal.signal(number, self._receive))
        return self

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if signal.SIGINT in self._received:
                raise KeyboardInterrupt
            os.write(2, b"\nstops after this step and saves; Ctrl-C again ends at once, without saving\n")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self._received.append(number)

    def __exit__(self, *exception: object) -> None:
        self._restore.close()

    def __call__(self) -> bool:
        if not self._stopped:
            self._stopped = bool(self._received) if jax.process_count() == 1 else _preempted()
        return self._stopped

    def interrupted(self) -> bool:
        """Tells whether Ctrl-C came to any process. All processes have to call it."""
        return any(from_all(signal.SIGINT in self._received))


def _preempted() -> bool:
    from jax.experimental import multihost_utils

    # The service takes numbers that rise by one as long as the process lives.
    return multihost_utils.reached_preemption_sync_point(next(_polls))


def fail(line: str, code: int) -> bool:
    """Tells the other processes that this one ends with `code`. False: another has reported the same line before."""
    failure = {"process": jax.process_index(), "line": line, "code": code}
    try:
        _client().key_value_set(_FAILURE, json.dumps(failure))
        return True
    except jax.errors.JaxRuntimeError:
        told = failure_of_others()
        return told is None or told["line"] != line


def failure_of_others() -> dict[str, Any] | None:
    """Returns the failure that a process reported by `fail`, {"process", "line", "code"}, or None."""
    try:
        return json.loads(_client().key_value_try_get(_FAILURE))
    except jax.errors.JaxRuntimeError:
        return None


def leave() -> None:
    """Marks this process as about to end after `fail`; process 0 waits for the others, which need its service."""
    client, index = _client(), jax.process_index()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_LEFT}/{index}", "")
        until = time.monotonic() + _LEAVING_SECONDS
        while index == 0 and len(client.key_value_dir_get(_LEFT)) < jax.process_count() and time.monotonic() < until:
            time.sleep(0.05)


# ---- worker processes of Beam ----------------------------------------------------------------------------------------
# The DirectRunner of Beam starts its workers as processes, which go on when the command is killed. So a worker imports
# this module first, and waits in a thread for a file lock that the command holds: the end of the command, however it
# comes, releases the lock. Ctrl-C reaches all processes; the command reports it, and workers are silent.

_BEAM_VARIABLE = "TELE_BEAM_COMMAND"  # path of the file that the command has locked
BEAM_OPTION = f"--beam_plugins={__name__}"  # makes Beam's workers import this module


@contextlib.contextmanager
def ending_beam_workers() -> Iterator[None]:
    """Makes the workers that a pipeline with BEAM_OPTION starts in the body end with this process."""
    with tempfile.NamedTemporaryFile(prefix="tele_beam_") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.environ[_BEAM_VARIABLE] = held.name
        hook, threading.excepthook = threading.excepthook, _without_interrupted(threading.excepthook)
        try:
            yield
        finally:
            del os.environ[_BEAM_VARIABLE]
            threading.excepthook = hook


def _without_interrupted(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Wraps a hook for errors of threads, so that it ignores a shell of Beam that Ctrl-C ended."""

    def quieter(failure: Any) -> None:
        if not str(failure.exc_value).endswith(("exited with return code -2", "exited with return code 130")):
            hook(failure)

    return quieter


def _end_with(path: str) -> None:
    with contextlib.suppress(OSError), open(path) as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # granted when the command has ended
        with contextlib.suppress(OSError):
            os.unlink(path)
    os._exit(0)


def _fall_silent(number: int, frame: object) -> None:
    """Discards the error output of this worker after Ctrl-C, which the command reports."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


if _BEAM_VARIABLE in os.environ:  # this is a worker
    with contextlib.suppress(ValueError):  # not in its main thread
        signal.signal(signal.SIGINT, _fall_silent)
    threading.Thread(target=_end_with, args=(os.environ[_BEAM_VARIABLE],), daemon=True).start()
