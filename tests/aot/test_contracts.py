"""How the published models lie on three slices is what the golden files say."""

import json

import pytest

import tele_jax as tele
from tele_jax import published
from tele_jax.axes import flatten
from tests.aot.contracts import DIRECTORY, SLICES, contract


@pytest.mark.parametrize("model", published.PUBLISHED)
def test_every_leaf_lies_as_the_contract_says(model):
    golden = json.loads((DIRECTORY / f"{model}.json").read_text())
    assert contract(model) == golden, "if this is meant: python -m tests.aot.contracts, and look at the diff"


def test_there_is_a_contract_for_every_published_model_and_no_other():
    assert {path.stem for path in DIRECTORY.glob("*.json")} == set(published.PUBLISHED)


@pytest.mark.parametrize("model", published.PUBLISHED)
def test_devices_share_the_parameters_evenly(model):
    """Nothing of any size lies whole on every device: the parts add up to the whole, small vectors aside."""
    cfg = tele.get_model(model)
    vectors = sum(spec.size for spec in flatten(tele.spec(cfg)).values() if spec.role in ("scale", "bias"))
    for name, (_, fsdp, tensor) in SLICES.items():
        held = json.loads((DIRECTORY / f"{model}.json").read_text())[name]["bytes_per_device"] / 4
        even = (tele.count_params(cfg) - vectors) / (fsdp * tensor)
        assert even <= held <= even + vectors
