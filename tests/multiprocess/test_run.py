"""One run by 1, 2 and 4 processes, stopped and killed on the way: what comes out is that of one undisturbed process.

Every process is a `tele train` of its own, with its share of 8 simulated devices, and talks to the others by
jax.distributed and Gloo on localhost.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tele_jax import checkpoint, growth
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.train import metrics
from tests.ports import free_port

DEVICES = 8
# Compiling is what these tests cost; the programs are tiny.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PAGE = """
from pathlib import Path
from ml_collections import ConfigDict
HERE = Path(__file__).parent

def get_config():
    source = dict(files=(str(HERE / "text.jsonl"),), validation_files=(str(HERE / "held_out.jsonl"),), format="jsonl")
    data = dict(tokenizer=str(HERE / "tokenizer.model"), sources=dict(text=source), eval_bytes=2000)
    shared = dict(data=dict(data, cache=str(HERE / "rows")), batch_size=8, seq_len=32, log_every=1, checkpoint_every=4)
    shared = dict(shared, optimizer=dict(learning_rate=3e-3))
    model = dict(num_layers=2, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=600, dtype="float32")
    config = ConfigDict()
    config.run = {run}
    config.small = dict(kind="pretrain", steps=12, microbatches=2, model=dict(model, remat="none"), **shared)
    if "grow" in config.run:
        larger = dict(num_layers=3, embed_dim=24, num_heads=4, mlp_dim=38)
        config.grow = dict(kind="grow", layers="distance", model=larger)
        config.large = dict(kind="pretrain", steps=4, **shared)
    config.mesh = dict(data=2, fsdp=2, tensor=2)
    return config
"""
CACHE = """
from pathlib import Path
from ml_collections import ConfigDict
HERE = Path(__file__).parent

def get_config():
    source = dict(files=(str(HERE / "text.jsonl"),), format="jsonl")
    return ConfigDict(dict(data=dict(tokenizer=str(HERE / "tokenizer.model"), sources=dict(text=source)), seq_len=32))
"""


# Gloo writes its sentence in pieces, from several threads: what they make together is not always one line each.
GLOO = re.compile(
    r"(\[Gloo\] |Rank |\d| is connected to | peer ranks\. |Expected number of connected peer ranks is : |\s)*"
)


class Processes:
    """`tele train` in so many processes; all are killed where the `with` block ends."""

    def __init__(self, count, page, workdir, *extra, only_last=()):
        address = f"127.0.0.1:{free_port()}"
        self.workdir, self.children = workdir, []
        command = [sys.executable, "-m", "tele_jax.cli.main", "train", "--config", str(page), "--workdir", str(workdir)]
        for number in range(count):
            flags = f"--xla_force_host_platform_device_count={DEVICES // count} {FLAGS}"
            environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "1"}
            if count > 1:
                place = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(number)}
                environment |= {f"JAX_{name}": value for name, value in place.items()}
            log = workdir.with_name(f"{workdir.name}.{number}.{time.monotonic_ns()}.log").open("w")
            last = only_last if number == count - 1 else ()
            child = subprocess.Popen([*command, *extra, *last], stdout=log, stderr=log, text=True, env=environment)
            self.children.append((child, log))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for child, log in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
            log.close()

    def wait(self):
        """(exit code, what it said) of each."""
        codes = [child.wait(timeout=400) for child, _ in self.children]
        return list(zip(codes, self.said(), strict=True))

    def said(self):
        """What each has said so far; read apart, for what `log` knows of a place in the file is the process's too."""
        return [Path(log.name).read_text() for _, log in self.children]

    def wait_for(self, name):
        """Until a file of the run is there."""
        self.wait_until((self.workdir / name).exists)

    def wait_until(self, true):
        until = time.monotonic() + 300
        while not true():
            ended = [child.poll() for child, _ in self.children if child.poll() is not None]
            assert not ended and time.monotonic() < until, self.said()
            time.sleep(0.02)

    def kill(self, number, which):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.children[number][0].pid, which)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 8))) for _ in range(300)]
    lines = [json.dumps({"text": f"text {i}: {' '.join(rng.choices(words, k=20))}"}) for i in range(400)]
    (directory / "text.jsonl").write_text("".join(line + "\n" for line in lines))
    (directory / "held_out.jsonl").write_text("no JSON\n" + "".join(line + "\n" for line in lines[:50]))
    arguments = ["tokenizer", "train", "--preset", "tele_flm", "--vocab-size", "480", "--out"]
    assert main([*arguments, str(directory / "tokenizer.model"), str(directory / "text.jsonl")]) == 0
    (directory / "all.py").write_text(PAGE.format(run=("small", "grow", "large")))
    (directory / "small.py").write_text(PAGE.format(run=("small",)))
    (directory / "cache.py").write_text(CACHE)
    cache = ["data", "cache", "--config", str(directory / "cache.py"), "--out", str(directory / "rows")]
    assert main([*cache, "--runner", "serial"]) == 0
    return directory


@pytest.fixture(scope="module")
def one(place):
    """The work directory of one process with all 8 devices."""
    with Processes(1, place / "all.py", place / "one") as alone:
        [(code, said)] = alone.wait()
    assert code == 0, said
    return place / "one"


@pytest.fixture(scope="module")
def stopped(place):
    """That of two processes, of which one got SIGTERM, and what became of them."""
    with Processes(2, place / "small.py", place / "two") as two:
        two.wait_for("small/checkpoints/4")
        # JAX looks for the signal once a second, in which a quick machine might come to the last step.
        two.kill(0, signal.SIGSTOP)
        two.kill(1, signal.SIGTERM)
        two.wait_until(lambda: "SIGTERM caught" in two.said()[1])
        two.kill(0, signal.SIGCONT)
        outcomes = two.wait()
    return place / "two", outcomes


