"""Programs of a model: honest ones pass, attempts to break out are contained, and pass@k is the estimator it claims."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tele_jax.cli.main import main
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.eval import code, confine, sandbox
from tele_jax.eval.model import EvalModel
from tele_jax.eval.sandbox import Limits
from tests.inference.test_chat import model, work_directory

pytestmark = pytest.mark.usefixtures("quick_compilation")

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate([1], [2]) == [1, 2]\n"
LIMITS = Limits(cpu=1, memory=1 << 28)
HOME = os.path.expanduser("~")


def task(name, prompt, solution, test):
    return {"task_id": f"T/{name}", "prompt": prompt, "entry_point": name, "canonical_solution": solution, "test": test}


TASKS = [
    task("add", "def add(a, b):\n", "    return a + b\n", TESTS),
    task(
        "root",  # the test calls a function of the prompt, as HumanEval/32 does
        "import math\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\ndef root(xs):\n",
        "    return -xs[0] / xs[1]\n",
        "def check(candidate):\n    for c in ([1, 2], [-6, 3]):\n        assert abs(poly(c, candidate(c))) < 1e-9\n",
    ),
    task(
        "same",
        "def same(x, *, times=1):\n    '''Repeats.'''\n",
        "    return (x,) * times\n",
        "def check(candidate):\n"
        "    for x in (None, True, 1 << 99, float('inf'), '猫\\ud800', b'a', {1: {2, 3}}, (1, [2]), 1j):\n"
        "        got = candidate(x, times=2)\n        assert got == (x, x) and type(got[0]) is type(x)\n",
    ),
    task(
        "fail",
        "def fail(x):\n",
        "    raise ValueError(f'not {x}')\n",
        "def check(candidate):\n    try:\n        candidate(3)\n    except ValueError as error:\n"
        "        assert str(error) == 'not 3'\n    else:\n        assert False\n",
    ),
]


@pytest.fixture(scope="module")
def mode():
    try:
        return sandbox.find_mode()
    except UserError as error:
        pytest.skip(str(error))


def verdict(program, mode, **how):
    return sandbox.judge(program, ADD, TESTS, "add", mode=mode, limits=how.pop("limits", LIMITS))


# What a program does, and what the reason of its failure must say. {...} is filled in by the test.
ATTEMPTS = {
    "makes a socket": ("import socket\nsocket.create_connection(('127.0.0.1', {port}))", "Operation not permitted"),
    "sends a datagram": ("import socket\nsocket.socket(type=2).sendto(b'', ('127.0.0.1', 9))", "not permitted"),
    "writes elsewhere": ("open('{outside}/new', 'w').write('x')", "Permission denied"),
    "truncates a file": ("import os\nos.truncate('{outside}/secret', 0)", "PermissionError"),
    "renames a file": ("import os\nos.rename('{outside}/secret', '{outside}/other')", "PermissionError"),
    "changes a mode": ("import os\nos.chmod('{outside}/secret', 0)", "Operation not permitted"),
    "reads elsewhere": ("open('{outside}/secret').read()", "Permission denied"),
    "lists the home": (f"import os\nos.listdir({HOME!r})", "Permission denied"),
    "reads the repository": ("open({repository!r}).read()", "Permission denied"),
    "reads through a link": ("import os\nos.symlink('{outside}', 'it')\nopen('it/secret').read()", "PermissionError"),
    "reads /etc": ("open('/etc/passwd').read()", "Permission denied"),
    "reads /proc": ("open('/proc/{parent}/environ').read()", "PermissionError|FileNotFoundError"),
    "reads variables": ("import os\nassert os.environ, 'none'", "AssertionError: none"),
    "fills a large file": ("open('big', 'w').write('x' * 10**8)", "File too large|Permission denied"),
    "makes many files": ("for i in range(10**6): open(str(i), 'w').write('x')", "No space left|Permission denied"),
    "forks without end": ("import os\nwhile True: os.fork()", "Operation not permitted"),
    "starts threads": ("import threading\nwhile True: threading.Thread(target=input).start()", "can't start"),
    "starts a program": ("import subprocess\nsubprocess.run(['/bin/true'])", "Operation not permitted"),
    "becomes a program": ("import os\nos.execv('/bin/true', ['true'])", "Operation not permitted"),
    "leaves a daemon": ("import os\nif os.fork(): os._exit(0)\nos.setsid()", "Operation not permitted"),
    "takes memory": ("x = []\nwhile True: x.append(bytearray(10**6))", "MemoryError"),
    "takes memory outside": ("import os\nos.memfd_create('x')", "Operation not permitted"),
    "spins": ("while True: pass", "out of (processor )?time"),
    "ignores signals": (
        "import signal\nfor i in set(signal.Signals) - {9, 19}: signal.signal(i, signal.SIG_IGN)\nwhile True: pass",
        "out of (processor )?time",
    ),
    "raises its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "ValueError"),
    "sleeps": ("import time\ntime.sleep(1000)", "out of time"),
    "floods its output": ("while True: print('x' * 10**6)", "out of (processor )?time"),
    "floods every file": (
        "import os\nwhile True:\n  for i in range(64):\n    try: os.write(i, b'x' * 10**5)\n    except OSError: pass",
        "too long|out of",
    ),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", "Operation not permitted"),
    "kills the evaluation": ("import os\nos.kill({parent}, 9)", "Operation not permitted|No such process"),
    "kills everything": ("import os\nos.kill(-1, 9)", "Operation not permitted"),
    "kills by a file's owner": ("import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, {parent})", "Operation not permitted"),
    "traces": ("import ctypes\nassert ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0, 'no'", "AssertionError: no"),
    "makes a namespace": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0, 'no'", "Error: no"),
    "exits before the tests": ("import os\nos._exit(0)", "ended before its tests did: exit code 0"),
    "exits in a call": ("def add(a, b):\n    raise SystemExit(0)\nX = 0", "SystemExit: 0"),
    "prints a verdict": ("print('passed')\nprint('{{\"reason\": \"\"}}')\nadd = print", "AssertionError"),
    "writes a verdict everywhere": (
        "import os\nfor i in range(64):\n  try: os.write(i, b'{{\"reason\": \"\"}}\\n')\n  except OSError: pass\n"
        "os._exit(0)",
        "KeyError|ended before",
    ),
    "equals everything": (
        "class E:\n  def __eq__(self, other): return True\ndef add(a, b): return E()\nX = 0",
        "a value of type E is not a plain one",
    ),
    "crashes": ("import ctypes\nctypes.string_at(0)", "signal 11"),
    "defines nothing": ("X = 0\ndel add", "NameError"),
    "is no Python": ("def add(", "SyntaxError"),
}  # fmt: skip


@pytest.mark.parametrize("which", sandbox.confine.MODES[:2])
def test_attempts_to_break_out_are_contained_and_fail_with_a_reason(which, mode, tmp_path, monkeypatch):
    if which == "namespaces" != mode:
        pytest.skip("no namespaces on this system")
    script = shutil.copy(confine.__file__, tmp_path / "confine.py")  # no other test has processes of this name
    monkeypatch.setattr(confine, "__file__", script)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "secret").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        server.settimeout(0)
        fill = {"{port}": server.getsockname()[1], "{outside}": tmp_path, "{parent}": os.getpid(), "{{": "{", "}}": "}"}
        fill["{repository!r}"] = repr(str(Path(__file__).resolve()))

        def attempt(program):
            for name, value in fill.items():
                program = program.replace(name, str(value))
            return verdict(program if "def add" in program else f"{ADD}{program}\n", which)

        found = dict(zip(ATTEMPTS, pool.map(attempt, [program for program, _ in ATTEMPTS.values()])))
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody came
    wrong = {name: reason for name, reason in found.items() if not re.search(ATTEMPTS[name][1], reason)}
    assert wrong == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confine.py", "secret"]
    assert (tmp_path / "secret").read_text() == "secret" and (tmp_path / "secret").stat().st_mode & 0o400
    deadline = time.monotonic() + 30  # the kernel takes a moment to end what was killed
    while left := running(str(script)):
        assert time.monotonic() < deadline, left


def running(script):
    """The processes whose command line has the path of a script."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [file.parent.name] if script.encode() in file.read_bytes() else []
    return found


