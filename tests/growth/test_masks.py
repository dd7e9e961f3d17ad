"""Mask schedules: 0 before, rising during, gone after; and a decoder behind masks at 1 is the plain one."""

import inspect
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten
from tele_jax.growth.masks import require_unmasked, vectors
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh, put_batch
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import make_step, state_shardings
from tests import reference
from tests.growth.strategies import without_compiling

pytestmark = pytest.mark.usefixtures("quick_compilation")

SRC = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=5, vocab_size=16),
    **dict(output_biases=True, remat="none"),
)
LARGER = dict(num_layers=3, embed_dim=11, num_heads=6, mlp_dim=8)
DST = SRC.replace(**LARGER)
PLAN = growth.plan(SRC, DST, policy="msg", layers=[0, 0, 1])
AXES = ("embed", "mlp", "heads", "layers")


@pytest.fixture
def plan():
    return PLAN


def new_values(masks):
    """{axis: c}, from the vectors."""
    values = {}
    for axis, mask in masks.items():
        fresh = PLAN.maps[axis].fresh
        assert (mask[~fresh] == 1).all() and np.unique(mask[fresh]).size == 1
        values[axis] = float(mask[fresh][0])
    return values


def test_masks_are_one_on_what_was_there_and_rise_on_what_is_new(plan):
    masks = vectors(plan, 0.25)
    assert {axis: mask.tolist() for axis, mask in masks.items()} == {
        "embed": [1.0] * 6 + [0.25] * 5,
        "mlp": [1.0] * 5 + [0.25] * 3,
        "heads": [1.0, 1.0, 0.25, 1.0, 1.0, 0.25],
        "layers": [1.0, 0.25, 1.0],
    }
    assert all(mask.dtype == np.float32 for mask in masks.values())


def test_only_grown_axes_are_masked():
    plan = growth.plan(SRC, SRC.replace(mlp_dim=8), policy="msg")
    assert vectors(plan, 0.5).keys() == {"mlp"}
    assert growth.MaskSchedule(growth.plan(SRC, SRC, policy="msg"))(0) is None


def test_the_ramp_is_closed_before_linear_within_and_gone_after(plan):
    schedule = growth.MaskSchedule(plan, start=100, ramp=50)
    values = {step: schedule(step)["mlp"][-1] for step in (0, 99, 100, 101, 125, 149)}
    assert values == {
        0: 0.0,
        99: 0.0,
        100: 0.0,
        101: pytest.approx(1 / 50),
        125: pytest.approx(0.5),
        149: pytest.approx(49 / 50),
    }
    assert schedule(150) is None and schedule(10_000) is None


def test_a_mapping_gives_every_axis_its_own_value_and_has_to_name_all(plan):
    values = {"embed": 1.0, "mlp": 0.5, "heads": 0.0, "layers": 0.25}
    assert new_values(vectors(plan, values)) == values
    with pytest.raises(tele.UserError, match="no value for heads, layers"):
        vectors(plan, {"embed": 1.0, "mlp": 0.5})


def test_the_cosine_shape_is_half_a_wave(plan):
    schedule = growth.MaskSchedule(plan, start=10, ramp=8, shape="cosine")
    for step in range(10, 18):
        expected = (1 - math.cos(math.pi * (step - 10) / 8)) / 2
        assert new_values(schedule(step)) == pytest.approx(dict.fromkeys(AXES, expected), abs=1e-7)
    assert new_values(schedule(9)) == dict.fromkeys(AXES, 0.0) and schedule(18) is None


def test_one_axis_after_another_each_takes_the_whole_ramp(plan):
    schedule = growth.MaskSchedule(plan, start=3, ramp=4, order=("mlp", "layers", "embed", "heads"))
    rows = [tuple(new_values(schedule(step))[axis] for axis in schedule.order) for step in range(19)]
    quarters = (0.25, 0.5, 0.75)
    assert rows == [
        *[(0, 0, 0, 0)] * 4,
        *[(c, 0, 0, 0) for c in quarters],
        (1, 0, 0, 0),
        *[(1, c, 0, 0) for c in quarters],
        (1, 1, 0, 0),
        *[(1, 1, c, 0) for c in quarters],
        (1, 1, 1, 0),
        *[(1, 1, 1, c) for c in quarters],
    ]
    assert schedule(19) is None


schedules = st.builds(
    growth.MaskSchedule,
    st.just(PLAN),
    start=st.integers(0, 99),
    ramp=st.integers(0, 99),
    unit=st.sampled_from(["steps", "tokens"]),
    order=st.just("together") | st.permutations(AXES),
    shape=st.sampled_from(["linear", "cosine"]),
    tokens_per_step=st.integers(1, 17),
)


