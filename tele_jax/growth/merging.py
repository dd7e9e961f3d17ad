"""Merging: one parameter tree of several of one architecture, in memory (`merge`) or on disk (merge_stored.py).

    surgery.merge(cfg, [a, b, c], weights=(2, 1, 1))                             weighted mean
    surgery.merge(cfg, [a, b], "slerp", t=0.3)                                   along the arc (Shoemake 1985)
    surgery.merge(cfg, [a, b], "task_arithmetic", base=base, scale=0.4)          arXiv 2212.04089
    surgery.merge(cfg, [a, b], "ties", base=base, density=0.2)                   arXiv 2306.01708
    surgery.merge(cfg, [a, b], "passthrough", slices=[(0, 0, 3), (1, 1, 4)])     layers 0 to 2 of a, then 1 to 3 of b

A tensor, here, is one index of the stacked axes of a leaf (the kernel of one layer) or a leaf without such axes. All is
computed in float64 and rounded once to the dtype of the leaf. Sums over a tensor are added up in blocks of one size, so
that the bits depend neither on chunks of files nor on threads.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NoReturn, get_args

import jax.numpy as jnp
import numpy as np

from tele_jax.axes import Leaf, Params, ParamSpec, check_tree, flatten, require_arrays, unflatten
from tele_jax.config import ModelConfig, checked, differing_fields, finite, require, require_config
from tele_jax.errors import UserError
from tele_jax.model.spec import flat_spec
from tele_jax.sharding import tiles

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "passthrough"]
# Fields of a recipe, beside its method, that each method reads.
_USES = {"linear": ("weights",), "slerp": ("t", "scope"), "task_arithmetic": ("weights", "scale")}
_USES |= {"ties": ("weights", "density", "scale", "scope"), "passthrough": ("slices",)}

_STRAIGHT = 1 - 1e-12  # cosine from which slerp is linear: factors of the arc differ from those of the line by 1e-12
_BLOCK, _COUNTED = 2**20, 2**22  # bytes in float64 that are computed, or summed, at once
_SORTED = 2**22  # entries of a tensor whose magnitudes are held at once, at most: twice 16 MiB, within SCRATCH_BYTES
SCRATCH_BYTES = 12 * _COUNTED

Read = Callable[[str, tuple[int, ...], tuple[slice, ...]], np.ndarray]  # read(leaf, stacked index, part) -> float64
Tensor = tuple[str, tuple[int, ...]]  # a leaf, and the index along its stacked axes


@checked
class Recipe:
    """The rule by which models become one; fields that the method does not use must keep their defaults."""

    method: Method = "linear"
    weights: tuple[float, ...] | None = None  # one per model; linear divides them by their sum; None: 1 each
    t: float | None = None  # slerp: 0 is the first model, 1 the second
    density: float = 0.2  # ties: the share of each task vector that is kept; the paper's top 20%
    scale: float = 1.0  # factor on the merged task vector; lambda in both papers
    # What slerp measures one angle of, and ties one threshold per task vector: each tensor apart (as mergekit does), or
    # the whole model (as the paper on TIES does).
    scope: Literal["tensor", "model"] = "tensor"
    slices: tuple[tuple[int, ...], ...] = ()  # passthrough: (model, first layer, layer after the last), in order

    def __post_init__(self):
        for field in dataclasses.fields(self)[1:]:
            used, value = field.name in _USES[self.method], getattr(self, field.name)
            require(used or value == field.default, f"{field.name}: method {self.method} does not use it; leave it out")
        for name in ("t", "scale", "density"):
            require(getattr(self, name) is None or math.isfinite(getattr(self, name)), f"{name} must be finite")
        require(0 < self.density <= 1, f"density={self.density} is a share, above 0 and at most 1")
        require(self.method != "slerp" or self.t is not None, "slerp needs t: 0 is the first model, 1 the second")
        require(self.t is None or 0 <= self.t <= 1, f"t={self.t} must be in [0, 1]: 0 is the first model, 1 the second")
        for weight in self.weights or ():
            finite(weight, "weights")
            require(self.method != "ties" or weight > 0, f"weights: {weight:g}; those of ties must be above 0")
        size = sum(map(abs, self.weights or (1.0,)))
        require(math.isfinite(size), "weights: their sum is not finite")
        about_zero = self.method == "linear" and abs(sum(self.weights or (1.0,))) <= 1e-6 * size
        require(not about_zero, "weights: their sum is 0, or next to it; linear divides by it")
        require(self.method != "passthrough" or len(self.slices) > 0, "passthrough needs slices: which layers of which")
        for part in self.slices:
            fits = len(part) == 3 and min(part) >= 0 and part[1] < part[2]
            require(fits, f"slices: {part} is not (model, first layer, layer after the last)")

    @property
    def needs_base(self) -> bool:
        return "scale" in _USES[self.method]

    def sources(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        """(model, layer) of each layer of the result; layers: the number of layers of each model.

        Raises:
          UserError: the number of models does not fit; a slice of a model or of layers that are not there.
        """
        models = len(layers)
        require(models >= (1 if self.slices else 2), "merge needs two models or more")
        require(self.method != "slerp" or models == 2, f"slerp merges two models, not {models}")
        weights = self.weights
        require(weights is None or len(weights) == models, f"weights: {len(weights or ())} for {models} models")
        require(self.method == "passthrough" or len({*layers}) == 1, f"models have {layers} layers; see passthrough")
        for model, first, end in self.slices:
            require(model < models, f"slices: no model {model}; there are {models}, from 0")
            require(end <= layers[model], f"slices: layers {first} to {end - 1} of model {model}, of {layers[model]}")
        parts = [[(model, layer) for layer in range(first, end)] for model, first, end in self.slices]
        return [*itertools.chain(*parts)] or [(0, layer) for layer in range(layers[0])]


def merge(
    cfg: ModelConfig | Sequence[ModelConfig],
    trees: Sequence[Params],
    method: Method = "linear",
    *,
    base: Params | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Merges parameter trees into one of numpy arrays; a pure function.

    Args:
      cfg: the config of the models, or one for each where passthrough takes layers of models of several depths.
      trees: two or more (passthrough: one or more), nested dicts of arrays as spec(cfg) describes them, of one dtype.
      base: the model that those of task_arithmetic and ties were fine-tuned from.
      how: weights, t, density, scale, scope, slices: see `Recipe`.

    The result has the dtypes of the trees. After passthrough it has as many layers as the slices together; the
    table, with its norm, is that of the first slice's model, the last norm and the head are those of the last slice's.

    >>> cfg = ModelConfig(num_layers=1, embed_dim=2, num_heads=1, mlp_dim=2, vocab_size=3)
    >>> trees = [unflatten({n: np.full(s.shape, x) for n, s in flat_spec(cfg).items()}) for x in (1.0, 5.0)]
    >>> merge(cfg, trees, weights=(3, 1))["final_norm"]["scale"]
    array([2., 2.])

    Raises:
      UserError: trees that do not fit the config or each other (names the leaves that differ); settings that the method
        does not use, or that do not fit; a base that is missing, or not asked for.
    """
    recipe, given = Recipe(method=method, **how), [*trees]
    require_base(recipe, base is not None)
    cfgs = [cfg] * len(given) if isinstance(cfg, ModelConfig) else [*cfg]
    require(len(cfgs) == len(given), f"merge: {len(cfgs)} configs for {len(given)} trees")
    for number, one in enumerate(cfgs):
        require_config(one, "merge: cfg")
        same = one.replace(num_layers=cfgs[0].num_layers) if recipe.slices else one
        other = differing_fields(same, cfgs[0])
        require(not other, f"merge: cfg[{number}] differs from cfg[0] in {', '.join(other)}; such models do not fit")
    sources = recipe.sources([one.num_layers for one in cfgs])
    flat = [flatten(tree) for tree in (*given, *([] if base is None else [base]))]
    for number, leaves in enumerate(flat):
        where = f"merge: {f'trees[{number}]' if number < len(given) else 'base'}"
        require_arrays(leaves, where)
        spec = flat_spec(cfgs[number] if number < len(given) else cfgs[0])
        check_tree(leaves, spec, f"{where} does not fit the config", dtypes=False)
        check_dtypes(leaves, flat[0], where)
    arrays = [{name: np.asarray(leaf) for name, leaf in leaves.items()} for leaves in flat]
    like = {name: dataclasses.replace(leaf, dtype=arrays[0][name].dtype) for name, leaf in flat_spec(cfgs[0]).items()}
    merger = Merger(recipe, [_reader(leaves) for leaves in arrays], sources, result_spec(like, len(sources)))
    merged = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in merger.spec.items()}
    for name, index in merger.tensors():
        part = merged[name][index] if index else merged[name]
        merger.fill(part[...], name, index, (0,) * part.ndim)
    return unflatten(merged)


