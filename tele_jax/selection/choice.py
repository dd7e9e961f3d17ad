"""The choice: quotas of categories, clusters, and the samples within them.

Sources: k-means over features with a share for each cluster, arXiv 2409.11378; farthest-first traversal, Gonzalez 1985
(k_centre). Random choices order the samples by a hash of the seed and their numbers: a sample has the same place in
every run with this seed, whatever else is dropped.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tele_jax.clean import hashing
from tele_jax.errors import UserError, nearest
from tele_jax.extras import need
from tele_jax.selection.settings import ClustersConfig, SelectConfig

BLOCK = 8192  # samples whose distances are computed at once


def shuffled(ids: np.ndarray, seed: int) -> np.ndarray:
    """Returns a random number for each sample, uint64[n], by its id, int64[n]."""
    return hashing.mix(hashing.mix(ids.astype(np.uint64)) ^ hashing.mix(np.array([seed + 1], np.uint64)))


def shares(count: int, sizes: Sequence[int], *, equal: bool) -> list[int]:
    """Divides `count` among groups: equally, or in proportion to their sizes; no group gets more than it has.

    Proportions are rounded by the largest remainder; among equal ones the first group comes first.

    >>> shares(10, [2, 30, 30], equal=True), shares(10, [10, 20, 70], equal=False)
    ([2, 4, 4], [1, 2, 7])

    Raises:
      ValueError: `count` is above the sum of the sizes.
    """
    total = sum(sizes)
    if count > total:
        raise ValueError(f"{count} of {total}")
    if not equal:
        found = [count * size // total if total else 0 for size in sizes]
        by_remainder = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total) if total else 0, i))
        for i in by_remainder[: count - sum(found)]:
            found[i] += 1
        return found
    found, left = [0] * len(sizes), count
    by_size = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    for place, i in enumerate(by_size):  # the smallest first: what it lacks, the larger ones share
        found[i] = min(sizes[i], left // (len(sizes) - place))
        left -= found[i]
    for i in range(len(sizes)):  # rounding left fewer than there are groups with room
        room = min(sizes[i] - found[i], left, 1)
        found[i] += room
        left -= room
    assert not left  # a group with room got at least as much as all others with room, less one
    return found


def allot(config: SelectConfig, sizes: Mapping[str, int], known: Sequence[str]) -> dict[str, int]:
    """Returns how many samples of each category are selected.

    Args:
      sizes: samples that are left, by category.
      known: all categories of the pool.

    Raises:
      UserError: a quota for a category that the pool does not have, or above what is left of it; not as many samples
        are left as are to be selected.
    """
    for name, quota in config.quotas.items():
        if name not in known:
            raise UserError(f"quotas.{name}: the pool has no such category; {nearest(name, known, 'it has')}")
        left = sizes.get(name, 0)
        if quota > left:
            raise UserError(f"quotas.{name}={quota:,}: {left:,} samples are left of this category")
    others = [name for name in sorted(sizes) if name not in config.quotas]
    rest, left = config.count - sum(config.quotas.values()), sum(sizes[name] for name in others)
    if rest > left:
        where = " of the categories without a quota" if config.quotas else ""
        raise UserError(f"count={config.count:,}: {rest:,} are to be selected, but {left:,} are left{where}")
    found = shares(rest, [sizes[name] for name in others], equal=config.balance == "equal")
    return dict(sorted({**config.quotas, **dict(zip(others, found, strict=True))}.items()))


def centres(features: np.ndarray, config: ClustersConfig, seed: int) -> np.ndarray:
    """Returns the centres of k-means, float64[min(config.count, n), D], of features [n, D]."""
    cluster = need("sklearn.cluster")
    count = min(config.count, len(np.unique(features, axis=0)))
    with one_thread():
        return cluster.KMeans(count, n_init=1, random_state=seed).fit(features.astype(np.float64)).cluster_centers_


def one_thread():
    """A context in which libraries compute with one thread: sums then have one order, and results the same bits."""
    return need("threadpoolctl").threadpool_limits(1)


def axes(features: np.ndarray) -> np.ndarray:
    """Returns the two directions in which features [n, D] spread most, float64[D, 2]: for a picture."""
    with one_thread():
        _, vectors = np.linalg.eigh(features.T @ features)
    found = vectors[:, :-3:-1] if features.shape[1] > 1 else np.repeat(vectors, 2, axis=1)
    return found * np.sign(found[np.abs(found).argmax(0), np.arange(2)])  # a direction has no sign: choose one


def assign(features: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest centre, int32[n], and the distance to it, float32[n], of features [n, D]."""
    nearest_one, distance = np.zeros(len(features), np.int32), np.zeros(len(features), np.float32)
    with one_thread():
        for start in range(0, len(features), BLOCK):
            part = np.asarray(features[start : start + BLOCK], np.float64)
            squared = (part**2).sum(1)[:, None] - 2 * part @ centres.T + (centres**2).sum(1)
            nearest_one[start : start + BLOCK] = found = squared.argmin(1)
            # Again, without the cancellation of the formula above.
            distance[start : start + BLOCK] = np.sqrt(((part - centres[found]) ** 2).sum(1))
    return nearest_one, distance