@given(schedule=schedules)
def test_no_mask_ever_falls_and_in_an_order_at_most_one_axis_moves(schedule):
    per_step = schedule.tokens_per_step if schedule.unit == "tokens" else 1
    axes = 1 if schedule.order == "together" else len(AXES)
    end = -(-(schedule.start + schedule.ramp * axes) // per_step)
    before = dict.fromkeys(AXES, 0.0)
    for step in range(end):
        values = new_values(schedule(step))
        assert all(before[axis] <= values[axis] <= 1 for axis in AXES)
        if step * per_step <= schedule.start:
            assert set(values.values()) == {0.0}
        if schedule.order == "together":
            assert len(set(values.values())) == 1
        else:
            rising = [values[axis] for axis in schedule.order]
            assert sum(0 < c < 1 for c in rising) <= 1 and rising == sorted(rising, reverse=True)
        before = values
    assert schedule(end) is None and schedule(end + 1000) is None


@given(
    start=st.integers(0, 50),
    ramp=st.integers(0, 50),
    order=st.just("together") | st.permutations(AXES),
    shape=st.sampled_from(["linear", "cosine"]),
    tokens_per_step=st.sampled_from([1, 7, 4096, 5_505_024]),
)
def test_tokens_are_steps_times_tokens_per_step(start, ramp, order, shape, tokens_per_step):
    how = dict(order=order, shape=shape)
    steps = growth.MaskSchedule(PLAN, start, ramp, **how)
    tokens = growth.MaskSchedule(
        PLAN, start * tokens_per_step, ramp * tokens_per_step, "tokens", **how, tokens_per_step=tokens_per_step
    )
    for step in range(start + 4 * ramp + 2):
        a, b = steps(step), tokens(step)
        assert (a is None) == (b is None)
        assert a is None or all(np.array_equal(a[axis], b[axis]) for axis in AXES)
    for axis, closed in steps.closed_steps().items():
        assert np.array_equal(closed, tokens.closed_steps()[axis])


@given(schedule=schedules)
def test_closed_steps_are_those_with_c_at_zero(schedule):
    closed = schedule.closed_steps()
    assert schedule.masked_steps == next(step for step in itertools.count() if schedule(step) is None)
    for axis in AXES:
        expected = next(step for step in itertools.count() if (m := schedule(step)) is None or m[axis].min() > 0)
        assert closed[axis].dtype == np.int32
        assert closed[axis].tolist() == [expected if fresh else 0 for fresh in PLAN.maps[axis].fresh]


def test_without_masks_nothing_is_closed():
    assert growth.MaskSchedule(growth.plan(SRC, DST)).closed_steps() == {}


def test_a_ramp_of_no_steps_opens_at_once(plan):
    assert growth.MaskSchedule(plan, start=0, ramp=0)(0) is None


def test_a_ramp_of_no_steps_is_closed_until_it_starts(plan):
    schedule = growth.MaskSchedule(plan, start=5, ramp=0)
    assert schedule(3)["mlp"][-1] == 0.0 and schedule(4)["mlp"][-1] == 0.0
    assert schedule(5) is None


def test_a_plan_that_needs_no_masks_gets_none():
    assert growth.MaskSchedule(growth.plan(SRC, DST), ramp=100)(0) is None


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(start=-1), "must not be negative"),
        (dict(ramp=-5), "must not be negative"),
        (dict(unit="epochs"), "unit: 'epochs' is not one of 'steps', 'tokens'"),
        (dict(unit="tokens"), "unit: 'tokens' needs tokens_per_step above 0, got None"),
        (dict(unit="tokens", tokens_per_step=0), "needs tokens_per_step above 0, got 0"),
        (dict(shape="step"), "shape: 'step' is not one of 'linear', 'cosine'"),
        (dict(order="embed"), "order: 'embed' is neither 'together' nor a list of the axes .*: embed, mlp, heads, lay"),
        (dict(order=("embed", "mlp", "heads")), "each once: embed, mlp, heads, layers"),
        (dict(order=("embed", "mlp", "heads", "layers", "mlp")), "each once"),
        (dict(order=("embed", "mlp", "kv_heads", "layers")), "each once"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(plan, kwargs, match):
    with pytest.raises(tele.UserError, match=match):
        growth.MaskSchedule(plan, **kwargs)


def test_an_order_names_the_axes_that_this_plan_grows_and_no_others():
    plan = growth.plan(SRC, SRC.replace(mlp_dim=8, num_layers=3), policy="msg")
    masks = growth.MaskSchedule(plan, ramp=2, order=["layers", "mlp"])(3)
    assert masks["layers"].min() == 1 and masks["mlp"].min() == 0.5
    with pytest.raises(tele.UserError, match=r"each once: mlp, layers$"):
        growth.MaskSchedule(plan, order=AXES)


@pytest.mark.parametrize(("mask", "shown"), [(0.0, "0.00"), (0.256, "0.25"), (0.9999, "0.99"), (1.0, "0.99")])
def test_a_checkpoint_behind_masks_is_refused_and_never_said_to_be_complete(mask, shown):
    with pytest.raises(tele.UserError, match=f"here: grown behind masks that stand at {shown};"):
        require_unmasked([{"mask": None}, {"mask": mask}], "here")
    require_unmasked([{"mask": mask}, {"mask": None}], "here")


def test_behind_closed_masks_it_is_the_source_and_behind_open_ones_the_plain_grown_model(x64):
    src = SRC.replace(dtype="float64", param_dtype="float64")
    plan = growth.plan(src, src.replace(**LARGER), policy="msg", layers=[0, 0, 1])
    params = reference.random_params(src, np.random.default_rng(0), 1.0)
    tokens = np.random.default_rng(1).integers(0, 16, (2, 6))
    with without_compiling():
        big = growth.apply(plan, params)
    masked = jax.jit(lambda masks: tele.forward(plan.dst_cfg, big, tokens, masks=masks))
    source, grown = reference.forward(src, params, tokens), reference.forward(plan.dst_cfg, big, tokens)
    np.testing.assert_allclose(masked(vectors(plan, 0.0)), source, rtol=0, atol=1e-12 * np.abs(source).max())
    np.testing.assert_allclose(masked(vectors(plan, 1.0)), grown, rtol=0, atol=1e-12 * np.abs(grown).max())
    assert np.abs(source - grown).max() > 1e-2
    # The last step of a long ramp is next to the plain model: dropping the masks then is no jump.
    nearly = growth.MaskSchedule(plan, ramp=100_000)(99_999)
    np.testing.assert_allclose(masked(nearly), grown, rtol=0, atol=1e-3 * np.abs(grown).max())


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_masks_at_one_are_no_masks(x64, tie_embeddings):
    cfg = DST.replace(dtype="float64", param_dtype="float64", tie_embeddings=tie_embeddings, embed_norm=True)
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    tokens = np.random.default_rng(1).integers(0, 16, (2, 6))
    masked = jax.jit(lambda masks: tele.forward(cfg, params, tokens, masks=masks))
    plain, ones = masked(None), masked(vectors(PLAN, 1.0))
    np.testing.assert_allclose(ones, plain, rtol=0, atol=1e-15 * np.abs(plain).max())


# A real step of a small model that grows along all axes, kv_heads included.
SMALL = SRC.replace(dtype="float32")
LARGE = SMALL.replace(**LARGER).replace(num_heads=9, num_kv_heads=3)
BATCH = {
    "tokens": np.random.default_rng(2).integers(0, 16, (2, 8), np.int32),
    "targets": np.random.default_rng(3).integers(0, 16, (2, 8), np.int32),
    "loss_weights": np.ones((2, 8), np.float32),
}


@pytest.fixture(scope="module")
def grown():
    """(plan, parameters of the large model: any will do)."""
    params = reference.random_params(LARGE, np.random.default_rng(0), 1.0)
    return growth.plan(SMALL, LARGE, policy="msg", layers=[0, 0, 1]), jax.tree.map(np.float32, params)


def test_the_training_step_compiles_once_while_masks_move_and_once_more_when_they_drop(grown):
    plan, params = grown
    schedule = growth.MaskSchedule(plan, start=2, ramp=2, order=AXES)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer(LARGE, OptimizerConfig(learning_rate=1e-3), lambda step: 1.0)
    step = make_step(LARGE, tx, mesh, batch_size=2)
    compiled = inspect.getclosurevars(step).nonlocals["compiled"]
    shardings, opt_shardings = state_shardings(LARGE, tx, mesh)
    params = jax.device_put(params, shardings)
    opt_state = jax.jit(tx.init, out_shardings=opt_shardings)(params)
    counts = []
    for i in range(13):
        params, opt_state, _ = step(params, opt_state, put_batch(BATCH, mesh, 2), schedule(i))
        counts.append(compiled._cache_size())
    assert counts == [1] * 10 + [2] * 3
    assert schedule(9) is not None and schedule(10) is None


def test_a_unit_has_its_first_gradient_in_the_step_after_its_closed_ones(grown):
    plan, params = grown
    schedule = growth.MaskSchedule(plan, start=1, ramp=2, order=("heads", "layers", "embed", "mlp"))
    closed = schedule.closed_steps()
    assert {axis: steps.max() for axis, steps in closed.items()} == {
        "heads": 2, "kv_heads": 2, "layers": 4, "embed": 6, "mlp": 8,
    }  # fmt: skip
    gradient = jax.jit(jax.grad(lambda p, masks: next_token_loss(LARGE, p, BATCH, masks)[0]))
    for step in range(9):
        gradients = flatten(gradient(params, schedule(step)))
        for name, spec in plan.dst_spec.items():
            live = np.asarray(gradients[name]) != 0
            # An entry waits for all of its axes: those that are closed have no gradient, not a small one.
            waits = [closed[axis] if axis in closed else np.zeros(size, int) for axis, size in spec_sizes(spec)]
            open_since = np.maximum.reduce(np.meshgrid(*waits, indexing="ij"))
            assert not live[open_since > step].any(), (step, name)
            if name not in ("embed.table", "lm_head.kernel"):  # whose rows of absent tokens have none
                assert live[open_since <= step].all(), (step, name)


def spec_sizes(spec):
    return zip(spec.axes, spec.shape, strict=True)
