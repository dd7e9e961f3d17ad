"""Several growths in one go: the bits of one after the other, in memory and streamed; and what cannot be composed.

One after the other is `oracle.grow` twice, in numpy from the words of the plan; functions are those of tests/reference.
"""

import json

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.axes import flatten, unflatten
from tele_jax.growth import Plan
from tests import reference
from tests.checkpoint.trees import assert_same
from tests.growth import oracle
from tests.growth.checkpoints import DST, SMALL, SRC
from tests.growth.strategies import growths, without_compiling
from tests.growth.test_apply import closed_masks, params_of, relative_difference, same_bits, tokens_of
from tests.growth.test_apply_opt import close, grown_moments

LARGEST = dict(num_layers=4, embed_dim=30, num_heads=6, num_kv_heads=6, mlp_dim=50, input_mult=0.7)


def plan_of(case):
    places_layers_itself = case.kwargs["policy"] in ("stack", "random")
    return growth.plan(case.src, case.dst, **case.kwargs | ({"layers": "uniform"} if places_layers_itself else {}))


def pairs(policies):
    """(the first case, its plan, the plan that follows) of two random growths."""

    @st.composite
    def draw_pair(draw):
        case = draw(growths(policy=policies[0]))
        first = plan_of(case)
        after = draw(growths(policy=policies[1], src=first.dst_cfg))
        return case, first, plan_of(after)

    return draw_pair()


def each(policies, function, examples=15):
    @settings(max_examples=examples)
    @given(pairs(policies))
    def check(pair):
        function(*pair)

    with without_compiling():
        check()


def grown_twice(first, then, params, **how):
    return oracle.grow(then, oracle.grow(first, params, **how), **how)


POLICIES = ("exact", "msg", "copy", "stack", "interleave", "random")
UNMASKED = [("exact", "exact"), ("exact", "copy"), ("copy", "exact"), ("copy", "copy")]


@pytest.mark.parametrize("policies", [*UNMASKED, ("msg", "msg")])
def test_two_growths_in_one_go_are_one_after_the_other_and_keep_the_function(policies):
    def check(case, first, then):
        both = growth.compose(first, then)
        params, tokens = params_of(case), tokens_of(case.src)
        big = growth.apply(both, params)
        same_bits(big, grown_twice(first, then, params))
        assert (both.src_cfg, both.dst_cfg) == (case.src, then.dst_cfg) and both.is_model and both.preserving
        before = reference.forward(case.src, params, tokens)
        after = reference.forward(both.dst_cfg, big, tokens, masks=closed_masks(both))
        assert relative_difference(before, after[..., : case.src.vocab_size]) <= 1e-12

    each(policies, check)


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_can_be_composed_is_sound_and_keeps_its_promise(policy):
    """Of any two policies: also masks and none, where what one of them grows needs none."""
    composed = 0

    @settings(max_examples=60)
    @given(st.sampled_from(POLICIES).flatmap(lambda other: pairs((policy, other))))
    def check(pair):
        nonlocal composed
        case, first, then = pair
        try:
            both = growth.compose(first, then)
        except tele.UserError as error:
            assert "cannot be done in one go" in str(error) and "msg" in (first.policy, then.policy)
            return
        composed += 1
        growth.check(both)
        params = params_of(case)
        big = growth.apply(both, params)
        report = growth.verify_stored(both, params, big)
        assert report.ok, report
        if both.preserving:
            tokens = tokens_of(case.src)
            before = reference.forward(case.src, params, tokens)
            after = reference.forward(both.dst_cfg, big, tokens, masks=closed_masks(both))
            assert relative_difference(before, after[..., : case.src.vocab_size]) <= 1e-12

    with without_compiling():
        check()
    assert composed > 2


def test_a_fresh_value_that_a_later_growth_copies_counts_once():
    """One value thirty times over has not the moments of thirty values."""
    with without_compiling():
        src = SRC.replace(embed_dim=1, num_layers=1)
        params = reference.random_params(src, np.random.default_rng(0), 1.0)
        params = jax.tree.map(np.float32, params)
        for seed in range(10):
            plan = growth.widen_mlp(src, 25, seed=seed)
            plan = growth.compose(plan, growth.insert_layers(plan.dst_cfg, 30))
            big = growth.apply(plan, params)
            assert not growth.verify_stored(plan, params, big).altered


