"""The package as it is installed: light to import, bounded requirements, verbs that answer."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import jax
import pytest

from tele_jax.cli.main import VERBS, main

HEAVY = {"tensorflow", "tensorflow_text", "torch", "libtpu", "seqio", "sentencepiece", "matplotlib"}
WRITTEN = [verb for verb in VERBS if importlib.util.find_spec(f"tele_jax.cli.{verb.replace(chr(45), chr(95))}")]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120)


def test_import_loads_no_extra():
    done = python("-c", "import sys, tele_jax; print(*{name.partition('.')[0] for name in sys.modules})")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"jax", "tele_jax"} <= loaded
    assert not HEAVY & loaded


def test_the_public_names_do_what_they_say():
    # tele.generate is a function of the same name as its module, which chat imports.
    done = python(
        "-c",
        "import tele_jax as tele, tele_jax.inference.chat; "
        "print(all(callable(f) for f in [tele.generate, tele.growth.plan]))",
    )
    assert done.stdout.split() == ["True"], done.stderr


def test_every_requirement_has_a_lower_and_an_upper_bound():
    requirements = importlib.metadata.requires("tele_jax")
    assert len(requirements) > 20
    for requirement in requirements:
        bounds = requirement.partition(";")[0]
        assert re.search(r">=\d", bounds) and re.search(r"<\d", bounds), requirement


def test_the_command_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tele")
    assert script.load() is main


# Where the tests run in the background, Ctrl-C is ignored, and so it is in the processes that they start.
NOT_IGNORED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
LOADING = """
import sys
sys.argv = ["/usr/bin/tele", "inspect", "x"]
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from tele_jax.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["jaxlib", "tele_jax.cli.inspect"])
def test_ctrl_c_while_the_command_loads_is_one_line(module):
    done = python("-c", NOT_IGNORED + LOADING.format(module=module))
    assert (done.returncode, done.stderr) == (130, "tele: interrupted\n")


BUSY = """
import sys, threading
sys.argv = ["tele", "inspect", "x"]
from tele_jax.cli import inspect, main
def run(args):
    threading.Thread(target=threading.Event().wait).start()
    raise KeyboardInterrupt
inspect.run = run
sys.exit(main.main())
"""


def test_ctrl_c_does_not_wait_for_threads_that_are_at_work():
    done = python("-c", BUSY)
    assert (done.returncode, done.stderr) == (130, "tele: interrupted\n")


def test_a_program_that_imports_the_package_keeps_its_ctrl_c():
    code = "import tele_jax; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert python("-c", NOT_IGNORED + code).stdout.split() == ["True"]


@pytest.mark.parametrize("verb", WRITTEN)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: tele {verb}")


def test_the_command_alone_prints_its_verbs_and_its_version(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: tele") and all(f"\n    {verb}" in printed for verb in VERBS)
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"tele {importlib.metadata.version('tele_jax')}\n"


def test_an_unknown_verb_is_one_line_and_exit_2():
    done = python("-m", "tele_jax.cli.main", "trian")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"tele: .*trian.*\n", done.stderr)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "argument VERB: invalid choice: 'trian'; did you mean 'train'?; see tele --help"),
        (["--versoin"], "unrecognized argument --versoin; did you mean '--version'?; see tele --help"),
        (["train", "--confg", "x"], "train: unrecognized argument --confg; did you mean '--config'?"),
        (["train"], "train: the following arguments are required: --config, --workdir; see tele train --help"),
        (["data", "cahce"], "data: argument ACTION: invalid choice: 'cahce'; did you mean 'cache'?"),
        (["data", "cache", "--confg=x"], "data cache: unrecognized argument --confg; did you mean '--config'?"),
        (["train", "--config", "tests", "--workdir", "W"], "--config tests: is a directory, not a file"),
    ],
)
def test_a_misspelt_word_is_named_once_with_the_nearest_known_one(words, line, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tele: {line}") and error.count("tele: ") == 1


def test_eight_devices_are_simulated():
    assert len(jax.devices("cpu")) == 8
