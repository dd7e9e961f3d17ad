"""Losses of reward models, DPO, PPO and GRPO: pure functions of log-probabilities, values and rewards.

Arrays are B sequences, or pairs of them, by T positions. `logp` is the log-probability in nats of the token drawn at a
position, and `mask` is not 0 at the positions that count. Results are float32, or float64 where an argument is; every
function works inside jit. Losses over positions are returned as (sum, count): sums and counts of microbatches and
devices are added, and divided once.

    ratio_t      = exp(logp_t - old_logp_t)                                 arXiv 1707.06347 (PPO)
    advantages   = group_advantages(rewards, group, kind="grpo")            arXiv 2402.03300 (GRPO)
    weights, n   = token_weights(mask, kind="grpo")
    total, _     = ppo_policy(logp, old_logp, advantages[:, None] + 0 * mask, mask, clip=0.2, weights=weights)
    loss         = total / n
"""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from tele_jax.errors import UserError, require, require_known

__all__ = [
    "dpo", "gae", "group_advantages", "kl", "kl_loss", "ppo_policy", "ppo_value",
    "ratios", "reward", "rewards_differ", "sampler_weights", "token_weights", "whiten",
]  # fmt: skip

GROUP_EPSILON = 1e-4  # added to the standard deviation of a group, as in TRL 1.16: noise in equal rewards stays small
WHITEN_EPSILON = 1e-8  # added to the variance


def __dir__() -> list[str]:
    return __all__


def dpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    ref_chosen: ArrayLike,
    ref_rejected: ArrayLike,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_len: ArrayLike | None = None,
    rejected_len: ArrayLike | None = None,
) -> jax.Array:
    """The loss of direct preference optimisation, [B], from log-probabilities of whole replies, [B] each.

    With z = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), each bracket divided by the length of its
    reply where lengths are given, and e = label_smoothing:

        sigmoid, conservative   -(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z)
        ipo                     (z - 1 / (2 beta))^2

    Sources: arXiv 2305.18290 (sigmoid, e = 0; conservative, the share e of labels being wrong: its authors' note on
    cDPO), 2310.12036 (IPO), 2411.15124 (division by lengths).

    Args:
      beta: above 0; the weight of the KL divergence from the reference.
      label_smoothing: in [0, 0.5); not with kind ipo.
      chosen_len, rejected_len: numbers of tokens, [B] each, or neither.

    Raises:
      UserError: an unknown kind, a number outside its range, shapes that differ, one of two lengths, a length below 1.

    >>> dpo([-3.0, -4.0], [-5.0, -4.0], [-4.0, -4.0], [-4.0, -4.0], beta=0.5, kind="ipo")
    Array([1., 1.], dtype=float32)
    """
    require_known(kind, ("sigmoid", "ipo", "conservative"), f"dpo: kind={kind!r} is unknown")
    require(_real(beta) and 0 < beta < math.inf, f"dpo: beta={beta!r} must be a number above 0")
    allowed = _real(label_smoothing) and 0 <= label_smoothing < 0.5
    require(allowed, f"dpo: label_smoothing={label_smoothing!r} must be in [0, 0.5)")
    require(kind != "ipo" or not label_smoothing, "dpo: label_smoothing: kind 'ipo' has none; give kind='conservative'")
    given = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected, "ref_chosen": ref_chosen}
    chosen, rejected, ref_chosen, ref_rejected = _arrays("dpo", **given, ref_rejected=ref_rejected)
    require(chosen.ndim == 1, f"dpo: policy_chosen: expected [B], got {list(chosen.shape)}")
    chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
    require((chosen_len is None) == (rejected_len is None), "dpo: give both chosen_len and rejected_len, or neither")
    if chosen_len is not None and rejected_len is not None:
        _, *lengths = _arrays("dpo", policy_chosen=chosen, chosen_len=chosen_len, rejected_len=rejected_len)
        for name, length in zip(("chosen_len", "rejected_len"), lengths):
            require(not _known(length) or bool((length >= 1).all()), f"dpo: {name}: a reply has at least 1 token")
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    difference = chosen - rejected
    if kind == "ipo":
        return jnp.square(difference - 1 / (2 * beta))
    right, wrong = jax.nn.log_sigmoid(beta * difference), jax.nn.log_sigmoid(-beta * difference)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def reward(chosen: ArrayLike, rejected: ArrayLike, *, margin: ArrayLike | None = None) -> jax.Array:
    """The loss of a reward model, -log sigmoid(chosen - rejected - margin), [B], from scores [B] and margins [B].

    Sources: arXiv 2203.02155 (Bradley-Terry), 2307.09288 (margins). Raises UserError where shapes differ.

    >>> print(reward([2.0, 0.0], [0.0, 0.0], margin=[1.0, 0.0]))
    [0.3132617 0.6931472]
    """
    chosen, rejected = _arrays("reward", chosen=chosen, rejected=rejected)
    if margin is not None:
        _, margin = _arrays("reward", chosen=chosen, margin=margin)
        rejected = rejected + margin
    return -jax.nn.log_sigmoid(chosen - rejected)


