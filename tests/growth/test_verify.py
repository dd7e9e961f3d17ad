"""Verification: it passes what is right and sees what is wrong; and what is new does learn, for real."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten, unflatten
from tele_jax.growth import axis_map
from tele_jax.model.loss import next_token_loss
from tests import reference
from tests.growth.strategies import without_compiling

pytestmark = pytest.mark.usefixtures("quick_compilation")

SRC = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=5, vocab_size=12),
    **dict(output_biases=True, mup_base_width=3, rms_eps=1e-3, remat="none"),
)
LARGER = dict(num_layers=3, embed_dim=11, num_heads=6, mlp_dim=8)
TOKENS = np.random.default_rng(1).integers(0, 12, (2, 9))
SCALES = ("layers.attn_norm.scale", "layers.mlp_norm.scale", "final_norm.scale")


def configs(dtype="float64"):
    src = SRC.replace(dtype=dtype, param_dtype=dtype)
    return src, src.replace(**LARGER)


def params_of(src):
    params = reference.random_params(src, np.random.default_rng(0), 1.0)
    params["embed"]["table"] *= 0.1
    return jax.tree.map(lambda x: x.astype(src.param_dtype), params)


def verify(plan, change=None):
    """The report on what this plan makes, or on what `change` (of the dict of leaves, in place) makes of that."""
    params = params_of(plan.src_cfg)
    with without_compiling():
        big = growth.apply(plan, params)
    if change is not None:
        leaves = {name: np.array(leaf) for name, leaf in flatten(big).items()}
        change(leaves)
        big = unflatten(leaves)
    return growth.verify(plan, params, big, TOKENS)


def with_leaves(plan, **changes):
    """The plan with fields of some leaves changed: with_leaves(plan, **{"embed.table": dict(zero=())})."""
    return plan.replace(
        leaves={**plan.leaves, **{k: dataclasses.replace(plan.leaves[k], **v) for k, v in changes.items()}},
    )


# ---- What is right ----


@pytest.mark.parametrize(
    "kwargs", [{}, dict(epsilon="keep"), dict(policy="msg"), dict(layers=[0, 0, 1])], ids=lambda k: str(k or "exact")
)
def test_a_plan_as_it_was_made_passes(x64, kwargs):
    report = verify(growth.plan(*configs(), **kwargs))
    assert report.ok, report
    assert report.max_rel <= 1e-12 and abs(report.kl) < 1e-12 and report.tolerance == 1e-12
    assert report.altered == report.dead == report.locked == ()
    assert str(report).endswith("ok") and "NOT" not in str(report)
    data = json.loads(json.dumps(report.to_json()))
    assert data["ok"] is True and data["policy"] == kwargs.get("policy", "exact") and len(data["plan"]) == 64


def test_float32_passes_at_its_own_tolerance(usual_compilation):
    report = verify(growth.plan(*configs("float32")))
    assert report.ok and report.tolerance == 2e-5 and 0 < report.max_rel < 2e-5


def test_copies_are_found_to_be_locked_and_a_policy_that_says_so_passes(x64):
    src, dst = configs()
    plan = growth.plan(src.replace(num_kv_heads=4), dst.replace(num_kv_heads=6), policy="copy")
    report = verify(plan)
    assert report.ok and not report.lively and not report.altered
    assert "mlp[5] = mlp[0]" in report.locked and "embed[6] = embed[0]" in report.locked
    assert not verify(plan.replace(lively=True)).ok


def test_a_policy_that_does_not_preserve_is_measured_but_not_failed(x64):
    plan = growth.plan(*configs(), policy="random")
    report = verify(plan)
    assert report.ok and report.max_rel > 1e-3 and report.kl > 1e-6
    assert not dataclasses.replace(report, preserving=True).ok


# ---- What is wrong, one thing at a time ----


def norms_not_rescaled(plan):
    return with_leaves(plan, **{name: dict(coefficient=1.0) for name in SCALES})


def one_norm_not_rescaled(plan):
    return with_leaves(plan, **{"layers.mlp_norm.scale": dict(coefficient=1.0)})


def epsilon_kept_without_dividing_the_writers(plan):
    return plan.replace(dst_cfg=plan.dst_cfg.replace(rms_eps=plan.src_cfg.rms_eps))


def heads_appended_across_groups(plan):
    heads = axis_map.widen("heads", plan.src_cfg.num_heads, plan.dst_cfg.num_heads)
    return plan.replace(maps={**plan.maps, "heads": heads})


def multiplier_recomputed_instead_of_folded(plan):
    return with_leaves(plan, **{"lm_head.kernel": dict(coefficient=1.0)})


def both_sides_random_in_embed(plan):
    return with_leaves(plan, **{"embed.table": dict(zero=())})


def both_sides_random_in_mlp(plan):
    return with_leaves(plan, **{"layers.mlp.down": dict(zero=("layers", "embed"))})


def both_sides_random_in_heads(plan):
    return with_leaves(plan, **{"layers.attn.o": dict(zero=("layers", "embed"))})


def copied_layers_take_part_at_once(plan):
    return with_leaves(plan, **{"layers.attn.o": dict(zero=("embed", "heads"))})


def copied_biases_take_part_at_once(plan):
    return with_leaves(plan, **{"layers.mlp.down_bias": dict(zero=("embed",))})


@pytest.mark.parametrize(
    "mutation",
    [
        norms_not_rescaled,
        one_norm_not_rescaled,
        epsilon_kept_without_dividing_the_writers,
        heads_appended_across_groups,
        multiplier_recomputed_instead_of_folded,
        both_sides_random_in_embed,
        both_sides_random_in_mlp,
        both_sides_random_in_heads,
        copied_layers_take_part_at_once,
        copied_biases_take_part_at_once,
    ],
)
def test_a_plan_that_changes_the_function_fails(x64, mutation):
    report = verify(mutation(growth.plan(*configs())))
    assert not report.ok
    assert report.max_rel > 1e-5 and report.kl > 0
    assert not (report.altered or report.dead or report.locked)
    assert "NOT ok" in str(report)


NOTHING = dict(fill="constant", value=0.0)


@pytest.mark.parametrize(
    ("leaves", "dead"),
    [
        (("layers.mlp.gate", "layers.mlp.up"), "mlp[5] in layers.mlp.down"),
        (("layers.mlp.gate",), "mlp[7] in layers.mlp.up"),
        (("layers.attn.q", "layers.attn.k", "layers.attn.v"), "heads[4] in layers.attn.q"),
        (SCALES, "embed[6] in final_norm.scale"),
        (
            ("layers.attn.q", "layers.attn.k", "layers.attn.v", "layers.mlp.gate", "layers.mlp.up", "lm_head.kernel"),
            "embed[10] in embed.table",
        ),
    ],
    ids=["gate_and_up", "gate_alone", "queries_keys_values", "norm_scales", "all_readers_of_embed"],
)
def test_units_with_both_sides_zero_are_found_dead(x64, leaves, dead):
    src, _ = configs()
    grown = {"mlp": dict(mlp_dim=8), "embed": dict(embed_dim=11), "heads": dict(num_heads=6, num_kv_heads=3)}
    plan = growth.plan(src, src.replace(**grown[dead.split("[")[0]]))
    report = verify(with_leaves(plan, **{name: NOTHING for name in leaves}))
    assert not report.ok
    assert dead in report.dead
    assert report.max_rel <= 1e-12 and not report.altered  # nothing else is wrong


def test_identical_new_units_are_found_locked(x64):
    def twins(leaves):
        for name in ("layers.mlp.gate", "layers.mlp.up"):
            leaves[name][..., 6] = leaves[name][..., 5]
        leaves["layers.mlp.down"][:, 6] = leaves["layers.mlp.down"][:, 5]

    report = verify(growth.plan(*configs()), twins)
    assert report.locked == ("mlp[6] = mlp[5]",)
    # They learn, but alike; and they are not the values that the seed gives.
    assert not report.ok and not report.dead and set(report.altered) <= {"layers.mlp.gate", "layers.mlp.up"}
    assert report.altered


def _flip_last_bit(leaves):
    leaves["layers.attn.q"].view(np.int64)[0, 0, 0, 0] ^= 1


def _scale_off_by_a_little(leaves):
    leaves["final_norm.scale"][2] *= 1 + 1e-14


def _swap_layers(leaves):
    leaves["layers.mlp.up"][[0, 1]] = leaves["layers.mlp.up"][[1, 0]]


@pytest.mark.parametrize(
    ("change", "leaf"),
    [(_flip_last_bit, "layers.attn.q"), (_scale_off_by_a_little, "final_norm.scale"), (_swap_layers, "layers.mlp.up")],
)
def test_an_old_entry_that_is_not_the_source_s_is_named(x64, change, leaf):
    report = verify(growth.plan(*configs()), change)
    assert report.altered == (leaf,)
    assert not report.ok and leaf in str(report)


def test_not_a_number_never_passes(x64):
    def poison(leaves):
        leaves["layers.mlp.gate"][0, 0, 7] = np.nan  # a new entry

    assert not verify(growth.plan(*configs()), poison).ok


def test_trees_that_do_not_fit_are_refused():
    src, dst = configs("float32")
    plan = growth.plan(src, dst)
    params = params_of(src)
    with pytest.raises(tele.UserError, match=r"the parameters do not fit the config: embed\.table.*; and \d+ more$"):
        growth.verify(plan, params, params, TOKENS)


# ---- Liveness, by training ----


def _fresh_units(plan, leaf):
    for dimension, axis in enumerate(plan.dst_spec[leaf].axes):
        for unit in np.flatnonzero(plan.maps[axis].fresh):
            yield f"{axis}[{unit}] in {leaf}", dimension, unit


@pytest.mark.parametrize("policy", ["exact", "msg"])
def test_all_that_is_new_learns_within_two_steps_and_nothing_is_equal_after_fifty(policy):
    src, dst = configs("float32")
    plan = growth.plan(src, dst.replace(num_kv_heads=3, num_heads=9), policy=policy)
    with without_compiling():
        big = growth.apply(plan, params_of(src))
    rng = np.random.default_rng(2)
    optimizer = optax.adamw(1e-3)
    schedule = growth.MaskSchedule(plan, ramp=50)
    ones = {axis: np.ones_like(mask) for axis, mask in (schedule(0) or {}).items()} or None

    @jax.jit
    def step(params, state, tokens, masks):
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": jnp.ones(tokens[:, 1:].shape)}

        def mean_loss(p):
            total, weight = next_token_loss(plan.dst_cfg, p, batch, masks)
            return total / weight

        gradient = jax.grad(mean_loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    state = jax.jit(optimizer.init)(big)
    alive = set()
    for i in range(51):
        tokens = rng.integers(0, 12, (8, 10))
        big, state, gradient = step(big, state, tokens, schedule(i) or ones)
        if i <= 2:  # the gradient after i steps
            alive |= {
                unit
                for leaf, g in flatten(gradient).items()
                for unit, dimension, index in _fresh_units(plan, leaf)
                if np.take(np.asarray(g), index, axis=dimension).any()
            }
    assert {unit for leaf in plan.leaves for unit, _, _ in _fresh_units(plan, leaf)} - alive == set()
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(big).items()}
    for axis in ("layers", "embed", "heads", "kv_heads", "mlp"):
        units = [
            np.moveaxis(leaves[name], spec.axes.index(axis), 0).reshape(plan.maps[axis].dst_size, -1)
            for name, spec in plan.dst_spec.items()
            if axis in spec.axes
        ]
        assert len(np.unique(np.concatenate(units, axis=1), axis=0)) == plan.maps[axis].dst_size, axis