def test_a_program_may_use_its_own_directory(mode):
    if mode != "namespaces":
        pytest.skip("without namespaces nothing can be written")
    lines = ["open('x', 'w').write('a' * 1000)", "import os; os.mkdir('d'); os.rename('x', 'd/y')"]
    lines += ["assert open('d/y').read() == 'a' * 1000; os.remove('d/y'); os.rmdir('d')"]
    assert verdict(ADD + "\n".join(lines), mode) == ""


def test_solutions_pass_and_wrong_ones_fail(mode):
    for one in TASKS:
        whole = one["prompt"] + one["canonical_solution"]
        how = {"mode": mode, "limits": Limits()}
        assert sandbox.judge(whole, whole, one["test"], one["entry_point"], **how) == ""
        wrong = one["prompt"] + "    return 1.5\n"
        assert sandbox.judge(wrong, whole, one["test"], one["entry_point"], **how).startswith(
            ("AssertionError", "TypeError")
        )


def test_without_isolation_the_verdicts_are_the_same():
    assert verdict(ADD, "none") == ""
    assert verdict("def add(a, b): return a\n", "none") == "AssertionError"
    assert "out of" in verdict(ADD + "while True: pass", "none")


def test_tests_that_do_not_run_are_the_users_mistake(mode):
    with pytest.raises(UserError, match=r"the tests of add do not run: NameError: name 'nothing' is not defined"):
        sandbox.judge(ADD, ADD, "nothing()\n" + TESTS, "add", mode=mode, limits=LIMITS)


