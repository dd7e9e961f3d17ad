"""PPO, GRPO and DPO on a task whose optimum is known: one picture of the divergence from it over updates.

    JAX_PLATFORMS=cpu python benchmarks/align_bandit.py --png bandit.png [--json FILE]

A policy is a table of logits, one row for each prefix that a reply can have. With few tokens and short replies all
replies are enumerated, so that every expectation is an exact sum in float64: nothing here is drawn. The best policy for
the reward r and the weight beta of the KL divergence is known, pi* = pi_ref exp(r / beta) / Z. The losses are those of
tele.losses; tests/align/test_bandit.py compares their gradients with the true ones.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tele_jax import losses

END = 0  # a reply ends with this token, or at the longest length


class Bandit(NamedTuple):
    """All N replies of up to T tokens: tokens, states (numbers of their prefixes) and mask, [N, T] each.

    ref_logits [number of states, V] is the reference policy, rewards are [N].
    """

    tokens: np.ndarray
    states: np.ndarray
    mask: np.ndarray
    ref_logits: np.ndarray
    rewards: np.ndarray


def make(vocab: int = 4, length: int = 3, seed: int = 0) -> Bandit:
    """A bandit with normal rewards and a normal reference."""
    rng = np.random.default_rng(seed)
    going_on = [p for n in range(length) for p in itertools.product(range(1, vocab), repeat=n)]
    number = {prefix: i for i, prefix in enumerate(going_on)}
    replies = [(*p, token) for p in going_on for token in range(vocab) if token == END or len(p) == length - 1]
    tokens, states, mask = (np.zeros((len(replies), length), int) for _ in range(3))
    for row, reply in enumerate(replies):
        for t, token in enumerate(reply):
            tokens[row, t], states[row, t], mask[row, t] = token, number[reply[:t]], 1
    return Bandit(tokens, states, mask, rng.normal(0, 0.5, (len(number), vocab)), rng.normal(0, 1, len(replies)))


def token_logp(bandit: Bandit, logits: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens of all replies, [N, T]; 0 behind their ends."""
    return jax.nn.log_softmax(logits)[bandit.states, bandit.tokens] * bandit.mask


def logp(bandit: Bandit, logits: jax.Array) -> jax.Array:
    """Log-probabilities of all replies, [N]."""
    return jnp.sum(token_logp(bandit, logits), 1)


def best_logp(bandit: Bandit, beta: float) -> jax.Array:
    """Log-probabilities of all replies under the best policy, [N]."""
    return jax.nn.log_softmax(logp(bandit, bandit.ref_logits) + bandit.rewards / beta)


def distance(bandit: Bandit, logits: jax.Array, beta: float) -> jax.Array:
    """The divergence KL(policy || best policy) in nats."""
    found = logp(bandit, logits)
    return jnp.sum(jnp.exp(found) * (found - best_logp(bandit, beta)))


def objective(bandit: Bandit, logits: jax.Array, beta: float) -> jax.Array:
    """What the best policy maximises: the mean reward less beta KL(policy || reference)."""
    found = logp(bandit, logits)
    return jnp.sum(jnp.exp(found) * (bandit.rewards - beta * (found - logp(bandit, bandit.ref_logits))))


class Learner(NamedTuple):
    """A method: its first parameters, what a rollout gives (params -> batch), and the loss of a batch."""

    params: Any
    rollout: Callable
    loss: Callable


def ppo(bandit: Bandit, *, beta: float, clip: float = 0.2, lam: float = 0.95) -> Learner:
    """PPO with a table of values, and the KL divergence in the reward of every token (k1)."""
    last = bandit.mask * (np.cumsum(bandit.mask[:, ::-1], 1)[:, ::-1] == 1)

    def rollout(params):
        old, values = token_logp(bandit, params["policy"]), params["values"][bandit.states]
        penalty = beta * losses.kl(old, token_logp(bandit, bandit.ref_logits), kind="k1")
        rewards = last * bandit.rewards[:, None] - penalty
        return old, values, *losses.gae(rewards, values, bandit.mask, gamma=1.0, lam=lam)

    def loss(params, batch):
        old, values, advantages, returns = batch
        often = jnp.exp(jnp.sum(old, 1, keepdims=True)) + 0 * old
        found = token_logp(bandit, params["policy"])
        policy, _ = losses.ppo_policy(found, old, advantages, bandit.mask, clip=clip, weights=often)
        rows = (params["values"][bandit.states], values, returns, bandit.mask)
        value = jax.vmap(lambda *row: losses.ppo_value(*(x[None] for x in row), clip=None)[0])(*map(jnp.asarray, rows))
        return policy + jnp.sum(often[:, 0] * value)

    return Learner({"policy": bandit.ref_logits, "values": np.zeros(len(bandit.ref_logits))}, rollout, loss)


