"""Optimizer state: moments that belong to the grown parameters, for states of optax, and steps that show it."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten, unflatten
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import OptimizerConfig
from tele_jax.train import optimizer as training
from tests import reference
from tests.growth import optimizers, oracle
from tests.growth.strategies import growths, without_compiling

pytestmark = pytest.mark.usefixtures("quick_compilation")

SRC = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=5, vocab_size=12),
    **dict(padded_vocab_size=14, output_biases=True, embed_norm=True, dtype="float64", param_dtype="float64"),
    **dict(remat="none", rms_eps=1e-3),
)
LARGER = dict(num_layers=3, embed_dim=11, num_heads=9, num_kv_heads=3, mlp_dim=8, output_mult=3.0, input_mult=0.5)
DST = SRC.replace(**LARGER)
SRC32 = SRC.replace(dtype="float32", param_dtype="float32")
DST32 = SRC32.replace(**LARGER)


def grown_moments(plan, moments, power):
    """m' = m/a^power where a parameter was before, 0 where it was not."""
    out = {}
    for name, value in flatten(moments).items():
        spec = plan.dst_spec[name]
        index = np.ix_(*(np.maximum(plan.maps[axis].index, 0) for axis in spec.axes))
        value = np.asarray(value)[index] / plan.leaves[name].coefficient ** power
        out[name] = np.where(oracle.fresh(plan, spec.axes), 0.0, value)
    return unflatten(out)


def close(a, b, rtol=1e-14):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=0, err_msg=name)


# ---- Moments ----


def test_moments_are_divided_by_what_scaled_the_parameter_and_new_ones_are_zero():
    @settings(max_examples=60)
    @given(growths())
    def check(case):
        plan = growth.plan(case.src, case.dst, **case.kwargs)
        mu, nu = (reference.random_params(case.src, np.random.default_rng(seed), 1.0) for seed in (1, 2))
        state = training.AdamState(count=np.int32(3), mu=mu, nu=nu, born={})
        grown = growth.apply_opt(plan, state)
        assert type(grown) is type(state) and grown.count == 3
        close(grown.mu, grown_moments(plan, mu, 1))
        close(grown.nu, grown_moments(plan, nu, 2))

    with without_compiling():
        check()


def test_adam_of_optax_needs_the_optimizer_that_made_its_state(x64):
    """Adam, AdaMax and ADOPT keep the same type, and nothing else in the state tells them apart."""
    plan = growth.plan(SRC, DST)
    mu, nu = (reference.random_params(SRC, np.random.default_rng(seed), 1.0) for seed in (1, 2))
    state = (optax.EmptyState(), optax.ScaleByAdamState(count=np.int32(3), mu=mu, nu=nu))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    with without_compiling():
        grown = growth.apply_opt(plan, state, adam)[1]
        close(grown.mu, grown_moments(plan, mu, 1))
        close(grown.nu, grown_moments(plan, nu, 2))
        for optimizer in (None, optax.chain(optax.clip(1.0), optax.scale_by_adamax())):
            with pytest.raises(tele.UserError, match=r"1\..*ScaleByAdamState"):
                growth.apply_opt(plan, state, optimizer)
        # Before the first step there is nothing to take for something else.
        zeros = optax.scale_by_adam().init(jax.tree.map(np.zeros_like, mu))
        assert jax.tree.structure(growth.apply_opt(plan, zeros)) == jax.tree.structure(zeros)


def test_a_type_says_what_it_is_only_where_nothing_comes_before_it_in_a_chain():
    plan = growth.plan(SRC, DST)
    gradient = reference.random_params(SRC, np.random.default_rng(1), 1.0)
    trace = optax.TraceState(gradient)
    with without_compiling():
        for state in (trace, (trace, optax.EmptyState()), optax.MaskedState((trace,))):
            grown = growth.apply_opt(plan, state)
            got = next(x for x in jax.tree.leaves(grown, is_leaf=lambda x: isinstance(x, optax.TraceState)))
            close(got.trace, grown_moments(plan, gradient, 1))
        for state in ((optax.EmptyState(), trace), {"chain": trace}, ((optax.EmptyState(), (trace,)),)):
            with pytest.raises(tele.UserError, match="TraceState"):
                growth.apply_opt(plan, state)


def test_what_was_still_zero_in_the_trial_is_not_guessed():
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), tele.spec(SRC32))
    rare = optax.MultiSteps(optax.adam(1e-3), every_k_schedule=1000).gradient_transformation()
    state = rare.init(params)
    plan = growth.plan(SRC32, DST32)
    with without_compiling():
        growth.apply_opt(plan, state, rare)  # zeros
        adam = state.inner_opt_state[0]._replace(nu=params)
        with pytest.raises(tele.UserError, match="still zero after 64 steps"):
            growth.apply_opt(plan, state._replace(inner_opt_state=(adam, *state.inner_opt_state[1:])), rare)


