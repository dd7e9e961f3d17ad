"""The choice of the layers that are copied when a model gets deeper; each copy stands right after its source."""

import itertools
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from tele_jax.axes import PyTree, check_tree, flatten
from tele_jax.config import ModelConfig, finite, given, require, require_config, whole
from tele_jax.errors import UserError
from tele_jax.growth.verify import parts
from tele_jax.model import decoder
from tele_jax.model.spec import flat_spec
from tele_jax.sharding import to_host

METRICS = ("cosine", "relative_l2", "angular")


def choose(how: str | Sequence[int], src_layers: int, dst_layers: int, scores: Sequence[float] | None) -> list[int]:
    """Chooses the id of the source layer for every destination layer, in order.

    Args:
      how: "uniform" spreads the copies evenly; "last" and "middle" take the layers at that place; "distance" takes the
        layers that change their input least, by `scores`, and leaves out the first and the last of three or
        more; or the ids themselves, where a repeated id is a copy.

    Raises:
      UserError: an unknown name, ids that lose or reorder a source layer, "distance" without scores.
    """
    if scores is not None:
        listed = isinstance(scores, Iterable) and not isinstance(scores, str)
        require(listed, f"scores={scores!r}: not a list of numbers")
        scores = [finite(score, f"scores[{n}]") for n, score in enumerate(scores)]
    if not isinstance(how, str):
        require(isinstance(how, Iterable), f"layers={how!r}: neither a name nor a list of ids")
        ids = [whole(i, f"layers[{n}]") for n, i in enumerate(how)]
        require(len(ids) == dst_layers, f"layers: {len(ids)} ids given for {dst_layers} destination layers")
        require(
            list(dict.fromkeys(ids)) == list(range(src_layers)),
            f"layers: {ids} has to name each of the {src_layers} source layers, first occurrences in order",
        )
        return ids
    extra, every = dst_layers - src_layers, range(src_layers)
    if how == "uniform":
        copied = [i for i in every for _ in range((i + 1) * extra // src_layers - i * extra // src_layers)]
    elif how == "last":
        copied = _cycle(every[::-1], extra)
    elif how == "middle":
        centre = (src_layers - 1) / 2
        copied = _cycle(sorted(every, key=lambda i: (abs(i - centre), i)), extra)
    elif how == "distance":
        scores = given(scores, 'layers="distance" needs scores, one per source layer; see growth.layers.distances')
        require(len(scores) == src_layers, f"layers: {len(scores)} scores given for {src_layers} source layers")
        inner = every[1:-1] if src_layers > 2 else every
        copied = _cycle(sorted(inner, key=lambda i, s=scores: (s[i], i)), extra)
    else:
        raise UserError(f"layers: {how!r} is not one of uniform, last, middle, distance, or a list of ids")
    return sorted([*every, *copied])


def _cycle(order: Sequence[int], number: int) -> list[int]:
    return list(itertools.islice(itertools.cycle(order), number))


def distances(cfg: ModelConfig, params: PyTree, tokens: jax.Array | np.ndarray, metric: str = "cosine") -> list[float]:
    """Measures how much each layer changes its input, averaged over calibration tokens int32[B, S]: a float per layer.

    Args:
      params: a tree of arrays, or of checkpoint.LazyArray, which is read layer by layer.
      metric: "cosine", 1 - cos(in, out); "angular", arccos(cos)/pi; or "relative_l2", |out - in| / |in|. The published
        choice is unknown (arXiv 2407.02783 does not say it); cosine is ours.
    """
    require_config(cfg, "distances: cfg")
    check_tree(flatten(params), flat_spec(cfg), "distances: params are not those of cfg", dtypes=False)
    require(metric in METRICS, f"metric {metric!r} is not one of {', '.join(METRICS)}")
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        states = to_host(jax.jit(decoder.layer_states, static_argnums=0)(cfg, params, np.asarray(tokens)))
    else:  # stored on disk, and perhaps larger than memory: a block of a leaf at a time
        states = parts.states(parts.Side(cfg, flat_spec(cfg), flatten(params)), np.asarray(tokens))
    return [float(np.mean(_changes(*pair, metric))) for pair in itertools.pairwise(states)]


def _changes(before: np.ndarray, after: np.ndarray, metric: str) -> np.ndarray:
    """float64[B, S]: the distance between each token's state before and after a layer."""
    before, after = (np.asarray(x).astype(np.float64) for x in (before, after))
    norm = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    if metric == "relative_l2":
        return norm(after - before) / norm(before)
    cosine = np.sum(before * after, axis=-1) / (norm(before) * norm(after))
    return 1 - cosine if metric == "cosine" else np.arccos(np.clip(cosine, -1, 1)) / np.pi