def test_the_optimizer_state_of_both_growths():
    def check(case, first, then):
        both = growth.compose(first, then)
        mu, nu = (reference.random_params(case.src, np.random.default_rng(seed), 1.0) for seed in (1, 2))
        born = {axis: np.arange(size, dtype=np.int32) for axis, size in case.src.axis_sizes.items()}
        state = {"adam": {"count": np.int32(70), "mu": mu, "nu": nu, "born": born}, "rest": optax.EmptyState()}
        grown = growth.apply_opt(both, state)
        close(grown["adam"]["mu"], grown_moments(then, grown_moments(first, mu, 1), 1))
        close(grown["adam"]["nu"], grown_moments(then, grown_moments(first, nu, 2), 2))
        for axis, old in born.items():
            a, b = first.maps[axis], then.maps[axis]
            middle = [70 if new else old[i] for i, new in zip(a.index, a.fresh, strict=True)]
            last = [70 if new else middle[i] for i, new in zip(b.index, b.fresh, strict=True)]
            assert grown["adam"]["born"][axis].tolist() == last
        assert grown["adam"]["count"] == 70 and grown["rest"] == optax.EmptyState()

    each(("exact", "exact"), check, examples=25)
    each(("msg", "msg"), check, examples=10)


def test_shrinking_leads_back_to_the_first_source():
    def check(case, first, then):
        both = growth.compose(first, then)
        params = params_of(case)
        back = flatten(growth.shrink(both, grown_twice(first, then, params)))
        for name, value in flatten(params).items():
            scaled = [plan for plan in (first, then) if not plan.leaves[name].moves_exactly]
            np.testing.assert_allclose(back[name], value, rtol=1e-15 * 4 * len(scaled), atol=0)

    each(("exact", "exact"), check, examples=25)
    each(("copy", "exact"), check, examples=15)


def test_the_tally_adds_up_and_is_what_the_two_growths_make():
    def check(case, first, then):
        both = growth.compose(first, then)
        ones = lambda key, shape, std: np.ones(shape)  # noqa: E731
        twos, threes = (unflatten({n: np.full(s.shape, x) for n, s in first.src_spec.items()}) for x in (2.0, 3.0))
        made = flatten(grown_twice(first, then, twos, fresh_values=ones))
        other = flatten(grown_twice(first, then, threes, fresh_values=ones))
        printed = {line.split()[0]: line for line in str(both).splitlines()}
        for name, spec in both.dst_spec.items():
            tally = both.tally(name)
            kept, zero = made[name] != other[name], made[name] == 0
            as_it_was = first.leaves[name].moves_exactly and then.leaves[name].moves_exactly
            assert tally["copied" if as_it_was else "scaled"] == kept.sum()
            assert (tally["zero"], tally["fresh"]) == (zero.sum(), (~kept & ~zero).sum())
            assert sum(tally.values()) == spec.size
            assert printed[name].split()[-4:] == [f"{n:,}" for n in tally.values()]

    for policies in (("exact", "exact"), ("msg", "msg"), ("copy", "exact")):
        each(policies, check, examples=10)


def test_json_and_digest():
    def check(case, first, then):
        del case
        both = growth.compose(first, then)
        again = Plan.from_json(json.loads(json.dumps(both.to_json())))
        assert again == both and again.digest == both.digest and hash(again) == hash(both)
        assert str(again) == str(both)
        assert [step.to_json() for step in again.steps] == [first.to_json(), then.to_json()]
        others = [
            growth.compose(first.replace(seed=first.seed + 1), then),
            growth.compose(first, then.replace(seed=then.seed + 1)),
        ]
        assert len({plan.digest for plan in (both, first, then, *others)}) == 5

    each(("exact", "exact"), check, examples=10)


