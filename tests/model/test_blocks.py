"""The blocks form of attention, value and gradients, against the formula in float64; and what the CPU path rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.model import attention, platforms

# rows, tokens, heads, kv heads, head_dim; whether there are segments
CASES = [
    (2, 128, 2, 2, 64, True),
    (2, 129, 4, 2, 8, False),
    (1, 300, 6, 2, 10, True),
    (2, 384, 3, 1, 2, True),
    (1, 256, 1, 1, 160, False),
    (1, 257, 2, 2, 256, True),
]


def formula(q, k, v, segments):
    """Attention [B, S, N, H] in numpy, head by head, all scores at once."""
    result = np.empty_like(q)
    group = q.shape[2] // k.shape[2]
    seen = np.tril(np.ones((q.shape[1], q.shape[1]), bool))
    for row in range(q.shape[0]):
        visible = seen & (segments[row][:, None] == segments[row][None, :])
        for head in range(q.shape[2]):
            scores = q[row, :, head] @ k[row, :, head // group].T / np.sqrt(q.shape[3])
            weights = np.where(visible, np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
            result[row, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v[row, :, head // group]
    return result


@pytest.mark.parametrize(("rows", "length", "heads", "kv_heads", "head_dim", "segmented"), CASES)
def test_blocks_agree_with_the_formula(rows, length, heads, kv_heads, head_dim, segmented):
    rng = np.random.default_rng(length)
    q, g = rng.standard_normal((2, rows, length, heads, head_dim))
    k, v = rng.standard_normal((2, rows, length, kv_heads, head_dim))
    segments = rng.integers(0, 3, (rows, length), dtype=np.int32) if segmented else np.zeros((rows, length), np.int32)
    directions = [rng.standard_normal(x.shape) for x in (q, k, v)]
    with jax.enable_x64(True):
        run = lambda q, k, v: attention.blocks(q, k, v, jnp.asarray(segments) if segmented else None)  # noqa: E731
        value, pullback = jax.vjp(jax.jit(run), *map(jnp.asarray, (q, k, v)))
        gradients = [np.asarray(x) for x in pullback(jnp.asarray(g))]
    np.testing.assert_allclose(value, formula(q, k, v, segments), rtol=0, atol=1e-12)
    step = 1e-3
    for i, (gradient, direction) in enumerate(zip(gradients, directions)):
        moved = [[*(q, k, v)[:i], (q, k, v)[i] + n * step * direction, *(q, k, v)[i + 1 :]] for n in (-2, -1, 1, 2)]
        far_below, below, above, far_above = (np.sum(formula(*arrays, segments) * g) for arrays in moved)
        numeric = (8 * (above - below) - (far_above - far_below)) / (12 * step)
        assert abs(np.sum(gradient * direction) - numeric) < 1e-8 * max(1, abs(numeric))


def test_blocks_keep_no_weights_for_the_gradient():
    q = jnp.zeros((2, 512, 2, 8))
    kept = jax.tree.leaves(jax.eval_shape(lambda q: jax.vjp(attention.blocks, q, q, q)[1], q))
    assert max(leaf.size for leaf in kept) == q.size


@pytest.mark.parametrize(
    ("letters", "x", "kernel"),
    [
        ("BSD,DNH->BSNH", (2, 5, 7), (7, 3, 4)),
        ("BSNH,NHD->BSD", (2, 5, 3, 4), (3, 4, 7)),
        ("BSF,FD->BSD", (2, 5, 9), (9, 2)),
    ],
)
def test_projections_have_the_gradients_of_the_product(letters, x, kernel):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.standard_normal(x)), jnp.asarray(rng.standard_normal(kernel))
        value, pullback = jax.vjp(lambda x, kernel: platforms.project(letters, x, kernel), x, kernel)
        gradient = rng.standard_normal(value.shape)
        of_x, of_kernel = pullback(jnp.asarray(gradient))
    first, second, third = letters.replace("->", ",").split(",")
    np.testing.assert_allclose(value, np.einsum(letters, x, kernel), rtol=0, atol=1e-13)
    np.testing.assert_allclose(of_x, np.einsum(f"{third},{second}->{first}", gradient, kernel), rtol=0, atol=1e-13)
    np.testing.assert_allclose(of_kernel, np.einsum(f"{first},{third}->{second}", x, gradient), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", [(6, 3, 4), (6, 8)])
def test_kernels_rounded_on_tpus_are_those_of_the_cast(monkeypatch, kernel):
    """Value and gradients to the bit, of stacked float32 kernels in a scan with remat, in bfloat16."""
    rng = np.random.default_rng(0)
    x, stacked = jnp.asarray(rng.standard_normal((2, 5, 6)), jnp.bfloat16), rng.standard_normal((4, *kernel))
    stacked[0].flat[:4] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, np.nextafter(np.float32(1 + 2.0**-8), 2), -1e38
    letters = "BSD,DNH->BSNH" if len(kernel) == 3 else "BSD,DF->BSF"

    def run(product):
        @jax.checkpoint
        def layer(x, kernel):
            y = product(x, kernel)
            return jnp.tanh(x + y.reshape(*x.shape[:2], -1)[..., :6]), y

        function = lambda x, stacked: jax.lax.scan(layer, x, stacked)  # noqa: E731
        values, pullback = jax.vjp(jax.jit(function), x, jnp.asarray(stacked, jnp.float32))
        return values, pullback(jax.tree.map(lambda v: (v * 0.7).astype(v.dtype), values))

    expected = run(lambda x, kernel: jnp.einsum(letters, x, kernel.astype(x.dtype)))
    monkeypatch.setattr(platforms, "platform", lambda: "tpu")
    rounded = run(lambda x, kernel: platforms.project(letters, x, kernel))
    text = str(jax.make_jaxpr(lambda x, kernel: platforms.project(letters, x, kernel))(x, stacked[0].astype("float32")))
    assert "reduce_precision" in text and ("optimization_barrier" in text) == (len(kernel) == 3)
    assert rounded[1][1].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_the_gated_product_has_the_gradient_of_silu_times_up():
    rng = np.random.default_rng(0)
    gate, up, gradient = rng.standard_normal((3, 50)) * 3
    with jax.enable_x64(True):
        value, pullback = jax.vjp(platforms.gated, jnp.asarray(gate), jnp.asarray(up))
        of_gate, of_up = pullback(jnp.asarray(gradient))
    sigmoid = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(value, gate * sigmoid * up, rtol=0, atol=1e-13)
    np.testing.assert_allclose(of_gate, gradient * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(of_up, gradient * gate * sigmoid, rtol=0, atol=1e-13)


def test_rotary_tables_are_written_down_to_the_bit():
    cfg = tele.ModelConfig(
        num_layers=1, embed_dim=8, num_heads=1, head_dim=64, mlp_dim=8, vocab_size=8, dtype="float32"
    )
    positions = jnp.arange(3000)
    inverse = 10_000.0 ** (-np.arange(0, 64, 2, dtype=np.float64) / 64)
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    for table, function in zip(jax.jit(lambda p: attention.rotary_tables(cfg, p, 3000))(positions), (jnp.cos, jnp.sin)):
        np.testing.assert_array_equal(table, jax.jit(function)(angles))