def require_base(recipe: Recipe, there: bool) -> None:
    """Raises UserError for a base that is missing, or that the method does not use."""
    require(there or not recipe.needs_base, f"{recipe.method} needs a base: the model that the others started from")
    require(not there or recipe.needs_base, f"base: method {recipe.method} does not use it; leave it out")


def check_dtypes(leaves: Mapping[str, Leaf], first: Mapping[str, Leaf], where: str) -> None:
    """Raises UserError, naming them, for leaves whose dtype is another than in the first model."""
    wrong = [name for name in first if np.dtype(leaves[name].dtype) != np.dtype(first[name].dtype)]
    kinds = wrong and f"{leaves[wrong[0]].dtype}, and {first[wrong[0]].dtype} in the first model"
    require(not wrong, f"{where}: {wrong and wrong[0]} is {kinds}; convert one of the two first")
    odd = [name for name in first if not jnp.issubdtype(first[name].dtype, jnp.floating)]
    require(not odd, f"{where}: {odd and odd[0]} holds no floating point numbers")


def result_spec(spec: Mapping[str, ParamSpec], layers: int) -> dict[str, ParamSpec]:
    """The leaves of a merged model with so many layers."""
    deep = {name: tuple(layers if a == "layers" else n for a, n in zip(s.axes, s.shape)) for name, s in spec.items()}
    return {name: dataclasses.replace(leaf, shape=deep[name]) for name, leaf in spec.items()}


