"""Rows sorted by expert, one matmul for each group of them: active FLOPs, nothing dropped."""

from jaxtyping import Array, Float

from moejax.experts.activations import activate
from moejax.experts.layout import DispatchLayout
from pallas_kernels import combine_rows, dispatch_rows, grouped_matmul


def dropless_mlp(
    x_td: Float[Array, "t d"],
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e f d"],
    layout: DispatchLayout,
    gates: Float[Array, "t k"],
    activation: str,
    backend: str = "auto",
) -> Float[Array, "t d"]:
    """The MLP on rows in the order of ``layout``."""
    rows = dispatch_rows(x_td, layout.token, layout.row)
    h_rf = grouped_matmul(rows, wi_edf, layout.group_sizes, backend=backend)
    hidden_rf = activate(h_rf, activation)
    y_rd = grouped_matmul(hidden_rf, wo_efd, layout.group_sizes, backend=backend)
    return combine_rows(y_rd, layout.token, layout.row, gates)
