"""Linear maps and SwiGLU with weights of one's own for each modality, at dense FLOPs.

Tokens are sorted by modality once per forward (:func:`modality_layout`); each map gathers its
rows into that order, multiplies each modality's by its own weight, and gathers the result back. A
leading modality axis of size one means "shared": then it is an ordinary matmul and nothing is
sorted.
Mixture-of-Transformers, arXiv 2411.04996, Alg. 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import grouped_matmul, grouped_mlp, sort_by_group
from pallas_kernels.varying import cast_to_common_varying


class ModalityLayout(NamedTuple):
    """Rows of one device sorted by modality; the leading axis of size 1 is the device's."""

    order: Int[Array, "1 rows"]  # sorted row r holds token order[r]
    inverse: Int[Array, "1 rows"]  # token i lies in sorted row inverse[i]
    group_sizes: Int[Array, "1 m"]


def modality_layout(modality_bt: Int[Array, "b t"], num_modalities: int) -> ModalityLayout:
    """The stable sort of the tokens by modality, its inverse, and the counts."""
    by_modality = sort_by_group(modality_bt.reshape(-1), num_modalities)
    return ModalityLayout(*(ints[None] for ints in by_modality))


@jax.custom_vjp
def permute_rows(
    x_td: Float[Array, "t d"], order: Int[Array, " t"], inverse: Int[Array, " t"]
) -> Float[Array, "t d"]:
    """``x[order]`` for a permutation; its gradient is a gather too, never a scatter."""
    return x_td[order]


def _permute_fwd(x_td, order, inverse):
    return x_td[order], inverse


def _permute_bwd(inverse, dout_td):
    return dout_td[inverse], None, None


permute_rows.defvjp(_permute_fwd, _permute_bwd)


def _rows(x_btd, layout: ModalityLayout):
    rows = x_btd.reshape(-1, x_btd.shape[-1])
    return permute_rows(*cast_to_common_varying(rows, layout.order[0], layout.inverse[0]))


def _tokens(rows_td, layout: ModalityLayout, shape):
    tokens = permute_rows(*cast_to_common_varying(rows_td, layout.inverse[0], layout.order[0]))
    return tokens.reshape(*shape[:-1], rows_td.shape[-1])


def untied_linear(
    x_btd: Float[Array, "b t d"],
    w_mdf: Float[Array, "m d f"],
    layout: ModalityLayout,
    backend: str = "auto",
    group_offset: int = 0,
) -> Float[Array, "b t f"]:
    """``x[i] @ w[modality(i) - group_offset]``; zeros for modalities that have no weight."""
    rows = _rows(x_btd, layout)
    out = grouped_matmul(
        rows, w_mdf, layout.group_sizes[0], group_offset=group_offset, backend=backend
    )
    return _tokens(out, layout, x_btd.shape)


def untied_swiglu(
    x_btd: Float[Array, "b t d"],
    wi: tuple[Array, ...],
    wo: tuple[Array, ...],
    layout: ModalityLayout,
    backend: str = "auto",
) -> Float[Array, "b t d"]:
    """SwiGLU with the weights of each token's modality.

    ``wi`` ([m, d, 2f]) and ``wo`` ([m, f, d]) hold one stack over all modalities, or, for unequal
    widths, one stack of size 1 for each modality in order. Gate and up projections lie side by side
    in ``wi``. A stack with a smaller d than that of the tokens reads their first features, and
    writes those alone.
    """
    tokens = x_btd.reshape(-1, x_btd.shape[-1])
    order, inverse = layout.order[0], layout.inverse[0][:, None]

    def of_stack(offset: int, wi_mdf: Array, wo_mfd: Array) -> Array:
        d = wi_mdf.shape[1]
        out = grouped_mlp(
            tokens[:, :d],
            wi_mdf,
            wo_mfd,
            order,
            inverse,
            layout.group_sizes[0],
            activation=swiglu,
            group_offset=offset,
            backend=backend,
        )
        return widen(out, tokens.shape[1])

    outputs = (of_stack(i, *stack) for i, stack in enumerate(zip(wi, wo, strict=True)))
    return functools.reduce(jnp.add, outputs).reshape(x_btd.shape)


def widen(x: Float[Array, "*rows d"], size: int) -> Float[Array, "*rows {size}"]:
    """With zeros after the last axis, up to that size."""
    missing = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def swiglu(h_tf: Float[Array, "*rows ff"]) -> Float[Array, "*rows f"]:
    """``silu(gate) * up`` where the last axis holds gate, then up (arXiv 2002.05202)."""
    gate, up = jnp.split(h_tf, 2, axis=-1)
    return jax.nn.silu(gate) * up
