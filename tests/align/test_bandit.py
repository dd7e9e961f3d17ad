"""Estimators of tele.losses where all replies are enumerated: exact gradients, and the policy that they end at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import align_bandit
from tele_jax import losses

BETA = 0.4
BANDIT = align_bandit.make(vocab=3, length=3, seed=1)  # 15 replies, 7 prefixes
N, T = BANDIT.tokens.shape
STATES, VOCAB = BANDIT.ref_logits.shape
RNG = np.random.default_rng(2)
POLICY = RNG.normal(0, 1, (STATES, VOCAB))
OLDER = POLICY + RNG.normal(0, 0.2, (STATES, VOCAB))
LAST = BANDIT.mask * (np.cumsum(BANDIT.mask[:, ::-1], 1)[:, ::-1] == 1)


@pytest.fixture(autouse=True)
def _float64(x64):
    """Every test of this module computes in float64."""


def often(logits):
    """Probabilities of the replies, which are how often they are drawn: [N, 1], without a gradient."""
    return jax.lax.stop_gradient(jnp.exp(align_bandit.logp(BANDIT, logits)))[:, None]


def true_gradient(beta, at=POLICY, bandit=BANDIT):
    """The gradient of -(mean reward - beta KL(policy || reference)), of the sum over all replies."""
    return jax.grad(lambda x: -align_bandit.objective(bandit, x, beta))(jnp.asarray(at))


def policy_loss(logits, advantages, rows=slice(None), weights=None, at=POLICY, **options):
    """The expected loss of the policy where replies `rows` are drawn from `at` with advantages [rows, T]."""
    old = align_bandit.token_logp(BANDIT, jnp.asarray(at))[rows]
    weights = (often(at)[rows] if weights is None else weights) + 0 * old
    found = align_bandit.token_logp(BANDIT, logits)[rows]
    mask = BANDIT.mask[rows]
    return losses.ppo_policy(found, old, advantages + 0 * old, mask, clip=1.0, weights=weights, **options)[0]


def in_groups(logits, kind, size, mean="dapo"):
    """The expected loss with groups of `size` independent replies, all N^size groups enumerated."""
    members = np.indices((N,) * size).reshape(size, -1)
    rows, group = members.ravel(), np.tile(np.arange(members.shape[1]), size)
    advantages = losses.group_advantages(BANDIT.rewards[rows], group, kind=kind)[:, None]
    drawn = jnp.tile(often(POLICY)[:, 0][members].prod(0), size)[:, None] / size
    factors = losses.token_weights(BANDIT.mask[rows], kind=mean)[0]
    return policy_loss(logits, advantages, rows, drawn * factors)


def with_values(logits, lam, values, beta=0.0, kind="k1"):
    """The expected loss with generalised advantages, and the divergence in the rewards."""
    old = align_bandit.token_logp(BANDIT, jnp.asarray(POLICY))
    rewards = LAST * BANDIT.rewards[:, None] - beta * losses.kl(
        old, align_bandit.token_logp(BANDIT, BANDIT.ref_logits), kind=kind
    )
    return policy_loss(logits, losses.gae(rewards, values[BANDIT.states], BANDIT.mask, gamma=1.0, lam=lam)[0])


def true_values():
    """The mean reward after every prefix, [STATES]."""
    visits = [(often(POLICY) * (BANDIT.states == s) * BANDIT.mask) for s in range(STATES)]
    return np.array([float(jnp.sum(v * BANDIT.rewards[:, None]) / jnp.sum(v)) for v in visits])


ESTIMATORS = {  # name: (expected loss, factor on the true gradient)
    "REINFORCE": (lambda x: policy_loss(x, BANDIT.rewards[:, None]), 1),
    "REINFORCE, constant baseline": (lambda x: policy_loss(x, BANDIT.rewards[:, None] - 3.0), 1),
    "RLOO, groups of 2": (lambda x: in_groups(x, "rloo", 2), 1),
    "RLOO, groups of 3": (lambda x: in_groups(x, "rloo", 3), 1),
    "Dr. GRPO, groups of 2": (lambda x: in_groups(x, "dr_grpo", 2), 1 / 2),
    "Dr. GRPO, groups of 3": (lambda x: in_groups(x, "dr_grpo", 3), 2 / 3),
    "PPO, any values, lambda 1": (lambda x: with_values(x, 1.0, RNG.normal(0, 1, STATES)), 1),
    "PPO, true values, lambda 0.5": (lambda x: with_values(x, 0.5, true_values()), 1),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_expected_gradient_is_the_true_one(name):
    loss, factor = ESTIMATORS[name]
    found = jax.grad(loss)(jnp.asarray(POLICY))
    np.testing.assert_allclose(found, factor * true_gradient(0.0), rtol=0, atol=1e-8)


def test_means_over_sequences_and_normalised_rewards_are_biased():
    """What GRPO does by default: its direction is another one, which the tests above would see."""
    true = np.asarray(true_gradient(0.0)).ravel()
    for kind, mean in (("rloo", "grpo"), ("grpo", "dapo")):
        found = np.asarray(jax.grad(functools.partial(in_groups, kind=kind, size=2, mean=mean))(jnp.asarray(POLICY)))
        cosine = found.ravel() @ true / np.linalg.norm(found) / np.linalg.norm(true)
        assert 0.5 < cosine < 0.999


def test_inside_the_reward_k1_has_the_right_gradient_and_k2_and_k3_do_not():
    for kind in ("k1", "k2", "k3"):
        found = jax.grad(lambda x, kind=kind: with_values(x, 1.0, np.zeros(STATES), BETA, kind))(jnp.asarray(POLICY))
        error = np.abs(found - true_gradient(BETA)).max()
        assert error < 1e-8 if kind == "k1" else error > 1e-2


def divergence(x, reverse=True):
    found, ref = align_bandit.logp(BANDIT, x), align_bandit.logp(BANDIT, BANDIT.ref_logits)
    return jnp.sum(jnp.exp(found) * (found - ref)) if reverse else jnp.sum(jnp.exp(ref) * (ref - found))


def test_as_a_loss_k2_has_the_gradient_of_the_divergence_k1_none_and_k3_that_of_the_forward_one():
    """Fault 6: every form where it does not belong is seen."""
    ref, at = align_bandit.logp(BANDIT, BANDIT.ref_logits), jnp.asarray(POLICY)

    def gradient(function, kind, drawn=POLICY):
        found = jax.grad(lambda x: jnp.sum(often(drawn)[:, 0] * function(align_bandit.logp(BANDIT, x), ref, kind=kind)))
        return found(at)

    reverse, forward = jax.grad(divergence)(at), jax.grad(lambda x: divergence(x, reverse=False))(at)
    assert np.abs(reverse - forward).max() > 1e-2
    np.testing.assert_allclose(gradient(losses.kl, "k1"), 0, atol=1e-8)
    np.testing.assert_allclose(gradient(losses.kl, "k2"), reverse, rtol=0, atol=1e-8)
    np.testing.assert_allclose(gradient(losses.kl, "k3"), forward, rtol=0, atol=1e-8)
    for kind in ("k2", "k3"):
        np.testing.assert_allclose(gradient(losses.kl_loss, kind), reverse, rtol=0, atol=1e-8)
    value = jnp.sum(often(POLICY)[:, 0] * losses.kl_loss(align_bandit.logp(BANDIT, at), ref, kind="k3"))
    np.testing.assert_allclose(value, divergence(at), rtol=0, atol=1e-10, err_msg="the reported KL is the trained one")

    def older(found, ref, kind):
        ratio = losses.ratios(found[:, None], align_bandit.logp(BANDIT, OLDER)[:, None], np.ones((N, 1)))
        return jax.lax.stop_gradient(ratio[:, 0]) * losses.kl_loss(found, ref, kind=kind)

    np.testing.assert_allclose(gradient(older, "k3", OLDER), reverse, rtol=0, atol=1e-8)


def test_as_a_loss_on_tokens_it_is_the_divergence_after_given_prefixes():
    """So that it is not the divergence of replies, where they are longer than one token."""

    def on_tokens(x):
        found, ref = (align_bandit.token_logp(BANDIT, logits) for logits in (x, BANDIT.ref_logits))
        return jnp.sum(often(POLICY) * losses.kl_loss(found, ref) * BANDIT.mask)

    def given_prefixes(x):
        visits = jnp.array([jnp.sum(often(POLICY) * (BANDIT.states == s) * BANDIT.mask) for s in range(STATES)])
        found, ref = jax.nn.log_softmax(x), jax.nn.log_softmax(BANDIT.ref_logits)
        return jnp.sum(visits * jnp.sum(jnp.exp(found) * (found - ref), 1))

    at = jnp.asarray(POLICY)
    np.testing.assert_allclose(jax.grad(on_tokens)(at), jax.grad(given_prefixes)(at), rtol=0, atol=1e-8)
    assert np.abs(jax.grad(on_tokens)(at) - jax.grad(divergence)(at)).max() > 1e-2


def test_replies_of_another_policy_are_corrected_by_their_ratios():
    """Of one token, so that the ratio of a token is that of a reply; every ratio is far inside clip=1 and the cap."""
    bandit = align_bandit.make(vocab=6, length=1, seed=3)
    policy, older = jnp.asarray(RNG.normal(0, 1, (1, 6))), jnp.asarray(RNG.normal(0, 0.2, (1, 6)))
    older = policy + older
    drawn, old = (align_bandit.token_logp(bandit, x) for x in (older, policy))
    advantages, mask = bandit.rewards[:, None], np.ones((6, 1))
    assert np.abs(drawn - old).max() < 0.6

    def expected(x, of_old, weights):
        weights = jnp.exp(drawn) * weights
        return losses.ppo_policy(
            align_bandit.token_logp(bandit, x), of_old, advantages, mask, clip=1.0, weights=weights
        )[0]

    true = true_gradient(0.0, policy, bandit)
    by_ratio = jax.grad(expected)(policy, drawn, 1.0)
    by_weight = jax.grad(expected)(policy, old, losses.sampler_weights(old, drawn, mask, cap=9.0))
    np.testing.assert_allclose(by_ratio, true, rtol=0, atol=1e-8)
    np.testing.assert_allclose(by_weight, true, rtol=0, atol=1e-8)
    assert np.abs(jax.grad(expected)(policy, old, 1.0) - true).max() > 1e-2, "and not without them"


METHODS = {  # name: (the method, length of replies)
    "PPO": (align_bandit.ppo, 3),
    "GRPO, KL in the reward": (align_bandit.grpo, 3),
    "GRPO, RLOO, KL in the loss": (functools.partial(align_bandit.grpo, kind="rloo", penalty="loss"), 1),
    "DPO": (align_bandit.dpo, 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_at_the_best_policy(name):
    method, length = METHODS[name]
    bandit = align_bandit.make(vocab=4, length=length, seed=0)
    start = align_bandit.distance(bandit, bandit.ref_logits, 0.5)
    curve = align_bandit.train(bandit, method(bandit, beta=0.5), beta=0.5)
    assert start > 0.1 and len(curve) == 400
    assert curve[-1] < 1e-2 and curve[0] > 10 * curve[-1]