def _reader(leaves: Mapping[str, np.ndarray]) -> Read:
    return lambda name, index, part: leaves[name][(*index, *part)].astype(np.float64)


class Merger:
    """The computation of merged tensors, from functions that read parts of the models.

    Attributes:
      reads: of the models, then of the base where there is one.
      sources: (model, layer) of each layer of the result, as Recipe.sources makes it.
      spec: the leaves of the result.
      threads: threads that measure angles and thresholds, when this is made.
    """

    def __init__(
        self,
        recipe: Recipe,
        reads: Sequence[Read],
        sources: Sequence[tuple[int, int]],
        spec: Mapping[str, ParamSpec],
        threads: int = 1,
    ):
        self.recipe, self.spec, self._sources = recipe, spec, sources
        self._reads, self._base = (reads[:-1], reads[-1]) if recipe.needs_base else (reads, None)
        weights = recipe.weights or (1.0,) * len(self._reads)
        self._weights = [weight / sum(weights) for weight in weights] if recipe.method == "linear" else [*weights]
        measure = {"slerp": self._arc, "ties": self._thresholds}.get(recipe.method)
        self._measured: dict[Tensor, Any] = {}
        if measure is not None:
            tensors = self.tensors()
            groups = [tensors] if recipe.scope == "model" else [[tensor] for tensor in tensors]
            with ThreadPoolExecutor(threads) as pool:
                for group, found in zip(groups, pool.map(measure, groups), strict=True):
                    self._measured |= dict.fromkeys(group, found)

    def tensors(self) -> list[Tensor]:
        """All tensors of the result."""
        stacks = {name: leaf.shape[: len(leaf.stack)] for name, leaf in self.spec.items()}
        return [(name, index) for name, stack in stacks.items() for index in itertools.product(*map(range, stack))]

    def fill(self, out: np.ndarray, name: str, index: tuple[int, ...], start: Sequence[int]) -> None:
        """Computes the rectangle of a tensor that begins at `start`, into `out`."""
        measured = self._measured.get((name, index))
        for part in tiles(out.shape, 8, _BLOCK):
            inside = tuple(slice(p.start + s, p.stop + s) for p, s in zip(part, start, strict=True))
            with np.errstate(over="ignore", invalid="ignore"):
                out[part] = self._merged(name, index, inside, measured)
            if self.recipe.method != "passthrough" and not np.isfinite(out[part]).all():
                self._refuse(out.dtype, name, index, inside)

    def _refuse(self, dtype: np.dtype, name: str, index: tuple[int, ...], part: tuple[slice, ...]) -> NoReturn:
        """Says why merged values are not finite: those of a model are not, or the sum is too large for the dtype."""
        for number, read in enumerate([*self._reads, *filter(None, [self._base])]):
            model = f"model {number}" if number < len(self._reads) else "the base"
            known = bool(np.isfinite(read(name, index, part)).all())
            require(known, f"{name}{list(index) or ''}: {model} (counted from 0) holds values that are not finite")
        advice = "; choose weights of one sign" if self.recipe.method == "linear" else "; choose a smaller scale"
        raise UserError(f"{name}{list(index) or ''}: merged values are too large for {dtype}{advice}")

    def _merged(self, name: str, index: tuple[int, ...], part: tuple[slice, ...], measured: Any) -> np.ndarray:
        if self.recipe.method == "passthrough":
            if index:
                model, layer = self._sources[index[0]]
                return self._reads[model](name, (layer,), part)
            enters = (
                "embed" in self.spec[name].outputs
            )  # the table and its norm; the last norm and the head follow layers
            return self._reads[self._sources[0 if enters else -1][0]](name, (), part)
        if self._base is None:
            weights = self._weights if self.recipe.method == "linear" else measured
            return _sum((weight, read(name, index, part)) for weight, read in zip(weights, self._reads) if weight)
        base = self._base(name, index, part)
        tasks = [read(name, index, part) - base for read in self._reads]  # the task vectors
        if self.recipe.method == "ties":
            return base + self.recipe.scale * self._agreed(tasks, measured)
        return base + self.recipe.scale * _sum((w, task) for w, task in zip(self._weights, tasks))

    def _agreed(self, tasks: list[np.ndarray], thresholds: Sequence[np.float32]) -> np.ndarray:
        """The mean of trimmed task vectors over those of the elected sign (arXiv 2306.01708, algorithm 1)."""
        kept = [np.where(_magnitude(task) < least, 0, task) for task, least in zip(tasks, thresholds)]  # keeps NaN
        elected = np.sign(_sum(zip(self._weights, kept)))
        total, weight = np.zeros_like(tasks[0]), np.zeros_like(tasks[0])
        for w, task in zip(self._weights, kept):
            agrees = (np.sign(task) == elected) & (elected != 0)
            total += np.where(agrees, w * task, 0)
            weight += np.where(agrees, w, 0)
        return np.divide(total, weight, out=0 * elected, where=weight != 0)

    def _blocks(self, group: Sequence[Tensor], *reads: Read):
        for name, index in group:
            leaf = self.spec[name]
            for part in tiles(leaf.shape[len(leaf.stack) :], 8, _COUNTED):
                yield [read(name, index, part) for read in reads]

    def _arc(self, group: Sequence[Tensor]) -> tuple[float, float]:
        """The factors of slerp on both models: sin((1 - t) w) / sin(w) and sin(t w) / sin(w), w the angle between."""
        t, dot, first, second = float(self.recipe.t or 0), 0.0, 0.0, 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for a, b in self._blocks(group, *self._reads):
                dot, first = dot + float((a * b).sum()), first + float((a * a).sum())
                second += float((b * b).sum())
        norm = math.sqrt(first) * math.sqrt(second)
        cosine = dot / norm if norm else 1.0
        name = f"slerp: {group[0][0]}{[*group[0][1]] or ''}"
        require(math.isfinite(cosine), f"{name}: values or their squares are not finite, so that there is no angle")
        if cosine > _STRAIGHT or t in (0, 1):
            return 1 - t, t
        opposite = f"{name} points in opposite directions in both models, and no arc leads from one to the"
        require(cosine > -_STRAIGHT, f"{opposite} other; merge them with linear")
        angle = math.acos(cosine)
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    def _thresholds(self, group: Sequence[Tensor]) -> list[np.float32]:
        """The magnitude from which each task vector is kept; entries that are equal to it are kept all."""
        return [self._threshold(group, read) for read in self._reads]

    def _threshold(self, group: Sequence[Tensor], read: Read) -> np.float32:
        """The k-th largest magnitude, found by counting the upper, then the lower 16 bits of float32."""
        size = sum(math.prod(self.spec[name].shape[len(self.spec[name].stack) :]) for name, _ in group)
        left, prefix = max(1, int(self.recipe.density * size)), np.uint32(0)
        if left >= size:
            return np.float32(0)
        assert self._base is not None  # ties has one
        if size <= _SORTED:
            blocks = self._blocks(group, read, self._base)
            magnitudes = np.concatenate([_magnitude(values, base).ravel() for values, base in blocks])
            magnitudes.partition(size - left)
            return magnitudes[size - left]
        for shift in (16, 0):
            counts = np.zeros(2**16, np.int64)
            for values, base in self._blocks(group, read, self._base):
                bits = _magnitude(values, base).view(np.uint32).ravel()
                bits = bits if shift else bits[bits >> 16 == prefix >> 16]
                counts += np.bincount((bits >> shift) & 0xFFFF, minlength=2**16)
            above = np.cumsum(counts[::-1])
            place = int(np.searchsorted(above, left))  # counted from the largest
            left -= int(above[place - 1]) if place else 0
            prefix |= np.uint32(2**16 - 1 - place) << np.uint32(shift)
        return np.uint32(prefix).view(np.float32)


def _magnitude(values: np.ndarray, base: np.ndarray | float = 0.0) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.abs(values - base).astype(np.float32)


def _sum(terms: Any) -> np.ndarray:
    """The sum of weight * values over the terms (weight, values), in their order."""
    total = None
    for weight, values in terms:
        values = values * weight
        total = values if total is None else total + values
    assert total is not None  # weights are not all 0, or there is a base
    return total


METHODS = get_args(Method)
