"""A new kind of stage touches no file but its own: this one is a module that the test puts beside the others."""

import json
import sys

import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint, stages
from tele_jax.errors import UserError
from tele_jax.stages import run_config
from tele_jax.train import metrics
from tests.inference.test_chat import tokenizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")

KIND = '''
"""Pretraining whose head is pulled towards what it was at the start of the stage."""
import dataclasses
from typing import Literal
import jax
import jax.numpy as jnp
from tele_jax import checkpoint
from tele_jax.data.batches import Batches
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import TrainStage

@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(TrainStage):
    kind: Literal["anchored"]
    strength: float = 1.0

def batches(stage, index):
    return Batches(stage, "pretrain", index)

def beside(stage, cfg, previous, mesh):
    reference = checkpoint.load(previous, mesh=mesh, items=("params",)).params
    return {"head": reference["lm_head"]["kernel"]}

def loss(stage, cfg, params, batch, masks, beside):
    total, weight = next_token_loss(cfg, params, batch, masks)
    moved = weight * stage.strength * jnp.sum((params["lm_head"]["kernel"] - beside["head"]) ** 2)
    return total + moved, weight, {"moved": moved}
'''


@pytest.fixture
def anchored(tmp_path, monkeypatch):
    directory = tmp_path / "kinds"
    directory.mkdir()
    (directory / "anchored.py").write_text(KIND)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(directory)])
    yield
    sys.modules.pop("tele_jax.stages.anchored", None)
    vars(stages).pop("anchored", None)


def page(tmp_path, **anchored):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} and {i + 1} are not {2 * i}"}) + "\n" for i in range(200)))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    data = {
        "tokenizer": str(tmp_path / "tokenizer.model"),
        "sources": {"en": {"files": [str(text)], "format": "jsonl"}},
    }
    shared = {"data": data, "steps": 2, "batch_size": 4, "seq_len": 16, "log_every": 1}
    shared |= {"optimizer": {"learning_rate": 1e-2}}
    model = {"num_layers": 1, "embed_dim": 8, "num_heads": 1, "head_dim": 8, "mlp_dim": 8, "vocab_size": 600}
    first = {"kind": "pretrain", "model": model | {"dtype": "float32", "tie_embeddings": False}, **shared}
    return {"run": ["first", "second"], "first": first, "second": {"kind": "anchored", **shared, **anchored}}


def test_a_kind_that_the_trainer_does_not_know_is_trained(tmp_path, anchored):
    """Twice, in one batch and in microbatches: the sums and what is logged of them are the same."""
    moved = {}
    for parts in (1, 2):
        workdir = tmp_path / str(parts)
        summaries = tele.run(page(tmp_path, microbatches=parts), workdir)
        assert [s["kind"] for s in summaries] == ["pretrain", "anchored"]
        lines = metrics.read(workdir / "second" / "metrics" / "metrics.jsonl")
        moved[parts] = [line["moved"] for line in lines if "moved" in line]
        assert checkpoint.open_lazy(workdir).provenance[-1]["kind"] == "anchored"
    assert moved[1][0] == 0, "nothing has moved before the first step"
    assert moved[1][1] > 0
    np.testing.assert_allclose(moved[2], moved[1], rtol=1e-4)


def test_its_own_fields_are_checked(tmp_path, anchored):
    assert run_config(page(tmp_path, strength=2)).stages["second"].strength == 2.0
    with pytest.raises(UserError, match=r"config\.second\.strenght: unknown key of Settings; did you mean 'strength'"):
        run_config(page(tmp_path, strenght=2))


def test_an_unknown_kind_names_those_that_there_are(tmp_path):
    kinds = ", ".join(map(repr, stages.known_kinds()))
    assert "'grow', " in kinds and "'sft'" in kinds
    with pytest.raises(UserError, match=rf"config\.second\.kind: 'anchored' is not one of {kinds}$"):
        run_config(page(tmp_path))


def test_a_run_from_python_needs_a_page(tmp_path):
    with pytest.raises(UserError, match=r"config: expected a ConfigDict, a dict or a RunConfig, got 'page\.py'"):
        tele.run("page.py", tmp_path / "w")


def test_a_stage_goes_on_from_the_earlier_stage_that_it_names(tmp_path):
    """The third stage begins with the parameters of the first, not of the second, as the growth of the first does."""
    config = page(tmp_path)
    more = {key: value for key, value in config["first"].items() if key != "model"}
    grown = {"kind": "grow", "model": {"num_layers": 2}, "after": "first"}
    config |= {"run": ["first", "second", "third", "grown"], "second": more, "third": more | {"after": "first"}}
    config |= {"grown": grown, "third": config["third"] | {"optimizer": {"learning_rate": 1e-30}}}
    tele.run(config, tmp_path / "W")
    ends = {name: checkpoint.load(tmp_path / "W" / name).params for name in config["run"]}
    for name, same in (("second", False), ("first", True)):
        for later in ("third", "grown"):
            equal = np.array_equal(ends[name]["lm_head"]["kernel"], ends[later]["lm_head"]["kernel"])
            assert equal is same, (name, later)


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("after", ["second", "third", "nowhere"])
def test_a_stage_that_names_no_earlier_one_is_refused(tmp_path, after, grows):
    config = page(tmp_path)
    config["second"] = {key: value for key, value in config["first"].items() if key != "model"} | {"after": after}
    config["second"] = {"kind": "grow", "model": {}, "after": after} if grows else config["second"]
    told = "a growth goes on after a training stage; those" if grows else "the stages"
    with pytest.raises(UserError, match=rf"config.second.after='{after}': {told} before second are first; name"):
        run_config(config)