def test_an_optimizer_that_did_not_make_the_state_is_named():
    plan = growth.plan(SRC32, DST32)
    adam = optax.adam(1e-3)
    state = adam.init(tele.init(SRC32, jax.random.key(0)))
    for other in (optax.sgd(1e-3), optax.lion(1e-3)):
        with pytest.raises(tele.UserError, match="keeps no such part of the model"):
            growth.apply_opt(plan, state, other)
    with pytest.raises(tele.UserError, match="both have to belong to that model"):
        growth.apply_opt(plan, adam.init(tele.init(DST32, jax.random.key(0))), adam)
    for other in ("adam", optax.adam):
        with pytest.raises(tele.UserError, match="is no optax"):
            growth.apply_opt(plan, state, other)


def test_a_state_whose_shapes_follow_the_sizes_of_parameters_is_refused():
    """Adafactor keeps means of rows and columns; where it factors nothing, its state is grown like any other."""
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), tele.spec(SRC32))
    adafactor = optax.adafactor(1e-3, min_dim_size_to_factor=4)
    with without_compiling(), pytest.raises(tele.UserError, match="FactoredState"):
        growth.apply_opt(growth.plan(SRC32, DST32), adafactor.init(params), adafactor)


@pytest.mark.parametrize("name", optimizers.distinct())
def test_a_state_is_grown_exactly_or_refused(name, x64):
    """Every optimizer of the installed optax; docs/growth.md says which is which, and is made by the same function."""
    row = optimizers.look(name, optimizers.factories()[name])
    assert row.deviation is None or row.deviation < 32  # units of rounding
    assert name in _documented()[row.verdict]


def test_the_table_of_optimizers_is_complete():
    """A new optimizer in a later optax has to be looked at: python -m tests.growth.optimizers."""
    assert sorted(name for names in _documented().values() for name in names) == sorted(optimizers.factories())


def _documented():
    """{verdict: names} of the table in docs/growth.md."""
    lines = (Path(__file__).parents[2] / "docs" / "growth.md").read_text().split("\n| optax ")[1].splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {verdict: re.split(r", (?![^(]*\))", names) for verdict, names in cells}


def test_units_are_born_when_they_are_added():
    config = OptimizerConfig(learning_rate=1e-3)
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), tele.spec(SRC32))
    state = training.scale_by_adam(tele.spec(SRC32), config).init(params)
    state = state._replace(count=jnp.int32(40), born=state.born | {"mlp": jnp.array([0, 0, 0, 9, 9], jnp.int32)})
    plan = growth.plan(SRC32, DST32, layers=[0, 0, 1])
    with without_compiling():
        grown = growth.apply_opt(plan, (optax.EmptyState(), state))[1]
    assert grown.count == 40
    assert grown.born["mlp"].tolist() == [0, 0, 0, 9, 9, 40, 40, 40]
    assert grown.born["layers"].tolist() == [0, 40, 0]
    assert grown.born["heads"].tolist() == [0, 0, 40, 0, 0, 40, 40, 40, 40]
    assert grown.born["kv_heads"].tolist() == [0, 0, 40]
    assert {axis: len(born) for axis, born in grown.born.items()} == {
        axis: plan.dst_cfg.axis_sizes[axis] for axis in grown.born
    }


def test_an_empty_state_stays_empty():
    plan = growth.plan(SRC32, DST32)
    for state in ((), optax.EmptyState(), (optax.EmptyState(), {"a": ()})):
        assert growth.apply_opt(plan, state) == state


# ---- Steps, in float64 ----

BATCH = {
    "tokens": np.random.default_rng(3).integers(0, 12, (4, 7)),
    "targets": np.random.default_rng(4).integers(0, 12, (4, 7)),
    "loss_weights": np.ones((4, 7)),
}
GROWTHS = {
    "exact": dict(policy="exact"),
    "exact_keep": dict(policy="exact", epsilon="keep"),
    "exact_layers": dict(policy="exact", layers=[0, 1, 0]),
    "msg": dict(policy="msg"),
}


@functools.cache
def gradient_of(cfg):
    def mean_loss(params, masks):
        total, weight = next_token_loss(cfg, params, BATCH, masks)
        return total / weight

    return jax.jit(jax.grad(mean_loss))


def closed_masks(plan):
    return {axis: np.where(m.fresh, 0.0, 1.0) for axis, m in plan.maps.items() if axis != "kv_heads" and m.fresh.any()}


def grown_pair(kwargs, src=SRC, dst=DST):
    plan = growth.plan(src, dst, **kwargs)
    params = reference.random_params(src, np.random.default_rng(0), 1.0)
    with without_compiling():
        return plan, params, growth.apply(plan, params), closed_masks(plan) if plan.masked else None


