"""Controllers of the bias that takes part in the choice of experts: no loss, no gradient."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moejax.errors import UserError, did_you_mean

CONTROLLERS = ("sign", "increment")


def update_bias(
    kind: str,
    bias_e: Float[Array, " e"],
    counts_e: Float[Array, " e"],
    *,
    rate: float,
    num_ffn: int = 0,
    num_shared: int = 0,
    ffn_share: float = 1.0,
    target_e: Float[Array, " e"] | None = None,
) -> Float[Array, " e"]:
    """The biases after a step in which expert e was chosen ``counts_e`` times.

    "sign" (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): ``b_e += rate * sign(target - count_e)``,
    where the target is the mean count.
    "increment" (LongCat-Flash, arXiv 2509.01322): ``b_e += rate * (ffn_share / num_ffn -
    count_e / sum(counts))`` for experts with weights; the others keep their bias, so the mean
    number of experts with weights is driven to ``ffn_share * K``.

    Args:
      kind: "sign" or "increment".
      bias_e: one for each column of the logits.
      counts_e: choices over the whole batch, before any capacity. Nothing changes where all are 0.
      rate: the step.
      num_ffn: experts with weights, the first ones; 0: all.
      num_shared: shared experts, the last ones, which nobody chooses: their bias stays.
      ffn_share: the share of choices that they should have (K_e / K in the paper).
      target_e: for "sign", the count that each should have (:func:`fair_counts`).
    """
    if kind not in CONTROLLERS:
        raise UserError(
            f"model.moe.balance.name: no controller {kind!r}{did_you_mean(kind, CONTROLLERS)}"
        )
    bias_e, counts_e = lax.stop_gradient((bias_e, counts_e))
    total, moved = counts_e.sum(), counts_e.shape[0] - num_shared
    if kind == "sign":
        wanted = total / moved if target_e is None else lax.stop_gradient(target_e)
        step = jnp.sign(wanted - counts_e)
    else:
        moved = num_ffn or moved
        step = ffn_share / moved - counts_e / jnp.where(total > 0, total, 1)
    step = jnp.where(jnp.arange(counts_e.shape[0]) < moved, step, 0)
    return bias_e + jnp.where(total > 0, rate * step, 0).astype(bias_e.dtype)


def fair_counts(
    counts_me: Float[Array, "m e"], allowed_me: Bool[Array, "m e"]
) -> Float[Array, " e"]:
    """What each expert would get if each modality gave all experts that it may choose the same.

    The mean over all experts is no target where modalities have experts of their own: with little
    speech in the batch, all experts of speech stay below it, whoever among them is overloaded.
    """
    allowed_me = allowed_me.astype(counts_me.dtype)
    share_m = counts_me.sum(axis=-1) / jnp.maximum(allowed_me.sum(axis=-1), 1)
    return (share_m[:, None] * allowed_me).sum(axis=0)
