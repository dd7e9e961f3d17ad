"""Products of the decoder: as JAX does them on accelerators, on CPUs with gradients of their own that cost XLA less.

Letters: B batch, S sequence, D embed, F mlp, N heads, K kv_heads, H head_dim.
"""

import functools
import re

import jax
import jax.numpy as jnp

from tele_jax.sharding import platform


def project(letters: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """jnp.einsum(letters, x, kernel), the kernel in the dtype of x."""
    kernel = _rounded(kernel, x.dtype).astype(x.dtype)
    return _project(letters, x, kernel) if platform() == "cpu" else jnp.einsum(letters, x, kernel)


def _rounded(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The kernel of one layer rounded to dtype, on TPUs: values that the cast which follows does not change.

    The TPU compiler moves a cast out of the loop over the layers, where it casts the kernels of all of them and keeps
    the result through the step, 1 GiB a device in that of the 1T model. It does not move a rounding. Where head_dim is
    a dimension of its own, it copies what it gathers into another layout, 350 GB a step, unless the slice of the layer
    is an array of its own first; the kernels of the MLP are not copied, and would be gathered earlier than needed.
    """
    if platform() != "tpu" or kernel.dtype == dtype:
        return kernel
    if kernel.ndim == 3:
        kernel = jax.lax.optimization_barrier(kernel)
    return jax.lax.reduce_precision(kernel, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(letters: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(letters, x, kernel)


def _project_backward(letters, arguments, gradient):
    """As JAX does it, but for the order of the product that gives the gradient of the kernel.

    XLA transposes the first factor, on CPUs column by column and with everything that computes it: 38 ms for a gate of
    4,096 tokens and 704 units, 1 ms for the 256 of its input. So the narrower one comes first.
    """
    x, kernel = arguments
    of_x, of_kernel = jax.vjp(functools.partial(jnp.einsum, letters), x, kernel)[1](gradient)
    if x.size <= gradient.size:
        first, second, third = re.split(",|->", letters)
        of_kernel = jnp.einsum(f"{first},{third}->{second}", x, gradient)
    return of_x, of_kernel


_project.defvjp(lambda letters, x, kernel: (_project(letters, x, kernel), (x, kernel)), _project_backward)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    return _gated(gate, up) if platform() == "cpu" else jax.nn.silu(gate) * up


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The same, keeping for its gradient no more than its arguments."""
    return jax.nn.silu(gate) * up


def _gated_backward(arguments, gradient):
    gate, up = arguments
    sigmoid = jax.nn.sigmoid(gate)
    of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return of_gate, gradient * gate * sigmoid


_gated.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)
