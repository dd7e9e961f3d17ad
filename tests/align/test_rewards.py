"""Rewards of replies: who computes them never changes them, and what is wrong with one is a line."""

import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tele_jax.align.rewards import Asked, RewardConfig, Rewards
from tele_jax.errors import UserError

MODULE = '''
import fractions, math, os, random, subprocess, sys, time

import numpy as np

number = 3

def length(prompt, reply, record):
    print("a line that is no answer")
    return len(reply) - record["answer"]

def odd(prompt, reply, record):
    """What a user's function can do wrong."""
    return {
        "raise": lambda: 1 / 0, "nan": lambda: math.nan, "none": lambda: None, "text": lambda: "1", "fine": lambda: 7,
        "late": lambda: time.sleep(60), "exit": lambda: os._exit(3), "input": input, "stop": lambda: exit(4),
        "large": lambda: 10**400, "large float": lambda: -1e300, "set": lambda: {1}, "table": lambda: {(1,): 2},
        "fraction": lambda: fractions.Fraction(1, 2), "interrupt": interrupt,
    }[reply]()

def interrupt():
    raise KeyboardInterrupt

def kinds(prompt, reply, record):
    return [True, 2, np.float32(0.5), np.array(4), 10**15][record["answer"]]

def with_child(prompt, reply, record):
    """Starts a process, writes down its number, and then takes too long or ends."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(prompt, "w") as file:
        file.write(str(child.pid))
    while reply == "loop":
        print("at work", flush=True) if not record.setdefault("said", False) else None
        record["said"] = True
    time.sleep(600) if reply == "late" else os._exit(3) if reply == "exit" else None
    return 0.0

def one_argument(prompt):
    return 0.0

def all_fail(prompts, replies, records):
    return [1 / 0 for _ in prompts]

def chance(prompt, reply, record):
    return random.random()

def all_at_once(prompts, replies, records):
    return [len(p) + len(r) + record["answer"] for p, r, record in zip(prompts, replies, records)]

def too_few(prompts, replies, records):
    return [1.0]
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "imports_nothing.py").write_text("\nimport no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_rewards"


def asked(*replies):
    return [Asked(f"prompt {i}", reply, {"answer": i}, f"prompts.jsonl:{i + 1}") for i, reply in enumerate(replies)]


def score(replies, seed=0, **config):
    rewards = Rewards(RewardConfig(**config))
    try:
        return rewards.score(asked(*replies), seed)
    finally:
        rewards.close()


def test_the_number_of_processes_changes_no_reward(module):
    replies = ["x" * (i % 7) for i in range(40)]
    for name, seed in (("length", 0), ("chance", 5)):
        found = [score(replies, seed, function=f"{module}:{name}", processes=count)[0] for count in (1, 3)]
        assert found[0].tolist() == found[1].tolist()
        if name == "length":
            assert found[0].tolist() == [i % 7 - i for i in range(40)]
        else:
            assert len(set(found[0])) == 40 and 0.3 < found[0].mean() < 0.7
            assert (score(replies, 6, function=f"{module}:{name}")[0] != found[0]).all()
    together, failures = score(replies, function=f"{module}:all_at_once", batched=True)
    assert failures == 0 and together.tolist() == [len(f"prompt {i}") + i % 7 + i for i in range(40)]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("raise", r"ZeroDivisionError: division by zero \(own_rewards\.py:\d+\)"),
        ("nan", "returned nan, not a finite number"),
        ("none", "returned None, not a finite number"),
        ("text", "returned '1', not a finite number"),
        ("late", r"took more than 0\.5 s"),
        ("exit", "ended its process, exit code 3"),
        ("stop", "ended its process, exit code 4"),
        ("large", r"returned 1000*\.\.\., which is beyond 1e\+15"),
        ("large float", r"returned -1e\+300, which is beyond 1e\+15"),
        ("set", r"returned '\{1\}', not a finite number"),
        ("table", r"returned '\{\(1,\): 2\}', not a finite number"),
        ("fraction", r"returned 'Fraction\(1, 2\)', not a finite number"),
        ("interrupt", r"KeyboardInterrupt \(own_rewards\.py:\d+\)"),
        ("input", r"EOFError: EOF when reading a line \(own_rewards\.py:\d+\)"),
    ],
)
def test_a_bad_reward_names_the_record_or_counts_as_asked(module, reply, why):
    config = dict(function=f"{module}:odd", time_limit=0.5)
    longer = "a larger time_limit gives it longer, and " if reply == "late" else ""
    hint = f"; {longer}on_failure is the reward to go on with instead"
    with pytest.raises(
        UserError, match=rf"reward own_rewards:odd: {why}, for the reply '{reply}' to prompts\.jsonl:2{hint}$"
    ):
        score(["fine", reply, "fine"], **config)
    rewards, failures = score(["fine", reply, "fine"], on_failure=-2.0, processes=2, **config)
    assert rewards.tolist() == [7, -2, 7] and failures == 1


def test_a_list_of_another_length_is_refused(module):
    with pytest.raises(UserError, match=r"returned \[1\.0\], not 2 numbers in a list, for a draw of 2 replies; "):
        score(["a", "b"], function=f"{module}:too_few", batched=True)
    with pytest.raises(UserError, match=r"by zero \(own_rewards\.py:\d+\), for a draw of 2 replies; "):
        score(["a", "b"], function=f"{module}:all_fail", batched=True)


def test_numbers_of_any_kind_are_rewards(module):
    rewards, failures = score(["x"] * 5, function=f"{module}:kinds", time_limit=1e12)
    assert rewards.tolist() == [1, 2, 0.5, 4, 1e15] and failures == 0


@pytest.mark.parametrize("reply", ["late", "exit", "fine"])
def test_what_a_reward_starts_ends_with_it(module, tmp_path, reply):
    path = tmp_path / "child"
    rewards = Rewards(RewardConfig(function=f"{module}:with_child", time_limit=2.0, on_failure=-1.0))
    found, _ = rewards.score([Asked(str(path), reply, {}, "prompts.jsonl:1")], 0)
    rewards.close()
    assert found.tolist() == [0.0 if reply == "fine" else -1.0]
    status, latest = Path(f"/proc/{path.read_text()}/stat"), time.monotonic() + 30  # a kill may take a moment
    while alive := status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > latest:
            break
    assert not alive


def test_no_process_of_a_reward_is_left_by_a_run_that_is_killed(module, tmp_path):
    """All of them hold the standard error of the run, which has an end once the last is gone."""
    script = f"""from tele_jax.align.rewards import Asked, RewardConfig, Rewards
rewards = Rewards(RewardConfig(function="{module}:with_child", time_limit=1000.0))
rewards.score([Asked({str(tmp_path / "child")!r}, "loop", {{}}, "")], 0)
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    run = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.stderr is not None and b"at work\n" in iter(run.stderr.readline, b"")
    run.kill()
    run.communicate(timeout=60)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({}, "give one of function, verifier and model, not none"),
        ({"function": "a:b", "model": "m"}, "give one of function, verifier and model, not function and model"),
        ({"function": "length"}, r"function='length' is no \"module:name\""),
        ({"function": "a:b", "time_limit": 0.0}, r"time_limit=0\.0 must be above 0"),
        ({"verifier": "chain_sum", "batched": True}, "batched is about `function`"),
        ({"model": "m", "on_failure": 0.0}, "on_failure is about functions and verifiers"),
        ({"function": "a:b", "on_failure": math.nan}, "on_failure=nan is no finite number"),
        ({"function": "a:b", "on_failure": -1e300}, r"on_failure=-1e\+300 is beyond 1e\+15"),
    ],
)
def test_settings_that_cannot_be_are_a_line(config, match):
    with pytest.raises(UserError, match=match):
        RewardConfig(**config)


def test_what_is_not_there_is_found_when_it_is_opened(module):
    """The place in the message is one of the user's module, and never one of ours or of Python's import."""
    for name, why in (
        (f"{module}:lenght", "AttributeError: module 'own_rewards' has no attribute 'lenght'"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{module}:number", "TypeError: number is no function"),
        ("imports_nothing:f", r"ModuleNotFoundError: No module named 'no_such_module' \(imports_nothing\.py:2\)"),
    ):
        with pytest.raises(UserError, match=f"reward {name}: {why}$"):
            Rewards(RewardConfig(function=name))
    with pytest.raises(UserError, match=r"takes 1 positional argument but 3 were given, for the reply 'x'"):
        score(["x"], function=f"{module}:one_argument")


def test_a_verifier_grades_as_its_library_does(monkeypatch):
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning_gym is not installed")
    import reasoning_gym

    made = reasoning_gym.create_dataset("chain_sum", size=12, seed=1)
    replies = [f" {entry['answer']}" if i % 3 else str(i) for i, entry in enumerate(made)]
    asked = [Asked(e["question"], reply, e, "task:0") for e, reply in zip(made, replies, strict=True)]
    rewards = Rewards(RewardConfig(verifier="chain_sum", processes=2))
    found, _ = rewards.score(asked, 0)
    rewards.close()
    expected = [made.score_answer(reply.strip(), entry) for reply, entry in zip(replies, made, strict=True)]
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) > 1
    with pytest.raises(UserError, match="reward chain_some: ValueError"):
        Rewards(RewardConfig(verifier="chain_some"))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    with pytest.raises(UserError, match=r"No module named 'reasoning_gym'.*; pip install tele_jax\[align\]"):
        Rewards(RewardConfig(verifier="chain_sum"))
