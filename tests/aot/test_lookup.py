"""The residual stream and the embedding on a mesh: same numbers, cut as intended, no table gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tele_jax.settings import MeshConfig
from tele_jax.sharding import RULES, constrain, lookup, make_mesh, whole_rows

VOCAB, EMBED, ROWS, LENGTH = 48, 32, 8, 16
MESHES = [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, tensor=4)]


def loss(table, tokens, weights):
    return jnp.sum(lookup(table, tokens, "bfloat16").astype(jnp.float32) * weights)


@pytest.mark.parametrize("config", MESHES)
def test_rows_and_gradients_are_those_of_one_device(config):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCAB, EMBED)).astype(np.float32)
    tokens = rng.integers(0, 5, (ROWS, LENGTH))  # few, so that gradients of many tokens meet
    weights = rng.standard_normal((ROWS, LENGTH, EMBED)).astype(np.float32)
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weights.astype(jnp.bfloat16).astype(np.float32))
    mesh = make_mesh(config)
    cut = jax.device_put(table, NamedSharding(mesh, P(RULES["vocab"], RULES["embed"])))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda t: lookup(t, tokens, "bfloat16"))(cut)
        gradient = jax.jit(jax.grad(loss))(cut, tokens, weights)
        text = jax.jit(jax.grad(loss)).lower(cut, tokens, weights).compile().as_text()
    np.testing.assert_array_equal(np.asarray(found), table[tokens].astype(jnp.bfloat16))
    np.testing.assert_allclose(gradient, expected, atol=1e-4)
    assert f"f32[{VOCAB},{EMBED}]" not in text  # neither the table nor its gradient lies whole on a device


def test_the_stream_is_cut_over_embed_and_blocks_see_whole_rows():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = jnp.zeros((ROWS, LENGTH, EMBED))
    with jax.set_mesh(mesh):
        assert jax.jit(constrain)(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
        assert jax.jit(whole_rows)(x).sharding.spec == P(("data", "fsdp"))
        assert jax.jit(lambda x: whole_rows(x, tensor=2))(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
        assert jax.jit(constrain)(x[..., :15]).sharding.spec == P(("data", "fsdp"))  # 15 does not divide
        assert jax.jit(constrain)(x[:, :1]).sharding.spec == P(("data", "fsdp"))  # a token a row, as in decoding


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((3, 5, 7))
    assert constrain(x) is x and whole_rows(x, tensor=2) is x
