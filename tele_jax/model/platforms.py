"""Products of the decoder in the form that suits each platform, and other work-arounds for XLA on CPUs and TPUs.

Letters: B batch, S sequence, D embed, F mlp, N heads, K kv_heads, H head_dim.
"""

import ctypes
import functools
import re

import jax
import jax.numpy as jnp
from flax import struct

from tele_jax.sharding import platform

# Compiler options of a program that runs once, such as the initialisation: on two cores it compiles in 2.5 s instead of
# 3.6 for the quickstart (2026-11-29), to the same bits.
COMPILED_ONCE = {"xla_backend_optimization_level": 1}

# Parameters of mallopt, as <malloc.h> of glibc numbers them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


class Adapted(struct.PyTreeNode):
    """A kernel with a low-rank adapter: the kernel + scale * a b (model/adapters.py). It stands in a parameter tree.

    Flax compares the shape of a parameter with that of the first leaf alone, which has to be the kernel.
    """

    kernel: jax.Array  # [(layers), *inputs, *outputs]
    a: jax.Array  # [(layers), *inputs, rank]
    b: jax.Array  # [(layers), rank, *outputs]
    scale: float = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel.dtype


def project(letters: str, x: jax.Array, kernel: jax.Array | Adapted) -> jax.Array:
    """The product jnp.einsum(letters, x, kernel), the kernel in the dtype of x; for an Adapted, without merging it."""
    if isinstance(kernel, Adapted):
        of_x, of_kernel, result = re.split(",|->", letters)
        inputs, outputs = ("".join(c for c in of_kernel if (c in of_x) == inside) for inside in (True, False))
        rows = "".join(c for c in of_x if c not in inputs)
        low = project(f"{of_x},{inputs}R->{rows}R", x, kernel.a)
        return project(letters, x, kernel.kernel) + project(
            f"{rows}R,R{outputs}->{result}", low * kernel.scale, kernel.b
        )
    kernel = _rounded(kernel, x.dtype).astype(x.dtype)
    return _cpu_project(letters, x, kernel) if platform() == "cpu" else jnp.einsum(letters, x, kernel)


def _rounded(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The kernel of one layer, on TPUs rounded to dtype: the cast that follows does not change the values.

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
    """The activation silu(gate) * up."""
    return _cpu_gated(gate, up) if platform() == "cpu" else jax.nn.silu(gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cpu_project(letters: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product jnp.einsum(letters, x, kernel) with a gradient for CPUs."""
    return jnp.einsum(letters, x, kernel)


def _cpu_project_backward(letters, arguments, gradient):
    """JAX's gradients, except for the order of the product that gives the gradient of the kernel.

    XLA transposes the first factor, on CPUs column by column and with everything that computes it: 38 ms for a gate of
    4,096 tokens and 704 units, 1 ms for the 256 of its input. So the narrower one comes first.
    """
    x, kernel = arguments
    of_x, of_kernel = jax.vjp(functools.partial(jnp.einsum, letters), x, kernel)[1](gradient)
    if x.size <= gradient.size:
        first, second, third = re.split(",|->", letters)
        of_kernel = jnp.einsum(f"{first},{third}->{second}", x, gradient)
    return of_x, of_kernel


_cpu_project.defvjp(lambda letters, x, kernel: (_cpu_project(letters, x, kernel), (x, kernel)), _cpu_project_backward)


@jax.custom_vjp
def _cpu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The activation silu(gate) * up for CPUs, which keeps no more than its arguments for the gradient."""
    return jax.nn.silu(gate) * up


def _cpu_gated_backward(arguments, gradient):
    gate, up = arguments
    sigmoid = jax.nn.sigmoid(gate)
    of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return of_gate, gradient * gate * sigmoid


_cpu_gated.defvjp(lambda gate, up: (_cpu_gated(gate, up), (gate, up)), _cpu_gated_backward)


def compute_once(table: jax.Array) -> jax.Array:
    """Returns the rotary table unchanged; XLA on CPUs then computes it once and not in every layer: 1 ms instead of 8.

    XLA drops optimization barriers before it fuses, but keeps products. A product with the identity is exact.
    """
    if platform() != "cpu":
        return table
    return jnp.matmul(table, jnp.eye(table.shape[-1], dtype=table.dtype), precision=jax.lax.Precision.HIGHEST)


def keep_freed() -> bool:
    """Asks glibc to keep freed memory for the next step instead of giving it back; returns True where glibc agrees.

    XLA allocates and frees the temporaries of every step in one piece. Given back, they are mapped and zeroed page by
    page again: 308,000 faults and 0.6 of 3.7 processor seconds in the step of benchmarks/train_step.py (2026-11-25).
    The price is a process that stays as large as it once was, and grows where new sizes do not fit into freed blocks:
    call it in your own process only, and before the first threads, which would have their own arenas. Another C
    library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
