"""Rows sorted by expert, each expert on its own rows: active FLOPs, nothing dropped."""

from jaxtyping import Array, Float

from moejax.experts.activations import activation_named
from moejax.experts.layout import DispatchLayout
from pallas_kernels import grouped_mlp


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
    return grouped_mlp(
        x_td,
        wi_edf,
        wo_efd,
        layout.token,
        layout.row,
        layout.group_sizes,
        gates,
        activation=activation_named(activation),
        backend=backend,
    )
