"""The README's Python and its three commands of an evaluation run as they are printed."""

import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import tele_jax as tele
from tele_jax.cli.main import main
from tests.corpora.test_questions import packages  # noqa: F401 - small files in the place of what pip downloads
from tests.inference.test_chat import model, work_directory

README = Path(__file__).parent.parent / "README.md"


def test_the_growth_example_grows_and_preserves():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 512)
    plan, small, params, big = (names[name] for name in ("plan", "small", "params", "big"))
    before, after = tele.forward(small, params, tokens), tele.forward(plan.dst_cfg, big, tokens)
    assert float(jnp.abs(before - after).max()) <= 2e-5 * float(jnp.abs(before).max())
    report = tele.growth.verify(plan, params, big, tokens)
    assert report.ok, report


@pytest.mark.usefixtures("quick_compilation", "packages")
def test_three_commands_lead_from_a_release_to_a_finished_evaluation(tmp_path, monkeypatch):
    section = README.read_text(encoding="utf-8").partition("in three commands\n")[2].partition("\n## ")[0]
    commands = [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("    tele ")]
    assert [command[0] for command in commands] == ["import", "data", "eval"]
    monkeypatch.chdir(tmp_path)
    trained = work_directory(tmp_path / "W", *model(vocab_size=440, max_seq_len=512))
    tele.convert.export_checkpoint(trained, tmp_path / "SmolLM2-135M", format="llama")
    for command in commands:
        assert main(command) == 0, command
    results = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    asked = commands[-1][commands[-1].index("--tasks") + 1].split(",")
    assert sorted(results) == sorted(asked) and all(0 <= results[name]["acc,none"] <= 1 for name in asked)
