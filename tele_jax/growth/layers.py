"""Which layers are copied when a model gets deeper, and where the copies go: each right after its source."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from tele_jax.axes import flatten
from tele_jax.config import ModelConfig, finite, require, whole
from tele_jax.errors import UserError
from tele_jax.growth.verify import parts
from tele_jax.model import decoder
from tele_jax.model.spec import flat_spec
from tele_jax.sharding import to_host

METRICS = ("cosine", "relative_l2", "angular")


def choose(how: str | Sequence[int], src_layers: int, dst_layers: int, scores: Sequence[float] | None) -> list[int]:
    """For every destination layer the id of its source layer, in order.

    Args:
      how: "uniform" spreads the copies evenly; "last" and "middle" take the layers at that place; "distance" takes the
        layers that change their input least, by `scores`, and leaves out the first and the last of three or
        more; or the ids themselves, where a repeated id is a copy.

    Raises:
      UserError: an unknown name, ids that lose or reorder a source layer, "distance" without scores.
    """
    extra = dst_layers - src_layers
    if scores is not None:
        listed = isinstance(scores, Iterable) and not isinstance(scores, str)
        require(listed, f"scores={scores!r}: not a list of numbers")
        scores = [finite(score, f"scores[{n}]") for n, score in enumerate(scores)]
    if not isinstance(how, str):
        require(isinstance(how, Iterable), f"layers={how!r}: neither a name nor a list of ids")
        ids = [whole(i, f"layers[{n}]") for n, i in enumerate(how)]
        require(len(ids) == dst_layers, f"layers: {len(ids)} ids given for {dst_layers} destination layers")
        first = list(dict.fromkeys(ids))
        require(
            first == list(range(src_layers)),
            f"layers: {ids} has to name each of the {src_layers} source layers, first occurrences in order",
        )
        return ids
    if how == "uniform":
        copies = [(i + 1) * extra // src_layers - i * extra // src_layers for i in range(src_layers)]
    elif how == "last":
        copies = _cycle(list(range(src_layers))[::-1], extra, src_layers)
    elif how == "middle":
        centre = (src_layers - 1) / 2
        copies = _cycle(sorted(range(src_layers), key=lambda i: (abs(i - centre), i)), extra, src_layers)
    elif how == "distance":
        require(scores is not None, 'layers="distance" needs scores, one per source layer; see growth.layers.distances')
        require(len(scores) == src_layers, f"layers: {len(scores)} scores given for {src_layers} source layers")
        inner = range(1, src_layers - 1) if src_layers > 2 else range(src_layers)
        copies = _cycle(sorted(inner, key=lambda i: (scores[i], i)), extra, src_layers)
    else:
        raise UserError(f"layers: {how!r} is not one of uniform, last, middle, distance, or a list of ids")
    return [i for i in range(src_layers) for _ in range(1 + copies[i])]


def _cycle(order: Sequence[int], extra: int, src_layers: int) -> list[int]:
    copies = [0] * src_layers
    for n in range(extra):
        copies[order[n % len(order)]] += 1
    return copies


def distances(cfg: ModelConfig, params: Any, tokens: jax.Array, metric: str = "cosine") -> list[float]:
    """How much each layer changes its input, averaged over calibration tokens int32[B, S]: one float per layer.

    params: a tree of arrays, or of checkpoint.LazyArray, which is read layer by layer.

    cosine: 1 - cos(in, out); angular: arccos(cos)/pi; relative_l2: |out - in| / |in|. The published choice of metric
    is unknown (arXiv 2407.02783 does not say it); cosine is ours.
    """
    if metric not in METRICS:
        raise UserError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        return [
            float(np.mean(_changes(*pair, metric)))
            for pair in itertools.pairwise(
                to_host(jax.jit(decoder.layer_states, static_argnums=0)(cfg, params, np.asarray(tokens)))
            )
        ]
    # Stored on disk, and perhaps larger than memory: a block of a leaf at a time.
    states = parts.states(parts.Side(cfg, flat_spec(cfg), flatten(params)), np.asarray(tokens))
    return [float(np.mean(_changes(*pair, metric))) for pair in itertools.pairwise(states)]


def _changes(before: Any, after: Any, metric: str) -> np.ndarray:
    """float64[B, S]: how much a layer changes each token's state."""
    before, after = (np.asarray(x).astype(np.float64) for x in (before, after))
    norm = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    if metric == "relative_l2":
        return norm(after - before) / norm(before)
    cosine = np.sum(before * after, axis=-1) / (norm(before) * norm(after))
    return 1 - cosine if metric == "cosine" else np.arccos(np.clip(cosine, -1, 1)) / np.pi
