"""growth.check: passes every plan that growth makes, and names what is wrong with a plan that would not hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import growth, surgery
from tele_jax.growth import axis_map
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh
from tests.growth.strategies import growths, without_compiling
from tests.growth.test_verify import SCALES, both_sides_random_in_embed, configs, with_leaves

POLICIES = ("exact", "msg", "copy", "stack", "interleave", "random")
NOTHING = dict(fill="constant", value=0.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_plan_that_growth_makes_is_sound(policy):
    @settings(max_examples=60)
    @given(growths(policy=policy))
    def check(case):
        layers = {"layers": "uniform"} if policy in ("stack", "random") else {}
        plan = growth.plan(case.src, case.dst, **case.kwargs | layers)
        assert growth.check(plan) is None
        assert growth.check(growth.compose(plan, growth.plan(plan.dst_cfg, plan.dst_cfg))) is None

    with without_compiling():
        check()


def test_surgery_that_keeps_the_function_is_sound():
    cfg = configs()[0].replace(padded_vocab_size=14)
    with without_compiling():
        for plan in (
            *(surgery.pad(cfg, axis, size) for axis, size in dict(layers=4, heads=6, mlp=9, vocab=16).items()),
            surgery.take(cfg, "embed", [5, 3, 1, 0, 2, 4]),
            surgery.take(cfg, "heads", [3, 2, 0, 1]),
            surgery.cut(cfg, "vocab", 12),
            surgery.rename(cfg, {"embed.table": "wte"}),
            surgery.select(cfg, "layers.mlp.*"),
            surgery.drop(cfg, "layers", [0]),
        ):
            assert growth.check(plan) is None, plan


# ---- what changes the function, by the plan's own numbers --------------------------------------------------------


def plan_of(policy="exact", **how):
    src, dst = configs()
    with without_compiling():
        return growth.plan(src, dst.replace(output_mult=3.0), policy=policy, **how)


def refused(plan):
    """What is said, in one line."""
    with without_compiling(), pytest.raises(tele.UserError) as error:
        growth.check(plan)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"plan ({plan.policy}): ")
    return message


def with_maps(plan, **maps):
    return plan.replace(maps={**plan.maps, **maps})


@pytest.mark.parametrize("policy", ["exact", "msg"])
@pytest.mark.parametrize("name", SCALES)
def test_a_norm_scale_with_another_coefficient(policy, name):
    plan = plan_of(policy)
    right = (6 / 11) ** 0.5 if policy == "exact" else 1.0
    assert plan.leaves[name].coefficient == pytest.approx(right)
    message = refused(with_leaves(plan, **{name: dict(coefficient=0.9)}))
    assert message == f"plan ({policy}): {name}: coefficient is 0.9, but {right:.9g} keeps the function"


def test_every_norm_scale_not_rescaled_is_named():
    message = refused(with_leaves(plan_of(), **{name: dict(coefficient=1.0) for name in SCALES}))
    assert all(f"{name}: coefficient is 1," in message for name in SCALES)


@pytest.mark.parametrize(
    ("how", "eps", "right"),
    [({}, 1e-3, 1e-3 * 6 / 11), (dict(epsilon="keep"), 1e-3 * 6 / 11, 1e-3), (dict(policy="msg"), 1e-2, 1e-3)],
)
def test_another_epsilon(how, eps, right):
    plan = plan_of(**how)
    message = refused(plan.replace(dst_cfg=plan.dst_cfg.replace(rms_eps=eps)))
    assert message.endswith(f": rms_eps is {eps:.9g}, but {right:.9g} keeps the function")


def test_residual_writers_of_different_scale():
    message = refused(with_leaves(plan_of(), **{"layers.attn.o": dict(coefficient=2.0)}))
    assert "the writers of the residual stream differ: layers.attn.o 2, layers.attn.o_bias 1" in message


@pytest.mark.parametrize("policy", ["exact", "msg", "copy"])
def test_a_multiplier_recomputed_instead_of_folded(policy):
    src, dst = configs()
    with without_compiling():
        plan = growth.plan(src.replace(num_kv_heads=4), dst.replace(output_mult=3.0, num_kv_heads=6), policy=policy)
    folded = (1.0 / 2) / (3.0 * 3 / 11)  # effective multipliers: base width 3 over the widths 6 and 11
    assert plan.leaves["lm_head.kernel"].coefficient == pytest.approx(folded)
    message = refused(with_leaves(plan, **{"lm_head.kernel": dict(coefficient=1.0)}))
    assert "lm_head.kernel: coefficient is" in message and message.count("keeps the function") == 1
    with without_compiling():
        plan = growth.plan(src, src.replace(input_mult=4.0), policy=policy)
    assert "embed.table: coefficient is 4, but 1 keeps" in refused(
        with_leaves(plan, **{"embed.table": {"coefficient": 1}})
    )


def test_a_tied_model_whose_multipliers_change():
    src = configs()[0].replace(tie_embeddings=True)
    with without_compiling():
        for policy, embed_dim in (("exact", 11), ("msg", 11), ("copy", 12)):
            plan = growth.plan(src, src.replace(embed_dim=embed_dim, num_kv_heads=4), policy=policy)
            growth.check(plan)
            wrong = plan.replace(dst_cfg=plan.dst_cfg.replace(output_mult=plan.dst_cfg.output_mult * 1.01))
            assert "output_mult: logits is 0.505, but 0.5 keeps the function" in refused(wrong)


def test_heads_appended_across_groups():
    plan = plan_of()
    message = refused(with_maps(plan, heads=axis_map.widen("heads", 4, 6)))
    assert "heads[2] is heads[2] of the source, but reads kv_heads[0] and not [1]: heads have to grow inside" in message


BOTH_RANDOM = {
    "embed": ({"embed.table": dict(zero=())}, "embed.table"),
    "mlp": ({"layers.mlp.down": dict(zero=("layers", "embed"))}, "layers.mlp.down"),
    "heads": ({"layers.attn.o": dict(zero=("layers", "embed"))}, "layers.attn.o"),
}


@pytest.mark.parametrize("axis", BOTH_RANDOM)
def test_new_units_random_on_both_sides(axis):
    leaves, culprit = BOTH_RANDOM[axis]
    message = refused(with_leaves(plan_of(), **leaves))
    assert f"{axis}: new units are random on both sides ({culprit}" in message or f"; {culprit})" in message
    assert message.endswith("the function changes") and message.count("random on both") == 1


BOTH_ZERO = {
    "mlp": ("layers.mlp.gate", "layers.mlp.up"),
    "heads": ("layers.attn.q", "layers.attn.k", "layers.attn.v"),
    "embed": ("layers.attn.q", "layers.attn.k", "layers.attn.v", "layers.mlp.gate", "layers.mlp.up", "lm_head.kernel"),
}


@pytest.mark.parametrize("axis", BOTH_ZERO)
def test_new_units_zero_on_both_sides(axis):
    src = configs()[0]
    grown = {"mlp": dict(mlp_dim=8), "embed": dict(embed_dim=11), "heads": dict(num_heads=6, num_kv_heads=3)}
    with without_compiling():
        plan = growth.plan(src, src.replace(**grown[axis]))
    message = refused(with_leaves(plan, **dict.fromkeys(BOTH_ZERO[axis], NOTHING)))
    assert f"{axis}: new units are zero on both sides (" in message and message.endswith("they never learn")
    assert all(name in message for name in BOTH_ZERO[axis] if name != "layers.attn.q" or axis != "heads")


def test_a_gate_that_is_zero_alone():
    with without_compiling():
        plan = growth.plan(configs()[0], configs()[0].replace(mlp_dim=8))
    message = refused(with_leaves(plan, **{"layers.mlp.gate": NOTHING}))
    assert "mlp: new units are zero on both sides (layers.mlp.gate; layers.mlp.down): they never learn" in message


def test_every_norm_scale_zero_in_the_new_channels():
    message = refused(with_leaves(plan_of(), **dict.fromkeys(SCALES, NOTHING)))
    assert "embed: every norm scale is 0 in the new channels" in message and all(name in message for name in SCALES)


@pytest.mark.parametrize("name", ["layers.attn.o", "layers.mlp.down", "layers.attn.o_bias", "layers.mlp.down_bias"])
def test_a_copied_layer_that_writes_at_once(name):
    plan = plan_of(layers=[0, 0, 1])
    zero = tuple(axis for axis in plan.leaves[name].zero if axis != "layers")
    message = refused(with_leaves(plan, **{name: dict(zero=zero)}))
    assert f"layers: {name} of new layers is not zero, and writes to the residual stream at once" in message
    # One that is new and not copied may be filled with zeros instead.
    filled = with_maps(plan, layers=axis_map.widen("layers", 2, 3))
    assert f"layers: {name}" in refused(with_leaves(filled, **{name: dict(zero=zero, fill="normal", value=1.0)}))


@pytest.mark.parametrize(
    "names",
    [("layers.mlp.up",), ("layers.attn.k", "layers.attn.v"), ("layers.attn_norm.scale",), ("layers.mlp_norm.scale",)],
)
def test_a_copied_layer_that_reads_nothing_and_writes_nothing(names):
    message = refused(with_leaves(plan_of(), **{name: dict(zero=("layers",)) for name in names}))
    assert message.startswith(f"plan (exact): layers: {', '.join(names)} of new layers")
    assert message.endswith("zero, and so are the writers: they never learn")


@pytest.mark.parametrize("name", ["layers.attn.q", "layers.attn.v", "layers.mlp.gate"])
def test_a_kernel_that_is_scaled_inside_a_layer(name):
    message = refused(with_leaves(plan_of(), **{name: dict(coefficient=0.5)}))
    assert message == f"plan (exact): {name}: coefficient is 0.5, but 1 keeps the function"


def test_copies_that_do_not_add_up_to_what_they_copy():
    src = configs()[0].replace(num_kv_heads=4)
    with without_compiling():
        plan = growth.plan(src, src.replace(embed_dim=9, mlp_dim=8, num_heads=6, num_kv_heads=6), policy="copy")
    message = refused(with_leaves(plan, **{"layers.mlp.down": dict(shared=())}))
    assert message == "plan (copy): layers.mlp.down: reads every copy along mlp whole, and not its share"
    message = refused(with_leaves(plan, **{"layers.attn.o": dict(scaled=())}))
    assert message == "plan (copy): layers.attn.o: is not scaled along embed, whose copies are"
    whole = axis_map.AxisMap("mlp", 5, plan.maps["mlp"].index, np.zeros(8, bool))
    assert "mlp[0] of the source counts 2 times in the result, and not once" in refused(with_maps(plan, mlp=whole))


def test_units_that_are_lost():
    plan = plan_of()
    lost = axis_map.AxisMap("mlp", 5, [0, 1, 2, 3, -1, -1, -1, -1])
    assert "mlp[4] of the source counts 0 times in the result" in refused(with_maps(plan, mlp=lost))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (dict(mlp=axis_map.widen("mlp", 5, 9)), "plan.maps.mlp: dst_size is 9, but 8 in dst_cfg"),
        (dict(embed=axis_map.widen("embed", 5, 11)), "plan.maps.embed: src_size is 5, but 6 in src_cfg"),
    ],
)
def test_maps_that_are_not_the_configs_(maps, message):
    with without_compiling(), pytest.raises(tele.UserError, match=f"^{message}$"):
        with_maps(plan_of(), **maps)


def test_leaves_without_a_plan_and_plans_without_a_leaf():
    plan = plan_of()
    leaves = {name: leaf for name, leaf in plan.leaves.items() if name != "embed.table"}
    with without_compiling(), pytest.raises(tele.UserError, match=r"plan\.leaves: embed\.tabel, embed\.table: in"):
        plan.replace(leaves={**leaves, "embed.tabel": plan.leaves["embed.table"]})


def test_a_policy_that_does_not_promise_is_not_held_to_it():
    plan = plan_of()
    for change in ({"embed.table": dict(zero=())}, {"layers.attn.o": dict(coefficient=2.0)}):
        with without_compiling():
            growth.check(with_leaves(plan, **change).replace(preserving=False))
    dead = with_leaves(plan, **dict.fromkeys(BOTH_ZERO["mlp"], NOTHING))
    with without_compiling():
        growth.check(dead.replace(lively=False))


def test_all_that_is_wrong_is_said_and_of_every_step():
    with without_compiling():
        first = both_sides_random_in_embed(plan_of())
        then = growth.plan(first.dst_cfg, first.dst_cfg.replace(mlp_dim=20))
        then = then.replace(dst_cfg=then.dst_cfg.replace(rms_eps=1.0))
        message = refused(growth.compose(first, then))
    assert "embed: new units are random on both sides (embed.table" in message and "rms_eps is 1," in message


@settings(max_examples=40)
@given(st.sampled_from(["coefficient", "zero", "value"]), st.data())
def test_what_is_done_to_a_leaf_of_a_plan_is_either_refused_or_harmless(field, data):
    """Any change of one leaf of an exact plan that check lets pass leaves the function as it was."""
    from tests import reference
    from tests.growth.test_apply import relative_difference, tokens_of

    with without_compiling():
        src, dst = configs()
        plan = growth.plan(src, dst, layers=[0, 0, 1])
        name = data.draw(st.sampled_from(sorted(plan.leaves)))
        axes = [axis for axis in plan.dst_spec[name].axes if axis in ("layers", "embed", "mlp", "heads", "kv_heads")]
        change = {
            "coefficient": st.sampled_from([0.5, 1.0, 2.0]),
            "zero": st.lists(st.sampled_from(axes), unique=True).map(tuple),
            "value": st.sampled_from([0.0, 0.3]),
        }[field]
        changed = with_leaves(plan, **{name: {field: data.draw(change)}})
        try:
            growth.check(changed)
        except tele.UserError as error:
            assert name in str(error) or "writers of the residual stream" in str(error)
            return
        params = reference.random_params(src, np.random.default_rng(0), 1.0)
        before = reference.forward(src, params, tokens_of(src))
        after = reference.forward(changed.dst_cfg, growth.apply(changed, params), tokens_of(src))
        assert relative_difference(before, after) <= 1e-12, changed.leaves[name]


# ---- meshes ------------------------------------------------------------------------------------------------------


def test_a_mesh_over_which_the_grown_model_does_not_divide():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    src = tele.ModelConfig(num_layers=1, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=8, vocab_size=16)
    with without_compiling():
        growth.check(growth.plan(src, src.replace(embed_dim=12, mlp_dim=10, num_heads=4)), mesh)
        plan = growth.plan(src, src.replace(embed_dim=10))
        growth.check(plan)
        with pytest.raises(
            tele.UserError, match=r"the grown model does not fit the mesh: .*: embed=10 does not divide"
        ):
            growth.check(plan, mesh)