def k_centre(features: np.ndarray, first: int, count: int) -> list[int]:
    """Returns `count` rows of features [n, D]: `first`, and then always the row farthest from all before it."""
    rows = np.asarray(features, np.float64)
    chosen, gap = [first], np.full(len(rows), math.inf)
    while len(chosen) < count:
        gap = np.minimum(gap, ((rows - rows[chosen[-1]]) ** 2).sum(1))
        gap[chosen[-1]] = -1.0  # chosen already; of equal rows the first is next
        chosen.append(int(gap.argmax()))
    return chosen


class Candidates:
    """Samples that no stage dropped, as columns of n samples in the order of their numbers.

    Attributes:
      ids: int64[n]. category: str[n]. answer_tokens: int[n].
      cluster, distance: int32[n], float32[n], see `assign`.
      difficulty: float[n], or NaN without a model.
      features: float[n, D].
    """

    def __init__(self, ids, category, answer_tokens, cluster, distance, difficulty, features):
        self.ids, self.category, self.answer_tokens = ids, category, answer_tokens
        self.cluster, self.distance, self.difficulty, self.features = cluster, distance, difficulty, features


def choose(config: SelectConfig, left: Candidates, known: Sequence[str]) -> np.ndarray:
    """Returns the rows of `left` that are selected, in order; raises UserError as `allot`."""
    order = shuffled(left.ids, config.seed)
    names, counts = np.unique(left.category, return_counts=True)
    sizes = {str(name): int(count) for name, count in zip(names, counts, strict=True)}
    if config.method in ("random", "longest") and not config.quotas:
        wanted: dict[str | None, int] = {None: config.count}
        allot(config, sizes, known)  # for its messages
    else:
        wanted = {name: number for name, number in allot(config, sizes, known).items() if number}
    chosen: list[np.ndarray] = []
    for name, number in wanted.items():
        rows = np.arange(len(left.ids)) if name is None else np.flatnonzero(left.category == name)
        if config.method == "clusters":
            chosen.append(_by_clusters(config, left, rows, order, number))
        elif config.method == "longest":
            chosen.append(rows[np.lexsort((left.ids[rows], -left.answer_tokens[rows]))[:number]])
        else:
            chosen.append(rows[np.argsort(order[rows], kind="stable")[:number]])
    return np.sort(np.concatenate(chosen))


def _by_clusters(config: SelectConfig, left: Candidates, rows: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Chooses `count` of the rows of a category: a share from each cluster, by the config's `within`."""
    names, sizes = np.unique(left.cluster[rows], return_counts=True)
    parts = shares(count, sizes.tolist(), equal=config.clusters.balance == "equal")
    chosen = []
    for name, number in zip(names, parts, strict=True):
        if not number:
            continue
        members = rows[left.cluster[rows] == name]
        nearest_first = np.lexsort((left.ids[members], left.distance[members]))
        if config.clusters.within == "k_centre":
            picked = k_centre(left.features[members], int(nearest_first[0]), number)
        elif config.clusters.within == "nearest":
            picked = nearest_first[:number]
        elif config.clusters.within == "hardest":  # highest difficulty among those left
            picked = np.lexsort((left.ids[members], -left.difficulty[members]))[:number]
        else:
            picked = np.argsort(order[members], kind="stable")[:number]
        chosen.append(members[picked])
    return np.concatenate(chosen)
