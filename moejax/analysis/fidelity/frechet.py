"""The Frechet distance of two sets of features, as if both were Gaussian. Pure numpy, float64."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The Gaussian of a set of features.

    Attributes:
      mean_d: its mean.
      factor_rd: a matrix F with ``F^T F`` the covariance, of no more rows than n and d have.
    """

    mean_d: Float[np.ndarray, " d"]
    factor_rd: Float[np.ndarray, "r d"]

    @classmethod
    def of(cls, x_nd: Float[np.ndarray, "n d"]) -> "Gaussian":
        """The covariance is over n - 1."""
        x_nd = np.asarray(x_nd, np.float64)
        mean = x_nd.mean(axis=0)
        factor = (x_nd - mean) / np.sqrt(len(x_nd) - 1)
        if len(x_nd) > x_nd.shape[1]:
            factor = np.asarray(np.linalg.qr(factor, mode="r"))
        return cls(mean, factor)


def frechet_distance(x: Gaussian, y: Gaussian) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, never negative.

    The Frechet (2-Wasserstein) distance, squared, of two Gaussians (Dowson & Landau 1982), which
    arXiv:1706.08500 takes for pictures. With ``S1 = F^T F`` and ``S2 = G^T G`` the eigenvalues of
    S1 S2 are those of ``(F G^T)(F G^T)^T``, so that the trace of the root is the sum of the
    singular values of ``F G^T``. No root of a matrix is taken, nor a product that is not symmetric,
    of which rounding makes complex numbers where there are fewer pictures than features.
    """
    overlap = np.linalg.svd(x.factor_rd @ y.factor_rd.T, compute_uv=False).sum()
    traces = np.square(x.factor_rd).sum() + np.square(y.factor_rd).sum()
    shift = np.square(x.mean_d - y.mean_d).sum()
    return float(max(shift + traces - 2 * overlap, 0))