def gae(
    rewards: ArrayLike, values: ArrayLike, mask: ArrayLike, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and returns (arXiv 1506.02438), [B, T] each, 0 where the mask is 0.

        delta_t = rewards_t + gamma values_{t+1} - values_t
        A_t     = delta_t + gamma lam A_{t+1}           returns_t = A_t + values_t

    The positions of a row that count are one run, with padding before and behind. values_{t+1} and A_{t+1} are 0 where
    the mask at t+1 is 0: the last position of a run has no bootstrap, and a second run in a row is an episode of its
    own. Rewards and values where the mask is 0 are never read: the reward of the whole belongs at the last position.
    Raises UserError for gamma or lam outside [0, 1], and where the shapes, [B, T], differ.

    >>> gae([[0.0, 1.0, 9.0]], [[0.5, 0.5, 9.0]], [[1, 1, 0]], gamma=1.0, lam=0.5)[0]
    Array([[0.25, 0.5 , 0.  ]], dtype=float32)
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        require(_real(value) and 0 <= value <= 1, f"gae: {name}={value!r} must be in [0, 1]")
    kept, rewards, values = _kept("gae", mask, rewards=rewards, values=values)
    ahead = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    goes_on = jnp.pad(kept[:, 1:], ((0, 0), (0, 1))).astype(rewards.dtype)
    deltas = rewards + gamma * ahead - values

    def step(later, position):
        delta, factor = position
        advantage = delta + factor * later
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[:, 0]), (deltas.T, gamma * lam * goes_on.T), reverse=True)
    advantages = jnp.where(kept, advantages.T, 0)
    return advantages, advantages + values


def group_advantages(rewards: ArrayLike, group: ArrayLike, *, kind: str = "grpo") -> jax.Array:
    """Advantages of replies within the group of replies to one prompt, [B]; exactly 0 where all of a group are equal.

    With the mean and the standard deviation (over n - 1) of the n rewards of a group:

        grpo      (reward - mean) / (std + 1e-4)                       arXiv 2402.03300, with TRL 1.16's std and 1e-4
        rloo      reward - mean of the others = (reward - mean) n / (n - 1)                    arXiv 2402.14740
        dr_grpo   reward - mean                                                                arXiv 2503.20783

    Drawn from the policy, the expected gradient of sum(advantage * logp) is the true gradient for rloo, and (n - 1)/n
    times it for dr_grpo.

    Args:
      rewards: float[B].
      group: int[B], any ids, in any order.

    Raises:
      UserError: an unknown kind, shapes that differ, ids that are no whole numbers; for grpo and rloo a group of one
        (inside jit, where the ids are not known, its advantage is NaN).

    >>> group_advantages([1.0, 0.0, 0.0, 3.0, 3.0], [7, 7, 7, 2, 2], kind="rloo")
    Array([ 1. , -0.5, -0.5,  0. ,  0. ], dtype=float32)
    """
    require_known(kind, ("grpo", "rloo", "dr_grpo"), f"group_advantages: kind={kind!r} is unknown")
    rewards, index = _groups("group_advantages", rewards, group)
    if kind != "dr_grpo" and _known(group):
        ids, sizes = np.unique(np.asarray(group), return_counts=True)
        alone = ids[sizes == 1][:1].tolist()
        require(not alone, f"group_advantages: group {alone} has one reward; kind {kind!r} needs at least 2 in a group")

    def total(x):
        return jax.ops.segment_sum(x, index, rewards.size)[index]

    above = rewards - jax.ops.segment_min(rewards, index, rewards.size)[index]  # equal rewards become exactly 0
    n = total(jnp.ones_like(rewards))
    if kind == "rloo":
        return (n * above - total(above)) / (n - 1)
    centred = above - total(above) / n
    return centred if kind == "dr_grpo" else centred / (jnp.sqrt(total(centred**2) / (n - 1)) + GROUP_EPSILON)


