"""Axis names, which every parameter carries, and the facts that follow from them alone.

A parameter is declared once, in its Flax module, as `declare(self, "q", inputs=("embed",), outputs=("heads",
"head_dim"))`. Its shape, initial value, sharding, growth, muP group and tensor mapping are all read off those names.

    stack     leading axes over which the parameter is repeated: ("layers",) or ()
    inputs    axes that the operation sums over, looks up in, or (a norm scale) reads elementwise
    outputs   axes that the operation produces; equal to inputs where it is elementwise and writes the axes it reads
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from tele_jax.config import ModelConfig, check_fields, from_dict, require
from tele_jax.errors import UserError, abridged

# Axes that grow with the width of the model in muP's sense; the others stay finite.
WIDTH_AXES = frozenset({"embed", "heads", "kv_heads", "mlp"})

Params = Mapping[str, Any]  # nested by name, with a Leaf at the end of every path
Leaf = Any  # an array, in memory or stored (checkpoint.LazyArray), or what stands for one
Leaves = Mapping[str, Leaf]  # {dotted name: leaf}
PyTree = Any  # what jax.tree takes apart, such as an optimizer state

Role = Literal["kernel", "table", "bias", "scale"]


@check_fields
@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter without its values: shape, dtype and named axes."""

    shape: tuple[int, ...]
    dtype: Any
    stack: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """One name per dimension: stack, inputs, outputs (once, where inputs and outputs are equal)."""
        return self.stack + _dimensions(self.inputs, self.outputs)

    @property
    def role(self) -> Role:
        """The parameter's use: scale (elementwise on its inputs), bias (added), table (looked up) or kernel."""
        return role(self.inputs, self.outputs)

    @property
    def is_matrix_like(self) -> bool:
        """True where both the inputs and the outputs grow with width (muP)."""
        return is_matrix_like(self.inputs, self.outputs)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        names = {"stack": list(self.stack), "inputs": list(self.inputs), "outputs": list(self.outputs)}
        return {"shape": list(self.shape), "dtype": jnp.dtype(self.dtype).name, **names}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "ParamSpec":
        """The inverse of to_json. Raises UserError for values that to_json does not make."""
        fields = from_dict(_SpecFields, values, "leaf")
        try:
            dtype = jnp.dtype(fields.dtype)
        except (TypeError, ValueError):  # half a surrogate pair
            raise UserError(f"leaf.dtype: {fields.dtype!r} is no dtype") from None
        spec = cls(fields.shape, dtype, fields.stack, fields.inputs, fields.outputs)
        require(min(spec.shape, default=0) >= 0, f"leaf.shape: {list(spec.shape)} has a size below 0")
        fits = not spec.axes or len(spec.axes) == len(spec.shape)
        require(fits, f"leaf.shape: {list(spec.shape)} does not have the axes {', '.join(spec.axes)}")
        return spec


