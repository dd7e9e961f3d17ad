"""The verification of a growth, shared by two processes: one report, and each has looked at its own layers only."""

import json
import os
import subprocess
import sys

import pytest

from tele_jax import growth
from tests.growth.test_spread import WRONG, grown
from tests.ports import free_port

SCRIPT = """
import json, sys
from tele_jax import growth, processes, sharding
from tele_jax.cli import train as several
from tele_jax.errors import DamageError
from tele_jax.growth.verify import entries
from tele_jax.growth.verify import parts as layerwise
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh
from tests.growth.test_spread import WRONG, grown, on_mesh

looked, look, parts = [], entries.differing, layerwise.parts

def count_look(plan, src, dst, unit):
    looked.append(["structure", unit])
    return look(plan, src, dst, unit)

def count_parts(plan, src, dst, unit):
    looked.append(["parts", unit])
    return parts(plan, src, dst, unit)

entries.differing, layerwise.parts = count_look, count_parts
sharding.BLOCK_BYTES = 1000
number, port = int(sys.argv[1]), sys.argv[2]
with several.together(processes.Place(f"127.0.0.1:{port}", 2, number)):
    reports = []
    for mesh, wrong in ((dict(fsdp=2, tensor=2), []), (dict(fsdp=4), WRONG)):
        case = on_mesh(make_mesh(MeshConfig(**mesh)), *grown(wrong=wrong))
        reports.append(growth.verify_stored(*case).to_json())
    big = [number] * 1_000_000  # 3 MB a process
    assert processes.from_all(big) == [[0] * 1_000_000, [1] * 1_000_000]
    assert not processes._client().key_value_dir_get("tele_jax/from_all"), "cleared"
    print("found", json.dumps([reports, looked]), flush=True)

    def fail_in_layer_2(plan, src, dst, unit):
        if unit == 2:
            raise DamageError("layer 2 cannot be read")
        return look(plan, src, dst, unit)

    entries.differing = fail_in_layer_2
    growth.verify_stored(*case)
"""


@pytest.fixture(scope="module")
def outcomes():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command, port = [sys.executable, "-c", SCRIPT], free_port()
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = [subprocess.Popen([*command, str(i), str(port)], env=environment, **streams) for i in range(2)]
    said = [child.communicate(timeout=120) for child in children]
    lines = [[line for line in out.splitlines() if "found [" in line] for out, _ in said]  # Gloo talks on stdout
    assert all(len(found) == 1 for found in lines), said
    found = [json.loads(line.split("found ", 1)[1]) for (line,) in lines]
    return found, [(child.returncode, err) for child, (_, err) in zip(children, said, strict=True)]


@pytest.mark.parametrize("which", [0, 1], ids=["right", "wrong"])
def test_both_processes_report_what_one_reports(outcomes, which):
    expected = json.loads(json.dumps(growth.verify_stored(*grown(wrong=[[], WRONG][which])).to_json()))
    for reports, _ in outcomes[0]:
        assert reports[which] == expected
    assert expected["ok"] == (which == 0) and len(expected["altered"]) == (0, 6)[which]


def test_each_process_looks_at_its_share(outcomes):
    (_, first), (_, second) = outcomes[0]
    assert [[unit, level] for level, unit in first[:6]] == [
        [unit, level] for unit in (None, 1, 3) for level in ("structure", "parts")
    ]
    assert second[:4] == [["structure", 0], ["parts", 0], ["structure", 2], ["parts", 2]]
    assert len(first) == 12 and len(second) == 8


def test_a_failure_in_the_share_of_one_ends_both_with_its_line(outcomes):
    (first, heard), (second, said) = outcomes[1]
    assert first == second == 1, outcomes[1]
    assert "tele: process 1: layer 2 cannot be read" in said and "process 1 failed: layer 2 cannot be read" in heard
