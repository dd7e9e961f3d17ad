"""Losses of alignment in float64 numpy, written with loops from the formulas; nothing of tele_jax computes here.

Arrays are [B] or [B, T]. Losses over positions return (sum, count).
"""

import math

import numpy as np


def softplus(x):
    """log(1 + e^x) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def cross_entropy(logits, targets, weights):
    """(sum of weights * -log softmax(logits)[target], sum of weights); logits [B, T, V]."""
    total = 0.0
    for b, t in np.ndindex(*targets.shape):
        row = logits[b, t]
        total += weights[b, t] * (math.log(np.exp(row - row.max()).sum()) + row.max() - row[targets[b, t]])
    return total, weights.sum()


def reward(chosen, rejected, margin=None):
    margin = np.zeros(len(chosen)) if margin is None else margin
    return np.array([softplus(-(c - r - m)) for c, r, m in zip(chosen, rejected, margin, strict=True)])


def dpo(policy, reference, *, beta, kind="sigmoid", label_smoothing=0.0, lengths=None):
    """policy, reference and lengths are [B, 2] each, chosen first."""
    losses = []
    for i in range(len(policy)):
        (a, b), (c, d) = policy[i], reference[i]
        m, n = (1.0, 1.0) if lengths is None else lengths[i]
        z = (a - c) / m - (b - d) / n
        if kind == "ipo":
            losses.append((z - 0.5 / beta) ** 2)
        else:
            losses.append((1 - label_smoothing) * softplus(-beta * z) + label_smoothing * softplus(beta * z))
    return np.array(losses)


def gae(rewards, values, mask, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, as the paper's equation 16 has it, up to the end of the row."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(len(rewards)):
        (where,) = np.nonzero(mask[b])
        for n, t in enumerate(where):
            for power, u in enumerate(where[n:]):
                last = u == where[-1]
                delta = rewards[b, u] + (0.0 if last else gamma * values[b, u + 1]) - values[b, u]
                advantages[b, t] += (gamma * lam) ** power * delta
            returns[b, t] = advantages[b, t] + values[b, t]
    return advantages, returns


def policy(logp, old_logp, advantages, mask, *, clip, level="token", mean="dapo", length=None, weights=None):
    """The clipped loss and what it is divided by: `mean` is dapo (positions), grpo (sequences) or dr_grpo (length)."""
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    total, count = 0.0, 0.0
    for b in range(len(logp)):
        (where,) = np.nonzero(mask[b])
        if not len(where):
            continue
        log_ratios = [logp[b, t] - old_logp[b, t] for t in where]
        if level == "sequence":
            log_ratios = [sum(log_ratios) / len(where)] * len(where)
        of_row = 0.0
        for t, log_ratio in zip(where, log_ratios, strict=True):
            ratio, advantage = math.exp(log_ratio), advantages[b, t]
            allowed = min(ratio, 1 + high) if advantage >= 0 else max(ratio, 1 - low)
            of_row -= allowed * advantage * (1.0 if weights is None else weights[b, t])
        total += of_row / {"dapo": 1, "grpo": len(where), "dr_grpo": length}[mean]
        count += len(where) if mean == "dapo" else 1
    return total, count


def value(values, old_values, returns, mask, clip):
    total = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        losses = [(values[b, t] - returns[b, t]) ** 2]
        if clip is not None:
            near = min(max(values[b, t], old_values[b, t] - clip), old_values[b, t] + clip)
            losses.append((near - returns[b, t]) ** 2)
        total += 0.5 * max(losses)
    return total, float(np.count_nonzero(mask))


def group_advantages(rewards, group, kind):
    found = np.zeros(len(rewards))
    for i in range(len(rewards)):
        others = [rewards[j] for j in range(len(rewards)) if group[j] == group[i]]
        mean = sum(others) / len(others)
        if kind == "rloo":
            found[i] = rewards[i] - (sum(others) - rewards[i]) / (len(others) - 1)
        elif kind == "dr_grpo":
            found[i] = rewards[i] - mean
        else:
            deviation = math.sqrt(sum((r - mean) ** 2 for r in others) / (len(others) - 1))
            found[i] = (rewards[i] - mean) / (deviation + 1e-4)
    return found


def kl(logp, ref_logp, kind):
    r = np.exp(ref_logp - logp)
    return {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": r - 1 - np.log(r)}[kind]


def gradient(function, x, step=1e-3):
    """Central differences of fourth order of a scalar function: their error is about 1e-12 where it is smooth."""
    found = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):

        def at(moved, index=index):
            y = x.copy()
            y[index] += moved
            return function(y)

        found[index] = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    return found
