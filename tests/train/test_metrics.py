"""Figures on disk: valid JSON, no holes after a kill, and utilisation only where a peak is published."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import types

import jax
import pytest

from tele_jax.errors import DamageError
from tele_jax.train import metrics

KILLED = """
import os, signal, sys
from pathlib import Path
from tele_jax.train import metrics
writer = metrics.Metrics(Path(sys.argv[1]), 0)
for step in range(1, 21):
    writer.write(step, {"loss": step / 2})
    if step == 15:
        writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def events(directory):
    """{step: value} of the tag "loss", by the framing of TFRecord: length, its CRC, the event, its CRC."""
    from tensorboardX.proto import event_pb2

    found = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            if at + 16 + length > len(data):
                break
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            for value in event.summary.value:
                if value.tag == "loss":
                    found[event.step] = value.simple_value
            at += 16 + length
    return found


def test_what_lies_before_a_flush_is_there_after_a_kill(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert {step: step / 2 for step in range(1, 16)}.items() <= events(tmp_path).items()
    writer = metrics.Metrics(tmp_path, 15)  # goes on from a checkpoint of step 15
    for step in range(16, 21):
        writer.write(step, {"loss": float(step)})
    writer.close()
    expected = {step: step / 2 if step <= 15 else float(step) for step in range(1, 21)}
    assert {line["step"]: line["loss"] for line in metrics.read(tmp_path / "metrics.jsonl")} == expected
    assert events(tmp_path) == expected


def test_a_figure_that_is_not_finite_is_null_on_disk_and_nan_when_it_is_read(tmp_path):
    writer = metrics.Metrics(tmp_path, 0)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 5, "mfu": None})
    writer.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5.0}
    metrics.Metrics(tmp_path, 1).close()  # started again, the line stays what it is
    [read] = metrics.read(tmp_path / "metrics.jsonl")
    assert math.isnan(read["loss"]) and math.isnan(read["grad_norm"]) and read["tokens"] == 5
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1, "a last line that a kill cut short is left out"


@pytest.mark.parametrize(
    ("kind", "peak"), [("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU7x", 2307e12 / 2), ("cpu", None)]
)
def test_utilisation_is_by_the_published_peak_of_a_device(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    used = metrics.utilisation(1e15, devices=8)
    assert used == (None if peak is None else 1e15 / (8 * peak))


def test_a_full_disk_is_told_in_one_line(tmp_path):
    writer = metrics.Metrics(tmp_path, 0)
    writer._file.close()
    message = rf"{tmp_path}/metrics.jsonl: could not be written \(No space left on device\)"
    full = os.open("/dev/full", os.O_WRONLY)
    writer._file = types.SimpleNamespace(write=lambda text: os.write(full, text.encode()))
    with pytest.raises(DamageError, match=message):
        writer.write(1, {"loss": 1.0})
    os.close(full)