def groups_of_two(bandit: Bandit) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of replies and of groups, [2 N^2] each: all groups of two replies."""
    pairs = np.indices((len(bandit.tokens),) * 2).reshape(2, -1)
    return pairs.ravel(), np.tile(np.arange(pairs.shape[1]), 2)


def grpo(bandit: Bandit, *, beta: float, kind: str = "grpo", penalty: str = "reward", clip: float = 0.2) -> Learner:
    """GRPO with groups of two, and the KL divergence in the rewards (k1) or in the loss of every token (k3).

    kind is that of losses.group_advantages.
    """
    rows, group = groups_of_two(bandit)
    mask, ref = bandit.mask[rows], token_logp(bandit, bandit.ref_logits)

    def rollout(params):
        old = token_logp(bandit, params)
        rewards = bandit.rewards - beta * jnp.sum(losses.kl(old, ref, kind="k1"), 1) * (penalty == "reward")
        return old, losses.group_advantages(rewards[rows], group, kind=kind)[:, None] * mask

    def loss(params, batch):
        old, advantages = batch
        often = jnp.exp(jnp.sum(old, 1))[rows].reshape(2, -1).prod(0)  # of every group
        weights = jnp.tile(often / 2, 2)[:, None] * mask
        found = token_logp(bandit, params)
        total, _ = losses.ppo_policy(found[rows], old[rows], advantages, mask, clip=clip, weights=weights)
        if penalty == "loss":
            again = jax.lax.stop_gradient(losses.ratios(found, old, bandit.mask))
            terms = again * losses.kl_loss(found, ref, kind="k3") * bandit.mask
            total += beta * jnp.sum(jnp.exp(jnp.sum(old, 1, keepdims=True)) * terms)
        return total

    return Learner(bandit.ref_logits, rollout, loss)


def dpo(bandit: Bandit, *, beta: float) -> Learner:
    """DPO on all pairs of replies of the reference, preferred as Bradley and Terry have it: sigmoid(r - r')."""
    (first, second), ref = np.indices((len(bandit.tokens),) * 2).reshape(2, -1), logp(bandit, bandit.ref_logits)
    often = jnp.exp(ref[first] + ref[second]) * jax.nn.sigmoid(bandit.rewards[first] - bandit.rewards[second])

    def loss(params, _):
        found = logp(bandit, params)
        return jnp.sum(often * losses.dpo(found[first], found[second], ref[first], ref[second], beta=beta))

    return Learner(bandit.ref_logits, lambda params: None, loss)


@functools.partial(jax.jit, static_argnames=("rollout", "loss", "rollouts", "epochs", "rate", "figure"))
def _train(params, rollout, loss, rollouts, epochs, rate, figure):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, rollouts * epochs))

    def of_rollout(carry, _):
        batch = rollout(carry[0])

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
            params = optax.apply_updates(params, updates)
            return (params, state), figure(params)

        return jax.lax.scan(step, carry, length=epochs)

    (params, _), figures = jax.lax.scan(of_rollout, (params, optimizer.init(params)), length=rollouts)
    return params, figures.ravel()


def train(bandit: Bandit, learner: Learner, *, beta: float, updates: int = 400, epochs: int = 4, rate: float = 0.1):
    """Trains by Adam with a rate that falls to 0, `epochs` updates a rollout; returns the distances after updates."""

    def figure(params):
        return distance(bandit, params["policy"] if isinstance(params, dict) else params, beta)

    params = jax.tree.map(jnp.asarray, learner.params)
    return np.asarray(_train(params, learner.rollout, learner.loss, updates // epochs, epochs, rate, figure)[1])


def main() -> None:
    """Trains the methods, draws their curves, and prints the last distances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", required=True, help="where to draw the picture (needs the extra [plots])")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the KL divergence, 0.5")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rewards and of the reference, 0")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    bandit = make(seed=args.seed)
    methods = {
        "PPO": ppo(bandit, beta=args.beta),
        "GRPO, KL in the reward": grpo(bandit, beta=args.beta),
        "DPO": dpo(bandit, beta=args.beta),
        "RLOO, KL in the loss of every token": grpo(bandit, beta=args.beta, kind="rloo", penalty="loss"),
        "GRPO, KL in the loss of every token": grpo(bandit, beta=args.beta, penalty="loss"),
    }
    curves = {name: train(bandit, learner, beta=args.beta) for name, learner in methods.items()}
    start = float(distance(bandit, bandit.ref_logits, args.beta))
    print(f"{len(bandit.tokens)} replies, beta {args.beta}; KL(reference || best) {start:.4f} nats")
    for name, curve in curves.items():
        print(f"{name:36} {curve[-1]:.2e}")
    if args.json:
        thinned = {name: [float(f"{x:.3g}") for x in curve[9::10]] for name, curve in curves.items()}
        found = {"beta": args.beta, "seed": args.seed, "start": start, "every tenth distance": thinned}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw({name: curves[name] for name in ("PPO", "GRPO, KL in the reward", "DPO")}, args.png)


def draw(curves: dict[str, np.ndarray], path: str) -> None:
    """Draws distances over updates into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.semilogy(np.arange(1, len(curve) + 1), curve, label=name)
    axes.axhline(1e-2, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="updates", ylabel="KL(policy || best policy), nats", title="Three ways to the same policy")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