def test_three_growths_compose_in_any_grouping():
    with without_compiling():
        a = growth.plan(SRC, SRC.replace(embed_dim=19, num_layers=3))
        b = growth.plan(a.dst_cfg, a.dst_cfg.replace(mlp_dim=31, output_mult=1.5), policy="copy", seed=1)
        c = growth.plan(b.dst_cfg, b.dst_cfg.replace(embed_dim=23, num_heads=6), epsilon="keep", seed=2)
        left, right = growth.compose(growth.compose(a, b), c), growth.compose(a, growth.compose(b, c))
        assert left == right and left.policy == "exact + copy + exact" and left.seed == [0, 1, 2]
        params = reference.random_params(SRC, np.random.default_rng(0), 1.0)
        params = jax.tree.map(np.float32, params)
        same_bits(growth.apply(left, params), oracle.grow(c, grown_twice(a, b, params)))
        growth.check(left)
        assert not growth.verify_stored(left, params, growth.apply(left, params)).altered


# ---- streamed ----------------------------------------------------------------------------------------------------


def _numbers(generator, shape):
    """Normal numbers, and some zeros and infinities. (Subnormal ones, which XLA flushes, are in test_stream.py.)"""
    values = generator.standard_normal(shape, np.float32)
    return np.where(generator.random(shape) < 0.05, generator.choice([0.0, -0.0, np.inf], shape), values).astype("f4")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(path of a checkpoint, its params, its optimizer state)"""
    generator = np.random.default_rng(0)
    params, mu, nu = (jax.tree.map(lambda s: _numbers(generator, s.shape), tele.spec(SRC)) for _ in range(3))
    born = {axis: np.arange(size, dtype=np.int32) for axis, size in SRC.axis_sizes.items()}
    state = {"adam": {"count": np.int32(40), "mu": mu, "nu": nu, "born": born}}
    path = tmp_path_factory.mktemp("compose") / "src"
    checkpoint.save(path, SRC, params, opt_state=state, step=7)
    return path, params, state


def _streamed_pairs():
    exact = growth.plan(SRC, DST, seed=3, epsilon="keep")
    msg = growth.plan(SRC, DST, seed=3, policy="msg", layers=[0, 0, 1])
    copy = growth.plan(SRC, DST, seed=3, policy="copy")
    yield growth.compose(exact, growth.plan(exact.dst_cfg, exact.dst_cfg.replace(**LARGEST), seed=4))
    yield growth.compose(msg, growth.plan(msg.dst_cfg, msg.dst_cfg.replace(**LARGEST), seed=4, policy="msg"))
    yield growth.compose(copy, growth.plan(copy.dst_cfg, copy.dst_cfg.replace(**LARGEST), seed=4))


@pytest.mark.parametrize("number", range(3), ids=["exact+exact", "msg+msg", "copy+exact"])
@pytest.mark.parametrize("chunk_bytes", [500, 3000])
def test_streaming_gives_the_bits_of_both_growths(stored, number, chunk_bytes, tmp_path):
    path, params, state = stored
    with without_compiling():
        plan = list(_streamed_pairs())[number]
        big, grown = growth.apply(plan, params), growth.apply_opt(plan, state)
    figures = growth.stream(
        plan, path, tmp_path / "dst", opt=True, chunk_bytes=chunk_bytes, memory_gb=0.2, workers=1 + number
    )
    loaded = checkpoint.load(tmp_path / "dst", cfg=plan.dst_cfg)
    assert figures.complete and loaded.step == 7
    assert_same(loaded.params, unflatten(flatten(big)))
    assert_same(loaded.opt_state, grown)
    assert loaded.provenance[-1]["policy"] == plan.policy and loaded.provenance[-1]["plan"] == plan.digest


def test_streaming_both_at_once_gives_the_files_of_one_after_the_other(stored, tmp_path):
    path, *_ = stored
    with without_compiling():
        plan = next(_streamed_pairs())
    first, then = (Plan((step,)) for step in plan.steps)
    growth.stream(first, path, tmp_path / "a", opt=True, **SMALL)
    growth.stream(then, tmp_path / "a", tmp_path / "b", opt=True, **SMALL)
    growth.stream(plan, path, tmp_path / "c", opt=True, **SMALL)
    for item in ("params", "opt_state"):
        files = [
            {f.relative_to(d): f.read_bytes() for f in (d / item).rglob("[0-9]*") if f.is_file()}
            for d in (tmp_path / "b", tmp_path / "c")
        ]
        assert files[0] == files[1] and len(files[0]) > 100


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_growth_that_needs_masks_and_one_that_must_not_have_them():
    with without_compiling():
        msg = growth.plan(SRC, SRC.replace(embed_dim=20), policy="msg")
        exact = growth.plan(msg.dst_cfg, msg.dst_cfg.replace(mlp_dim=30))
        with pytest.raises(tele.UserError, match=r"msg and exact cannot be done in one go: .* train until the masks"):
            growth.compose(msg, exact)
        first = growth.plan(SRC, SRC.replace(num_layers=3))
        with pytest.raises(tele.UserError, match="exact and msg cannot be done in one go"):
            growth.compose(first, growth.plan(first.dst_cfg, first.dst_cfg.replace(embed_dim=20), policy="msg"))


def test_copies_of_channels_that_masks_weigh():
    """Unevenly copied channels keep a norm's mean by their scale, which is right only where nothing is masked."""
    with without_compiling():
        msg = growth.plan(SRC, SRC.replace(embed_dim=20), policy="msg")
        uneven = growth.plan(msg.dst_cfg, msg.dst_cfg.replace(embed_dim=30), policy="copy")
        with pytest.raises(tele.UserError, match="masks weigh the mean of a norm"):
            growth.compose(msg, uneven)
        even = growth.compose(msg, growth.plan(msg.dst_cfg, msg.dst_cfg.replace(embed_dim=40), policy="copy"))
        before_masks = growth.plan(SRC, SRC.replace(embed_dim=21), policy="copy")
        other = growth.compose(
            before_masks, growth.plan(before_masks.dst_cfg, before_masks.dst_cfg.replace(embed_dim=26), policy="msg")
        )
        params = reference.random_params(SRC, np.random.default_rng(0), 1.0)
        params = jax.tree.map(np.float32, params)
        tokens = tokens_of(SRC)
        before = reference.forward(SRC, params, tokens)
        for plan in (even, other):
            big = growth.apply(plan, params)
            after = reference.forward(plan.dst_cfg, big, tokens, masks=closed_masks(plan))
            assert relative_difference(before, after) <= 2e-6  # float32 parameters, scaled


