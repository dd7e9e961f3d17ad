"""Work-arounds for XLA on CPUs: products whose gradients cost less, a table that is computed once, and the allocator.

Letters: B batch, S sequence, D embed, F mlp, N heads, K kv_heads, H head_dim.
"""

import ctypes
import functools
import re

import jax
import jax.numpy as jnp

# Compiler options of a program that runs once, such as the initialisation: on two cores it compiles in 2.5 s instead of
# 3.6 for the quickstart (2026-11-29), to the same bits.
COMPILED_ONCE = {"xla_backend_optimization_level": 1}

# Parameters of mallopt, as <malloc.h> of glibc numbers them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(letters: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """jnp.einsum(letters, x, kernel) with a gradient of its own."""
    return jnp.einsum(letters, x, kernel)


def _project_backward(letters, arguments, gradient):
    """The gradients of JAX, except for the order of the product that gives the gradient of the kernel.

    XLA transposes the first factor, on CPUs column by column and with everything that computes it: 38 ms for a gate of
    4,096 tokens and 704 units, 1 ms for the 256 of its input. So the narrower one comes first.
    """
    x, kernel = arguments
    of_x, of_kernel = jax.vjp(functools.partial(jnp.einsum, letters), x, kernel)[1](gradient)
    if x.size <= gradient.size:
        first, second, third = re.split(",|->", letters)
        of_kernel = jnp.einsum(f"{first},{third}->{second}", x, gradient)
    return of_x, of_kernel


project.defvjp(lambda letters, x, kernel: (project(letters, x, kernel), (x, kernel)), _project_backward)


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, which keeps no more than its arguments for the gradient."""
    return jax.nn.silu(gate) * up


def _gated_backward(arguments, gradient):
    gate, up = arguments
    sigmoid = jax.nn.sigmoid(gate)
    of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return of_gate, gradient * gate * sigmoid


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


def compute_once(table: jax.Array) -> jax.Array:
    """The rotary table unchanged: XLA would compute it again in every layer, for every head, at 8 ms instead of 1.

    XLA drops optimization barriers before it decides what to fuse, but keeps products. A product with the identity is
    exact.
    """
    return jnp.matmul(table, jnp.eye(table.shape[-1], dtype=table.dtype), precision=jax.lax.Precision.HIGHEST)


def keep_freed() -> bool:
    """Asks glibc to keep freed memory for the next step instead of giving it back; returns True where glibc agrees.

    XLA allocates and frees the temporaries of every step in one piece. Given back, they are mapped and zeroed page by
    page again: 308,000 faults and 0.6 of 3.7 processor seconds in the step of benchmarks/train_step.py (2026-11-25).
    The price is that the process stays as large as it once was, and larger where blocks of ever other sizes do not fit
    into what was freed: of one's own process only. To be called before the first threads, which would have arenas of
    their own; another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
