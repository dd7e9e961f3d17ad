"""Growth of parameters: as arrays (`apply`), computed where they are read (`lazy`), and the way back (`shrink`).

    big = growth.apply(plan, params)
    big = growth.lazy(plan, checkpoint.open_lazy(path).params)
    big["layers"]["mlp"]["up"][3, :64]         the bits of growth.apply(plan, params)["layers"]["mlp"]["up"][3, :64]
    growth.verify_stored(plan, params, big)    a comparison before a byte is written

Optimizer states: see opt_state.py; arrays on a mesh: see sharded.py.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import Leaf, Leaves, Params, check_tree, flatten, unflatten
from tele_jax.errors import UserError, abridged
from tele_jax.growth import kernel
from tele_jax.growth.kernel import tile
from tele_jax.growth.leaf import LeafPlan, LeafStep
from tele_jax.growth.plan import Plan, Step, require_plan
from tele_jax.sharding import tiles

BLOCK_BYTES = 32 * 2**20  # bytes of the source that a lazy leaf reads at once

Take = Callable[[jax.Array, Sequence[np.ndarray]], jax.Array]


def apply(plan: Plan, params: Params) -> Params:
    """The grown parameters; a pure function. For arrays that lie on a mesh, see `sharded`.

    Raises:
      UserError: params are not what plan.src_cfg describes, the leaves that differ are named; float64 without
        jax_enable_x64.
    """
    require_plan(plan, "apply: plan")
    return grow_params(plan, params, grow_leaf)


def grow_params(plan: Plan, params: Params, grow: Callable[[LeafStep, Any], Any]) -> Params:
    """Grows parameters as `apply` does, with grow(step of the leaf, array) as the kernel."""
    leaves = flatten(params)
    check_tree(leaves, plan.src_spec)
    for step in plan.steps:
        leaves = {name: grow(step.leaf_step(name), leaves[source]) for name, source in step.sources.items()}
    return unflatten(leaves)


def shrink(plan: Plan, params: Params) -> Params:
    """The left inverse of `apply`: to the bit where nothing was scaled, to rounding elsewhere.

    Per step that is one unit in the last place where a leaf has a coefficient alone, and a few (five, with random
    factors) where its units were split into copies, by policy copy, which multiplies by several factors.

    Raises:
      UserError: params are not what plan.dst_cfg describes; the plan drops something, which nothing brings back.
    """
    require_plan(plan, "shrink: plan")
    leaves = flatten(params)
    check_tree(leaves, plan.dst_spec)
    for step in reversed(plan.steps):
        leaves = _shrink_leaves(step, leaves)
    return unflatten(leaves)


def _shrink_leaves(step: Step, leaves: Leaves) -> Leaves:
    try:
        inverse = {axis: m.invert() for axis, m in step.maps.items()}
    except ValueError as error:
        raise UserError(f"shrink: policy {step.policy} has no inverse: {error}") from None
    kept = {source: name for name, source in step.sources.items()}
    if lost := step.src_spec.keys() - kept.keys():
        raise UserError(f"shrink: policy {step.policy} has no inverse: it drops {abridged(sorted(lost))}")
    small = {}
    for name, spec in step.src_spec.items():
        leaf = step.leaves[kept[name]]
        # The inverse of what growth multiplied by, with its rounding: entries come back to one unit in the last place.
        factor = float(np.asarray(leaf.coefficient, jnp.promote_types(spec.dtype, jnp.float32)))
        back = LeafPlan(1 / factor, (), leaf.scaled, leaf.shared)
        small[name] = grow_leaf(LeafStep(back, tuple(inverse[axis] for axis in spec.axes)), leaves[kept[name]])
    return small


def take(array: jax.Array, indices: Sequence[np.ndarray]) -> jax.Array:
    """The entries of an array at indices, one int array per dimension; anything at NEW."""
    for dimension, index in enumerate(indices):
        if not np.array_equal(index, np.arange(array.shape[dimension])):
            array = jnp.take(array, np.maximum(index, 0), axis=dimension, mode="clip")
    return array


def grow_leaf(step: LeafStep, array: Leaf, take: Take = take) -> jax.Array:
    """The whole of a leaf after one step."""
    dtype = array.dtype
    array = jnp.asarray(array)
    if array.dtype != dtype:
        raise UserError(
            f"a leaf of {dtype} would be cut to {array.dtype}: jax.config.update('jax_enable_x64', True) keeps it; "
            "growth.stream and growth.lazy work without"
        )
    return tile(step, [np.arange(size) for size in step.shape], functools.partial(take, array), array.dtype)


# ---- lazily ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class GrownArray:
    """A leaf of the grown tree; indexing it with integers and slices computes that part of it.

    Attributes:
      source: array, or checkpoint.LazyArray.
    """

    plan: Plan
    name: str
    source: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.dst_spec[self.name].shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.plan.dst_spec[self.name].dtype)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.plan.dst_spec[self.name].axes

    def __getitem__(self, key: object) -> np.ndarray:
        from tele_jax.checkpoint.lazy import basic_index

        index = basic_index(key, self.shape)
        bounds = [part if isinstance(part, slice) else slice(part, part + 1) for part in index]
        if any(part.step not in (None, 1) for part in bounds):
            raise IndexError("a grown leaf takes slices without a step")
        out = np.empty([part.stop - part.start for part in bounds], self.dtype)
        if out.size:
            steps = [(step, _chunks(step.shape, out.itemsize)) for step in self.plan.leaf_steps(self.name)]
            kernel.fill_after(out, steps, [part.start for part in bounds], _chunkwise(self.source))
        return out[tuple(slice(None) if isinstance(part, slice) else 0 for part in index)]


def lazy(plan: Plan, params: Params) -> Params:
    """The tree that growth.apply would make, as GrownArray leaves. params: arrays, or checkpoint.LazyArray.

    Raises:
      UserError: params are not what plan.src_cfg describes.
    """
    require_plan(plan, "lazy: plan")
    leaves = flatten(params)
    check_tree(leaves, plan.src_spec)
    return unflatten({name: GrownArray(plan, name, leaves[plan.sources[name]]) for name in plan.dst_spec})


def _chunkwise(array: Leaf) -> kernel.Source:
    """An array that can be sliced, as a source of chunks; those at the edge are filled up with zeros."""
    chunks = _chunks(array.shape, np.dtype(array.dtype).itemsize)

    @contextlib.contextmanager
    def chunk(index: tuple[int, ...]) -> Iterator[np.ndarray]:
        bounds = [(i * n, min((i + 1) * n, size)) for i, n, size in zip(index, chunks, array.shape, strict=True)]
        part = np.asarray(array[tuple(slice(*b) for b in bounds)])
        short = [(0, n - size) for n, size in zip(chunks, part.shape, strict=True)]
        yield np.pad(part, short) if any(map(any, short)) else part

    return kernel.Source(chunks, chunk)


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of the first of the tiles of about BLOCK_BYTES that cover a leaf."""
    return tuple(part.stop for part in next(tiles(shape, itemsize, BLOCK_BYTES)))
