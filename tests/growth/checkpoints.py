"""A small checkpoint with its optimizer state to grow from, full of awkward numbers, for the tests of streaming."""

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.settings import OptimizerConfig
from tele_jax.train.optimizer import optimizer

SRC = tele.ModelConfig(
    num_layers=2, embed_dim=16, num_heads=4, head_dim=4, mlp_dim=24, vocab_size=40, output_mult=2.0, output_biases=True
)
DST = SRC.replace(num_layers=3, embed_dim=21, num_heads=6, num_kv_heads=6, mlp_dim=37, output_mult=0.5)
SMALL = {"chunk_bytes": 900, "memory_gb": 0.2}
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 1.2e-38, 3e38], np.float32)


def random_numbers(generator, shape, dtype=np.float32):
    """Normal numbers, and some that arithmetic treats in a way of its own."""
    values = np.asarray(generator.standard_normal(shape) * 10.0 ** generator.integers(-3, 3, shape))
    places = generator.random(shape) < 0.05
    values[places] = generator.choice(SPECIAL, places.sum())
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def random_tree(cfg, seed, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random_numbers(generator, leaf.shape, dtype), tele.spec(cfg))


def random_state(cfg, tx=None):
    """Of an optax optimizer, by default the one that training uses, in the middle of a run."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tele.spec(cfg))
    tx = optimizer(cfg, OptimizerConfig(learning_rate=1e-3), lambda step: 1.0) if tx is None else tx
    state = jax.eval_shape(tx.init, abstract)
    generator = np.random.default_rng(2)

    def fill(leaf):
        if leaf.dtype == np.int32:
            return generator.integers(0, 9, leaf.shape, np.int32)
        return random_numbers(generator, leaf.shape)

    return jax.tree.map(fill, state)


def save(path, cfg=SRC, **how):
    state = random_state(cfg)
    checkpoint.save(path, cfg, random_tree(cfg, 1), opt_state=state, step=7, provenance=[{"stage": "before"}], **how)
    return path


class Stopped(Exception):
    pass


def stop_half_way(plan, src, dst, **how):
    """As far as half of it; returns how many tiles were finished."""
    count = 0

    def stop(done, total):
        nonlocal count
        count += done > 0
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        growth.stream(plan, src, dst, progress=stop, **how)
    return count
