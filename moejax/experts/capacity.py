"""At most c rows for each expert: static buffers, batched matmuls; what does not fit is dropped."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.experts.activations import activate
from moejax.experts.layout import DispatchLayout, dispatch_layout
from pallas_kernels import combine_rows, dispatch_rows


def capacity_layout(
    expert_ids: Int[Array, "t k"], num_experts: int, capacity: int, max_rows: int | None = None
) -> DispatchLayout:
    """The layout of buffers [e, c]: row ``e * capacity + i`` is the i-th choice of expert e.

    Of more than ``capacity`` choices of one expert, in the order of tokens and of a token's
    choices, the first ones are kept. Rows of nobody hold token t, one past the end.
    """
    layout = dispatch_layout(expert_ids, num_experts, max_rows)
    starts = jnp.cumsum(layout.group_sizes) - layout.group_sizes
    sizes = jnp.minimum(layout.group_sizes, capacity)
    place = jnp.arange(capacity)[None]
    source = jnp.clip(starts[:, None] + place, 0, layout.token.shape[0] - 1)
    token = jnp.where(place < sizes[:, None], layout.token[source], expert_ids.shape[0])
    expert = jnp.clip(expert_ids, 0, num_experts - 1)
    place = layout.row - starts[expert]
    chosen = layout.row < layout.token.shape[0]
    row = jnp.where(
        chosen & (place < capacity), expert * capacity + place, num_experts * capacity
    ).astype(jnp.int32)
    return DispatchLayout(token=token.reshape(-1), row=row, group_sizes=sizes)


def capacity_mlp(
    x_td: Float[Array, "t d"],
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e f d"],
    layout: DispatchLayout,
    gates: Float[Array, "t k"],
    activation: str,
) -> Float[Array, "t d"]:
    """The MLP on the buffers of :func:`capacity_layout`."""
    num_experts, d = wi_edf.shape[:2]
    rows = dispatch_rows(x_td, layout.token, layout.row)
    x_ecd = rows.reshape(num_experts, -1, d)
    hidden_ecf = activate(jnp.einsum("ecd,edf->ecf", x_ecd, wi_edf), activation)
    y_ecd = jnp.einsum("ecf,efd->ecd", hidden_ecf, wo_efd)
    return combine_rows(y_ecd.reshape(-1, d), layout.token, layout.row, gates)
