"""The splash kernel (interpreted here) against the reference form: values, gradients, segments, groups, meshes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tele_jax.model import attention
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh

LENGTH = 256


def inputs(batch, heads, kv_heads, head_dim, dtype="float32"):
    rng = np.random.default_rng(head_dim)
    q, g = (rng.standard_normal((batch, LENGTH, heads, head_dim), dtype=np.float32) for _ in range(2))
    k, v = (rng.standard_normal((batch, LENGTH, kv_heads, head_dim), dtype=np.float32) for _ in range(2))
    segments = np.sort(rng.integers(0, 4, (batch, LENGTH)), axis=1).astype(np.int32)
    return [jnp.asarray(x, dtype) for x in (q, k, v, g)], jnp.asarray(segments)


def rows_of(q):
    return jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])


def value_and_gradients(implementation, arrays, segments):
    def weighted(q, k, v, g):
        rows = rows_of(q)
        return jnp.sum(attention.attend(implementation, q, k, v, rows, rows, segments).astype(jnp.float32) * g)

    q, k, v, g = arrays
    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)))(q, k, v, g.astype(jnp.float32))


def largest_difference(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "segmented"),
    [(2, 2, 64, True), (2, 1, 128, True), (1, 1, 160, False), (1, 1, 256, True)],
)
def test_splash_agrees_with_the_formula(heads, kv_heads, head_dim, segmented):
    arrays, segments = inputs(2, heads, kv_heads, head_dim)
    segments = segments if segmented else None
    found = value_and_gradients("splash", arrays, segments)
    assert largest_difference(found, value_and_gradients("reference", arrays, segments)) < 2e-5


def test_splash_on_a_mesh_agrees_with_one_device():
    arrays, segments = inputs(4, 2, 2, 64)
    alone = value_and_gradients("splash", arrays, segments)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        on_mesh = value_and_gradients("splash", arrays, segments)
    assert largest_difference(on_mesh, alone) < 1e-6


@pytest.mark.parametrize(
    ("length", "dtype", "kv_heads", "reason"),
    [
        (200, "float32", 2, "rows of 200 tokens"),
        (256, "float16", 2, "float16"),
        (256, "float32", 1, "1 kv heads on mesh tensor = 2"),
    ],
)
def test_what_splash_cannot_do_falls_back_with_one_line(length, dtype, kv_heads, reason):
    (q, k, v, _), _ = inputs(4, 2, kv_heads, 16, dtype)
    q, k, v = (x[:, :length] for x in (q, k, v))
    rows = rows_of(q)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match=f"splash does not do {reason}.*taking the xla form"):
        found = jax.jit(lambda q, k, v: attention.attend("splash", q, k, v, rows, rows))(q, k, v)
    np.testing.assert_allclose(
        found, attention.reference(q, k, v, rows, rows), atol=2e-3 if dtype == "float16" else 1e-5
    )


def test_auto_takes_no_kernel_where_it_would_be_interpreted():
    (q, k, v, _), _ = inputs(1, 1, 1, 64)
    rows = rows_of(q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = jax.jit(lambda q, k, v: attention.attend("auto", q, k, v, rows, rows)).lower(q, k, v).as_text()
    assert "splash" not in text