def rewards_differ(rewards: ArrayLike, group: ArrayLike) -> jax.Array:
    """Marks the replies whose group has rewards that differ, bool[B]: DAPO's dynamic sampling keeps them alone.

    Arguments and errors as for `group_advantages`. Source: arXiv 2503.14476, equation 11.
    """
    rewards, index = _groups("rewards_differ", rewards, group)
    extremes = (jax.ops.segment_max, jax.ops.segment_min)
    most, least = (extreme(rewards, index, rewards.size)[index] for extreme in extremes)
    return most != least


def whiten(values: ArrayLike, mask: ArrayLike, *, shift_mean: bool = True) -> jax.Array:
    """(values - mean) / sqrt(variance + 1e-8), [B, T], over the positions that count; 0 elsewhere.

    The variance is over n. shift_mean=False keeps the mean. Raises UserError where shapes differ.
    """
    kept, values = _kept("whiten", mask, values=values)
    n = jnp.maximum(jnp.sum(kept), 1)
    mean = jnp.sum(values) / n
    centred = jnp.where(kept, values - mean, 0)
    scaled = centred * jax.lax.rsqrt(jnp.sum(centred**2) / n + WHITEN_EPSILON)
    return scaled if shift_mean else jnp.where(kept, scaled + mean, 0)


def ratios(logp: ArrayLike, old_logp: ArrayLike, mask: ArrayLike, *, level: str = "token") -> jax.Array:
    """Importance ratios of the policy against the one that drew, [B, T]; 1 where the mask is 0.

        token      exp(logp_t - old_logp_t)
        sequence   exp(mean over the sequence's positions of logp - old_logp), at each of them     arXiv 2507.18071

    Raises UserError for an unknown level, and where shapes differ.
    """
    require_known(level, ("token", "sequence"), f"ratios: level={level!r} is unknown")
    kept, logp, old_logp = _kept("ratios", mask, logp=logp, old_logp=old_logp)
    difference = logp - old_logp
    if level == "sequence":
        difference = jnp.mean(difference, 1, where=kept | ~kept.any(1, keepdims=True), keepdims=True) * kept
    return jnp.exp(jnp.minimum(difference, 80))  # finite in float32


