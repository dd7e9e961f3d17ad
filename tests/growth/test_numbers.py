"""Ids, seeds, scores and steps that are something else are refused by the same rule, wherever they enter."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import growth, surgery
from tele_jax.cli.main import main
from tele_jax.config import from_dict
from tele_jax.settings import GrowStage

CFG = tele.ModelConfig(num_layers=3, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=6, vocab_size=10)
DEEPER = CFG.replace(num_layers=4)
MASKED = growth.plan(CFG, CFG.replace(mlp_dim=8), policy="msg")
REPLACED = {
    **{"src_cfg": ["tele_flm_52b", None], "dst_cfg": [{"embed_dim": 8}, None], "seed": ["x", -1, 1.5]},
    **{"policy": [3, None], "notes": ["text"], "preserving": ["yes"], "masked": [None], "lively": [2]},
    **{"maps": [None, {}, {"mlp": 3}, MASKED.maps | {"mlp": "x"}], "tree": [3], "src_tree": ["x"]},
    "leaves": [None, {}, {"embed.table": growth.LeafPlan()}, MASKED.leaves | {"embed.table": 3}]
    + [MASKED.leaves | {"embed.table": growth.LeafPlan(**wrong)} for wrong in ({"coefficient": "x"}, {"fill": "zero"})],
}
NOT_WHOLE = (True, np.True_, 1.7, 1.0, "1", None, float("nan"))


def planned(**how):
    return growth.plan(CFG, DEEPER, **how)


def refused(call, *words):
    with pytest.raises(tele.UserError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_no_id_and_no_step(value):
    word = "must be a whole number"
    refused(lambda: planned(layers=[0, value, 1, 2]), "layers[1]", word)
    refused(lambda: growth.insert_layers(CFG, [0, value, 1, 2]), "layers[1]", word)
    refused(lambda: planned(seed=value), "seed", word)
    for change in (surgery.take, surgery.drop):
        for axis in surgery.FIELDS:
            refused(lambda change=change, axis=axis: change(CFG, axis, [0, value]), f"{axis} ids[1]", word)
    refused(lambda: surgery.duplicate(CFG, [value]), word)
    refused(lambda: surgery.submodel(CFG, mlp=[0, value]), word)
    refused(lambda: surgery.cut(CFG, "mlp", value), word)
    refused(lambda: surgery.pad(CFG, "mlp", value), word)
    refused(lambda: growth.MaskSchedule(MASKED, start=value), "start", word)
    refused(lambda: growth.MaskSchedule(MASKED, ramp=value), "ramp", word)
    refused(lambda: growth.MaskSchedule(MASKED)(value), "step", word)
    if value is not None:
        refused(lambda: growth.MaskSchedule(MASKED, unit="tokens", tokens_per_step=value), "tokens_per_step", word)


@pytest.mark.parametrize("value", [v for v in NOT_WHOLE if v is not None], ids=repr)
def test_sizes_are_whole_numbers(value):
    for field in ("num_layers", "embed_dim", "mlp_dim", "num_kv_heads", "head_dim", "max_seq_len", "mup_base_width"):
        refused(lambda field=field: CFG.replace(**{field: value}), f"{field}=", "must be a whole number")
    refused(lambda: growth.widen_mlp(CFG, value), "mlp_dim=", "must be a whole number")
    refused(lambda: growth.insert_layers(CFG, value), "layers=", "must be a whole number")
    refused(lambda: growth.insert_layers(CFG, [value]), "layers[0]", "must be a whole number")


@pytest.mark.parametrize("value", [True, "1.0", None, float("nan"), float("inf")], ids=repr)
def test_multipliers_are_finite_numbers(value):
    refused(lambda: CFG.replace(input_mult=value), "input_mult", "finite number")


def test_parameters_are_a_tree_of_arrays():
    for params in (None, [1.0], 3):
        refused(lambda params=params: growth.apply(planned(), params), "nested dict")
    lists = jax.tree.map(lambda leaf: leaf.tolist(), tele.init(CFG, jax.random.key(0)))
    refused(lambda: growth.apply(planned(), lists), "embed.table: list, not an array")


def test_numpy_integers_are_whole():
    sizes = CFG.replace(mlp_dim=np.int64(6), input_mult=np.float32(1))
    assert sizes == CFG and type(sizes.mlp_dim) is int
    assert growth.insert_layers(CFG, np.int64(4)) == growth.insert_layers(CFG, 4)
    assert planned(layers=np.array([0, 0, 1, 2]), seed=np.int64(3)) == planned(layers=[0, 0, 1, 2], seed=3)
    assert surgery.take(CFG, "mlp", np.arange(2)).dst_cfg.mlp_dim == 2
    assert growth.MaskSchedule(MASKED, start=np.int32(2), ramp=4)(np.int64(2))["mlp"].tolist() == [1.0] * 6 + [0.0] * 2


@pytest.mark.parametrize("seed", [-1, 2**32, "7", True, 0.5])
def test_seeds(seed, tmp_path):
    refused(lambda: planned(seed=seed), "seed")
    refused(lambda: from_dict(GrowStage, {"kind": "grow", "model": {}, "seed": seed}), "seed")
    refused(lambda: tele.generate(CFG, tele.init(CFG, jax.random.key(0)), [[1]], max_new_tokens=1, seed=seed), "seed")
    changed = planned().to_json() | {"seed": seed}
    refused(lambda: growth.Plan.from_json(changed), "seed")


@pytest.mark.parametrize("seed", ["-1", "1.5", "x"])
def test_seeds_on_the_command_line(seed, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    commands = [
        [
            "tokenizer",
            "train",
            "--preset",
            "tele_flm",
            "--vocab-size",
            "300",
            "--out",
            str(tmp_path / "t.model"),
            str(text),
        ],
        ["generate", str(tmp_path), "--prompt", "hello"],
    ]
    for command in commands:
        assert main([*command, f"--seed={seed}"]) == 2
        assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "0.5", None, True], ids=repr)
def test_scores_are_finite_numbers(score):
    refused(lambda: planned(layers="distance", scores=[0.1, score, 0.2]), "scores[1]", "finite number")
    refused(lambda: planned(scores=[0.1, score, 0.2]), "scores[1]", "finite number")  # not used, and wrong all the same
    refused(lambda: planned(layers="distance", scores="abc"), "scores")
    refused(lambda: planned(layers="distance", scores=0.5), "scores")
    refused(lambda: surgery.rescale(CFG, {"lm_head.*": score}), "finite number")


def test_layers_that_are_no_list():
    for layers in (3, None, 1.5):
        refused(lambda layers=layers: planned(layers=layers), "layers")


def test_float64_is_not_cut_to_float32():
    """Neither parameters nor optimizer states, where JAX computes in 32 bits; what works on the host keeps all bits."""
    src = CFG.replace(dtype="float64", param_dtype="float64")
    plan = growth.plan(src, src.replace(mlp_dim=8, embed_dim=12))
    params = jax.tree.map(lambda s: np.random.default_rng(0).normal(size=s.shape), tele.spec(src))
    big = jax.tree.map(lambda s: np.zeros(s.shape), tele.spec(plan.dst_cfg))
    born = {axis: np.zeros(size, np.int32) for axis, size in src.axis_sizes.items()}
    state = {"count": np.int32(1), "mu": params, "nu": params, "born": born}
    refused(lambda: growth.apply(plan, params), "float64", "jax_enable_x64")
    refused(lambda: growth.apply_opt(plan, state), "float64", "jax_enable_x64")
    refused(lambda: growth.shrink(plan, big), "float64", "jax_enable_x64")
    refused(lambda: growth.apply(surgery.cut(src, "mlp", 4), params), "float64", "jax_enable_x64")
    lazy = growth.lazy(plan, params)
    assert lazy["final_norm"]["scale"][:8].dtype == np.float64
    kept = params["final_norm"]["scale"] * np.sqrt(8 / 12)
    np.testing.assert_allclose(lazy["final_norm"]["scale"][:8], kept, rtol=1e-15)


WRONG_PLANS = ({"steps": []}, "plan.json", None, MASKED.steps[0])


@pytest.mark.parametrize("plan", WRONG_PLANS, ids=["dict", "path", "None", "step"])
def test_what_is_no_plan_is_named(plan):
    params, word = tele.init(CFG, jax.random.key(0)), "expected a Plan"
    for call in (growth.apply, growth.shrink, growth.lazy, growth.apply_opt):
        refused(lambda call=call: call(plan, params), call.__name__, word)
    refused(lambda: growth.check(plan), "check: plan", word)
    refused(lambda: growth.sharded(plan, None, None), "sharded: plan", word)
    refused(lambda: growth.state_shardings(plan, None, None), "state_shardings: plan", word)
    refused(lambda: growth.compose(plan, MASKED), "first plan", word)
    refused(lambda: growth.compose(MASKED, plan), "second plan", word)
    refused(lambda: growth.MaskSchedule(plan), "MaskSchedule.plan", "expected Plan")
    refused(lambda: growth.verify(plan, params, params, [[1, 2, 3]]), "verify: plan", word)
    refused(lambda: growth.verify_stored(plan, params, params), "verify_stored: plan", word)
    for stream in (growth.stream, growth.stream_outline):
        refused(lambda stream=stream: stream(plan, "a", "b"), "stream: plan", word)
    refused(lambda: growth.Plan(plan), "steps")


def test_a_field_of_a_plan_is_replaced_and_a_misspelt_one_is_named():
    assert MASKED.replace(seed=7).seed == 7 and MASKED.replace(seed=7) != MASKED
    refused(lambda: MASKED.replace(leafs={}), "no field 'leafs'; did you mean 'leaves'?")
    both = growth.compose(growth.widen_mlp(CFG, 8), growth.widen_mlp(CFG.replace(mlp_dim=8), 9))
    refused(lambda: both.replace(seed=7), "this one has 2")
    refused(lambda: both.leaves, "2 steps")


@pytest.mark.parametrize("fields", [{name: value} for name in REPLACED for value in REPLACED[name]], ids=str)
def test_a_value_of_a_plan_that_is_of_another_type_is_named(fields):
    """By every way to a step: replace, dataclasses.replace and a list of steps."""
    (name,) = fields
    refused(lambda: MASKED.replace(**fields), f"plan.{name}")
    refused(lambda: growth.Plan([dataclasses.replace(MASKED.steps[0], **fields)]), f"plan.{name}")


def test_steps_that_are_no_list_of_steps_or_do_not_follow_each_other_are_named():
    (step,), (other,) = MASKED.steps, planned().steps
    refused(lambda: growth.Plan(()), "a list of nothing")
    refused(lambda: growth.Plan((MASKED,)), "a list of Plan", "growth.compose")
    refused(lambda: growth.Plan([step, other]), "plan step 1 produces another model than plan step 2", "mlp_dim 8 -> 6")
    wider = growth.widen_embed(CFG, 12, policy="msg")
    copied = growth.widen_embed(wider.dst_cfg, 16, policy="copy")
    refused(lambda: growth.Plan([*wider.steps, *copied.steps]), "msg and copy cannot be done in one go")
    for text in ("plan.json", json.dumps(MASKED.to_json())):
        refused(lambda text=text: growth.Plan.from_json(text), "got str; json.loads")


def test_an_optimizer_state_or_a_mesh_that_is_none_is_named():
    refused(lambda: growth.apply_opt(MASKED, None), "opt_state", "got None")
    other = jax.make_mesh((1,), ("x",))
    for mesh in ("mesh", other):
        refused(lambda mesh=mesh: growth.check(MASKED, mesh), "check: mesh")
    for mesh in (None, "mesh", other):
        refused(lambda mesh=mesh: growth.sharded(MASKED, mesh, None), "sharded: mesh")
        refused(lambda mesh=mesh: growth.state_shardings(MASKED, mesh, ()), "state_shardings: mesh")


def test_growth_of_one_axis_names_a_misspelt_argument():
    calls = {growth.widen_mlp: 8, growth.widen_embed: 16, growth.widen_heads: 4, growth.insert_layers: 4}
    for call, size in (calls | {growth.grow_vocab: 12, growth.pad_vocab: 4}).items():
        refused(lambda call=call, size=size: call(CFG, size, polcy="msg"), "'polcy'", "did you mean 'policy'")


@pytest.mark.parametrize("layers", [0, -1, 2, [], [5], [0, 1], [0, 2, 1]], ids=str)
def test_layers_that_cannot_be_inserted_are_named_as_they_were_given(layers):
    refused(lambda: growth.insert_layers(CFG, layers), str(layers), "layers", "3 ")


def test_long_lists_of_leaves_are_cut_in_messages():
    params = tele.init(CFG, jax.random.key(0))
    wider = CFG.replace(embed_dim=12, head_dim=6, vocab_size=11)
    for call in (
        lambda: growth.apply(growth.plan(wider, wider), params),
        lambda: tele.checkpoint.save("x", wider, params),
    ):
        with pytest.raises(tele.UserError, match=r"and 9 more") as error:
            call()
        assert len(str(error.value)) < 400 and "embed.table" in str(error.value)


@pytest.mark.parametrize("cfg", [{"num_layers": 3}, "tele_flm_52b", None], ids=["dict", "name", "None"])
def test_what_is_no_config_is_named(cfg):
    word = "expected a ModelConfig"
    refused(lambda: growth.plan(cfg, DEEPER), "src_cfg", word)
    refused(lambda: growth.plan(CFG, cfg), "dst_cfg", word)
    refused(lambda: growth.widen_mlp(cfg, 8), "cfg", word)
    refused(lambda: growth.grow_vocab(cfg, 12), "cfg", word)
    refused(lambda: growth.pad_vocab(cfg, 4), "cfg", word)
    refused(lambda: growth.layers.distances(cfg, {}, [[1, 2]]), "cfg", word)
    for change in (surgery.take, surgery.drop):
        refused(lambda change=change: change(cfg, "mlp", [0]), "model", word)
    refused(lambda: surgery.find(cfg), "model", word)


def test_a_key_is_no_seed_and_a_list_is_no_tree():
    refused(lambda: planned(seed=jax.random.key(0)), "seed", "must be a whole number")
    refused(lambda: growth.apply(planned(), [1, 2]), "nested dict", "list")
    params = tele.init(CFG, jax.random.key(0))
    refused(lambda: growth.apply(planned(), {"params": params}), "params.embed.table: not a parameter")
    for tokens in ([[1, 2, 3], [4, 5]], [[1.0, 2.0, 3.0]], "abc"):
        refused(lambda tokens=tokens: growth.verify(planned(), params, params, tokens), "tokens")
    refused(lambda: growth.verify(planned(), "runs/a", params, [[1, 2, 3]]), "params", "open checkpoint", "str")


def test_lists_are_taken_where_arrays_are():
    plan, params = planned(layers=(0, 1, 1, 2)), tele.init(CFG, jax.random.key(0))
    assert growth.verify(plan, params, growth.apply(plan, params), [[1, 2, 3], [4, 5, 6]]).ok
    assert len(growth.layers.distances(CFG, params, [[1, 2, 3]])) == CFG.num_layers
    assert growth.AxisMap("mlp", 2, [0, 1, -1], [False, False, True], [1, 1, 1], [1, 1, 1]).fresh.tolist() == [0, 0, 1]


def test_plans_and_reports_are_shown_in_a_few_lines_or_as_a_table():
    plan, params = planned(policy="copy"), tele.init(CFG, jax.random.key(0))
    both = growth.compose(plan, growth.widen_mlp(plan.dst_cfg, 9))
    report = growth.verify_stored(plan, params, growth.apply(plan, params))
    for shown in (repr(plan), repr(both), repr(report), repr(plan.steps[0]), repr(plan.maps["mlp"])):
        assert len(shown) < 200 and shown.count("\n") < 3
    for table in (plan._repr_html_(), both._repr_html_(), report._repr_html_()):
        assert table.count("<table>") == table.count("</table>") == 1
    assert "layers.mlp.up" in both._repr_html_() and "-&gt;" in both._repr_html_()
