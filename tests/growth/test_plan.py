"""Plans as data: what is zero and what is fresh, counts, text, JSON, and what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten, unflatten
from tele_jax.growth import LeafPlan, Plan
from tele_jax.growth.axis_map import NEW
from tests import reference
from tests.growth import oracle, strategies
from tests.growth.strategies import growths, without_compiling

SMALL = dict(num_layers=2, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=10, vocab_size=16)
SRC = tele.ModelConfig(**SMALL)
DST = SRC.replace(embed_dim=12, num_layers=3, mlp_dim=15, num_heads=6, output_mult=2.0, mup_base_width=4)

# The two sides of every axis, as the table of the design says.
PRODUCERS = {
    "embed": {"embed.table", "layers.attn.o", "layers.mlp.down"},
    "mlp": {"layers.mlp.gate", "layers.mlp.up"},
    "heads": {"layers.attn.q"},
}
CONSUMERS = {
    "embed": {"layers.attn.q", "layers.attn.k", "layers.attn.v", "layers.mlp.gate", "layers.mlp.up", "lm_head.kernel"},
    "mlp": {"layers.mlp.down"},
    "heads": {"layers.attn.o"},
}
ZERO_SIDE = {"embed": PRODUCERS["embed"], "mlp": CONSUMERS["mlp"], "heads": CONSUMERS["heads"]}


def each(function, policy=None, examples=100):
    """Runs function(plan) for many random growths."""

    @settings(max_examples=examples)
    @given(growths(policy=policy))
    def check(case):
        function(growth.plan(case.src, case.dst, **case.kwargs))

    with without_compiling():
        check()


@pytest.mark.parametrize("options", [{}, dict(tie_embeddings=True), dict(output_biases=True, embed_norm=True)])
def test_the_specs_that_these_tests_make_quickly_are_those_of_the_modules(options):
    cfg = tele.ModelConfig(**SMALL | dict(num_heads=6, num_kv_heads=3), **options, param_dtype="bfloat16")
    assert strategies.flat_spec(cfg) == strategies.FLAT_SPEC(cfg)
    assert {name: leaf.shape for name, leaf in strategies.flat_spec(cfg).items()} == reference.shapes(cfg)


# ---- What becomes of a leaf ----


def test_exactly_one_side_of_every_new_unit_is_zero():
    def check(plan):
        params = reference.random_params(plan.src_cfg, np.random.default_rng(0), 1.0)
        big = flatten(oracle.grow(plan, params))
        for axis, zero_side in ZERO_SIDE.items():
            units = np.flatnonzero(plan.maps[axis].fresh)
            for name in PRODUCERS[axis] | CONSUMERS[axis]:
                if name in big and units.size:
                    part = np.take(big[name], units, axis=plan.dst_spec[name].axes.index(axis))
                    assert part.any() != (name in zero_side), (axis, name)
        copies = np.flatnonzero(plan.maps["layers"].fresh)
        for name in ("layers.attn.o", "layers.mlp.down", "layers.attn.o_bias", "layers.mlp.down_bias"):
            assert name not in big or not big[name][copies].any()
        for name in ("layers.attn.q", "layers.mlp.up", "layers.attn_norm.scale"):
            assert not copies.size or big[name][copies].any()

    each(check, "exact")


def test_new_norm_scales_are_never_zero():
    def check(plan):
        for name, leaf in plan.leaves.items():
            if name.endswith("scale"):
                assert leaf.fill == "constant" and leaf.value != 0 and not leaf.zero

    each(check)


def test_msg_zeroes_nothing_but_new_biases_and_masks_the_start():
    def check(plan):
        assert plan.preserving
        assert plan.masked == any(plan.maps[axis].fresh.any() for axis in ("layers", "embed", "heads", "mlp"))
        assert not any(leaf.zero for leaf in plan.leaves.values())
        assert plan.dst_cfg.rms_eps == plan.src_cfg.rms_eps

    each(check, "msg")


def test_norm_scales_take_the_root_of_the_ratio_and_epsilon_the_ratio():
    plan = growth.plan(SRC, DST)
    assert plan.leaves["final_norm.scale"].coefficient == pytest.approx((8 / 12) ** 0.5, rel=1e-15)
    assert plan.dst_cfg.rms_eps == pytest.approx(1e-5 * 8 / 12, rel=1e-15)
    keep = growth.plan(SRC, DST, epsilon="keep")
    assert keep.dst_cfg.rms_eps == 1e-5
    for name in ("embed.table", "layers.attn.o", "layers.mlp.down"):
        assert keep.leaves[name].coefficient == pytest.approx((12 / 8) ** 0.5, rel=1e-15)
    assert keep.leaves["final_norm.scale"].coefficient == pytest.approx((8 / 12) ** 0.5, rel=1e-15)


def test_a_changed_multiplier_is_folded_into_the_head():
    plan = growth.plan(SRC, DST)
    assert plan.dst_cfg.output_mult == 2.0
    before, after = 1.0, 2.0 * 4 / 12  # output_mult * base width / width
    assert plan.leaves["lm_head.kernel"].coefficient == pytest.approx(before / after, rel=1e-15)


def test_a_tied_model_keeps_its_effective_multipliers():
    src = SRC.replace(tie_embeddings=True, input_mult=3.0, mup_base_width=4)
    plan = growth.plan(src, src.replace(embed_dim=12, input_mult=1.0, output_mult=7.0))
    assert plan.dst_cfg.input_mult == 3.0
    assert plan.dst_cfg.logit_mult == pytest.approx(src.logit_mult, rel=1e-15)
    assert plan.leaves["embed.table"].coefficient == 1


# ---- Counts and text ----


def test_the_tally_of_every_leaf_adds_up_and_is_what_growth_makes():
    def check(plan):
        # No source entry and no fresh value is 0 here, so that 0 is what the plan made zero.
        params = unflatten({name: np.full(spec.shape, 2.0) for name, spec in plan.src_spec.items()})
        nonzero = lambda key, shape, std: np.ones(shape)  # noqa: E731
        for name, array in flatten(oracle.grow(plan, params, nonzero)).items():
            spec, leaf, tally = plan.dst_spec[name], plan.leaves[name], plan.tally(name)
            assert sum(tally.values()) == spec.size == array.size
            new = np.zeros(spec.shape, bool)
            for dimension, axis in enumerate(spec.axes):
                new |= oracle.along(plan.maps[axis].index == NEW, dimension, len(spec.shape))
            zero = array == 0
            moved = "copied" if leaf.coefficient == 1 else "scaled"
            assert tally[moved] == np.sum(~new & ~zero), name
            assert tally["zero"] == np.sum(zero), name
            assert tally["fresh"] == np.sum(new & ~zero), name

    each(check, "exact", examples=60)
    each(check, "msg", examples=30)


PRINTED = """\
policy exact: preserves the function
axes: layers 2 -> 3, embed 8 -> 12, heads 4 -> 6, mlp 10 -> 15
config: rms_eps 1e-05 -> 6.66667e-06
config: output_mult 1.0 -> 2.0
leaf                        from        to    copied  scaled      zero     fresh
embed.table                 16x8     16x12       128       0        64         0
final_norm.scale               8        12         0       8         0         4
layers.attn.k            2x8x2x4  3x12x2x4       192       0         0        96
layers.attn.o            2x4x4x8  3x6x4x12       256       0       608         0
layers.attn.q            2x8x4x4  3x12x6x4       384       0         0       480
layers.attn.v            2x8x2x4  3x12x2x4       192       0         0        96
layers.attn_norm.scale       2x8      3x12         0      24         0        12
layers.mlp.down           2x10x8   3x15x12       160       0       380         0
layers.mlp.gate           2x8x10   3x12x15       240       0         0       300
layers.mlp.up             2x8x10   3x12x15       240       0         0       300
layers.mlp_norm.scale        2x8      3x12         0      24         0        12
lm_head.kernel              8x16     12x16         0     128         0        64
total                      1,544     4,392     1,792     184     1,052     1,364
bytes                   6.176 kB  17.57 kB  7.168 kB   736 B  4.208 kB  5.456 kB"""


def test_a_printed_plan_says_what_becomes_of_every_leaf():
    lines = str(growth.plan(SRC, DST)).splitlines()
    for line in PRINTED.splitlines():
        assert line in lines


def test_a_printed_plan_says_what_is_not_preserved():
    text = str(growth.plan(SRC, DST, policy="random"))
    assert "policy random: does not preserve the function" in text and "note: " in text
    assert "preserves the function, behind masks at 0" in str(growth.plan(SRC, DST, policy="msg"))
    assert "axes: every axis keeps its size" in str(growth.plan(SRC, SRC))


def _count(layers, embed, mlp, rows):
    """Heads times head_dim is embed in the Tele-FLM series: four square matrices, three of the mlp, two norms."""
    return layers * (4 * embed**2 + 3 * embed * mlp + 2 * embed) + 2 * rows * embed + embed


STAGES = [
    ("tele_flm_52b", "tele_flm_102b", 80_384, (64, 8_192, 21_824), (80, 10_240, 27_264)),
    ("tele_flm_102b", "tele_flm_1t", 81_920, (80, 10_240, 27_264), (140, 20_480, 98_304)),
]


@pytest.mark.parametrize("policy", ["exact", "msg"])
@pytest.mark.parametrize(("src", "dst", "rows", "small", "large"), STAGES)
def test_the_published_growths_are_planned_with_exact_counts(src, dst, rows, small, large, policy):
    src, dst = (tele.get_model(name).replace(padded_vocab_size=rows) for name in (src, dst))
    plan = growth.plan(src, dst, policy=policy)
    growth.check(plan)
    (n, d, f), (n2, d2, f2) = small, large
    total = next(line for line in str(plan).splitlines() if line.startswith("total"))
    assert f"{_count(n, d, f, rows):,}" in total and f"{_count(n2, d2, f2, rows):,}" in total
    tallies = {name: plan.tally(name) for name in plan.leaves}
    sums = {kind: sum(t[kind] for t in tallies.values()) for kind in ("copied", "scaled", "zero", "fresh")}
    assert sum(sums.values()) == _count(n2, d2, f2, rows)
    if policy == "exact":
        # Copied layers keep what reads the stream and get zeros in o and down; embed grows everywhere.
        assert tallies["layers.attn.q"]["copied"] == n2 * d * d
        assert tallies["layers.attn.q"]["fresh"] == n2 * (d2 * d2 - d * d)
        assert tallies["layers.attn.o"] == {"copied": n * d * d, "scaled": 0, "zero": n2 * d2**2 - n * d**2, "fresh": 0}
        assert tallies["layers.mlp.down"]["zero"] == n2 * d2 * f2 - n * d * f
        assert tallies["embed.table"]["zero"] == rows * (d2 - d)
        # 1/32 -> 1/40 is folded into the head; 1/40 -> 1/40 leaves it alone.
        assert tallies["lm_head.kernel"]["scaled" if dst.output_mult == 1.0 else "copied"] == rows * d
        assert plan.dst_cfg.rms_eps == pytest.approx(1e-5 * d / d2, rel=1e-15)
    else:
        assert sums["zero"] == 0
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert len(json.dumps(plan.to_json())) < 20_000


@pytest.mark.parametrize("policy", ["exact", "msg"])
def test_both_published_growths_in_one_go_are_sound_and_counted(policy):
    """From 52B to 1T, of whose 4 TB nothing is allocated."""
    rows = 81_920
    first, middle, last = (
        tele.get_model(f"tele_flm_{n}").replace(padded_vocab_size=rows) for n in ("52b", "102b", "1t")
    )
    plan = growth.plan(first, middle, policy=policy)
    plan = growth.compose(plan, growth.plan(plan.dst_cfg, last, policy=policy))
    growth.check(plan)
    (n, d, f), (n2, d2, f2) = STAGES[0][3], STAGES[1][4]
    total, size = (
        next(line for line in str(plan).splitlines() if line.startswith(word)) for word in ("total", "bytes")
    )
    before, after = _count(n, d, f, rows), _count(n2, d2, f2, rows)
    assert total.split()[1:3] == [f"{before:,}", f"{after:,}"]
    assert size.split()[1:5] == [f"{4 * before / 1e9:.4g}", "GB", f"{4 * after / 1e12:.4g}", "TB"]
    tallies = {name: plan.tally(name) for name in plan.dst_spec}
    sums = {kind: sum(t[kind] for t in tallies.values()) for kind in ("copied", "scaled", "zero", "fresh")}
    assert sum(sums.values()) == after
    # What comes from the 52B: of q every layer has one, copied; of o the layers that are no copies.
    assert tallies["layers.attn.q"]["copied"] == n2 * d * d
    assert tallies["layers.attn.o"]["copied"] == (n if policy == "exact" else n2) * d * d
    assert tallies["lm_head.kernel"]["scaled"] == rows * d  # 1/32 -> 1/40 in the first of the two
    if policy == "exact":
        # Zero in o: all that either growth adds; every layer that was there, in heads and channels that were not.
        assert tallies["layers.attn.o"]["zero"] == n2 * d2 * d2 - n * d * d
        assert tallies["embed.table"] == {"copied": rows * d, "scaled": 0, "zero": rows * (d2 - d), "fresh": 0}
        assert plan.dst_cfg.rms_eps == pytest.approx(1e-5 * d / d2, rel=1e-15)
        assert tallies["final_norm.scale"] == {"copied": 0, "scaled": d, "zero": 0, "fresh": d2 - d}
    else:
        assert sums["zero"] == 0 and plan.masked
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


# ---- JSON and digests ----


def test_json_gives_the_same_plan_back():
    def check(plan):
        again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan and hash(again) == hash(plan)
        assert (again.src_cfg, again.dst_cfg, dict(again.leaves)) == (plan.src_cfg, plan.dst_cfg, dict(plan.leaves))
        assert again.maps.keys() == plan.maps.keys()
        for axis, m in plan.maps.items():
            for field in ("index", "fresh", "scale", "share"):
                np.testing.assert_array_equal(getattr(again.maps[axis], field), getattr(m, field))
        assert str(again) == str(plan)

    each(check)
    each(check, "copy", examples=30)


def test_json_gives_the_same_plan_back_where_a_float_was_given_as_an_int():
    plan = growth.plan(SRC.replace(output_mult=2), DST)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_equal_plans_have_equal_digests_and_other_plans_others():
    plan = growth.plan(SRC, DST)
    assert growth.plan(SRC, DST) == plan and len(plan.digest) == 64
    others = [
        growth.plan(SRC, DST, seed=1),
        growth.plan(SRC, DST, policy="msg"),
        growth.plan(SRC, DST, layers=[0, 0, 1]),
        growth.plan(SRC, DST, epsilon="keep"),
        growth.plan(SRC, DST.replace(mlp_dim=16)),
        plan.replace(leaves={**plan.leaves, "embed.table": LeafPlan()}),
    ]
    assert len({p.digest for p in [plan, *others]}) == 1 + len(others)


def test_a_digest_is_the_same_in_another_process():
    code = (
        "import tele_jax as tele; from tele_jax import growth\n"
        f"src = tele.ModelConfig(**{SMALL!r})\n"
        "dst = src.replace(embed_dim=12, num_layers=3, mlp_dim=15, num_heads=6, output_mult=2.0, mup_base_width=4)\n"
        "print(growth.plan(src, dst).digest)"
    )
    env = os.environ | {"PYTHONHASHSEED": "12345", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == growth.plan(SRC, DST).digest


def test_a_plan_without_a_field_or_with_an_unknown_one_is_refused():
    data = growth.plan(SRC, DST).to_json()
    with pytest.raises(tele.UserError, match="plan: the field 'maps' is missing"):
        Plan.from_json({key: value for key, value in data.items() if key != "maps"})
    data["leaves"]["embed.table"]["coeficient"] = 1.0
    with pytest.raises(tele.UserError, match=r"plan\.leaves\.embed\.table\.coeficient: .*did you mean 'coefficient'"):
        Plan.from_json(data)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(embed_dim=7), "embed_dim would shrink, 8 -> 7: growth only adds; see growth.shrink"),
        (dict(mlp_dim=9), "mlp_dim would shrink, 10 -> 9"),
        (dict(num_layers=1), "num_layers would shrink, 2 -> 1"),
        (dict(num_heads=2), "num_heads would shrink, 4 -> 2"),
        (dict(num_kv_heads=1), "num_kv_heads would shrink, 2 -> 1"),
        (dict(head_dim=8), "head_dim differs, 4 -> 8: growth cannot change it"),
        (dict(rope=tele.Rope(theta=5e5)), "rope differs"),
        (dict(tie_embeddings=True), "tie_embeddings differs, False -> True"),
        (dict(output_biases=True), "output_biases differs"),
        (dict(embed_norm=True), "embed_norm differs"),
        (dict(residual_mult=0.5), "residual_mult differs, 1.0 -> 0.5: growth cannot change it"),
        (dict(param_dtype="bfloat16"), "param_dtype differs, float32 -> bfloat16"),
        (dict(num_heads=6, num_kv_heads=6, head_dim=2), "head_dim differs"),
    ],
)
def test_what_growth_cannot_do_is_refused(changes, message):
    with pytest.raises(tele.UserError, match=message):
        growth.plan(SRC, SRC.replace(**changes))


def test_heads_that_would_change_their_group_are_refused():
    src = SRC.replace(num_heads=6, num_kv_heads=2)
    with pytest.raises(tele.UserError, match="num_kv_heads: 6 heads in 2 groups do not fit into 6 heads in 3 groups"):
        growth.plan(src, src.replace(num_kv_heads=3))


def test_a_larger_vocabulary_keeps_the_old_tokens_and_says_what_it_cannot_keep():
    src = SRC.replace(vocab_size=13, padded_vocab_size=16)
    assert growth.plan(src, src.replace(padded_vocab_size=24)).notes == ()
    plan = growth.plan(src, src.replace(vocab_size=20, padded_vocab_size=24))
    first, second = plan.notes
    assert first.startswith("7 new tokens: the logits of the 13 old ones stay") and "softmax" in first
    assert second == "3 of the new tokens take over padding rows of the source as they are"
    for name in ("embed.table", "lm_head.kernel"):
        assert plan.tally(name) == {"copied": 16 * 8, "scaled": 0, "zero": 0, "fresh": 8 * 8}


def test_a_smaller_vocabulary_is_refused():
    with pytest.raises(tele.UserError, match="vocab_size would shrink, 16 -> 15"):
        growth.plan(SRC, SRC.replace(vocab_size=15))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(policy="exakt"), "policy 'exakt' is not one of exact, msg"),
        (dict(epsilon="drop"), "epsilon 'drop' is not one of 'scale', 'keep'"),
        (dict(layers="first"), "layers: 'first' is not one of uniform, last, middle, distance"),
        (dict(layers="distance"), 'layers="distance" needs scores'),
        (dict(layers="distance", scores=[1.0]), "layers: 1 scores given for 2 source layers"),
        (dict(layers=[0, 1]), "layers: 2 ids given for 3 destination layers"),
        (dict(layers=[0, 0, 0]), r"layers: \[0, 0, 0\] has to name each of the 2 source layers"),
        (dict(layers=[1, 0, 0]), "first occurrences in order"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(tele.UserError, match=message):
        growth.plan(SRC, DST, **kwargs)


def test_epsilon_keep_is_refused_for_a_tied_model_that_grows_in_width():
    src = SRC.replace(tie_embeddings=True)
    with pytest.raises(tele.UserError, match=r'epsilon="keep" divides the embedding, .* use "scale"'):
        growth.plan(src, src.replace(embed_dim=12), epsilon="keep")
    growth.plan(src, src.replace(mlp_dim=12), epsilon="keep")
