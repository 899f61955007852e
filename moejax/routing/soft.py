"""Soft MoE: slots that mix all tokens of a group, tokens that mix all slots."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from moejax.routing import checks
from moejax.routing.normalise import softmax
from moejax.routing.perturb import NOISE_CHOICES, perturb
from moejax.routing.plan import RouterInputs, SoftPlan, router


def _slots(options: Mapping[str, Any]) -> int:
    return options.get("slots", 1)


def _columns(num_experts: int, options: Mapping[str, Any]) -> int:
    return num_experts * _slots(options)


def _check_soft(num_experts: int, options: Mapping[str, Any]) -> None:
    checks.require_at_least(options, "slots", 1)
    checks.require_choice(options, "noise", NOISE_CHOICES)
    checks.require_at_least(options, "noise_scale", 0)


@router(
    "soft",
    causal=False,
    columns=_columns,
    # A token's output has a part of each.
    choices=lambda experts, options: experts,
    slots=_slots,
    check=_check_soft,
)
def soft(
    inputs: RouterInputs, *, slots: int = 1, noise: str = "", noise_scale: float = 1.0
) -> SoftPlan:
    """Each slot a softmax over tokens, each token a softmax over slots (arXiv 2308.00951).

    The logits have ``experts * slots`` columns, slot c of expert e in ``e * slots + c``. Scores by
    cosine with a learned scale are those of the paper (score "cosine", ``learn_scale``). Padding
    is in no slot and gets nothing. ``inputs.allowed`` may have one column for each expert.
    """
    logits = perturb(inputs, noise, noise_scale)
    mask = jnp.broadcast_to(inputs.valid[..., None], logits.shape)
    if inputs.allowed is not None:
        mask &= jnp.repeat(inputs.allowed, logits.shape[-1] // inputs.allowed.shape[-1], axis=-1)
    by_slot = lambda values: values.reshape(*logits.shape[:2], -1, slots)
    return SoftPlan(
        dispatch=by_slot(softmax(logits, mask, axis=1)),
        combine=by_slot(softmax(logits, mask, axis=-1)),
    )
