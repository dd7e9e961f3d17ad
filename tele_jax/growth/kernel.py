"""The tile kernel: any rectangle of a grown leaf, from the plan and from whatever it needs of the source.

It serves arrays in memory and on a mesh; host_kernel.py follows the same rules in numpy for checkpoints on disk, and
tests compare the bits of the two. All arithmetic is exact or correctly rounded elementwise (copies, one multiplication,
integers), so that a result does not depend on how it was tiled.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from tele_jax.growth.axis_map import NEW, AxisMap
from tele_jax.growth.plan import LeafPlan

# Sum of four uniform 16-bit integers: mean and standard deviation.
_MEAN = 4 * (2**16 - 1) / 2
SUM_STD = math.sqrt(4 * (2**32 - 1) / 12)

Read = Callable[[Sequence[np.ndarray]], jax.Array]


def tile(
    leaf: LeafPlan,
    maps: Sequence[AxisMap],
    where: Sequence[np.ndarray],
    read: Read,
    key: tuple[int, int],
    shape: Sequence[int],
    dtype,
    power: int = 1,
) -> jax.Array:
    """The entries of a grown leaf at the destination indices `where`, one int array per dimension.

    Args:
      maps: the AxisMap of every dimension.
      read: read(source indices, one array per dimension) -> that rectangle of the source leaf; anything at NEW.
      key: of the fresh values, see `leaf_key`.
      shape: of the whole destination leaf.
      power: of the factors: 1, and 2 for second moments.
    """
    known = [m.index[w] != NEW for m, w in zip(maps, where, strict=True)]
    fresh = [m.fresh[w] for m, w in zip(maps, where, strict=True)]
    source = read([m.index[w] for m, w in zip(maps, where, strict=True)])
    value = _scaled(leaf, maps, where, source, power)
    if not all(k.all() for k in known):
        value = jnp.where(_outer(known, np.logical_and), value, _filled(leaf, where, key, shape, dtype))
    zeroed = [f if m.axis in leaf.zero else np.zeros_like(f) for m, f in zip(maps, fresh, strict=True)]
    if any(z.any() for z in zeroed):
        value = jnp.where(_outer(zeroed, np.logical_or), jnp.zeros((), dtype), value)
    return value.astype(dtype)


def _scaled(leaf: LeafPlan, maps, where, source: jax.Array, power: int) -> jax.Array:
    if leaf.moves_exactly:
        return source
    precise = jnp.promote_types(source.dtype, jnp.float32)
    factor = jnp.asarray(float(leaf.coefficient) ** power, precise)
    for dimension, (m, w) in enumerate(zip(maps, where, strict=True)):
        along = leaf.factors(m)
        if along is not None:
            factor = factor * _along(jnp.asarray(along[w] ** power, precise), dimension, len(where))
    return (source.astype(precise) * factor).astype(source.dtype)


def _filled(leaf: LeafPlan, where, key, shape, dtype) -> jax.Array:
    if leaf.fill == "constant":
        return jnp.asarray(leaf.value, dtype)
    return normal(key, where, shape, leaf.value).astype(dtype)


def leaf_key(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit words that the fresh values of a leaf are drawn with."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def normal(key: tuple[int, int], where: Sequence[np.ndarray], shape: Sequence[int], std: float) -> jax.Array:
    """Bell-shaped float32 values of mean 0 and the given std, each a function of key and absolute index alone.

    Threefry (Salmon et al. 2011) of (row, column) gives 64 bits; their four 16-bit parts are added up. The sum of four
    uniform values is near normal (kurtosis 2.7, cut off at 3.46 std, like a truncated normal) and, unlike a logarithm
    or an inverse error function, needs only integers and one product that is rounded once: the same bits under every
    tiling, and on every platform that rounds as IEEE 754 says (compared on CPUs).
    """
    # jnp, not numpy: under jit only the vectors become constants of the program, not every row of the leaf.
    rows = jnp.zeros((1,) * (len(shape) - 1), jnp.uint32)
    for dimension, (size, w) in enumerate(zip(shape[:-1], where[:-1], strict=True)):
        rows = rows * jnp.uint32(size) + _along(jnp.asarray(w.astype(np.uint32)), dimension, len(shape) - 1)
    if math.prod(shape[:-1]) > 2**32 or shape[-1] > 2**32:
        raise ValueError(f"a leaf of shape {tuple(shape)} has more than 2^32 rows or columns")
    counters = jnp.broadcast_arrays(rows[..., None], jnp.asarray(where[-1].astype(np.uint32)))
    words = threefry2x32_p.bind(jnp.uint32(key[0]), jnp.uint32(key[1]), *counters)
    return bell(words, jnp.float32(std / SUM_STD))


def bell(words: Sequence[jax.Array], scale: jax.Array) -> jax.Array:
    """float32 values from two random words uint32[...] each; scale: float32, std / SUM_STD."""
    total = sum((word & 0xFFFF) + (word >> 16) for word in words).astype(jnp.int32)
    # total - mean is a multiple of 1/2 below 2^18: exact in float32, so that the product is rounded once.
    return (total.astype(jnp.float32) - jnp.float32(_MEAN)) * scale


def _along(vector, dimension: int, ndim: int):
    return vector.reshape([-1 if i == dimension else 1 for i in range(ndim)])


def _outer(vectors: Sequence[np.ndarray], combine: np.ufunc) -> jax.Array:
    """Vectors over the dimensions combined into one broadcastable mask, constant ones left out."""
    neutral = combine is np.logical_and
    mask = jnp.asarray(neutral)
    for dimension, vector in enumerate(vectors):
        if not (vector == neutral).all():
            other = _along(jnp.asarray(vector), dimension, len(vectors))
            mask = (mask & other) if neutral else (mask | other)
    return mask
