"""Runs with branches: a stage goes on from the stage that it names, and opens the masks of that growth alone."""

import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.errors import UserError
from tele_jax.growth.masks import mask_of
from tele_jax.stages import run_config
from tele_jax.train import metrics
from tests.train.test_new_kind import page as small_page

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPENS = {"mask_ramp": 2, "steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3}


def branched(tmp_path):
    """A growth, a stage that passes it by, the stage that opens its masks, and another growth of the first model.

    Both growths make models of the same shapes, in which different layers are new.
    """
    config = small_page(tmp_path)
    small = config["first"] | {"model": config["first"]["model"] | {"num_layers": 2}}
    small["data"]["eval_bytes"] = 400
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "7 and 8 are not 14, and 14 are not 15"}\n' * 9)
    small["data"]["sources"]["en"]["validation_files"] = [str(held_out)]
    train = {key: value for key, value in small.items() if key != "model"}
    grow = {"kind": "grow", "policy": "msg", "model": {"num_layers": 3}, "after": "small"}
    stages = {
        "small": small,
        "grow_a": grow | {"layers": (0, 0, 1)},
        "beside": train | {"after": "small"},
        "a": train | OPENS | {"after": "grow_a"},
        "grow_b": grow | {"layers": (0, 1, 1)},
        "b": train | OPENS,
    }
    return {"run": list(stages), **stages}


def test_masks_are_opened_by_the_stage_that_goes_on_from_their_growth(tmp_path):
    config = run_config(branched(tmp_path))
    assert config.parents == {
        "small": None, "grow_a": "small", "beside": "small", "a": "grow_a", "grow_b": "small", "b": "grow_b",
    }  # fmt: skip
    assert config.lineage("b") == ["small", "grow_b", "b"]
    tele.run(config, tmp_path / "W")

    def bits(stage):
        lines = metrics.read(tmp_path / "W" / stage / "metrics" / "metrics.jsonl")
        return [line["eval/bits_per_byte/en"] for line in lines if "eval/bits_per_byte/en" in line]

    for name in ("a", "b"):  # closed masks of the right layers: the model is the small one, to rounding
        assert bits(name)[0] == pytest.approx(bits("small")[-1], abs=1e-5)
        assert abs(bits(name)[-1] - bits(name)[0]) > 1e-3
        halfway = checkpoint.open_lazy(tmp_path / "W" / name / "checkpoints" / "1")
        assert mask_of(halfway.provenance, name) == 0.5
        assert mask_of(checkpoint.open_lazy(tmp_path / "W" / name).provenance, name) is None
    passed_by = checkpoint.open_lazy(tmp_path / "W" / "beside")
    assert passed_by.cfg.num_layers == 2 and [e["stage"] for e in passed_by.provenance] == ["small", "beside"]
    assert bits("beside")[0] == bits("small")[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": {"mask_ramp": 0}}, r"config\.a\.mask_ramp: has to be above 0: config\.grow_a grows by policy 'msg'"),
        ({"beside": {"mask_ramp": 1}}, r"config\.beside\.mask_ramp: after='small' is no growth"),
        ({"beside": {"after": None}}, r"config\.beside\.mask_ramp: has to be above 0: config\.grow_a grows by"),
        ({"b": {"after": "a"}}, r"config\.b\.mask_ramp: after='a' is no growth"),
        ({"grow_b": {"after": None}, "a": {"after": None}}, r"config\.a\.mask_ramp: no growth comes right before"),
        (
            {"beside": {"optimizer": {"learning_rate": 1e-3, "trained": "new"}}},
            r"follow a growth, and config\.small is",
        ),
        (
            {"grow_b": {"optimizer_state": False}, "b": {"optimizer": {"learning_rate": 1e-3, "new_warmup_steps": 1}}},
            r"config\.b\.optimizer\.new_warmup_steps: config\.grow_b grows without optimizer_state",
        ),
        (
            {"beside": {"kind": "dpo", "reference": "grow_a"}},
            r"config\.beside\.reference='grow_a': grows by policy 'msg', and its masks are closed",
        ),
    ],
)
def test_masks_and_moments_of_a_page_are_checked_along_its_branches(tmp_path, change, message):
    config = branched(tmp_path)
    for name, keys in change.items():
        config[name] = config[name] | keys
    with pytest.raises(UserError, match=message):
        run_config(config)


def test_a_growth_right_behind_closed_masks_is_refused(tmp_path):
    config = branched(tmp_path)
    config = {name: config[name] for name in ("small", "grow_a", "grow_b", "b")}
    del config["grow_b"]["after"]
    with pytest.raises(UserError, match=r"config\.grow_b: cannot grow while the masks of config\.grow_a are closed"):
        run_config({"run": list(config), **config})


def test_growths_that_no_stage_goes_on_from_and_orders_of_branches_are_free(tmp_path):
    config = branched(tmp_path)
    config["b"]["after"] = "grow_b"
    config["run"] = ["small", "grow_b", "grow_a", "beside", "b", "a"]
    assert run_config(config).parents["grow_b"] == run_config(config).parents["grow_a"] == "small"
    del config["a"]
    config["run"] = ["small", "grow_b", "b", "beside", "grow_a"]
    assert run_config(config).parents["beside"] == "small"