def ppo_policy(
    logp: ArrayLike,
    old_logp: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip: float | tuple[float, float],
    level: str = "token",
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The clipped loss of the policy (arXiv 1707.06347, equation 7): (sum over the mask, number of its positions).

        -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

    Args:
      logp, old_logp, advantages, mask: [B, T]. Nothing is read where the mask is 0. Gradients flow through logp alone.
      clip: low = high, in (0, 1]; or (low, high), arXiv 2503.14476 (DAPO): 0 < low <= 1, 0 < high.
      level: "token" or "sequence", see `ratios`.
      weights: [B, T], factors of the positions in the sum: see `token_weights` and `sampler_weights`. The number of
        positions is without them.

    Raises:
      UserError: a number outside its range, an unknown level, shapes that differ.

    >>> ppo_policy([[-1.0, -1.0]], [[-1.0, -2.0]], [[1.0, 1.0]], [[1, 1]], clip=0.2)
    (Array(-2.2, dtype=float32), Array(2., dtype=float32))
    """
    low, high = _clip("ppo_policy", clip)
    fixed = {"old_logp": old_logp, "advantages": advantages, "weights": 1 if weights is None else weights}
    kept, logp, *others = _kept("ppo_policy", mask, logp=logp, **fixed)
    old_logp, advantages, weights = jax.lax.stop_gradient(others)
    ratio = ratios(logp, old_logp, kept, level=level)
    gains = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    return -jnp.sum(gains * weights), jnp.sum(kept, dtype=gains.dtype)


def ppo_value(
    values: ArrayLike, old_values: ArrayLike, returns: ArrayLike, mask: ArrayLike, *, clip: float | None
) -> tuple[jax.Array, jax.Array]:
    """The loss of the value head: (sum over the mask, number of its positions).

        max((values - returns)^2, (old_values + clip(values - old_values, -clip, clip) - returns)^2) / 2

    The factor 1/2 and the clipping are those of OpenAI's baselines (ppo2). clip=None does not clip. Gradients flow
    through values alone, and nothing is read where the mask is 0. The arguments are [B, T] each. Raises UserError for
    a clip that is not above 0, and where shapes differ.
    """
    require(clip is None or (_real(clip) and clip > 0), f"ppo_value: clip={clip!r} must be above 0, or None")
    kept, values, *fixed = _kept("ppo_value", mask, values=values, old_values=old_values, returns=returns)
    old, returns = jax.lax.stop_gradient(fixed)
    losses = jnp.square(values - returns)
    if clip is not None:
        losses = jnp.maximum(losses, jnp.square(old + jnp.clip(values - old, -clip, clip) - returns))
    return jnp.sum(losses) / 2, jnp.sum(kept, dtype=losses.dtype)


def token_weights(mask: ArrayLike, *, kind: str = "grpo", length: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Weights of positions, float[B, T], and the number by which their sum of losses is divided, once.

        grpo      1 / positions of the sequence, by sequences: the mean over means of sequences      arXiv 2402.03300
        dapo      1, by positions: the mean over positions                                           arXiv 2503.14476
        dr_grpo   1 / length, by sequences; length is the same for all, the limit of new tokens      arXiv 2503.20783

    Sequences without a position count nowhere. Raises UserError for an unknown kind, and for a length below 1 or with
    another kind.

    >>> token_weights([[1, 1], [1, 0]], kind="grpo")
    (Array([[0.5, 0.5],
           [1. , 0. ]], dtype=float32), Array(2., dtype=float32))
    """
    require_known(kind, ("grpo", "dapo", "dr_grpo"), f"token_weights: kind={kind!r} is unknown")
    fits = length is None if kind != "dr_grpo" else _real(length) and length >= 1  # pyright: ignore[reportOptionalOperand]
    require(
        fits, f"token_weights: length={length!r}: kind 'dr_grpo' needs one of at least 1, the other kinds have none"
    )
    kept = _kept("token_weights", mask)[0].astype(float)
    n = jnp.sum(kept, 1, keepdims=True)
    if kind == "dapo":
        return kept, jnp.sum(n)
    return kept / (length or jnp.maximum(n, 1)), jnp.sum(n > 0, dtype=kept.dtype)


def sampler_weights(old_logp: ArrayLike, sampler_logp: ArrayLike, mask: ArrayLike, *, cap: float) -> jax.Array:
    """Truncated importance weights min(exp(old_logp - sampler_logp), cap), [B, T]; 0 where the mask is 0. No gradient.

    They correct for replies drawn by a policy other than that of old_logp: older, or computed otherwise. Source:
    arXiv 1802.01561 (V-trace), section 4.1. Raises UserError for a cap that is not above 0, and where shapes differ.
    """
    require(_real(cap) and cap > 0, f"sampler_weights: cap={cap!r} must be above 0")
    kept, old, sampler = _kept("sampler_weights", mask, old_logp=old_logp, sampler_logp=sampler_logp)
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(old - sampler, math.log(cap))) * kept)


def kl(logp: ArrayLike, ref_logp: ArrayLike, *, kind: str = "k1") -> jax.Array:
    """Estimates of the divergence KL(policy || reference), one for each draw of the policy, [B, T].

    With d = logp - ref_logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (J. Schulman, "Approximating KL divergence",
    2020). k1 and k3 have the right mean. Inside a reward, k1 alone gives the right gradient. As a loss, the gradient
    of k1 is 0 on average, that of k2 is the divergence's, and that of k3 is KL(reference || policy)'s: see `kl_loss`.

    Raises UserError for an unknown kind, and where shapes differ.

    >>> print(kl([[0.0, -1.0]], [[-1.0, -1.0]], kind="k2"))
    [[0.5 0. ]]
    """
    require_known(kind, ("k1", "k2", "k3"), f"kl: kind={kind!r} is unknown")
    logp, ref_logp = _arrays("kl", logp=logp, ref_logp=ref_logp)
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    return difference**2 / 2 if kind == "k2" else jnp.expm1(-difference) + difference


