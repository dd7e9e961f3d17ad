"""Mask schedules: 0 before, linear during, gone after; and a decoder behind masks at 1 is the plain one."""

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import growth
from tele_jax.growth.masks import vectors
from tests import reference
from tests.growth.strategies import without_compiling

SRC = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=5, vocab_size=16),
    **dict(output_biases=True, remat="none"),
)
LARGER = dict(num_layers=3, embed_dim=11, num_heads=6, mlp_dim=8)
DST = SRC.replace(**LARGER)


@pytest.fixture
def plan():
    return growth.plan(SRC, DST, policy="msg", layers=[0, 0, 1])


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


def test_shapes_and_dtypes_stay_the_same_along_the_ramp_so_that_nothing_compiles_again(plan):
    schedule = growth.MaskSchedule(plan, start=3, ramp=7)
    traced = []

    @jax.jit
    def step(masks):
        traced.append(1)
        return sum(mask.sum() for mask in masks.values())

    for i in range(10):
        step(schedule(i))
    assert len(traced) == 1


def test_a_ramp_of_no_steps_opens_at_once(plan):
    assert growth.MaskSchedule(plan, start=0, ramp=0)(0) is None


def test_a_ramp_of_no_steps_is_closed_until_it_starts(plan):
    schedule = growth.MaskSchedule(plan, start=5, ramp=0)
    assert schedule(3)["mlp"][-1] == 0.0 and schedule(4)["mlp"][-1] == 0.0
    assert schedule(5) is None


def test_a_plan_that_needs_no_masks_gets_none():
    assert growth.MaskSchedule(growth.plan(SRC, DST), ramp=100)(0) is None


@pytest.mark.parametrize("kwargs", [dict(start=-1), dict(ramp=-5)])
def test_a_schedule_into_the_past_is_refused(plan, kwargs):
    with pytest.raises(tele.UserError, match="must not be negative"):
        growth.MaskSchedule(plan, **kwargs)


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
