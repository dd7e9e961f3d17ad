"""Faults that other trainers have had: each is planted in tele.losses, and the check that holds against it fails."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tele_jax import losses
from tests.align import oracle
from tests.align.test_losses import ADVANTAGES, LOGP, MASK, OLD, REF, VALUES

REAL = {name: getattr(losses, name) for name in losses.__all__}


def microbatches_are_one_batch():
    """Sums and counts of rows of very different lengths are added, and divided once."""
    for cuts in ([4], [1, 3], [2, 2], [1, 1, 1, 1]):
        ends = np.cumsum([0, *cuts])
        parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        found = [losses.ppo_policy(LOGP[p], OLD[p], ADVANTAGES[p], MASK[p], clip=0.2) for p in parts]
        total, count = (sum(float(pair[i]) for pair in found) for i in (0, 1))
        expected = np.divide(*oracle.policy(LOGP, OLD, ADVANTAGES, MASK, clip=0.2))
        np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def mean_of_the_microbatch(*args, **options):
    total, count = REAL["ppo_policy"](*args, **options)
    return total / count, jnp.ones(())


def divided_twice(*args, **options):
    total, count = REAL["ppo_policy"](*args, **options)
    return total / len(args[0]), count


def padding_is_never_read():
    """Rows behind and before which anything stands, one of them cut at the limit, are what they are alone."""
    wild = [np.where(MASK, x, np.nan) for x in (ADVANTAGES, VALUES)]
    found = losses.gae(*wild, MASK, gamma=1.0, lam=0.9)
    white = np.asarray(losses.whiten(wild[0], MASK))
    slope = jax.grad(lambda v: jnp.sum(losses.gae(wild[0], v, MASK, gamma=1.0, lam=0.9)[1]))(jnp.asarray(wild[1]))
    assert np.isfinite(slope).all() and not np.any(slope[MASK == 0])
    for ours, theirs in zip(found, oracle.gae(ADVANTAGES, VALUES, MASK, 1.0, 0.9), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    kept = ADVANTAGES[MASK > 0]
    np.testing.assert_allclose(white[MASK > 0], (kept - kept.mean()) / kept.std(), rtol=1e-5, atol=1e-6)
    row, (begin, end) = 1, (0, 3)  # padded behind: its last value must not come from the padding
    alone = losses.gae(*(x[row : row + 1, begin:end] for x in (ADVANTAGES, VALUES)), MASK[:1, :3], gamma=1.0, lam=0.9)
    np.testing.assert_allclose(found[0][row, begin:end], alone[0][0], rtol=1e-5)


def everything_counts(what, mask, **given):
    return (np.ones(np.shape(mask), bool), *(jnp.nan_to_num(jnp.asarray(x, jnp.float32)) for x in given.values()))


def bootstraps_behind_the_end(rewards, values, mask, **options):
    """Padding is a position like others, without reward and with some value."""
    filled = (jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 1.0))
    return REAL["gae"](*filled, np.ones(np.shape(mask)), **options)


def equal_rewards_say_nothing():
    """Thirds of 0.1 in float32 have another mean than 0.1: a division by their deviation would make a signal of it."""
    group = np.repeat([0, 1], [3, 2])
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 1.0], np.float32)
    for kind in ("grpo", "rloo", "dr_grpo"):
        assert not np.any(losses.group_advantages(rewards, group, kind=kind))
    assert not np.any(losses.rewards_differ(rewards, group))
    nearly = np.array([1.0, 1.0 + 1e-6], np.float32)
    assert np.abs(losses.group_advantages(nearly, [0, 0])).max() < 0.05, "groups of two do not explode"


def without_an_epsilon(rewards, group, *, kind="grpo"):
    found = np.zeros(len(rewards), np.float32)
    for g in set(np.asarray(group).tolist()):
        members = np.asarray(rewards)[np.asarray(group) == g]
        found[np.asarray(group) == g] = (members - members.mean()) / np.maximum(members.std(ddof=1), 1e-12)
    return found


def the_ratio_carries_the_gradient():
    """In the first epoch every ratio is 1, and the gradient is that of sum(A logp), not nothing."""
    for level in ("token", "sequence"):
        slope = jax.grad(lambda x, level=level: losses.ppo_policy(x, OLD, ADVANTAGES, MASK, clip=0.2, level=level)[0])
        sums = np.where(MASK, ADVANTAGES, 0)
        means = sums.sum(1, keepdims=True) / MASK.sum(1, keepdims=True) * MASK
        np.testing.assert_allclose(slope(OLD), -(sums if level == "token" else means), rtol=1e-5, atol=1e-6)


def constant_ratios(*args, **options):
    return jax.lax.stop_gradient(REAL["ratios"](*args, **options))


def the_divergence_in_the_loss_has_its_gradient():
    value, slope = jax.value_and_grad(lambda x: jnp.sum(losses.kl_loss(x, REF)))(LOGP)
    np.testing.assert_allclose(slope, LOGP - REF, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, oracle.kl(LOGP, REF, "k3").sum(), rtol=1e-5)


PLANTED = [  # (number of the fault, check, function that is replaced, its faulty form)
    (1, microbatches_are_one_batch, "ppo_policy", mean_of_the_microbatch),
    (1, microbatches_are_one_batch, "ppo_policy", divided_twice),
    (4, padding_is_never_read, "_kept", everything_counts),
    (4, padding_is_never_read, "gae", bootstraps_behind_the_end),
    (5, equal_rewards_say_nothing, "group_advantages", without_an_epsilon),
    (5, the_ratio_carries_the_gradient, "ratios", constant_ratios),
    (6, the_divergence_in_the_loss_has_its_gradient, "kl_loss", lambda x, ref: losses.kl(x, ref, kind="k1")),
    (6, the_divergence_in_the_loss_has_its_gradient, "kl_loss", lambda x, ref: losses.kl(x, ref, kind="k2")),
    (6, the_divergence_in_the_loss_has_its_gradient, "kl_loss", lambda x, ref: losses.kl(x, ref, kind="k3")),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check, *_ in PLANTED))
def test_the_losses_have_none_of_the_known_faults(check):
    check()


@pytest.mark.parametrize(("number", "check", "name", "faulty"), PLANTED)
def test_a_planted_fault_is_seen(number, check, name, faulty, monkeypatch):
    monkeypatch.setattr(losses, name, faulty)
    with pytest.raises(AssertionError):
        check()
