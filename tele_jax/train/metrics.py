"""Figures of a stage: metrics.jsonl, one object a line, and TensorBoard events with the same names.

JSON has no NaN and no infinity (RFC 8259): in metrics.jsonl such a figure is null, and `read` gives NaN for it.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from tele_jax.config import as_written
from tele_jax.errors import DamageError
from tele_jax.extras import hidden
from tele_jax.files import parse_json, write_file, writing
from tele_jax.processes import is_first
from tele_jax.published import peak_flops

FLUSH_SECONDS = 30  # between two flushes at most, for those who watch
EVALUATIONS = "eval/"  # of held-out text and of tasks
EVALUATION = "eval/bits_per_byte/"  # and the domain
TASKS = "eval/tasks/"  # and the task and its metric


def utilisation(flops_per_second: float, devices: int) -> float | None:
    """Model FLOP utilisation of so many devices, or None where the peak of one is not known (a CPU)."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else flops_per_second / (peak * devices)


class Metrics:
    """Writes the figures of one stage; started again, it drops what was written after the step it goes on from.

    All processes have one; that of process 0 writes.
    """

    def __init__(self, directory: Path, first_step: int):
        self._writes = is_first()
        if not self._writes:
            return
        with hidden(["torch"]):  # which takes two seconds, for tensors that nobody hands it
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] - generated
            from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] - generated

        self._path = directory / "metrics.jsonl"
        kept = [line for line in read(self._path) if line["step"] <= first_step]
        write_file(self._path, "".join(_to_line(line) for line in kept))
        self._file = self._path.open("a", buffering=1)
        # SummaryWriter has a queue and a thread between, and its flush does not wait for them.
        self._events = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
        self._event, self._summary = Event, Summary
        begins = SessionLog(status=SessionLog.START)  # from this step on, TensorBoard forgets what was written before
        self._events.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=begins))
        self._flushed = time.monotonic()

    def write(self, step: int, figures: Mapping[str, float | None]) -> None:
        """One line, with `step`; figures that are None are left out."""
        if not self._writes:
            return
        known = {name: float(value) for name, value in figures.items() if value is not None}
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in known.items()]
        with writing(self._path):
            self._file.write(_to_line({"step": step, **known}))
            self._events.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hands all to the operating system: what lies before a checkpoint is never written again after a kill."""
        if self._writes:
            with writing(self._path):
                self._file.flush()
                self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        if not self._writes:
            return
        with writing(self._path):
            self._file.close()
            self._events.close()


def _to_line(figures: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
      DamageError: another line is not figures by name.
    """
    lines = []
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    for number, text in enumerate(texts, start=1):
        where = f"{path}:{number}"
        try:
            figures = parse_json(text, where)
            as_written(dict[str, float | None], figures, where)
        except DamageError:
            if number < len(texts):
                raise
            break  # also the nothing behind the last line end
        lines.append({name: math.nan if value is None else value for name, value in figures.items()})
    return lines


def described(line: Mapping[str, float | None]) -> str:
    """The figures of a line of training for people."""
    rates = [f"{line[name]:.2e}" for name in ("learning_rate", "matrix_learning_rate")]
    rate = f"rate {rates[0]}" if rates[0] == rates[1] else f"rates {rates[0]} and {rates[1]}"
    used = f"{line['model_flops_per_second']:.3g} model FLOP/s"
    if line["mfu"] is not None:
        used = f"{line['mfu']:.1%} MFU"
    learned = "".join(f"{name} {line[name]:.4f}, " for name in ("reward", "kl") if name in line)
    return (
        f"{learned}loss {line['loss']:.4f}, gradient norm {line['grad_norm']:.3g}, {rate}, "
        f"{line['tokens_per_second']:,.0f} tokens/s, {used}"
    )
