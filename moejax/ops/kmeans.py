"""k-means (Lloyd 1982, k-means++ seeding) in numpy: the baseline of learned codes."""

import numpy as np
from jaxtyping import Float, Int

# Rows compared with all centres at once: bounds the memory of one block.
_BLOCK = 8192
_SEED_POINTS = 16_384


def nearest(
    points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "k d"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(index of the nearest centre, squared distance to it) of each point."""
    index = np.empty(len(points), np.int64)
    distance = np.empty(len(points), points.dtype)
    centre_norms = np.square(centres).sum(axis=1)
    for start in range(0, len(points), _BLOCK):
        block = points[start : start + _BLOCK]
        scores = centre_norms - 2 * block @ centres.T
        index[start : start + _BLOCK] = best = scores.argmin(axis=1)
        chosen = scores[np.arange(len(block)), best]
        distance[start : start + _BLOCK] = chosen + np.square(block).sum(axis=1)
    return index, np.maximum(distance, 0)


def fit_kmeans(
    points: Float[np.ndarray, "n d"], k: int, *, steps: int = 25, seed: int = 0
) -> Float[np.ndarray, "k d"]:
    """Centres after ``steps`` rounds of Lloyd's algorithm from a k-means++ start.

    Equal points are merged and weighted, which changes nothing but the time. A centre that loses
    all its points moves to the point that is farthest from its own. If there are fewer than ``k``
    different points, each is a centre, and the last one is repeated.
    """
    points, weights = np.unique(np.asarray(points, np.float32), axis=0, return_counts=True)
    if len(points) <= k:
        return np.pad(points, ((0, k - len(points)), (0, 0)), mode="edge")
    rng = np.random.default_rng(seed)
    # Seeding visits every point once for each centre; a sample of them starts Lloyd as well.
    count = min(len(points), max(_SEED_POINTS, 8 * k))
    sample = rng.choice(len(points), count, replace=False, p=weights / weights.sum())
    centres = _plus_plus(points[sample], weights[sample], k, rng)
    for _ in range(steps):
        index, distance = nearest(points, centres)
        order = np.argsort(index, kind="stable")
        used, starts = np.unique(index[order], return_index=True)
        totals = np.add.reduceat(weights[order].astype(np.float64), starts)
        sums = np.add.reduceat(points[order] * weights[order, None], starts, axis=0)
        centres[used] = sums / totals[:, None]
        empty = np.setdiff1d(np.arange(k), used)
        centres[empty] = points[np.argsort(-distance * weights)[: len(empty)]]
    return centres


def _plus_plus(points, weights, k: int, rng: np.random.Generator):
    """Each next centre is drawn with probability proportional to its squared distance."""
    norms = np.square(points).sum(axis=1)
    centres = np.empty((k, points.shape[1]), np.float32)
    centres[0] = points[rng.choice(len(points), p=weights / weights.sum())]
    distance = np.square(points - centres[0]).sum(axis=1)
    for i in range(1, k):
        mass = np.cumsum(distance * weights, dtype=np.float64)
        drawn = min(np.searchsorted(mass, rng.random() * mass[-1], "right"), len(points) - 1)
        centres[i] = points[drawn]
        to_new = norms - 2 * points @ centres[i] + norms[drawn]
        distance = np.minimum(distance, np.maximum(to_new, 0))
    return centres