def kl_loss(logp: ArrayLike, ref_logp: ArrayLike, *, kind: str = "k3") -> jax.Array:
    """Terms of a loss whose mean over draws of the policy has the gradient of KL(policy || reference), [B, T].

    Both kinds have the gradient of k2, (logp - ref_logp) d logp. kind="k3" has the value of k3, whose mean is right and
    which is never negative. With log-probabilities of tokens, the gradient is that of the divergence of the next token,
    averaged over the drawn prefixes, which get no gradient. With log-probabilities of whole sequences, it is that of
    the divergence between sequences. On draws of an older policy, multiply by `ratios` without their gradient.

    Raises UserError for another kind (the gradients of k1 and k3 themselves are other ones), and where shapes differ.
    """
    require(kind in ("k2", "k3"), f"kl_loss: kind={kind!r}: known are 'k2' and 'k3'; k1 has no gradient as a loss")
    squared = kl(logp, ref_logp, kind="k2")
    return squared + jax.lax.stop_gradient(kl(logp, ref_logp, kind=kind) - squared)


def _real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _known(value: object) -> bool:
    """Returns whether this process can read the values: not inside jit, nor where other processes hold a part."""
    return not isinstance(value, Tracer) and getattr(value, "is_fully_addressable", True)


def _arrays(what: str, **given: ArrayLike) -> list[jax.Array]:
    """The arguments in one dtype, float32 or better. Raises UserError unless they are numbers of one shape."""
    arrays = {}
    for name, value in given.items():
        try:
            arrays[name] = jnp.asarray(value)
        except (TypeError, ValueError):
            raise UserError(f"{what}: {name}: expected an array of numbers, got {type(value).__name__}") from None
    first, shape = next((name, array.shape) for name, array in arrays.items())
    for name, array in arrays.items():
        same = array.shape in (shape, ())  # a number stands for all
        require(same, f"{what}: {name}: expected the shape of {first}, {list(shape)}, got {list(array.shape)}")
    dtype = jnp.result_type(*arrays.values(), jnp.float32)
    return [array.astype(dtype) for array in arrays.values()]


def _kept(what: str, mask: ArrayLike, **given: ArrayLike) -> tuple[jax.Array, ...]:
    """The positions that count, bool[B, T], and the arguments with 0 at the others. Raises UserError as `_arrays`."""
    kept = _arrays(what, mask=mask)[0] != 0
    require(kept.ndim == 2, f"{what}: mask: expected [B, T], got {list(kept.shape)}")
    return kept, *(jnp.where(kept, array, 0) for array in _arrays(what, mask=kept, **given)[1:])


def _clip(what: str, clip: float | tuple[float, float]) -> tuple[float, float]:
    low, high = clip if isinstance(clip, tuple | list) and len(clip) == 2 else (clip, clip)
    fits = _real(low) and _real(high) and 0 < low <= 1 and high > 0  # pyright: ignore[reportOperatorIssue]
    require(fits, f"{what}: clip={clip!r} must be in (0, 1], or (low, high) with 0 < low <= 1 and 0 < high")
    return low, high  # pyright: ignore[reportReturnType]


def _groups(what: str, rewards: ArrayLike, group: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The rewards, and the number of each one's group among the groups: [B] each."""
    (rewards,), _ = _arrays(what, rewards=rewards), _arrays(what, group=group)
    group = jnp.asarray(group)
    integers = jnp.issubdtype(group.dtype, jnp.integer)
    fits = integers and rewards.ndim == 1 and rewards.size and group.shape == rewards.shape
    shapes = f"{rewards.dtype}{list(rewards.shape)} and {group.dtype}{list(group.shape)}"
    require(bool(fits), f"{what}: expected rewards float[B] and group int[B], B at least 1, got {shapes}")
    return rewards, jnp.unique(group, return_inverse=True, size=group.size)[1]
