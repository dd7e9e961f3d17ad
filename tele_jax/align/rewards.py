"""Rewards of replies: by a function that the page names, by a verifier of reasoning-gym, or by a reward model.

Functions and verifiers run in processes of their own (reward_worker.py), which a reply that takes too long ends. A
reward depends on its prompt, reply and record alone, whatever the number of processes: also that of a function that
draws numbers, for the module `random` is seeded for every call.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tele_jax.config import checked, require, require_positive
from tele_jax.errors import UserError
from tele_jax.files import Table

START_SECONDS = 300.0  # a worker may take so long to import what it needs
LARGEST = 1e15  # size of a reward at most; losses square sums of rewards in float32, which ends at 3.4e38


@checked
class RewardConfig:
    """The source of rewards: one of function, verifier and model."""

    # Function of a module, "module:name", called as name(prompt, reply, record): the texts and the table of the prompt,
    # with fields such as its answer; it returns a number.
    function: str | None = None
    batched: bool = False  # the function is given lists of all prompts, replies and records of a draw, once
    # Generator of reasoning_gym whose score_answer grades replies, such as chain_sum; of_record: the one that the
    # metadata of each prompt names.
    verifier: str | None = None
    model: str | None = None  # reward model: an earlier stage of the run, or a checkpoint
    processes: int = 1  # that functions and verifiers run in
    time_limit: float = 10.0  # seconds of wall time for a reply
    # Reward where a function or verifier raises, runs over time or returns no finite number; counted in the figure
    # reward_failures. None: the run ends.
    on_failure: float | None = None

    def __post_init__(self):
        chosen = [name for name in ("function", "verifier", "model") if getattr(self, name) is not None]
        require(len(chosen) == 1, f"give one of function, verifier and model, not {' and '.join(chosen) or 'none'}")
        require_positive(self, "processes", "time_limit")
        if self.function is not None:
            module, _, name = self.function.partition(":")
            named = all(part.isidentifier() for part in [*module.split("."), *name.split(".")])
            require(named, f'function={self.function!r} is no "module:name"')
        require(not self.batched or self.function is not None, "batched is about `function`, which is not given")
        if self.on_failure is not None:
            require(math.isfinite(self.on_failure), f"on_failure={self.on_failure} is no finite number")
            require(abs(self.on_failure) <= LARGEST, f"on_failure={self.on_failure} is beyond {LARGEST:g}")
            require(self.model is None, "on_failure is about functions and verifiers; a model gives numbers always")

    @property
    def name(self) -> str:
        """The name of the source, for messages."""
        return str(self.function or self.verifier or self.model)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A reply to be rewarded: the texts, the table of its prompt, and where that prompt is, for messages."""

    prompt: str
    reply: str
    record: Table
    where: str


