"""Means inside one tree, and blocks that begin as the identity, against float64 numpy and the reference forward."""

import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import growth, surgery
from tele_jax.axes import flatten, unflatten
from tele_jax.errors import UserError
from tests import reference
from tests.growth.test_merging import DTYPES

CFG = tele.ModelConfig(
    **dict(num_layers=4, embed_dim=12, num_heads=6, head_dim=4, mlp_dim=10, vocab_size=13, padded_vocab_size=15),
    **dict(output_biases=True, dtype="float64", param_dtype="float64"),
)
PARAMS = reference.random_params(CFG, np.random.default_rng(0), 0.3)
TOKENS = np.random.default_rng(1).integers(0, 13, (2, 9), np.int32)


def changed(names, function):
    return unflatten({n: function(x) if n in names else x for n, x in flatten(PARAMS).items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_keys_and_values_are_pooled_to_their_means(dtype):
    params = unflatten({name: np.asarray(leaf).astype(dtype) for name, leaf in flatten(PARAMS).items()})
    cfg, pooled = surgery.pool_kv_heads(CFG, params, 2)
    assert cfg.num_kv_heads == 2
    for name, leaf in flatten(pooled).items():
        old = np.asarray(flatten(params)[name])
        if name in ("layers.attn.k", "layers.attn.v"):
            wide = old.astype(np.float64)
            old = np.stack([(wide[:, :, i] + wide[:, :, i + 1] + wide[:, :, i + 2]) / 3 for i in (0, 3)], 2)
            np.testing.assert_array_equal(leaf, old.astype(dtype))
        else:
            np.testing.assert_array_equal(leaf, old)
        assert leaf.dtype == dtype


def test_pooling_equal_heads_keeps_the_function():
    equal = changed(("layers.attn.k", "layers.attn.v"), lambda leaf: np.repeat(np.asarray(leaf)[:, :, ::3], 3, 2))
    cfg, pooled = surgery.pool_kv_heads(CFG, equal, 2)
    before, after = reference.forward(CFG, equal, TOKENS), reference.forward(cfg, pooled, TOKENS)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12 * np.abs(before).max())


def test_new_tokens_are_means_and_old_logits_stay():
    cfg, params = surgery.add_tokens(CFG, PARAMS, [[2, 5], [7], [0, 1, 12]])
    assert (cfg.vocab_size, cfg.padded_vocab_size) == (16, 16)
    for name, axis in (("embed.table", 0), ("lm_head.kernel", 1)):
        old, new = (np.moveaxis(np.asarray(flatten(tree)[name]), axis, 0) for tree in (PARAMS, params))
        np.testing.assert_array_equal(new[:13], old[:13])
        expected = [(old[2] + old[5]) / 2, old[7], (old[0] + old[1] + old[12]) / 3]
        np.testing.assert_allclose(new[13:], expected, rtol=1e-15)
    logits = reference.forward(CFG, PARAMS, TOKENS), reference.forward(cfg, params, TOKENS)
    np.testing.assert_allclose(logits[0][..., :13], logits[1][..., :13], rtol=0, atol=1e-14)  # BLAS adds in any order
    cfg, params = surgery.add_tokens(CFG, PARAMS, [[3]])  # one of the two padding rows is left
    assert (cfg.vocab_size, cfg.padded_vocab_size) == (14, 15)
    table = params["embed"]["table"]
    np.testing.assert_array_equal(table[[13, 14]], np.asarray(PARAMS["embed"]["table"])[[3, 14]])


def test_expanded_blocks_are_the_identity_to_the_bit():
    plan = surgery.expand_blocks(CFG, 2)
    assert plan.maps["layers"].index.tolist() == [0, 1, 1, 2, 3, 3] and plan.preserving
    large = unflatten({n: np.asarray(x[...]) for n, x in flatten(growth.lazy(plan, PARAMS)).items()})
    np.testing.assert_array_equal(
        reference.forward(plan.dst_cfg, large, TOKENS), reference.forward(CFG, PARAMS, TOKENS)
    )
    for name, leaf in flatten(large).items():
        if name in ("layers.attn.o", "layers.mlp.down", "layers.attn.o_bias", "layers.mlp.down_bias"):
            assert not leaf[[2, 5]].any()
        elif name.startswith("layers."):
            np.testing.assert_array_equal(leaf[[2, 5]], leaf[[1, 4]])


REFUSED = {
    "do not make 4 groups": lambda: surgery.pool_kv_heads(CFG, PARAMS, 4),
    "expected ids from 0 to 12": lambda: surgery.add_tokens(CFG, PARAMS, [[13]]),
    "of is empty": lambda: surgery.add_tokens(CFG, PARAMS, []),
    "at least one": lambda: surgery.add_tokens(CFG, PARAMS, [[1], []]),
    "do not fit the config": lambda: surgery.add_tokens(CFG.replace(mlp_dim=8), PARAMS, [[1]]),
    "do not make 3 groups": lambda: surgery.expand_blocks(CFG, 3),
    "blocks=1.5": lambda: surgery.expand_blocks(CFG, 1.5),
    "no floating point": lambda: surgery.pool_kv_heads(CFG, changed(("embed.table",), jnp.int32), 2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_named(message):
    with pytest.raises(UserError, match=message):
        REFUSED[message]()
