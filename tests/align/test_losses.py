"""tele.losses against float64 formulas: values, gradients, padding, groups, and what their arguments must be."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import losses
from tele_jax.model import loss as model_loss
from tests.align import oracle

B, T = 4, 6
RNG = np.random.default_rng(0)
# Rows of a batch: whole, padded behind, padded in front, one position.
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]])
OLD, REF = -RNG.exponential(1.0, (B, T)), -RNG.exponential(1.0, (B, T))
LOGP = OLD + RNG.normal(0, 0.4, (B, T))
ADVANTAGES, WEIGHTS = RNG.normal(0, 1, (B, T)), RNG.uniform(0.5, 2, (B, T))
VALUES, RETURNS = RNG.normal(0, 1, (B, T)), RNG.normal(0, 1, (B, T))
PAIRS, REF_PAIRS = -RNG.exponential(5.0, (5, 2)), -RNG.exponential(5.0, (5, 2))
LENGTHS, MARGIN = RNG.integers(1, 9, (5, 2)), RNG.uniform(0, 1, 5)
HIDDEN, KERNEL, TARGETS = RNG.normal(0, 1, (B, T, 3)), RNG.normal(0, 1, (3, 7)), RNG.integers(0, 7, (B, T))


def dpo(x, **options):
    lengths = options.pop("lengths", None)
    both = {} if lengths is None else {"chosen_len": lengths[:, 0], "rejected_len": lengths[:, 1]}
    pairs = (x[:, 0], x[:, 1], REF_PAIRS[:, 0], REF_PAIRS[:, 1])
    return jnp.mean(losses.dpo(*(jnp.asarray(p, x.dtype) for p in pairs), **options, **both))


def policy(x, *, mean="dapo", length=None, weights=None, **options):
    factors, count = losses.token_weights(MASK, kind=mean, length=length)
    factors = factors if weights is None else factors * weights
    old, advantages, factors = (jnp.asarray(a, x.dtype) for a in (OLD, ADVANTAGES, factors))
    return losses.ppo_policy(x, old, advantages, MASK, weights=factors, **options)[0] / count


def divided(pair):
    return pair[0] / pair[1]


def cross_entropy(x):
    kernel, weights = jnp.asarray(KERNEL, x.dtype), jnp.asarray(MASK * WEIGHTS, x.dtype)
    return model_loss.weighted_cross_entropy(x, kernel, TARGETS, weights, 0.7, 7) / jnp.sum(weights)


def values(x):
    rest = (jnp.asarray(a, x.dtype) for a in (OLD, RETURNS))
    return divided(losses.ppo_value(x, *rest, MASK, clip=0.3))


def case(ours, theirs, at, **options):
    return functools.partial(ours, **options), functools.partial(theirs, **options), at


def of_pairs(**options):
    return case(dpo, lambda x, **o: oracle.dpo(x, REF_PAIRS, **o).mean(), PAIRS, beta=0.3, **options)


def of_policy(**options):
    return case(policy, lambda x, **o: divided(oracle.policy(x, OLD, ADVANTAGES, MASK, **o)), LOGP, **options)


CASES = {
    "SFT": (
        cross_entropy,
        lambda x: divided(oracle.cross_entropy(0.7 * x @ KERNEL, TARGETS, MASK * WEIGHTS)),
        HIDDEN,
    ),
    "reward": (
        lambda x: jnp.mean(losses.reward(x[:, 0], x[:, 1])),
        lambda x: oracle.reward(x[:, 0], x[:, 1]).mean(),
        PAIRS / 5,
    ),
    "reward, margins": (
        lambda x: jnp.mean(losses.reward(x[:, 0], x[:, 1], margin=jnp.asarray(MARGIN, x.dtype))),
        lambda x: oracle.reward(x[:, 0], x[:, 1], MARGIN).mean(),
        PAIRS / 5,
    ),
    "DPO": of_pairs(kind="sigmoid"),
    "DPO, conservative": of_pairs(kind="conservative", label_smoothing=0.1),
    "DPO, divided by lengths": of_pairs(kind="sigmoid", lengths=LENGTHS),
    "IPO": of_pairs(kind="ipo"),
    "IPO, divided by lengths": of_pairs(kind="ipo", lengths=LENGTHS),
    "PPO, policy": of_policy(clip=0.2),
    "PPO, weights": of_policy(clip=0.2, weights=WEIGHTS),
    "GRPO": of_policy(clip=0.2, mean="grpo"),
    "Dr. GRPO": of_policy(clip=0.2, mean="dr_grpo", length=T),
    "DAPO": of_policy(clip=(0.2, 0.28), mean="dapo"),
    "GSPO": of_policy(clip=(3e-4, 4e-4), mean="grpo", level="sequence"),
    "GSPO, wide clip": of_policy(clip=1.0, mean="grpo", level="sequence"),
    "PPO, value": (values, lambda x: divided(oracle.value(x, OLD, RETURNS, MASK, 0.3)), VALUES - 1),
    "PPO, value without clip": (
        lambda x: divided(losses.ppo_value(x, 0 * x, jnp.asarray(RETURNS, x.dtype), MASK, clip=None)),
        lambda x: divided(oracle.value(x, OLD, RETURNS, MASK, None)),
        VALUES,
    ),
    **{
        f"KL {kind}": (
            lambda x, kind=kind: jnp.sum(losses.kl(x, jnp.asarray(REF, x.dtype), kind=kind) * ADVANTAGES),
            lambda x, kind=kind: (oracle.kl(x, REF, kind) * ADVANTAGES).sum(),
            LOGP,
        )
        for kind in ("k1", "k2", "k3")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_gradient_are_those_of_the_formula(name):
    ours, theirs, at = CASES[name]
    with jax.enable_x64(True):
        loss, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(at))
        assert loss.dtype == gradient.dtype == np.float64
    assert abs(float(loss) - theirs(at)) < 1e-10
    assert np.abs(gradient).max() > 1e-3, "the case says nothing about gradients"
    np.testing.assert_allclose(gradient, oracle.gradient(theirs, at), rtol=0, atol=1e-8)
    single, slopes = jax.jit(jax.value_and_grad(ours))(jnp.asarray(at, jnp.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, theirs(at), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slopes, gradient, rtol=1e-5, atol=1e-5)


def test_the_kl_of_a_loss_has_the_value_of_its_kind_and_the_gradient_of_k2():
    with jax.enable_x64(True):
        for kind in ("k2", "k3"):
            found, slope = jax.value_and_grad(lambda x, kind=kind: jnp.sum(losses.kl_loss(x, REF, kind=kind)))(LOGP)
            assert abs(float(found) - oracle.kl(LOGP, REF, kind).sum()) < 1e-10
            np.testing.assert_allclose(slope, LOGP - REF, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_and_returns_are_the_sums_of_the_paper(gamma, lam):
    with jax.enable_x64(True):
        found = losses.gae(ADVANTAGES, VALUES, MASK, gamma=gamma, lam=lam)
        slope = jax.grad(lambda v: jnp.sum(losses.gae(ADVANTAGES, v, MASK, gamma=gamma, lam=lam)[0] * WEIGHTS))(VALUES)
    for ours, theirs in zip(found, oracle.gae(ADVANTAGES, VALUES, MASK, gamma, lam), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    by_differences = oracle.gradient(lambda v: (oracle.gae(ADVANTAGES, v, MASK, gamma, lam)[0] * WEIGHTS).sum(), VALUES)
    np.testing.assert_allclose(slope, by_differences, rtol=0, atol=1e-8)
    single = losses.gae(*(a.astype(np.float32) for a in (ADVANTAGES, VALUES)), MASK, gamma=gamma, lam=lam)
    np.testing.assert_allclose(single, found, rtol=1e-5, atol=1e-5)


def test_advantages_and_returns_are_those_of_rlax():
    rlax = pytest.importorskip("rlax", reason="rlax is missing: pip install 'tele_jax[dev]'")
    gamma, lam = 0.97, 0.9
    advantages, returns = losses.gae(ADVANTAGES, VALUES, np.ones((B, T)), gamma=gamma, lam=lam)
    discounts = np.full(T, gamma)
    discounts[-1] = 0  # no bootstrap behind the last position
    for b in range(B):
        ahead = np.append(VALUES[b], 0.0)
        theirs = rlax.truncated_generalized_advantage_estimation(ADVANTAGES[b], discounts, lam, ahead)
        np.testing.assert_allclose(advantages[b], theirs, rtol=1e-5, atol=1e-5)
        theirs = rlax.lambda_returns(ADVANTAGES[b], discounts, ahead[1:], lam)
        np.testing.assert_allclose(returns[b], theirs, rtol=1e-5, atol=1e-5)


def test_a_token_that_was_all_but_impossible_gives_no_nan():
    for advantage in (1.0, 0.0):
        loss = lambda x, a=advantage: losses.ppo_policy(x, x - 200, jnp.full((1, 2), a), np.ones((1, 2)), clip=0.2)[0]  # noqa: E731
        value, slope = jax.value_and_grad(loss)(jnp.zeros((1, 2)))
        assert value == pytest.approx(-2.4 * advantage) and not np.any(slope)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dr_grpo"])
@given(data=st.data())
@settings(max_examples=15)
def test_groups_may_stand_in_any_order(kind, data):
    sizes = data.draw(st.sampled_from([[2, 2, 4], [5, 3], [8], [2, 2, 2, 2]]))
    group = np.repeat(data.draw(st.permutations([7, -3, 10**6, 0]))[: len(sizes)], sizes)
    numbers = st.lists(st.floats(-3, 3, width=32), min_size=len(group), max_size=len(group))
    rewards, order = np.array(data.draw(numbers)), data.draw(st.permutations(range(len(group))))
    found = losses.group_advantages(rewards[order], group[order], kind=kind)
    np.testing.assert_allclose(found, oracle.group_advantages(rewards, group, kind)[order], rtol=2e-4, atol=2e-4)
    equal = np.full(len(group), rewards[0])
    assert not np.any(losses.group_advantages(equal, group, kind=kind)), "equal rewards give exactly 0"
    assert not np.any(losses.rewards_differ(equal, group))


def test_group_advantages_in_float64_and_inside_jit():
    group, rewards = np.array([2, 5, 2, 5, 2, 9, 9]), RNG.normal(0, 1, 7)
    with jax.enable_x64(True):
        for kind in ("grpo", "rloo", "dr_grpo"):
            found = jax.jit(functools.partial(losses.group_advantages, kind=kind))(rewards, group)
            np.testing.assert_allclose(found, oracle.group_advantages(rewards, group, kind), rtol=0, atol=1e-10)
    rewards[[0, 2, 4]] = 0.1
    assert losses.rewards_differ(rewards, group).tolist() == [False, True, False, True, False, True, True]
    alone = jax.jit(losses.group_advantages)(np.array([1.0, 2.0, 3.0]), np.array([1, 1, 2]))
    assert np.isnan(alone[2]) and np.isfinite(alone[:2]).all(), "a group of one is known by its NaN inside jit"


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask():
    noisy = np.where(MASK, VALUES, np.nan)
    kept = VALUES[MASK > 0]
    for shift, mean in ((True, 0.0), (False, kept.mean())):
        found = np.asarray(losses.whiten(noisy, MASK, shift_mean=shift))
        assert not found[MASK == 0].any()
        expected = (kept - kept.mean()) / kept.std() + mean
        np.testing.assert_allclose(found[MASK > 0], expected, rtol=1e-5, atol=1e-5)


def test_the_weights_of_another_sampler_are_cut_and_have_no_gradient():
    with jax.enable_x64(True):
        found, slope = jax.value_and_grad(lambda x: jnp.sum(losses.sampler_weights(x, OLD, MASK, cap=1.2)))(LOGP)
    expected = sum(min(np.exp(LOGP[i] - OLD[i]), 1.2) for i in zip(*np.nonzero(MASK), strict=True))
    assert abs(float(found) - expected) < 1e-10 and not np.any(slope)


WRONG = [
    (lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta=0.0), r"dpo: beta=0.0 must be a number above 0"),
    (lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta="x"), r"dpo: beta='x' must be a number above 0"),
    (
        lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta=1, kind="ip"),
        r"dpo: kind='ip' is unknown; did you mean 'ipo",
    ),
    (lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta=1, label_smoothing=0.5), r"label_smoothing=0.5 .* \[0, 0.5\)"),
    (lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta=1, label_smoothing=-0.1), r"label_smoothing=-0.1 must be in"),
    (
        lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta=1, kind="ipo", label_smoothing=0.1),
        "label_smoothing: kind 'ipo' has none",
    ),
    (lambda: losses.dpo([1.0], [1.0, 2.0], [1.0], [1.0], beta=1), r"policy_rejected: expected .* \[1\], got \[2\]"),
    (lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta=1, chosen_len=[3]), "both chosen_len and rejected_len"),
    (
        lambda: losses.dpo([1.0], [1.0], [1.0], [1.0], beta=1, chosen_len=[3], rejected_len=[0]),
        "rejected_len: a reply has at least 1 token",
    ),
    (lambda: losses.dpo([[1.0]], [[1.0]], [[1.0]], [[1.0]], beta=1), r"policy_chosen: expected \[B\], got \[1, 1\]"),
    (lambda: losses.reward([None], [1.0]), "reward: chosen: expected an array of numbers, got list"),
    (lambda: losses.reward([1.0], [1.0], margin=[1.0, 2.0]), r"margin: expected the shape of chosen, \[1\], got \[2\]"),
    (lambda: losses.gae(VALUES, VALUES[:, 1:], MASK, gamma=1.0, lam=1.0), r"gae: values: expected .* got \[4, 5\]"),
    (lambda: losses.gae(VALUES, VALUES, MASK, gamma=1.1, lam=1.0), r"gae: gamma=1.1 must be in \[0, 1\]"),
    (lambda: losses.gae([1.0], [1.0], [1], gamma=1.0, lam=1.0), r"gae: mask: expected \[B, T\], got \[1\]"),
    (lambda: losses.ppo_policy(LOGP, OLD, ADVANTAGES[:, 0], MASK, clip=0.2), r"advantages: expected .* got \[4\]"),
    (lambda: losses.ppo_policy(LOGP, OLD, ADVANTAGES, MASK, clip=0.0), r"clip=0.0 must be in \(0, 1\], or \(low"),
    (lambda: losses.ppo_policy(LOGP, OLD, ADVANTAGES, MASK, clip=(0.2,)), r"clip=\(0.2,\) must be in"),
    (lambda: losses.ppo_policy(LOGP, OLD, ADVANTAGES, MASK, clip=0.2, level="s"), "level='s' is unknown; known: token"),
    (lambda: losses.ppo_value(VALUES, OLD, RETURNS, MASK, clip=-1.0), r"ppo_value: clip=-1.0 must be above 0, or None"),
    (lambda: losses.group_advantages([1.0, 2.0], [0, 0], kind="grop"), "kind='grop' is unknown; did you mean 'grpo'"),
    (
        lambda: losses.group_advantages([1.0, 2.0], [0]),
        r"rewards float\[B\] and group int\[B\].* got .*\[2\] and .*\[1\]",
    ),
    (lambda: losses.group_advantages([1.0, 2.0], [0.0, 0.0]), r"group int\[B\].* float32\[2\] and float32\[2\]"),
    (lambda: losses.group_advantages([1.0, 2.0, 3.0], [0, 4, 0]), r"group \[4\] has one reward; kind 'grpo' needs"),
    (lambda: losses.group_advantages([1.0, 2.0], ["a", "b"]), "group: expected an array of numbers, got list"),
    (lambda: losses.group_advantages([1.0], [0], kind="rloo"), r"group \[0\] has one reward; kind 'rloo' needs"),
    (lambda: losses.kl([1.0], [1.0], kind="k4"), "kl: kind='k4' is unknown; known: k1, k2, k3"),
    (lambda: losses.kl_loss([1.0], [1.0], kind="k1"), "kind='k1': known are 'k2' and 'k3'; k1 has no gradient"),
    (lambda: losses.token_weights(MASK, kind="dr_grpo"), "length=None: kind 'dr_grpo' needs one of at least 1"),
    (lambda: losses.token_weights(MASK, kind="grpo", length=3), "length=3: .* the other kinds have none"),
    (lambda: losses.sampler_weights(LOGP, OLD, MASK, cap=0), "cap=0 must be above 0"),
]


@pytest.mark.parametrize(("call", "named"), WRONG, ids=[re.sub(r"\W+", " ", named)[:40] for _, named in WRONG])
def test_a_wrong_argument_is_named_in_one_line(call, named):
    with pytest.raises(tele.UserError, match=named) as caught:
        call()
    assert "\n" not in str(caught.value)
