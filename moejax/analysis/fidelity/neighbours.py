"""What nearest neighbours tell of two sets of features: quality, diversity, copies.

A ball around each row reaches to its k-th neighbour of its own set; all balls together stand for
where the set lies. Distances are squared throughout, in float64. Pure numpy.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

# Rows whose distances to all others are held at once.
CHUNK = 1024
# A sample is a copy if it is nearer to a training picture than all but so many real pictures.
NEAR = 0.01


def distances(
    x_nd: Float[np.ndarray, "n d"], y_md: Float[np.ndarray, "m d"], *, chunk: int = CHUNK
) -> Iterator[tuple[slice, Float[np.ndarray, "c m"]]]:
    """Yields rows of x and their squared distances to all of y."""
    x, y = np.asarray(x_nd, np.float64), np.asarray(y_md, np.float64)
    norms = np.square(y).sum(axis=1)
    for start in range(0, len(x), chunk):
        rows = slice(start, min(start + chunk, len(x)))
        squares = np.square(x[rows]).sum(axis=1)[:, None] - 2 * x[rows] @ y.T + norms
        yield rows, np.maximum(squares, 0)


def radii(x_nd: Float[np.ndarray, "n d"], k: int, *, chunk: int = CHUNK) -> Float[np.ndarray, " n"]:
    """The squared distance of each row to the k-th nearest of the others (n > k)."""
    found = np.empty(len(x_nd))
    for rows, squares in distances(x_nd, x_nd, chunk=chunk):
        own = np.arange(rows.start, rows.stop)
        squares[np.arange(len(own)), own] = np.inf
        found[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return found


def neighbour_rates(
    samples_nd: Float[np.ndarray, "n d"],
    real_md: Float[np.ndarray, "m d"],
    samples_radii_n: Float[np.ndarray, " n"],
    real_radii_m: Float[np.ndarray, " m"],
    k: int,
    *,
    chunk: int = CHUNK,
) -> dict[str, float]:
    """Quality and diversity of samples beside real pictures, by the balls (:func:`radii`) of both.

    Returns:
      ``precision``: the share of samples inside of any real picture's ball, and ``recall``: of real
      ones inside of any sample's (arXiv:1904.06991). ``density``: how many real balls a sample lies
      in, over k; ``coverage``: the share of real balls with a sample in them (arXiv:2002.09797).
      On the edge of a ball is inside.
    """
    precise, inside, covered = 0, 0, np.zeros(len(real_md), bool)
    recalled = np.zeros(len(real_md), bool)
    for rows, squares in distances(samples_nd, real_md, chunk=chunk):
        in_real = squares <= real_radii_m
        precise += in_real.any(axis=1).sum()
        inside += in_real.sum()
        covered |= in_real.any(axis=0)
        recalled |= (squares <= samples_radii_n[rows, None]).any(axis=0)
    return {
        "precision": float(precise / len(samples_nd)),
        "recall": float(recalled.mean()),
        "density": float(inside / (k * len(samples_nd))),
        "coverage": float(covered.mean()),
    }


def nearest(
    x_nd: Float[np.ndarray, "n d"], y_md: Float[np.ndarray, "m d"], *, chunk: int = CHUNK
) -> Float[np.ndarray, " n"]:
    """The squared distance of each row of x to the nearest of y, which may be very many."""
    found = np.full(len(x_nd), np.inf)
    for start in range(0, len(y_md), chunk):
        for rows, squares in distances(x_nd, y_md[start : start + chunk], chunk=chunk):
            found[rows] = np.minimum(found[rows], squares.min(axis=1))
    return found


def copied(
    samples_n: Float[np.ndarray, " n"], held_out_m: Float[np.ndarray, " m"], near: float = NEAR
) -> float:
    """The share of samples that are nearer to training pictures than nearly all real ones are.

    Args:
      samples_n: the distance of each sample to its nearest training picture.
      held_out_m: the same of real pictures that are in no training set.
      near: the part of the real ones that may be as near: what is expected without copies.
    """
    return float((samples_n < np.quantile(held_out_m, near)).mean())


def nearer(samples_n: Float[np.ndarray, " n"], held_out_m: Float[np.ndarray, " m"]) -> float:
    """How often a sample is nearer to training pictures than a real one is, over all pairs of both.

    1/2 is expected without copies; of equal distances each half counts (the Mann-Whitney U of
    arXiv:2004.05675, there cell by cell).
    """
    ordered = np.sort(held_out_m)
    farther = len(ordered) - np.searchsorted(ordered, samples_n, "right")
    equal = np.searchsorted(ordered, samples_n, "right") - np.searchsorted(ordered, samples_n)
    return float((farther + equal / 2).mean() / len(ordered))
