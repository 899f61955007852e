"""Experts without a matmul: nothing, the token itself, a mixture of it and a vector."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def weightless_output(
    x_btd: Float[Array, "b t d"],
    ids_btk: Int[Array, "b t k"],
    gates_btk: Float[Array, "b t k"],
    num_zero: int,
    num_copy: int,
    constant_gate_edk: Float[Array, "e d 2"] | None = None,
    constant_ed: Float[Array, "e d"] | None = None,
) -> Float[Array, "b t d"]:
    """``sum_k gates_k * E_{ids_k}(x)`` over the weightless experts (arXiv 2410.07348, eq. 3 to 6).

    A zero expert gives 0, a copy expert x, a constant expert ``a_1 x + a_2 v`` with
    ``a = softmax(x W)``.

    Args:
      x_btd: tokens.
      ids_btk: choices, numbered from the first weightless expert on: zero, copy, constant; other
        numbers are other experts and contribute nothing here.
      gates_btk: weights of the choices.
      num_zero: zero experts.
      num_copy: copy experts.
      constant_gate_edk: W of each constant expert, or None without one.
      constant_ed: v of each constant expert.
    """
    first_copy, first_constant = num_zero, num_zero + num_copy
    copied = (ids_btk >= first_copy) & (ids_btk < first_constant)
    out = x_btd * jnp.where(copied, gates_btk, 0).sum(axis=-1, keepdims=True)
    if constant_gate_edk is None or constant_ed is None:
        return out
    numbers = jnp.arange(constant_ed.shape[0])[None, None, None]
    chosen = ids_btk[..., None] - first_constant == numbers
    gates_bte = jnp.where(chosen, gates_btk[..., None], 0).sum(axis=-2)
    mix = jax.nn.softmax(jnp.einsum("btd,edk->btek", x_btd, constant_gate_edk), axis=-1)
    of_x = (gates_bte * mix[..., 0]).sum(axis=-1, keepdims=True)
    return out + x_btd * of_x + jnp.einsum("bte,ed->btd", gates_bte * mix[..., 1], constant_ed)
