"""The tile kernel in JAX: any rectangle of a grown leaf, for arrays in memory and on a mesh.

The contract, which host_kernel.py follows for checkpoints on disk, is written in leaf.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.typing import DTypeLike

from tele_jax.growth.leaf import Along, LeafStep

# Sum of four uniform 16-bit integers: mean and standard deviation.
_MEAN = 4 * (2**16 - 1) / 2
SUM_STD = math.sqrt(4 * (2**32 - 1) / 12)

Read = Callable[[Sequence[np.ndarray]], jax.Array]


def tile(step: LeafStep, where: Sequence[np.ndarray], read: Read, dtype: DTypeLike) -> jax.Array:
    """Computes the entries of a grown leaf at the destination indices `where`, one int array per dimension.

    Args:
      read: read(source indices, one int array per dimension) gives that rectangle of the source leaf; what it gives
        at NEW is not used.
    """
    along = [step.along(dimension, index) for dimension, index in enumerate(where)]
    value = _scaled(step, along, read([part.origin for part in along]))
    if any(part.new.any() for part in along):
        value = jnp.where(_any([part.new for part in along]), _filled(step, where, dtype), value)
    if any(part.zero.any() for part in along):
        value = jnp.where(_any([part.zero for part in along]), jnp.zeros((), dtype), value)
    return value.astype(dtype)


def _scaled(step: LeafStep, along: Sequence[Along], source: jax.Array) -> jax.Array:
    if step.moves_exactly:
        return source
    precise = jnp.promote_types(source.dtype, jnp.float32)
    factor = jnp.asarray(step.coefficient, precise)
    for dimension, part in enumerate(along):
        if part.factors is not None:
            factor = factor * _on_dimension(jnp.asarray(part.factors, precise), dimension, len(along))
    return (source.astype(precise) * factor).astype(source.dtype)


def _filled(step: LeafStep, where: Sequence[np.ndarray], dtype: DTypeLike) -> jax.Array:
    if step.leaf.fill == "constant":
        return jnp.asarray(step.leaf.value, dtype)
    return normal(step.key, where, step.shape, step.leaf.value).astype(dtype)


def normal(key: tuple[int, int], where: Sequence[np.ndarray], shape: Sequence[int], std: float) -> jax.Array:
    """Bell-shaped float32 values of mean 0 and the given std, each a function of key and absolute index alone.

    Threefry (Salmon et al. 2011) of (row, column) gives 64 bits; their four 16-bit parts are added up. The sum of four
    uniform values is near normal (kurtosis 2.7, cut off at 3.46 std, like a truncated normal) and, unlike a logarithm
    or an inverse error function, needs only integers and one product that is rounded once: the same bits under every
    tiling, and on every platform that rounds as IEEE 754 says (compared on CPUs).
    """
    require_countable(shape)
    # jnp, not numpy: under jit only the vectors become constants of the program, not every row of the leaf.
    rows = jnp.zeros((1,) * (len(shape) - 1), jnp.uint32)
    for dimension, (size, w) in enumerate(zip(shape[:-1], where[:-1], strict=True)):
        rows = rows * jnp.uint32(size) + _on_dimension(jnp.asarray(w.astype(np.uint32)), dimension, len(shape) - 1)
    counters = jnp.broadcast_arrays(rows[..., None], jnp.asarray(where[-1].astype(np.uint32)))
    words = threefry2x32_p.bind(jnp.uint32(key[0]), jnp.uint32(key[1]), *counters)
    return bell(words, jnp.float32(std / SUM_STD))


def bell(words: Sequence[jax.Array], scale: jax.Array) -> jax.Array:
    """float32 values from two random words uint32[...] each; scale: float32, std / SUM_STD."""
    first, second = ((word & 0xFFFF) + (word >> 16) for word in words)
    total = (first + second).astype(jnp.int32)
    # total - mean is a multiple of 1/2 below 2^18: exact in float32, so that the product is rounded once.
    return (total.astype(jnp.float32) - jnp.float32(_MEAN)) * scale


def require_countable(shape: Sequence[int]) -> None:
    """Raises ValueError for a leaf with more rows or columns than 32-bit counters can tell apart."""
    if math.prod(shape[:-1]) > 2**32 or shape[-1] > 2**32:
        raise ValueError(f"a leaf of shape {tuple(shape)} has more than 2^32 rows or columns")


def _on_dimension(vector: Any, dimension: int, ndim: int) -> Any:
    return vector.reshape([-1 if i == dimension else 1 for i in range(ndim)])


def _any(vectors: Sequence[np.ndarray]) -> jax.Array:
    """True where the vector of any dimension is, broadcastable over the leaf; vectors without True are left out."""
    mask = jnp.asarray(False)
    for dimension, vector in enumerate(vectors):
        if vector.any():
            mask = mask | _on_dimension(jnp.asarray(vector), dimension, len(vectors))
    return mask
