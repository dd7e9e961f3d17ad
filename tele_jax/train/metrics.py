"""Figures of a stage: metrics.jsonl, one object a line, and TensorBoard events with the same names.

JSON has no NaN and no infinity (RFC 8259): in metrics.jsonl such a figure is null, and `read` gives NaN for it.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from tele_jax.data.extras import held_back
from tele_jax.processes import is_first

# Peak dense bf16 FLOP/s of one device, by jax's device_kind: Google's published figures.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
}


EVALUATION = "eval/bits_per_byte/"  # and the domain


def utilisation(flops_per_second: float, devices: int) -> float | None:
    """Model FLOP utilisation of so many devices, or None where the peak of one is not known (a CPU)."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else flops_per_second / (peak * devices)


class Metrics:
    """Writes the figures of one stage; started again, it drops what was written after the step it goes on from.

    All processes have one; that of process 0 writes.
    """

    def __init__(self, directory: Path, first_step: int):
        self._writes = is_first()
        if not self._writes:
            return
        with held_back(["torch"]):  # which takes two seconds, for tensors that nobody hands it
            from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        kept = [line for line in read(self._path) if line["step"] <= first_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(_to_line(line) for line in kept))
        os.replace(temporary, self._path)
        self._file = self._path.open("a", buffering=1)
        self._events = SummaryWriter(str(directory), purge_step=first_step + 1, flush_secs=30)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line, with `step`; figures that are None are left out."""
        if not self._writes:
            return
        figures = {name: float(value) for name, value in figures.items() if value is not None}
        self._file.write(_to_line({"step": step, **figures}))
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Puts everything on disk: what lies before a checkpoint is never written again after a kill."""
        if self._writes:
            self._file.flush()
            self._events.flush()

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        self._events.close()


def _to_line(figures: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            figures = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(figures, dict):
            break
        lines.append({name: math.nan if value is None else value for name, value in figures.items()})
    return lines
