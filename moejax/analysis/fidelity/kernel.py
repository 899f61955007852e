"""The kernel distance of two sets of features: the squared MMD of a cubic kernel, unbiased."""

import numpy as np
from jaxtyping import Float

BLOCKS = 10


def kernel_distance(
    x_nd: Float[np.ndarray, "n d"], y_md: Float[np.ndarray, "m d"], *, blocks: int = BLOCKS
) -> tuple[float, float]:
    """The mean over ``blocks`` disjoint parts of both sets, and its standard error.

    That of arXiv:1801.01401 (KID), there in Inception's features: the maximum mean discrepancy of
    the kernel ``(x y / d + 1)^3``, squared. Of each part it is the unbiased estimate, so that two
    sets of one distribution have a mean of 0, whatever their size, and may have a negative value.
    Rows are taken in their order, which must be random. Each part needs two rows.
    """
    parts = zip(
        np.array_split(np.asarray(x_nd, np.float64), blocks),
        np.array_split(np.asarray(y_md, np.float64), blocks),
        strict=True,
    )
    found = np.asarray([_unbiased(x, y) for x, y in parts])
    error = found.std(ddof=1) / np.sqrt(blocks) if blocks > 1 else np.nan
    return float(found.mean()), float(error)


def _unbiased(x_nd: np.ndarray, y_md: np.ndarray) -> float:
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values, n = kernel(x, x), len(x)
        return (values.sum() - np.trace(values)) / (n * (n - 1))

    return within(x_nd) + within(y_md) - 2 * kernel(x_nd, y_md).mean()