@dataclasses.dataclass(frozen=True)
class _SpecFields:
    """A ParamSpec as JSON."""

    shape: tuple[int, ...]
    dtype: str
    stack: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def role(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Role:
    if not inputs:
        return "bias"
    if not outputs or inputs == outputs:
        return "scale"
    return "table" if inputs == ("vocab",) else "kernel"


def is_matrix_like(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> bool:
    elementwise = role(inputs, outputs) in ("scale", "bias")
    return not elementwise and bool(WIDTH_AXES & set(inputs)) and bool(WIDTH_AXES & set(outputs))


def _dimensions(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> tuple[str, ...]:
    return inputs if inputs == outputs else inputs + outputs


class Named(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A value boxed with its axis names, as Flax carries it while a module is initialised."""

    value: Any
    stack: tuple[str, ...] = struct.field(pytree_node=False, default=())
    inputs: tuple[str, ...] = struct.field(pytree_node=False, default=())
    outputs: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: object) -> "Named":
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[object, object]) -> "Named":
        if index != 0:
            raise ValueError(f"parameters are stacked on the leading axis, not on axis {index}")
        return self.replace(stack=(params[nn.PARTITION_NAME], *self.stack))

    def remove_axis(self, index: int, params: Mapping[object, object]) -> "Named":
        del index, params
        return self.replace(stack=self.stack[1:])

    def spec(self, dtype: object) -> ParamSpec:
        return ParamSpec(tuple(self.value.shape), dtype, self.stack, self.inputs, self.outputs)


def declare(module: nn.Module, name: str, *, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> jax.Array:
    """Declares a parameter of a Flax module that has a `cfg: ModelConfig`, by the names of its axes alone."""
    cfg = module.cfg
    shape = tuple(cfg.axis_sizes[axis] for axis in _dimensions(inputs, outputs))

    def init(key: jax.Array) -> Named:
        value = _initial(cfg, key, shape, inputs, outputs)
        return Named(value, inputs=inputs, outputs=outputs)

    return module.param(name, init)  # pyright: ignore[reportReturnType] - Flax takes the value out of its box


def _initial(cfg: ModelConfig, key: jax.Array, shape, inputs, outputs) -> jax.Array:
    dtype = jnp.dtype(cfg.param_dtype)
    if role(inputs, outputs) == "bias":
        return jnp.zeros(shape, dtype)
    if role(inputs, outputs) == "scale":
        return jnp.ones(shape, dtype)
    # Truncated at two standard deviations, as the Tele-FLM report says; 0.87962566 is the std that is left there.
    std = fresh_std(cfg, inputs, outputs) / 0.87962566103423978
    return (jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.promote_types(dtype, jnp.float32)) * std).astype(
        dtype
    )


def fresh_std(cfg: ModelConfig, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> float:
    """Standard deviation of fresh values of a kernel or table: muP divides the variance of matrix-like ones by r."""
    if is_matrix_like(inputs, outputs):
        return cfg.matrix_init_std / math.sqrt(cfg.width_ratio)
    return cfg.init_std


def flatten(tree: Params) -> dict[str, Leaf]:
    """A nested dict as one dict with dotted keys, sorted: {"layers.attn.q": leaf, ...}.

    Raises:
      UserError: the tree is no dict, or has keys that are no names.
    """
    require(isinstance(tree, Mapping), f"expected parameters as a nested dict, got {type(tree).__name__}")
    leaves = traverse_util.flatten_dict(tree)
    for path in leaves:
        require(all(isinstance(key, str) for key in path), f"expected parameters as a nested dict of names, got {path}")
    return {".".join(path): leaves[path] for path in sorted(leaves, key=".".join)}


def unflatten(leaves: Leaves) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep=".")


def check_tree(
    leaves: Leaves, spec: Leaves, what: str = "the parameters do not fit the config", *, dtypes: bool = True
) -> None:
    """Raises UserError naming every leaf whose presence, shape or (with dtypes) dtype is not as in spec."""
    wrong = [f"{name}: not a parameter of this model" for name in sorted(leaves) if name not in spec]
    wrong += [f"{name}: missing" for name in spec if name not in leaves]
    for name in sorted(spec.keys() & leaves.keys()):
        have, want = leaves[name], spec[name]
        if not (hasattr(have, "shape") and hasattr(have, "dtype")) or (dtypes and not is_array(have)):
            wrong.append(f"{name}: {type(have).__name__}, not an array")
        elif tuple(have.shape) != want.shape or (dtypes and np.dtype(have.dtype) != np.dtype(want.dtype)):
            wrong.append(f"{name}: {have.dtype}{list(have.shape)}, expected {np.dtype(want.dtype)}{list(want.shape)}")
    require(not wrong, f"{what}: {abridged(wrong, '; ')}")


def is_array(leaf: Leaf) -> bool:
    """False for a leaf that JAX would take apart: a kernel with its adapter beside it (model/platforms.py)."""
    return leaf is None or jax.tree_util.all_leaves([leaf])


def require_arrays(leaves: Leaves, where: str) -> None:
    """Raises UserError, naming the argument, where leaves are kernels with adapters beside them."""
    wrong = [name for name, leaf in leaves.items() if not is_array(leaf)]
    require(not wrong, f"{where}: {abridged(wrong)}: with adapters beside them; tele.lora.merge makes arrays of them")


def map_param_subtrees(function: Callable[[tuple[str, ...], Params], PyTree], tree: PyTree, spec: Params, other=None):
    """Applies function(path, subtree) to every subtree that has the structure and shapes of the parameters.

    `tree` is any pytree, such as an optax state; `spec` a nested dict of ParamSpec (or of anything with a shape). Other
    leaves are passed on, or through other(path, leaf). path is made of field names and keys, e.g. ("0", "nu"). Where a
    subtree holds only some of the parameters (optax.masked puts an empty node in place of the others, or of a whole
    branch of them), function gets an empty node for each missing one; the result keeps the empty nodes as they were,
    whatever function returns there. A subtree that is whole may become one of another structure.
    """

    def visit(path, node):
        names = tuple(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)
        whole = _whole_tree(node, spec)
        if whole is None:
            return node if other is None else other(names, node)
        made = function(names, whole)
        has_gaps = any(map(is_empty, flatten(whole).values()))
        return _keep_gaps(node, made) if has_gaps else made

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=lambda node: _whole_tree(node, spec) is not None)


def _whole_tree(node: PyTree, spec: Params) -> dict[str, Any] | None:
    """The node, with an empty node for every parameter that it leaves out; None for another kind of tree."""
    if not isinstance(node, Mapping):
        return None
    whole = _fill_in(node, spec)
    return None if whole is _OTHER or all(map(is_empty, flatten(whole).values())) else whole


_OTHER = object()  # marks a node of other structure or shapes than the parameters


def _fill_in(node: PyTree, spec: PyTree) -> PyTree:
    if is_empty(node):
        return jax.tree.map(lambda _: node, spec) if isinstance(spec, Mapping) else node
    if not isinstance(spec, Mapping):
        fits = not isinstance(node, Mapping) and tuple(getattr(node, "shape", (None,))) == tuple(spec.shape)
        return node if fits else _OTHER
    if not isinstance(node, Mapping) or node.keys() != spec.keys():
        return _OTHER
    filled = {key: _fill_in(node[key], spec[key]) for key in node}
    return _OTHER if any(child is _OTHER for child in filled.values()) else filled


def _keep_gaps(node: PyTree, made: PyTree) -> PyTree:
    if is_empty(node):
        return node
    return {key: _keep_gaps(node[key], made[key]) for key in node} if isinstance(node, Mapping) else made


def is_empty(node: PyTree) -> bool:
    """True for a node without arrays in a tree of parameters, such as optax.MaskedNode."""
    return not isinstance(node, Mapping) and not jax.tree.leaves(node)
