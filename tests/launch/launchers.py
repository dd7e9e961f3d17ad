"""Runs launchers as a person would, with stand-ins for the cloud's programs that write down what they are asked."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tele_jax.cli import main

ROOT = Path(__file__).parents[2]
CODE = "/opt/tele"
PROGRAMS = ("gcloud", "kubectl", "xpk", "docker")
AT = ["--name", "tele-1", "--bucket", "gs://my-bucket", "--zone", "us-east5-a"]
PAGE = "configs/tele_flm_52b.py"
TRAIN = [
    *("tele", "train", "--config", PAGE, "--workdir", "runs/52b", "--config.mesh.fsdp=64", "--config.mesh.tensor=2"),
    *("--config.pretrain.microbatches=21", "--config.pretrain.data.cache=a cache"),
]

# Writes its own command line down, and answers by the first rule [text, output, exit code] whose text is in it; a rule
# is used up unless it is the last of its text. Without one: nothing, and 0.
STAND_IN = """#!{python} -IS
import json, pathlib, sys
here = pathlib.Path({directory!r})
line = " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
with (here / "calls").open("a") as file:
    file.write(line + chr(10))
rules = json.loads((here / "rules.json").read_text())
mine = [rule for rule in rules if rule[0] in line]
if mine:
    if sum(rule[0] == mine[0][0] for rule in mine) > 1:
        rules.remove(mine[0])
        (here / "rules.json").write_text(json.dumps(rules))
    print(mine[0][1], end="")
    sys.exit(mine[0][2])
"""


def stand_ins(directory: Path, rules: list, programs=PROGRAMS) -> dict[str, str]:
    """The environment in which they are found first."""
    (directory / "rules.json").write_text(json.dumps(rules))
    for program in programs:
        file = directory / program
        file.write_text(STAND_IN.format(python=sys.executable, directory=str(directory)))
        file.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def calls(directory: Path) -> list[str]:
    file = directory / "calls"
    return file.read_text().splitlines() if file.exists() else []


def launch(
    script: str, *words: str, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *words],
        env=os.environ | {"PYTHON": sys.executable} | (env or {}),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


def preflight_once(directory: Path, options: list[str], command: list[str]) -> dict[str, str]:
    """An environment whose Python says what `tele preflight` said here, in this process, and does all else itself."""
    page = [str(ROOT / word) if word == PAGE else word for word in command]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        words = ["preflight", "--bucket", "gs://my-bucket", "--checkout", str(ROOT), *options, "--", *page]
        assert main.main(words) == 0
    (directory / "preflight").write_text(said.getvalue())
    python = directory / "python"
    python.write_text(
        f'#!/usr/bin/env bash\n[[ $1 == -m ]] && exec cat {directory}/preflight\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return {"PYTHON": str(python), "TMPDIR": str(directory)}


def readme_commands() -> dict[str, list[str]]:
    """The launchers' command lines in launch/README.md, by script and name: words after the script."""
    text = (ROOT / "launch" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = [shlex.split(line) for line in re.findall(r"^ {4}(launch/\w+\.sh .*)$", text, re.MULTILINE)]
    return {f"{Path(words[0]).name} {words[words.index('--name') + 1]}": words for words in found}


@functools.cache
def dry_run(case: str) -> str:
    """What a command of the README prints with --dry-run. No program of the cloud may be called, and none is needed."""
    script, *words = readme_commands()[case]
    with tempfile.TemporaryDirectory() as directory:
        env = stand_ins(Path(directory), [["", "a stand-in was called", 1]])
        done = launch(Path(script).name, "--dry-run", *words, env=env | {"TMPDIR": directory})
        assert not calls(Path(directory)), calls(Path(directory))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def commands(text: str) -> list[list[str]]:
    """The command lines of a dry run, without its comments and the manifest."""
    text = re.sub(r" <<'MANIFEST'\n.*?\nMANIFEST$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def tele_command(text: str) -> list[str]:
    """The `tele` command that a dry run starts on the machines, wherever it stands in it."""
    manifest = re.search(r"^ *command: (\[.*\])$", text, re.MULTILINE)
    if manifest:
        return json.loads(manifest[1])
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if not line.startswith("# runs on")]
    for line in lines:
        for word in shlex.split(line) if "--command=" in line else [line]:
            if word.startswith("tele "):
                return shlex.split(word)
            tail = re.search(r"(?: -- |&& exec )(tele .*?)(?: \|\| result=\$\?)?$", word)
            if tail:
                return shlex.split(tail[1])
    raise AssertionError(f"no tele command in:\n{text}")
