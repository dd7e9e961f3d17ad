"""Operators: each changes one axis, keeps the function, and composes with the others to what one plan does."""

import functools

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten
from tests import reference
from tests.growth import oracle
from tests.growth.strategies import without_compiling
from tests.growth.test_apply import closed_masks, relative_difference, same_bits, tokens_of

CFG = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=5, vocab_size=13),
    **dict(padded_vocab_size=16, output_biases=True, rms_eps=1e-3, mup_base_width=3, input_mult=1.5),
    **dict(dtype="float64", param_dtype="float64"),
)


def keeps(plan, cfg=CFG):
    """The grown parameters, after a look at the plan, at them, and at what the model does."""
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    params["embed"]["table"] *= 0.1
    growth.check(plan)
    assert plan.preserving
    big = growth.apply(plan, params)
    if len(plan.steps) == 1:
        same_bits(big, oracle.grow(plan, params))
    assert {name: leaf.shape for name, leaf in flatten(big).items()} == reference.shapes(plan.dst_cfg)
    tokens = tokens_of(cfg)
    before = reference.forward(cfg, params, tokens)
    after = reference.forward(plan.dst_cfg, big, tokens, masks=closed_masks(plan))
    assert relative_difference(before, after[..., : cfg.vocab_size]) <= 1e-12
    return big


ALONE = {
    "embed": (lambda **how: growth.widen_embed(CFG, 11, **how), ["embed"]),
    "mlp": (lambda **how: growth.widen_mlp(CFG, 8, **how), ["mlp"]),
    "larger_groups": (lambda **how: growth.widen_heads(CFG, 6, **how), ["heads"]),
    "whole_groups": (lambda **how: growth.widen_heads(CFG, 6, 3, **how), ["heads", "kv_heads"]),
    "groups_split_in_two": (lambda **how: growth.widen_heads(CFG, 8, 8, **how), ["heads", "kv_heads"]),
    "groups_split_to_multi_head": (lambda **how: growth.widen_heads(CFG, 4, 4, **how), ["kv_heads"]),
    "layers": (lambda **how: growth.insert_layers(CFG, 3, **how), ["layers"]),
    "layers_by_id": (lambda **how: growth.insert_layers(CFG, [0, 0, 1, 0], **how), ["layers"]),
    "vocab": (lambda **how: growth.grow_vocab(CFG, 19, 24, **how), ["vocab"]),
    "padding": (lambda **how: growth.pad_vocab(CFG, 10, **how), ["vocab"]),
}


@pytest.mark.parametrize("policy", ["exact", "msg", "copy"])
@pytest.mark.parametrize("name", ALONE)
def test_each_operator_alone_changes_its_axis_and_not_the_function(name, policy):
    operator, axes = ALONE[name]
    with without_compiling():
        plan = operator(policy=policy, seed=5)
        keeps(plan)
    assert (plan.policy, plan.seed) == (policy, 5)
    assert sorted(axis for axis, m in plan.maps.items() if not m.is_identity) == axes


def test_multipliers_are_folded_into_what_reads_and_writes():
    with without_compiling():
        plan = growth.change_multipliers(CFG, input_mult=3.0, output_mult=5.0, mup_base_width=2)
        big = keeps(plan)
        params = reference.random_params(CFG, np.random.default_rng(0), 1.0)
    assert (plan.dst_cfg.input_mult, plan.dst_cfg.output_mult, plan.dst_cfg.mup_base_width) == (3.0, 5.0, 2)
    np.testing.assert_allclose(big["embed"]["table"], 0.1 * params["embed"]["table"] * (1.5 / 3.0), rtol=1e-15)
    # output_mult * base width / width: 1 * 3/6 before, 5 * 2/6 after.
    np.testing.assert_allclose(big["lm_head"]["kernel"], params["lm_head"]["kernel"] * 0.3, rtol=1e-15)
    assert not plan.grown_axes
    with without_compiling():
        assert growth.change_multipliers(CFG) == growth.plan(CFG, CFG)


def test_a_tied_model_keeps_its_multipliers_in_effect():
    tied = CFG.replace(tie_embeddings=True)
    with without_compiling():
        plan = growth.change_multipliers(tied, input_mult=3.0, output_mult=5.0)
        keeps(plan, tied)
    assert plan.dst_cfg.input_mult == 1.5 and plan.dst_cfg.logit_mult == tied.logit_mult


def _in_turn(**how):
    steps = [
        lambda cfg: growth.widen_embed(cfg, 11, **how),
        lambda cfg: growth.widen_mlp(cfg, 8, **how),
        lambda cfg: growth.widen_heads(cfg, 9, 3, **how),
        lambda cfg: growth.insert_layers(cfg, [0, 1, 1], **how),
        lambda cfg: growth.grow_vocab(cfg, 17, **how),
        lambda cfg: growth.pad_vocab(cfg, 8, **how),
    ]
    return functools.reduce(
        lambda plan, step: growth.compose(plan, step(plan.dst_cfg)),
        steps,
        growth.change_multipliers(CFG, input_mult=0.5),
    )


@pytest.mark.parametrize("policy", ["exact", "msg"])
def test_operators_in_turn_do_what_one_plan_does(policy):
    with without_compiling():
        plan = _in_turn(policy=policy)
        sizes = dict(embed_dim=11, mlp_dim=8, num_heads=9, num_kv_heads=3, num_layers=3, vocab_size=17)
        whole = growth.plan(
            CFG, CFG.replace(**sizes, padded_vocab_size=24, input_mult=0.5), policy=policy, layers=[0, 1, 1]
        )
        assert plan.dst_cfg == whole.dst_cfg
        in_turn, at_once = flatten(keeps(plan)), flatten(keeps(whole))
        for name, old in oracle.old(whole).items():  # what is new is drawn in another order
            np.testing.assert_allclose(in_turn[name][old], at_once[name][old], rtol=1e-14)