NUMBERS = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | st.binary() | st.frozensets(st.integers()) | st.sets(st.text()),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.tuples(st.text()), inner),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_values_cross_between_the_processes_unchanged(value):
    back = confine.from_json(json.loads(json.dumps(confine.to_json(value))))
    assert repr(back) == repr(value) or back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("machine", confine.AUDIT_ARCH)
def test_numbers_of_system_calls_are_those_of_the_kernel(machine):
    places = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
    header = f"/usr/include/{places[machine]}"
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    column = list(confine.AUDIT_ARCH).index(machine)
    for line in [*confine.SYSCALLS.split(","), *confine.COMMANDS]:
        name, *numbers = line.split()
        assert known.get(name, known.get(name.removeprefix("new"), "-")) == numbers[column], name


def test_pass_at_k_is_the_share_of_subsets_with_a_program_that_passes():
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        for c in range(n + 1 if k <= n else 0):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert code.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------ the verb


@pytest.fixture
def written(tmp_path):
    (tmp_path / "humaneval.jsonl").write_text("\n".join(map(json.dumps, TASKS)) + "\n")
    return work_directory(tmp_path / "W", *model(max_seq_len=256))


def scripted(monkeypatch, texts):
    """Puts texts in the place of what the model writes, in turn; returns the batches that it is asked for."""
    asked, left = [], iter(texts)

    def continue_texts(self, prompts, *, max_new_tokens, stop=(), on_text=None, **how):
        asked.append((prompts, how))
        for i in range(len(prompts)):
            text = next(left, None)
            if text is None:
                raise KeyboardInterrupt
            on_text(i, text)

    monkeypatch.setattr(EvalModel, "continue_texts", continue_texts)
    return asked


def test_eval_code_counts_what_passes_and_goes_on_after_a_kill(mode, written, tmp_path, monkeypatch, capsys):
    good = [one["canonical_solution"] for one in TASKS]
    out = tmp_path / "out"
    command = ["eval", "code", str(written), "--data", str(tmp_path), "--out", str(out), "--max-new-tokens", "8"]
    command += ["--samples", "2", "--k", "1,2"]
    scripted(monkeypatch, [good[0], good[0], good[1]])  # and then the command is killed
    assert main(command) == 130
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"task_id": "T/ro')  # a line that the kill cut short
    asked = scripted(monkeypatch, [good[1], "    pass\n", good[2], "    import os; os._exit(0)\n", good[3], good[3]])
    assert main([*command, "--json", str(tmp_path / "j.json")]) == 0
    assert len(asked) == 3 and all(how["temperature"] == 0.8 for _, how in asked)
    results = json.loads((out / "results.json").read_text())
    figures = results["results"]["humaneval"]
    assert (figures["pass@1,none"], figures["pass@2,none"]) == (0.75, 1.0)
    assert results["failed"] == {"TypeError": 1, "the program ended before its tests did": 1}
    verdicts = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sum(row["passed"] for row in verdicts) == 6 and len(verdicts) == 8
    assert "pass@1  0.7500" in capsys.readouterr().out
    asked = scripted(monkeypatch, [])
    assert main(command) == 0 and asked == []
    capsys.readouterr()
    assert main([*command, "--seconds", "6"]) == 2
    assert "results.jsonl: was made with another --seconds" in capsys.readouterr().err
    assert main([*command, "--seed", "1"]) == 2
    assert capsys.readouterr().err.endswith(
        "samples.jsonl: was made with another seed; choose another --out, or remove the files\n"
    )
    assert main(["eval", "table", str(out / "results.json")]) == 0
    assert "HumanEval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("Sure:\n```python\ndef root(xs):\n    return 1\n```\nIt works.", "def root(xs):\n    return 1\n"),
        ("```\ndef root(xs): 1\n```\nor\n```\ndef root(xs): 2\n```\n```sh\nls\n```", "def root(xs): 2\n"),
        ("```py\ndef root(xs):\n    return 3", "def root(xs):\n    return 3"),
        ("def root(xs):\n    return 4", "def root(xs):\n    return 4"),
    ],
)  # fmt: skip
def test_the_function_of_a_reply_takes_the_place_of_that_of_the_prompt(reply, program):
    before = TASKS[1]["prompt"].removesuffix("def root(xs):\n")
    assert code.program_of(TASKS[1], reply, chat=True) == before + program
    assert code.program_of(TASKS[1], "    return 5", chat=True) == TASKS[1]["prompt"] + "    return 5"
    assert code.program_of(TASKS[1], reply, chat=False) == TASKS[1]["prompt"] + reply


