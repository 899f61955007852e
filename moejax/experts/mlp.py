"""Mixture-of-experts MLP: a token's output is the gated sum of those of the experts it chose."""

from jaxtyping import Array, Float, Int

from moejax.experts.activations import activation_named
from moejax.experts.capacity import capacity_layout, capacity_mlp
from moejax.experts.dense import dense_mlp
from moejax.experts.layout import dispatch_layout
from pallas_kernels import grouped_mlp

DISPATCHES = ("dense", "capacity", "dropless")


def expert_mlp(
    x_td: Float[Array, "t d"],
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e f d"],
    expert_ids: Int[Array, "t k"],
    gates: Float[Array, "t k"],
    *,
    activation: str = "swiglu",
    dispatch: str = "dropless",
    capacity: int | None = None,
    max_rows: int | None = None,
    expected_share: float = 1.0,
    backend: str = "auto",
) -> Float[Array, "t d"]:
    """``out[t] = sum_k gates[t, k] * FFN_{ids[t, k]}(x[t])``.

    Args:
      x_td: tokens of this device.
      wi_edf: [e, d, 2f] for ``swiglu``, gate and up side by side; [e, d, f] for ``gelu``.
      wo_efd: of the same dtype as ``wi_edf`` and ``x_td``.
      expert_ids: a choice that is not in [0, e) adds nothing, and its gate has no gradient.
      gates: may be wider than ``x_td``; the products are in the wider type.
      activation: ``swiglu`` or ``gelu`` (the tanh form).
      dispatch: how the experts are run. ``dense``: each on every token, the definition.
        ``capacity``: buffers of ``capacity`` rows for each expert. ``dropless``: rows sorted by
        expert, at the FLOPs of the choices. All agree as long as no expert has more choices than
        ``capacity``.
      capacity: of ``capacity`` dispatch. Of more choices of one expert than this, the last in the
        order of tokens are dropped: they add nothing, as if their id were e.
      max_rows: the most choices there are, where that is known to be fewer than t * k (expert
        choice has a column for every expert, most of them empty).
      expected_share: of the choices, those in [0, e) on average, for the count of FLOPs.
      backend: of the kernels, see :func:`pallas_kernels.grouped_matmul`.

    Returns:
      [t, d] in the dtype of ``x_td``.

    Raises:
      ValueError: unknown dispatch or activation, or no capacity for ``capacity`` dispatch.
    """
    num_experts = wi_edf.shape[0]
    if dispatch == "dense":
        return dense_mlp(x_td, wi_edf, wo_efd, expert_ids, gates, activation)
    if dispatch == "dropless":
        layout = dispatch_layout(expert_ids, num_experts, max_rows)
        return grouped_mlp(
            x_td,
            wi_edf,
            wo_efd,
            layout.token,
            layout.row,
            layout.group_sizes,
            gates,
            activation=activation_named(activation),
            expected_share=expected_share,
            backend=backend,
        )
    if dispatch != "capacity":
        raise ValueError(f"no dispatch {dispatch!r}: {', '.join(DISPATCHES)}")
    if not capacity or capacity < 1:
        raise ValueError(f"capacity dispatch needs a capacity of at least 1, not {capacity}")
    layout = capacity_layout(expert_ids, num_experts, capacity, max_rows)
    return capacity_mlp(x_td, wi_edf, wo_efd, layout, gates, activation)
