"""What earlier versions wrote is still read: checkpoints, optimizer states, plans, receipts, caches and runs under way.

Each archive was made by make.py with the code of its version, which also wrote down what it had read and computed.
"""

import importlib.util
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tele_jax import checkpoint, growth
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.growth import receipt as receipts
from tele_jax.train import metrics

HERE = Path(__file__).parent
ARCHIVES = sorted(HERE.glob("*.tar.xz"))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=ARCHIVES, ids=[path.name.partition(".")[0] for path in ARCHIVES])
def made(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("made_before")
    with tarfile.open(request.param) as archive:
        archive.extractall(directory, filter="data")
    return directory / "made"


@pytest.fixture(scope="module")
def expected(made):
    return json.loads((made / "expected.json").read_text())


def digests(path):
    """By the function that wrote the expected ones down."""
    specification = importlib.util.spec_from_file_location("made_before_make", HERE / "make.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.digests(checkpoint, path)


def test_there_are_archives():
    assert ARCHIVES


def test_parameters_have_the_same_bits(made, expected):
    assert len(expected["params"]) == 7
    for place, values in expected["params"].items():
        assert digests(made / place) == values, place


def test_optimizer_states_are_read_and_grow_to_the_same_bits(made):
    before, grown = checkpoint.load(made / "run/small"), checkpoint.load(made / "grown")
    assert before.step == grown.step == 8
    ours = flatten(growth.apply_opt(receipts.read_plan(made / "grown"), before.opt_state))
    theirs = flatten(grown.opt_state)
    assert set(ours) == set(theirs) and len(theirs) > 20
    for name, value in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(value), err_msg=name)


def test_a_composed_plan_makes_the_same_bits(made, expected):
    plan = growth.Plan.from_json(json.loads((made / "composed_plan.json").read_text()))
    grown = flatten(growth.apply(plan, checkpoint.load(made / "run/small").params))
    loaded = flatten(checkpoint.load(made / "composed").params)
    assert set(grown) == set(loaded)
    for name, value in grown.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(loaded[name]), err_msg=name)


def test_a_receipt_still_vouches_for_its_checkpoint(made, capsys):
    assert main(["grow", str(made / "run/small"), str(made / "grown"), "--check"]) == 0
    assert "verified" in capsys.readouterr().out


def test_a_run_under_way_goes_on_to_the_same_figures(made, expected, tmp_path, monkeypatch):
    """Stopped in its second half: the growth's plan with its masks, the data's positions, a cache still to be read."""
    place = tmp_path / "made"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    workdir = place / "run"
    shutil.rmtree(workdir / "rows")
    shutil.rmtree(workdir / "large/checkpoints/8")
    (workdir / "large/summary.json").unlink()
    assert main(["train", "--config", "page.py", "--workdir", "run"]) == 0
    for stage, losses in expected["losses"].items():
        lines = metrics.read(workdir / stage / "metrics/metrics.jsonl")
        ours = [[line["step"], line["loss"]] for line in lines if "loss" in line]
        assert [step for step, _ in ours] == [step for step, _ in losses]
        np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in losses], rtol=1e-5)