class _Worker:
    """A process that computes rewards, and what it is at work on."""

    def __init__(self, what: Table):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"}  # accelerators belong to the run
        command = [sys.executable, "-u", str(Path(__file__).with_name("reward_worker.py"))]
        pipes: Table = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
        # A group of its own: Ctrl-C asks the run to stop after this step, and does not end its workers.
        self.process = subprocess.Popen[bytes](command, **pipes, start_new_session=True)
        self.ask(what, -1, START_SECONDS)

    def ask(self, request: object, number: int, seconds: float) -> None:
        """Hands over a request, which is that of a number; its answer is due in so many seconds."""
        self.number, self.seconds, self.due = number, seconds, time.monotonic() + seconds
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is read as the answer
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> Table:
        """The answer, once there is one to read or time is over."""
        if time.monotonic() >= self.due and not _ready(self, 0.0):
            self.end()
            return {"error": f"took more than {self.seconds:g} s"}
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            return {"error": f"ended its process, exit code {self.process.wait()}"}
        return json.loads(line)

    def end(self) -> None:
        """Kills the process, and those that a function has started in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _ready(worker: _Worker, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        assert worker.process.stdout is not None
        selector.register(worker.process.stdout, selectors.EVENT_READ)
        return bool(selector.select(seconds))


class Rewards:
    """Functions and verifiers at work, in processes that live until `close`."""

    def __init__(self, config: RewardConfig):
        """Starts one process, which imports the function or verifier.

        Raises:
          UserError: there is no such module, function or generator, or it cannot be imported.
        """
        self.config = config
        key = "function" if config.verifier is None else "verifier"
        path = [os.getcwd() if entry == "" else entry for entry in sys.path]
        self._what: Table = {"path": path, key: getattr(config, key)}
        self._idle = [self._started()]

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._idle:
            worker.end()
        self._idle.clear()

    def score(self, asked: Sequence[Asked], seed: int) -> tuple[np.ndarray, int]:
        """Rewards of replies, float64 [n], and how many of them are config.on_failure.

        seed: of the numbers that a function draws by the module `random`, with the place of the reply.

        Raises:
          UserError: a reward raises, takes too long or is no finite number, and config.on_failure is None; names the
            record of the prompt.
        """
        if not asked:
            return np.zeros(0), 0
        config, failures = self.config, 0
        if config.batched:
            columns = [[getattr(each, name) for each in asked] for name in ("prompt", "reply", "record")]
            calls, seconds = [(columns, f"{seed}")], config.time_limit * len(asked)
        else:
            calls = [((each.prompt, each.reply, each.record), f"{seed}/{i}") for i, each in enumerate(asked)]
            seconds = config.time_limit
        rewards = np.zeros(len(asked))
        for number, answer in self._answers(calls, seconds):
            values: list[Any] = [answer.get("reward")]
            if config.batched and "error" not in answer:
                values = answer["reward"] if isinstance(answer["reward"], list) else values
                if len(values) != len(asked):
                    answer = {"error": f"returned {_short(answer['reward'])}, not {len(asked)} numbers in a list"}
            if "error" in answer:
                values = [None] * (len(asked) if config.batched else 1)
            for place, value in enumerate(values, start=number):
                wrong = answer.get("error") or _wrong(value)
                if wrong and config.on_failure is None:
                    whole = config.batched and "error" in answer
                    one = f"the reply {_short(asked[place].reply)} to {asked[place].where}"
                    raise UserError(
                        f"reward {config.name}: {wrong}, for {f'a draw of {len(asked)} replies' if whole else one}; "
                        f"{'a larger time_limit gives it longer, and ' if 'took more' in wrong else ''}on_failure is "
                        "the reward to go on with instead"
                    )
                rewards[place] = config.on_failure if wrong else value
                failures += bool(wrong)
        return rewards, failures

    def _answers(self, calls: Sequence[tuple[Any, str]], seconds: float) -> Iterable[tuple[int, Table]]:
        """Yields (number of the call, answer) as they come; workers that are busy when the caller stops are ended."""
        waiting, busy = collections.deque(enumerate(calls)), set[_Worker]()
        selector = selectors.DefaultSelector()
        try:
            while waiting or busy:
                while waiting and len(busy) < self.config.processes:
                    worker = self._idle.pop() if self._idle else self._started()
                    number, call = waiting.popleft()
                    worker.ask(call, number, seconds)
                    busy.add(worker)
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # pyright: ignore
                left = min(worker.due for worker in busy) - time.monotonic()
                selector.select(max(0.0, min(left, 3600.0)))  # longer waits than 24 days are refused there
                now = time.monotonic()
                for worker in [w for w in busy if w.due <= now or _ready(w, 0.0)]:
                    selector.unregister(worker.process.stdout)  # pyright: ignore
                    busy.remove(worker)
                    answer = worker.answer()
                    if worker.process.poll() is None:
                        self._idle.append(worker)
                    else:
                        worker.end()
                    yield worker.number, answer
        finally:
            selector.close()
            for worker in busy:
                worker.end()

    def _started(self) -> _Worker:
        worker = _Worker(self._what)
        _ready(worker, START_SECONDS)
        if error := worker.answer().get("error"):
            worker.end()
            hint = "; pip install tele_jax[align]" if "No module named 'reasoning_gym'" in error else ""
            raise UserError(f"reward {self.config.name}: {error}{hint}")
        return worker


def _wrong(value: object) -> str:
    """Says what is wrong with a reward; nothing is."""
    if not isinstance(value, int | float) or value != value or value in (math.inf, -math.inf):
        return f"returned {_short(value)}, not a finite number"
    return "" if abs(value) <= LARGEST else f"returned {_short(value)}, which is beyond {LARGEST:g}"


def _short(value: object) -> str:
    """A value for a message of one line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
