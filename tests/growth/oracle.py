"""Growth in numpy, written from the words of the plan and the papers, to compare the library with.

normal(seed, name, shape, std)     the fresh values: Threefry-2x32 (Salmon et al. 2011) of (row, column)
grow(plan, params)                 what `tele.growth.apply` has to give, to the bit
old(plan)                          per leaf, true where the entry was in the model before
"""

import hashlib
import math

import numpy as np

from tele_jax.axes import flatten, unflatten

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key, counter):
    """Twenty rounds over pairs of uint32: (key0, key1), (counter0, counter1) -> two words."""
    keys = [np.uint32(key[0]), np.uint32(key[1]), np.uint32(key[0]) ^ np.uint32(key[1]) ^ np.uint32(0x1BD11BDA)]
    with np.errstate(over="ignore"):
        a, b = counter[0].astype(np.uint32) + keys[0], counter[1].astype(np.uint32) + keys[1]
        for i in range(5):
            for bits in ROTATIONS[i % 2]:
                a = a + b
                b = ((b << np.uint32(bits)) | (b >> np.uint32(32 - bits))) ^ a
            a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + np.uint32(i + 1)
    return a, b


def key_of(seed, name):
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return tuple(np.frombuffer(digest[:8], "<u4").tolist())


def normal(key, shape, std):
    """float32 of the given shape: the sum of four 16-bit integers, centred and scaled to the standard deviation."""
    columns = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    words = threefry(key, (columns // shape[-1], columns % shape[-1]))
    total = sum((word & np.uint32(0xFFFF)).astype(np.int64) + (word >> np.uint32(16)) for word in words)
    variance_of_uniform = (65536**2 - 1) / 12
    return (total - 2 * 65535).astype(np.float32) * np.float32(std / math.sqrt(4 * variance_of_uniform))


def along(vector, dimension, ndim):
    return np.asarray(vector).reshape([-1 if i == dimension else 1 for i in range(ndim)])


def fresh(plan, axes, only=None):
    """True where any of the axes (or of those in `only`) is fresh, broadcast over the leaf."""
    out = np.zeros([plan.maps[axis].dst_size for axis in axes], bool)
    for dimension, axis in enumerate(axes):
        if only is None or axis in only:
            out |= along(plan.maps[axis].fresh, dimension, len(axes))
    return out


def old(plan):
    """{leaf: bool array, true where an entry of the grown leaf was there before}"""
    return {name: ~fresh(plan, spec.axes) for name, spec in plan.dst_spec.items()}


def grow(plan, params, fresh_values=normal):
    """The grown tree. Scaling is done in float32 or better and rounded once to the leaf's dtype."""
    leaves = {}
    for name, array in flatten(params).items():
        array, leaf, spec = np.asarray(array), plan.leaves[name], plan.dst_spec[name]
        maps = [plan.maps[axis] for axis in spec.axes]
        value = array[np.ix_(*(np.maximum(m.index, 0) for m in maps))]
        if leaf.coefficient != 1 or leaf.scaled or leaf.shared:
            precise = np.promote_types(array.dtype, np.float32)
            factor = np.full((1,) * value.ndim, leaf.coefficient, precise)
            for dimension, m in enumerate(maps):
                along_axis = (m.scale if m.axis in leaf.scaled else 1) * (m.share if m.axis in leaf.shared else 1)
                if not np.isscalar(along_axis):
                    factor = factor * along(along_axis.astype(precise), dimension, value.ndim)
            value = (value.astype(precise) * factor).astype(array.dtype)
        new = np.zeros(value.shape, bool)
        for dimension, m in enumerate(maps):
            new |= along(m.index == -1, dimension, value.ndim)
        if leaf.fill == "normal":
            filling = fresh_values(key_of(plan.seed, name), value.shape, leaf.value).astype(array.dtype)
        else:
            filling = np.full(value.shape, leaf.value, array.dtype)
        value = np.where(new, filling, value)
        leaves[name] = np.where(fresh(plan, spec.axes, leaf.zero), np.zeros((), array.dtype), value)
    return unflatten(leaves)
