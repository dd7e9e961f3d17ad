"""Products of the decoder. CPUs have forms of their own (cpu.py).

Letters: B batch, S sequence, D embed, F mlp, N heads, K kv_heads, H head_dim.
"""

import jax
import jax.numpy as jnp

from tele_jax.model import cpu
from tele_jax.sharding import platform


def project(letters: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """jnp.einsum(letters, x, kernel), the kernel in the dtype of x."""
    kernel = _rounded(kernel, x.dtype).astype(x.dtype)
    return cpu.project(letters, x, kernel) if platform() == "cpu" else jnp.einsum(letters, x, kernel)


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


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    return cpu.gated(gate, up) if platform() == "cpu" else jax.nn.silu(gate) * up
