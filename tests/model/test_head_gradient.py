"""The gradient of the head on a mesh: reduced once for all chunks or once for each, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tele_jax.aot import counts, hlo
from tele_jax.model import loss
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh

ROWS, LENGTH, EMBED, VOCAB, USED, MULT = 8, 96, 16, 32, 29, 0.7
CHUNK = 24  # tokens: four chunks of the rows of a device where eight devices have a row each


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(loss, "CPU_CHUNK_TOKENS", CHUNK)
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", 0)
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((ROWS, LENGTH, EMBED)), rng.standard_normal((EMBED, VOCAB))
    targets, weights = rng.integers(0, USED, (ROWS, LENGTH)), rng.random((ROWS, LENGTH))
    return x, kernel, targets, weights


def formula(x, kernel, targets, weights):
    """The loss and its gradients, from softmax minus one-hot."""
    logits = MULT * x @ kernel[:, :USED]
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    hit = np.eye(USED)[targets]
    of_logits = MULT * weights[..., None] * (shares - hit)
    of_kernel = np.zeros_like(kernel)
    of_kernel[:, :USED] = np.einsum("BSD,BSV->DV", x, of_logits)
    return -np.sum(weights * np.log((shares * hit).sum(-1))), of_logits @ kernel[:, :USED].T, of_kernel


def compiled(inputs, mesh, dtype):
    x, kernel, targets, weights = inputs

    def total(x, kernel):
        return loss.weighted_cross_entropy(x, kernel, jnp.asarray(targets), jnp.asarray(weights, dtype), MULT, USED)

    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    with jax.set_mesh(make_mesh(mesh, devices)):
        arrays = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
        program = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arrays).compile()
        return program, program(*arrays)


@pytest.mark.parametrize("most", [2**32, 0], ids=["once", "every chunk"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=4)], ids=str)
def test_the_gradient_is_the_formula_s_however_often_it_is_reduced(inputs, mesh, most, monkeypatch, x64):
    monkeypatch.setattr(loss, "WHOLE_GRADIENT_BYTES", most)
    _, (found, gradients) = compiled(inputs, mesh, jnp.float64)
    value, *expected = formula(*inputs)
    np.testing.assert_allclose(found, value, rtol=1e-13)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def reductions(program):
    """(How often it runs, bytes that a device receives) of every reduction over fsdp of the size of the head."""
    found = counts.count(hlo.parse(program.as_text())).collectives
    size = 4 * EMBED * VOCAB
    kinds = ("reduce-scatter", "all-reduce")
    return [(c.times, c.times * c.received_bytes) for c in found if c.kind in kinds and c.operand_bytes == size]


def test_the_head_s_gradient_is_received_once_and_not_for_every_chunk(inputs, monkeypatch):
    mesh = MeshConfig(fsdp=8)
    program, once = compiled(inputs, mesh, jnp.float32)
    received = 4 * EMBED * VOCAB * 7 / 8
    assert reductions(program) == [(1, received)]
    monkeypatch.setattr(loss, "WHOLE_GRADIENT_BYTES", 0)
    program, often = compiled(inputs, mesh, jnp.float32)
    chunks = LENGTH // CHUNK
    assert reductions(program) == [(chunks, chunks * received)]
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(often), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
