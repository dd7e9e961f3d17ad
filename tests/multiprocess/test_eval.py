"""`tele eval` in two processes: the figures of one process, which the first one prints and writes."""

import json
import os
import subprocess
import sys

import pytest

from tele_jax.cli import eval as verb
from tele_jax.cli.main import main, parse
from tele_jax.errors import UserError
from tests.inference.test_chat import model, work_directory
from tests.ports import free_port

TEXTS = ["The cat sat on the mat. " * 9, "", "画蛇添足比喻做了多余的事。", *(f"A mat, {i} times." for i in range(9))]


@pytest.fixture
def command(tmp_path, quick_compilation):
    work = work_directory(tmp_path / "W", *model())
    (tmp_path / "en.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ["eval", "bpb", str(work), "--text", f"en={tmp_path}/en.jsonl", "--window", "16", "--out"]


def test_two_processes_find_what_one_finds(command, tmp_path):
    place = ["--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "1"}
    start = [sys.executable, "-m", "tele_jax.cli.main", *command, str(tmp_path / "two"), *place]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    children = [subprocess.Popen([*start, str(i)], **pipes) for i in range(2)]
    try:
        said = [child.communicate(timeout=200) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], said
    assert "bits per byte" in said[0][0] and "bits per byte" not in said[1][0]
    assert main([*command, str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    [mine], [theirs] = two.pop("models").values(), one.pop("models").values()
    assert two == one and mine["domains"]["en"]["tokens"] == theirs["domains"]["en"]["tokens"]
    assert mine["domains"]["en"]["bits_per_byte"] == pytest.approx(theirs["domains"]["en"]["bits_per_byte"], rel=1e-6)


def test_every_device_of_several_processes_is_in_the_mesh(command, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "is_distributed", lambda: True)  # the eight devices of this process stand for theirs
    _, args = parse([*command, str(tmp_path), "--mesh", "data=2"])
    with pytest.raises(UserError, match="--mesh data=2: takes 2 of the 8 devices of all processes; name all"):
        verb.mesh_of(args)
    _, args = parse([*command, str(tmp_path)])
    mesh = verb.mesh_of(args)
    assert mesh is not None and mesh.shape["data"] == 8
