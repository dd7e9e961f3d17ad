"""Attention against a cache, and the decoder that fills one, against numpy and against the pass over whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.config import Ntk, Rope
from tele_jax.inference.generate import prepare
from tele_jax.model import attention, decoder
from tests import reference

NOWHERE = decoder.NOWHERE


def plain_attention(q, k, v, q_index, kv_index):
    """One query at a time, from the formula, over the keys that it may see."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[1]
    result = np.zeros_like(q)
    for b, s, n in np.ndindex(batch, length, heads):
        seen = kv_index[b] <= q_index[b, s]
        weights = reference.softmax(k[b, n // group, seen] @ q[b, s, n] / np.sqrt(head_dim))
        result[b, s, n] = weights @ v[b, n // group, seen]
    return result


@pytest.mark.parametrize("used", [1, 4, 5, 8, 11, 12])
@pytest.mark.parametrize("length", [1, 3])
def test_attention_by_blocks_is_the_formula_and_reads_no_block_beyond(x64, monkeypatch, used, length):
    monkeypatch.setattr(attention, "SLOT_BLOCK", 4)
    rng = np.random.default_rng(used)
    layers, batch, kv_heads, slots, head_dim = 3, 2, 2, 12, 4
    q = rng.standard_normal((batch, length, 6, head_dim)) * 5  # large: the running maximum has to move
    k, v = rng.standard_normal((2, layers, batch, kv_heads, slots, head_dim))
    kv_index = np.full((batch, slots), NOWHERE)
    kv_index[:, :used] = np.arange(used)
    kv_index[1, 1 : used // 2] = NOWHERE  # padding between
    q_index = np.array([range(used - 1, used - 1 + length), [0] * length])
    expected = plain_attention(q, k[1][:, :, :used], v[1][:, :, :used], q_index, kv_index[:, :used])
    beyond = -(-used // 4) * 4
    k[:, :, :, beyond:] = v[:, :, :, beyond:] = np.nan
    result = jax.jit(attention.cached)(q, k, v, 1, q_index, kv_index, used)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)


def test_a_cache_that_does_not_divide_into_blocks_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "SLOT_BLOCK", 4)
    zeros = jnp.zeros((1, 1, 1, 10, 4))
    with pytest.raises(ValueError, match="10 slots does not divide into blocks of 4"):
        attention.cached(jnp.zeros((1, 1, 1, 4)), zeros, zeros, 0, jnp.zeros((1, 1)), jnp.zeros((1, 10)), 1)


@pytest.mark.parametrize("layers", ["stacked", "one by one"])
def test_rows_fed_in_parts_through_a_cache_have_the_states_of_whole_rows(x64, monkeypatch, layers):
    monkeypatch.setattr(attention, "SLOT_BLOCK", 8)
    cfg = tele.ModelConfig(
        num_layers=3, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, vocab_size=31, dtype="float64",
        param_dtype="float64", output_biases=True, embed_norm=True, rope=Rope(ntk=Ntk(4, 8)),
    )  # fmt: skip
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    params = jax.tree.map(jnp.asarray, params)
    tokens = np.random.default_rng(1).integers(0, 31, (2, 21))
    expected = np.asarray(decoder.hidden(cfg, params, tokens))  # rotary factors of 21 tokens
    if layers == "one by one":
        params = prepare(cfg, params)
        assert isinstance(params["layers"], tuple)
    step = jax.jit(decoder.hidden_cached, static_argnums=(0, 6), donate_argnums=4)
    cache = decoder.empty_cache(cfg, 2, 24)
    # Row 0 has a prompt of 13 tokens, row 1 of 9; both go in by chunks of 8, padded, then token by token from slot 13.
    lengths = np.array([13, 9])
    seen = [[], []]
    for start in (0, 8):
        positions = np.broadcast_to(np.arange(start, start + 8), (2, 8))
        positions = np.where(positions < lengths[:, None], positions, NOWHERE).astype(np.int32)
        piece = np.where(positions == NOWHERE, 0, np.take_along_axis(tokens, np.minimum(positions, 20), axis=1))
        x, cache = step(cfg, params, piece, positions, cache, np.int32(start), 21)
        for row in range(2):
            seen[row].append(np.asarray(x)[row, positions[row] < NOWHERE])
    for i in range(8):
        positions = (lengths + i)[:, None].astype(np.int32)
        x, cache = step(
            cfg, params, np.take_along_axis(tokens, positions, axis=1), positions, cache, np.int32(13 + i), 21
        )
        for row in range(2):
            seen[row].append(np.asarray(x)[row])
    for row in range(2):
        np.testing.assert_allclose(np.concatenate(seen[row]), expected[row, : lengths[row] + 8], rtol=1e-11, atol=1e-12)
