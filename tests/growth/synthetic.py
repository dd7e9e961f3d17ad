"""A source model of any size without its memory: every entry is one of a million random numbers, by its flat index."""

import math

import numpy as np

from tele_jax.axes import unflatten
from tele_jax.model.spec import flat_spec

PERIOD = 1_048_573  # a prime: rows of no leaf repeat


class SyntheticArray:
    """Normal numbers of a standard deviation (norm scales: around 1), read by leading integers and one slice."""

    def __init__(self, spec, seed: int, mean: float, std: float):
        self.shape, self.dtype = spec.shape, np.dtype(np.float32)
        self._pool = (np.random.default_rng(seed).standard_normal(PERIOD) * std + mean).astype(np.float32)

    def __getitem__(self, key):
        key = [key] if not isinstance(key, tuple) else list(key)
        key = [] if key == [...] else key
        bounds = [(k.indices(n)[:2] if isinstance(k, slice) else (k, k + 1)) for k, n in zip(key, self.shape)]
        bounds += [(0, n) for n in self.shape[len(bounds) :]]
        cut = next((d for d, (a, b) in enumerate(bounds) if b - a != 1), len(bounds))
        assert all((a, b) == (0, n) for (a, b), n in list(zip(bounds, self.shape))[cut + 1 :])
        below = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        first = sum(int(a) * b for (a, _), b in zip(bounds[: cut + 1], below))
        size = math.prod(b - a for a, b in bounds)
        out = np.resize(np.roll(self._pool, -(first % PERIOD)), size)
        shape = [b - a for (a, b), k in zip(bounds, key + [slice(None)] * len(bounds)) if isinstance(k, slice)]
        return out.reshape(shape)


def tree(cfg, std=0.02):
    """Parameters of cfg, none of them in memory."""
    leaves = {}
    for seed, (name, spec) in enumerate(flat_spec(cfg).items()):
        mean = 1.0 if spec.role == "scale" else 0.0
        leaves[name] = SyntheticArray(spec, seed, mean, 0.1 if spec.role == "scale" else std)
    return unflatten(leaves)
