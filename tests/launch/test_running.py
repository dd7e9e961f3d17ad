"""Not dry, against stand-ins: in which order things are asked for, what a preemption and a failed check lead to."""

import os
import signal
import subprocess
import time

import pytest

from tests.launch.launchers import AT, ROOT, TRAIN, calls, launch, preflight_once, stand_ins

FINE = [["auth list", "me@example.com", 0], ["buckets describe", "True", 0]]
TOPOLOGY = ["--topology", "v5p:4x4x8"]
SLICE = [*TOPOLOGY, "--", *TRAIN]


def environment(directory, rules: list, api: str) -> dict[str, str]:
    return stand_ins(directory, rules) | preflight_once(directory, [*TOPOLOGY, "--api", api], TRAIN)


def asked(directory) -> list[str]:
    """The verbs of what was asked after the checks."""
    words = ("create", "delete", "ssh", "describe tele-1", "cat ", "start tele-1", "rm ", "cp ")
    return [word.split()[0] for line in calls(directory) for word in words if f" {word}" in line.split("--command")[0]]


@pytest.mark.parametrize("ends", [0, 2])
def test_a_preempted_slice_is_made_again_and_the_run_goes_on(tmp_path, ends):
    rules = [
        *FINE,
        ["tpu-vm describe", "", 1],
        ["tpu-vm describe", "PREEMPTED\n", 0],
        ["tpu-vm describe", "READY\n", 0],
        ["tpu-vm ssh", "", 255],
        ["tpu-vm ssh", "", 1],
        ["tpu-vm ssh", "", ends],
    ]
    done = launch("tpu_vm.sh", *AT, "--spot", *SLICE, env=environment(tmp_path, rules, "tpu"))
    assert done.returncode == ends, done.stderr
    first = ["cp", "describe", "create", "ssh"]
    preempted = ["describe", "delete", "create", "ssh"]
    still_there = ["describe", "ssh"]
    deleted = ["delete"] if ends == 0 else []  # after a mistake it waits for the right command
    assert asked(tmp_path) == [*first, *preempted, *still_there, *deleted]
    assert all("--spot" in line for line in calls(tmp_path) if "tpu-vm create" in line)


@pytest.mark.parametrize(
    "rule, says",
    [
        (["auth list", "", 0], "gcloud auth login"),
        (["buckets describe", "", 0], "has no hierarchical namespace"),
        (["accelerator-types describe", "", 1], "v5p-256: us-east5-a does not offer it"),
        (
            ["storage ls gs://my-bucket/a cache/manifest.json", "", 1],
            "gs://my-bucket/a cache/manifest.json: is not there",
        ),
    ],
)
def test_nothing_is_created_where_a_check_fails(rule, says, tmp_path):
    done = launch("queued_resources.sh", *AT, *SLICE, env=environment(tmp_path, [rule, *FINE], "tpu"))
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr.splitlines()[-1]
    assert asked(tmp_path) == []


def test_a_suspended_resource_is_asked_for_again_until_the_command_has_ended(tmp_path):
    rules = [
        *FINE,
        ["queued-resources describe", "", 1],
        ["queued-resources describe", "WAITING_FOR_RESOURCES", 0],
        ["queued-resources describe", "SUSPENDED", 0],
        ["queued-resources describe", "ACTIVE", 0],
        *[["storage cat", "", 1]] * 3,
        ["storage cat", "0", 0],
    ]
    done = launch("queued_resources.sh", *AT, "--poll", "0", *SLICE, env=environment(tmp_path, rules, "tpu"))
    assert done.returncode == 0, done.stderr
    asked_for = ["cp", "describe", "rm", "create", "cat"]
    suspended = ["describe", "delete", "create", "cat"]
    assert asked(tmp_path) == [*asked_for, "describe", "cat", *suspended, "describe", "cat", "delete"]
    script = next(tmp_path.glob("tele-startup-*.sh"))
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_a_jobset_at_work_is_left_alone(tmp_path):
    rules = [*FINE, ["get jobset", "tele-1 ", 0]]
    done = launch("gke_jobset.sh", *AT, "--image", "i", *SLICE, env=environment(tmp_path, rules, "gke"))
    assert done.returncode == 2 and "is at work" in done.stderr
    assert not any("apply" in line or "delete" in line for line in calls(tmp_path))


# ------------------------------------------------------------------------------------------------ on every machine


@pytest.fixture
def machine(tmp_path):
    """A copy of the worker's script with a `tele` of the test's; starts it."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "mount").mkdir()
    script = tmp_path / "launch" / "worker.sh"
    script.write_bytes((ROOT / "launch" / "worker.sh").read_bytes())
    env = stand_ins(tmp_path, [], ["gcsfuse", "mountpoint", "uv"])
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    started = []

    def start(tele: str) -> subprocess.Popen:
        program = tmp_path / ".venv" / "bin" / "tele"
        program.write_text(f"#!/usr/bin/env bash\necho tele >>{tmp_path}/runs\n{tele}\n")
        program.chmod(0o755)
        words = ["gs://my-bucket", str(tmp_path / "mount"), "data", "0.10.2", "3", "--", "tele", "train"]
        process = subprocess.Popen(["bash", str(script), *words], env=os.environ | env | {"TELE_RESTART_SECONDS": "0"})
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def runs(directory, wanted: int) -> int:
    """How often `tele` was started, once that is `wanted`; or after a minute."""
    for _ in range(1200):
        found = len((directory / "runs").read_text().splitlines()) if (directory / "runs").exists() else 0
        if found >= wanted:
            break
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("codes, ends, times", [([1, 134, 0], 0, 3), ([143, 0], 0, 2), ([2], 2, 1), ([1] * 9, 1, 4)])
def test_a_failed_command_is_started_again_and_no_other(machine, tmp_path, codes, ends, times):
    cases = " ".join(f"{i + 1}) exit {code};;" for i, code in enumerate(codes))
    assert machine(f"case $(wc -l <{tmp_path}/runs) in {cases} esac").wait(60) == ends
    assert runs(tmp_path, times) == times


def test_who_asks_a_machine_to_stop_waits_until_its_state_is_saved(machine, tmp_path):
    saving = f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 143' TERM\nwhile true; do sleep 0.05; done"
    first = machine(saving)
    assert runs(tmp_path, 1) == 1
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    assert (tmp_path / "saved").exists()


def test_a_second_launcher_takes_over(machine, tmp_path):
    first = machine(f"trap 'touch {tmp_path}/saved; exit 143' TERM\nwhile true; do sleep 0.05; done")
    assert runs(tmp_path, 1) == 1
    second = machine(f"test -e {tmp_path}/saved")
    assert (second.wait(60), first.wait(60)) == (0, 143)