def test_eval_code_asks_a_chat_model_in_its_dialogue_form(mode, written, tmp_path, monkeypatch):
    one = TASKS[0]
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(one))
    out = tmp_path / "out"
    asked = scripted(monkeypatch, [f"```python\n{ADD}```"])
    command = ["eval", "code", str(written), "--data", str(tmp_path), "--out", str(out), "--max-new-tokens", "8"]
    assert main([*command, "--chat"]) == 0
    assert json.loads((out / "results.json").read_text())["results"]["humaneval"]["pass@1,none"] == 1
    vocabulary = load_vocabulary(written / "tokenizer.model")
    assert "def add(a, b):" in vocabulary.decode(asked[0][0][0]) and "block of code" in vocabulary.decode(
        asked[0][0][0]
    )


def test_no_two_samples_of_a_task_are_the_same_draw(mode, written, tmp_path, monkeypatch):
    """A row of a batch draws by the seed and its place, and a batch of the model has 16 rows."""
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(TASKS[0]))
    command = ["eval", "code", str(written), "--data", str(tmp_path), "--max-new-tokens", "8"]
    command += ["--samples", "20", "--k", "10", "--seconds", "1"]
    asked = scripted(monkeypatch, ["    return a\n"] * 20)
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    (first, second), seeds = [len(prompts) for prompts, _ in asked], [how["seed"] for _, how in asked]
    assert (first, second) == (16, 4) and seeds[0] != seeds[1]
    asked = scripted(monkeypatch, ["    return a\n"] * 20)
    assert main([*command, "--out", str(tmp_path / "b")]) == 0 and seeds == [how["seed"] for _, how in asked]


def test_a_real_model_writes_programs_that_are_cut_at_stop_strings(mode, written, tmp_path):
    out = tmp_path / "out"
    command = ["eval", "code", str(written), "--tasks", str(tmp_path / "humaneval.jsonl"), "--out", str(out)]
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(TASKS[0]))
    assert main([*command, "--max-new-tokens", "8"]) == 0
    (row,) = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert row["completion"] and not any(stop in row["completion"] for stop in code.STOP)


def test_what_is_wrong_is_one_line(written, tmp_path, monkeypatch, capsys):
    file = tmp_path / "humaneval.jsonl"

    def error(*flags):
        assert main(["eval", "code", str(written), "--out", str(tmp_path / "o"), *flags]) == 2
        return capsys.readouterr().err

    assert error() == "tele: --tasks FILE or --data DIR: is needed\n"
    assert "--tasks and --data: both name the tasks" in error("--tasks", str(file), "--data", str(tmp_path))
    assert error("--tasks", str(file), "--samples", "0") == "tele: --samples 0: must be at least 1\n"
    assert "--k 3: expected numbers from 1 to --samples" in error("--tasks", str(file), "--k", "3")
    assert "at temperature 0 all programs" in error("--tasks", str(file), "--samples", "2", "--temperature", "0")
    for line, message in (
        ("{", "line 1: not JSON"),
        ("[]", "line 1: needs a field 'task_id', str"),
        (json.dumps(TASKS[0] | {"test": 3}), "line 1: needs a field 'test', str"),
        (json.dumps(TASKS[0] | {"test": "assert 1"}), "the test of T/add defines no check(candidate)"),
        (json.dumps(TASKS[0]) + "\n" + json.dumps(TASKS[0]), "line 2: task_id T/add occurs twice"),
        ("", "holds no line"),
        (json.dumps(TASKS[0] | {"prompt": " "}), "the prompt of T/add is empty"),
    ):
        file.write_text(line)
        assert message in error("--tasks", str(file))
    file.write_text(json.dumps(TASKS[0] | {"prompt": "# long\n" * 200 + TASKS[0]["prompt"]}))
    if sys.platform == "linux" and platform.machine() in confine.AUDIT_ARCH:
        assert "T/add: its prompt of" in error("--tasks", str(file), "--unsafe-without-isolation")
        file.write_text(json.dumps(TASKS[0] | {"test": "nothing()\n" + TESTS}))
        message = error("--tasks", str(file), "--unsafe-without-isolation")  # before the prompt, of a small model
        assert "T/add: the tests of add do not run: NameError" in message and not (tmp_path / "o").exists()
    monkeypatch.setattr(confine, "__file__", str(tmp_path / "nothing.py"))
    message = error("--tasks", str(file))
    assert message.startswith("tele: code of a model cannot be isolated on this system (namespaces: no answer")
    assert message.count("\n") == 1 and "--unsafe-without-isolation" in message