def test_padding_the_vocabulary_needs_no_masks():
    with without_compiling():
        assert not growth.grow_vocab(SRC, 50, policy="msg").masked
        msg = growth.plan(SRC, SRC.replace(embed_dim=20), policy="msg")
        both = growth.compose(msg, growth.pad_vocab(msg.dst_cfg, 64))
        assert both.masked and both.preserving and both.dst_cfg.padded_vocab_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(mlp_dim=40),
            r"another model than the second plan starts from: mlp_dim 30 -> 40, .*layers\.mlp\.down",
        ),
        (dict(rms_eps=1e-3), r"second plan starts from: rms_eps 8\.\d+e-06 -> 0\.001$"),
        (dict(output_biases=False), r"output_biases True -> False, layers\.attn\.o_bias, layers\.mlp\.down_bias"),
    ],
)
def test_plans_that_do_not_meet(change, message):
    first = growth.plan(SRC, SRC.replace(embed_dim=19, mlp_dim=30))
    src = first.dst_cfg.replace(**change)
    with pytest.raises(tele.UserError, match=message):
        growth.compose(first, growth.plan(src, src))


def test_a_second_plan_made_of_the_config_that_was_asked_for_and_not_of_the_resolved_one():
    asked = SRC.replace(embed_dim=19)
    with pytest.raises(tele.UserError, match=r"rms_eps 8\.42"):
        growth.compose(growth.plan(SRC, asked), growth.plan(asked, asked.replace(mlp_dim=30)))


def test_stored_plans_whose_steps_do_not_follow_each_other():
    first = growth.plan(SRC, SRC.replace(mlp_dim=30))
    data = growth.compose(first, growth.plan(first.dst_cfg, first.dst_cfg.replace(mlp_dim=40))).to_json()
    with pytest.raises(
        tele.UserError, match="plan step 1 produces another model than plan step 2 starts from: mlp_dim 40 -> 24"
    ):
        Plan.from_json({"steps": data["steps"][::-1]})
    with pytest.raises(tele.UserError, match=r"plan\.steps: empty"):
        Plan.from_json({"steps": []})
    data["steps"][1]["maps"]["mlp"]["runs"] = [[0, 99]]
    with pytest.raises(tele.UserError, match=r"plan\.maps\.mlp\.runs: must be \(start, length\) inside the source"):
        Plan.from_json(data)
