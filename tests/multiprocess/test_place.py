"""Where a process stands among others: flags, environment, and mistakes in them."""

import os
import subprocess
import sys

import pytest

from tele_jax import processes
from tele_jax.cli import train as several
from tele_jax.cli.grow import _shard
from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.processes import Place, find_place
from tests.ports import free_port

ALL = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_the_environment_says_where_and_a_flag_wins():
    assert find_place({}, {}) is None
    assert find_place({}, ALL) == Place("h:1", 4, 3)
    assert find_place({"process_id": "0", "coordinator_address": "[::1]:80"}, ALL) == Place("[::1]:80", 4, 0)
    assert find_place({"num_processes": "1"}, {}) == Place(None, 1), "alone, also on a worker of a TPU slice"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_processes": "2"}, r"missing: --coordinator-address \(or JAX_COORDINATOR_ADDRESS\), --process-id"),
        ({"coordinator_address": "h:1"}, r"missing: --num-processes \(or JAX_NUM_PROCESSES\), --process-id"),
        ({"coordinator_address": "h:1", "num_processes": "2", "process_id": "2"}, "2 processes have ids from 0 to 1"),
        ({"coordinator_address": "h", "num_processes": "2", "process_id": "0"}, "'h' is not HOST:PORT"),
        ({"coordinator_address": "h:99999", "num_processes": "2", "process_id": "0"}, "a port up to 65535"),
        ({"coordinator_address": "h:1", "num_processes": "two", "process_id": "0"}, "'two' is not a number from 0"),
        ({"coordinator_address": "h:1", "num_processes": "2", "process_id": "-1"}, "'-1' is not a number from 0"),
    ],
)
def test_mistakes_name_flag_and_variable(given, match):
    with pytest.raises(UserError, match=match):
        find_place(given, {})


def test_the_command_refuses_before_it_waits(tmp_path, capsys):
    command = ["train", "--config", str(tmp_path / "none.py"), "--workdir", str(tmp_path / "w")]
    assert main([*command, "--num-processes", "2"]) == 2
    assert not (tmp_path / "w").exists() and "missing: --coordinator-address" in capsys.readouterr().err


def test_a_time_to_wait_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("TELE_JOIN_SECONDS", "5m")
    with pytest.raises(UserError, match="TELE_JOIN_SECONDS=5m: is not a number"), several.together(Place("h:1", 2, 0)):
        pass


def test_a_growth_takes_its_shard_from_the_environment(monkeypatch):
    assert _shard(None) == (0, 1) and _shard("1/2") == (1, 2)
    for name, value in ALL.items():
        monkeypatch.setenv(name, value)
    assert _shard(None) == (3, 4) and _shard("1/2") == (1, 2)


def test_one_process_agrees_with_itself():
    assert processes.from_first(lambda: {"a": 1}) == {"a": 1} and processes.is_first()
    processes.barrier()
    with processes.StopSignal() as stop:
        assert not stop()


def test_a_process_that_waits_in_vain_says_so(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    code = f"""
from tele_jax.cli import train as several
from tele_jax.processes import Place
with several.together(Place({address!r}, 2, 0)):
    print("came in")
"""
    environment = {**os.environ, "TELE_JOIN_SECONDS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stdout == ""
    assert f"the 2 processes at {address} did not all come within 1 s" in ended.stderr
    assert "Check failure" not in ended.stderr