def test_sigterm_to_one_process_stops_all_with_the_state_saved(stopped):
    workdir, outcomes = stopped
    assert [code for code, _ in outcomes] == [143, 143], outcomes
    steps = checkpoint.open_lazy(workdir).step
    assert 4 <= steps < 12 and not (workdir / "small" / "summary.json").exists()
    assert f"stopped at step {steps} of 12" in outcomes[0][1]
    # Process 0 alone speaks; Gloo and the preemption service of JAX write for themselves.
    theirs = [x for x in outcomes[1][1].splitlines() if "preemption_notifier" in x or GLOO.fullmatch(x)]
    assert outcomes[1][1].splitlines() == theirs
    aside = workdir / "small" / "rejected" / "text.validation_files.jsonl"
    assert outcomes[0][1].count("1 of 51 documents cannot be used") == 1 and str(aside) in outcomes[0][1]
    assert [json.loads(line)["line"] for line in aside.read_text().splitlines()] == [1]
    assert sorted(path.name for path in aside.parent.iterdir()) == [aside.name]


@pytest.fixture(scope="module")
def four(place, stopped):
    """That of four processes, which went on from what the two had saved and lost one at the last step."""
    workdir = place / "four"
    shutil.copytree(stopped[0], workdir)
    with Processes(4, place / "small.py", workdir) as four:
        four.wait_for("small/checkpoints/12")
        four.kill(3, signal.SIGKILL)
        # The heartbeat would end them after a minute; a launcher does not wait so long, and nor does this test.
    shutil.rmtree(workdir / "small" / "checkpoints" / "12", ignore_errors=True)
    (workdir / "small" / "summary.json").unlink(missing_ok=True)
    return workdir


def test_two_processes_go_on_from_four_and_train_grow_and_train_as_one_does(place, one, four):
    workdir = four
    assert checkpoint.open_lazy(workdir).step == 8, "written by four processes"
    with Processes(2, place / "all.py", workdir) as two:
        outcomes = two.wait()
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert "goes on at step 8 of 12" in outcomes[0][1]
    for stage in ("small", "large"):
        assert_same_stage(workdir, one, stage)
    assert (workdir / "grow" / "plan.json").read_text() == (one / "grow" / "plan.json").read_text()
    mine, theirs = (json.loads((w / "grow" / "growth_receipt.json").read_text()) for w in (workdir, one))
    # The fingerprints say how processes cut the arrays into chunks; sums of logits are rounded in another order.
    for key in mine.keys() - {"source", "destination", "max_abs", "max_rel", "kl", "layer_scores", "parts"}:
        assert mine[key] == theirs[key], key
    # What the two found together, each in its share of the layers, one process finds in what they have stored.
    old, new = (checkpoint.open_lazy(workdir / stage).params for stage in ("small", "grow"))
    plan = growth.Plan.from_json(json.loads((workdir / "grow" / "plan.json").read_text()))
    assert mine["parts"] == growth.verify_stored(plan, old, new).parts
    assert mine["parts"].keys() == theirs["parts"].keys()
    assert mine["ok"] and mine["max_abs"] < 1e-5
    assert_same_tree(checkpoint.load(workdir / "grow").params, checkpoint.load(one / "grow").params)
    assert not list(checkpoint.verify(checkpoint.open_lazy(workdir)))


def test_a_mistake_of_one_process_ends_all_with_its_line(place):
    wrong = "--config.small.log_every=2"  # which alone would do no harm, but the others wait for what is summed up
    began = time.monotonic()
    with Processes(2, place / "small.py", place / "mistake", only_last=[wrong]) as two:
        outcomes = two.wait()
    assert [code for code, _ in outcomes] == [2, 2], outcomes
    line = "started with another config than process 0: config.small.log_every was 1, is 2; start the same command"
    assert "tele: process 1 failed: " in outcomes[0][1] and line in outcomes[0][1]
    assert "tele: process 1: " in outcomes[1][1] and line in outcomes[1][1]
    assert time.monotonic() - began < 300, "and not when JAX gives up waiting"


# Each device computes the same whichever process it belongs to, but Gloo adds up what several processes hold in another
# order than one process does: sums of four and of eight, in float32. Measured: parameters 9e-8 of 1.0, moments 2e-9 of
# 0.03, losses 5e-7 of 6.
ATOL = 1e-6


def assert_same_stage(workdir, other, stage):
    mine, theirs = (metrics.read(w / stage / "metrics" / "metrics.jsonl") for w in (workdir, other))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for ours, reference in zip(mine, theirs, strict=True):
        for key in reference.keys() - {"tokens_per_second", "model_flops_per_second"}:
            np.testing.assert_allclose(ours[key], reference[key], rtol=1e-6, err_msg=f"{stage} {ours['step']} {key}")
    mine, theirs = (checkpoint.load(w / stage) for w in (workdir, other))
    # The rows that were read: a pure function of the step.
    assert mine.data_state == theirs.data_state and mine.step == theirs.step
    assert_same_tree(mine.params, theirs.params)
    assert_same_tree(mine.opt_state["1"]["mu"], theirs.opt_state["1"]["mu"])


def assert_same_tree(mine, theirs):
    mine, theirs = flatten(mine), flatten(theirs)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=ATOL, err_msg=name)