@pytest.mark.parametrize("name", [*GROWTHS, "copy"])
def test_moments_grow_like_the_gradients_that_they_average(x64, name):
    """The law behind apply_opt: the grown gradient is the gradient of the grown model, where a parameter was before."""
    src, dst = SRC, DST
    if name == "copy":
        src, dst = SRC.replace(num_kv_heads=4), DST.replace(num_kv_heads=9)
    plan, params, big, masks = grown_pair(GROWTHS.get(name, dict(policy="copy")), src, dst)
    small_gradient = jax.tree.map(np.asarray, gradient_of(src)(params, None))
    big_gradient = flatten(gradient_of(plan.dst_cfg)(big, masks))
    with without_compiling():
        grown = flatten(growth.apply_opt(plan, optax.TraceState(small_gradient)).trace)
    for leaf, old in oracle.old(plan).items():
        largest = np.abs(big_gradient[leaf]).max()
        np.testing.assert_allclose(
            grown[leaf][old], np.asarray(big_gradient[leaf])[old], rtol=1e-9, atol=1e-12 * largest, err_msg=leaf
        )


def test_the_gradients_of_split_keys_and_values_add_up_to_the_old_one(x64):
    """Grouped queries becoming multi-head: each copy learns from its own heads, so a step is not the old step there."""
    plan, params, big, _ = grown_pair({}, dst=SRC.replace(num_kv_heads=4))
    before, after = (flatten(gradient_of(c)(p, None)) for c, p in ((SRC, params), (plan.dst_cfg, big)))
    for name in plan.leaves:
        new = np.asarray(after[name])
        if name in ("layers.attn.k", "layers.attn.v"):
            new = new.reshape(2, 6, 2, 2, 4).sum(axis=3)
        np.testing.assert_allclose(new, before[name], rtol=1e-9, atol=1e-12, err_msg=name)


RATE, DECAY = 1e-2, 0.1


def _decays(spec):
    """Kernels and tables decay; norm scales and biases do not."""
    return jax.tree.map(lambda s: s.role in ("kernel", "table"), spec)


@pytest.mark.parametrize("name", GROWTHS)
@pytest.mark.parametrize("steps_before", [0, 4])
def test_an_adamw_step_of_the_grown_model_is_the_grown_step_of_the_small_one(x64, name, steps_before):
    """From a fresh state and from one with a history; and three more steps, with the new entries frozen.

    theta' = a theta has gradient g/a, and Adam's step u is the same for both: the grown step is a u only with a
    learning rate times a. That concerns the norm scales (a = s), and whatever else a plan scales.
    """
    plan, params, _, masks = grown_pair(GROWTHS[name])
    adamw = optax.adamw(RATE, eps=1e-12, weight_decay=DECAY, mask=_decays(tele.spec(SRC)))
    state = adamw.init(params)
    small_step = jax.jit(lambda g, s, p: adamw.update(g, s, p))
    factors = {leaf: plan.leaves[leaf].coefficient for leaf in plan.leaves}
    if name == "exact":
        assert {k for k, a in factors.items() if a != 1} >= {k for k in factors if k.endswith("norm.scale")}
    decay = flatten(_decays(tele.spec(plan.dst_cfg)))
    adam = optax.scale_by_adam(eps=1e-12)

    @jax.jit
    def big_step(gradient, state, params):
        updates, state = adam.update(gradient, state)
        updates, old = flatten(updates), flatten(params)
        return unflatten({k: -RATE * (factors[k] * u + DECAY * decay[k] * old[k]) for k, u in updates.items()}), state

    def small(params, state):
        updates, state = small_step(gradient_of(SRC)(params, None), state, params)
        return jax.tree.map(np.asarray, optax.apply_updates(params, updates)), state

    for _ in range(steps_before):
        params, state = small(params, state)
    with without_compiling():
        big = growth.apply(plan, params)
        grown_state = growth.apply_opt(plan, jax.tree.map(np.asarray, state), adamw)[0]
    is_old = unflatten(oracle.old(plan))
    for _ in range(1 + 3):
        params, state = small(params, state)
        updates, grown_state = big_step(gradient_of(plan.dst_cfg)(big, masks), grown_state, big)
        big = jax.tree.map(lambda p, u, old: np.where(old, p + u, p), big, updates, is_old)
        expected = flatten(oracle.grow(plan, params))
        for leaf, old in oracle.old(plan).items():
            np.testing.assert_allclose(flatten(big)[leaf][old], expected[leaf][old], rtol=0, atol=1e-7)


def test_without_the_factor_on_the_learning_rate_norm_scales_drift(x64):
    """So that the test above is known to see it."""
    plan, params, big, _ = grown_pair(GROWTHS["exact"])
    adam = optax.scale_by_adam(eps=1e-12)
    first = jax.jit(lambda g: adam.update(g, adam.init(g))[0])
    small = first(gradient_of(SRC)(params, None)["final_norm"])["scale"]
    large = first(gradient_of(plan.dst_cfg)(big, None)["final_norm"])["scale"][:6]
    np.testing.assert_allclose(small, large, rtol=1e-4)  # the same step, where s times the step is needed
    assert np.abs(large - np.sqrt(6 / 11) * small).min() > 0.2