def test_policies_may_differ_from_axis_to_axis():
    with without_compiling():
        plan = growth.widen_mlp(CFG, 8, policy="copy")
        plan = growth.compose(plan, growth.widen_embed(plan.dst_cfg, 11, epsilon="keep"))
        plan = growth.compose(plan, growth.widen_heads(plan.dst_cfg, 6, policy="copy"))
        keeps(plan)
        both = growth.compose(
            growth.widen_mlp(CFG, 8, policy="copy"), growth.widen_embed(CFG.replace(mlp_dim=8), 11, policy="msg")
        )
        assert both.masked
        keeps(both)


def test_grown_groups_keep_every_head_its_keys_and_values():
    """By index: which query heads and which keys and values stand where."""
    with without_compiling():
        larger, whole, split = (growth.widen_heads(CFG, *sizes) for sizes in ((6,), (6, 3), (4, 4)))
    assert larger.maps["heads"].index.tolist() == [0, 1, -1, 2, 3, -1]
    assert larger.maps["kv_heads"].index.tolist() == [0, 1]
    assert whole.maps["heads"].index.tolist() == [0, 1, 2, 3, -1, -1]
    assert whole.maps["kv_heads"].index.tolist() == [0, 1, -1]
    assert split.maps["heads"].index.tolist() == [0, 1, 2, 3]
    assert split.maps["kv_heads"].index.tolist() == [0, 0, 1, 1]


def test_new_tokens_take_over_padding_rows_and_say_so():
    with without_compiling():
        plan = growth.grow_vocab(CFG, 15)
        assert plan.dst_cfg.padded_vocab_size == 16 and not plan.grown_axes
        assert plan.notes[1] == "2 of the new tokens take over padding rows of the source as they are"
        big = keeps(plan)
        params = reference.random_params(CFG, np.random.default_rng(0), 1.0)
        np.testing.assert_array_equal(big["lm_head"]["kernel"], params["lm_head"]["kernel"])
        assert growth.grow_vocab(CFG, 20).dst_cfg.padded_vocab_size == 20
        assert growth.grow_vocab(CFG, 13, 32).dst_cfg.padded_vocab_size == 32


@pytest.mark.parametrize(("multiple", "rows"), [(1, 16), (16, 16), (10, 20), (128, 128)])
def test_padding_goes_up_to_the_next_multiple(multiple, rows):
    with without_compiling():
        assert growth.pad_vocab(CFG, multiple).dst_cfg.padded_vocab_size == rows


def test_multi_head_attention_stays_so():
    with without_compiling():
        plan = growth.widen_heads(CFG.replace(num_kv_heads=4), 7)
    assert plan.dst_cfg.num_kv_heads == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: growth.widen_embed(CFG, 5), "embed_dim would shrink, 6 -> 5: growth only adds"),
        (lambda: growth.widen_mlp(CFG, 4), "mlp_dim would shrink, 5 -> 4"),
        (lambda: growth.widen_heads(CFG, 5), "num_heads=5 does not divide into num_kv_heads=2 equal groups"),
        (lambda: growth.widen_heads(CFG, 3, 3), "num_heads would shrink, 4 -> 3"),
        (lambda: growth.widen_heads(CFG, 6, 6, policy="no"), "policy 'no' is not one of exact, msg"),
        (
            lambda: growth.widen_heads(CFG.replace(num_heads=6), 6, 3),
            "6 heads in 2 groups do not fit into 6 heads in 3",
        ),
        (lambda: growth.insert_layers(CFG, 1), "layers=1, but the model has 2 layers, and none is removed"),
        (lambda: growth.insert_layers(CFG, [0, 0]), r"layers: \[0, 0\] has to name each of the 2 source layers"),
        (lambda: growth.grow_vocab(CFG, 12), "vocab_size would shrink, 13 -> 12"),
        (lambda: growth.grow_vocab(CFG, 14, 13), "padded_vocab_size=13 is below vocab_size=14"),
        (lambda: growth.pad_vocab(CFG, 0), "multiple=0 must be above 0"),
        (lambda: growth.change_multipliers(CFG, input_mult=-1.0), r"input_mult=-1\.0 must be above 0"),
        (
            lambda: growth.widen_embed(CFG.replace(tie_embeddings=True), 9, epsilon="keep"),
            'epsilon="keep" divides the embedding',
        ),
    ],
)
def test_what_an_operator_cannot_do_is_refused(call, message):
    with without_compiling(), pytest.raises(tele.UserError, match=message):
        call()


def test_operators_run_as_the_library_does():
    """Without numpy in its place: eager and compiled, float32."""
    cfg = CFG.replace(dtype="float32", param_dtype="float32")
    plan = growth.compose(growth.widen_mlp(cfg, 8), growth.insert_layers(cfg.replace(mlp_dim=8), 3))
    params = jax.tree.map(np.float32, reference.random_params(cfg, np.random.default_rng(0), 1.0))
    big = jax.jit(lambda p: growth.apply(plan, p))(params)
    same_bits(big, oracle.grow(plan.steps[1], oracle.grow(plan.steps[0], params)))
