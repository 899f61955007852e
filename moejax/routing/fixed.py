"""Routers without a choice: by the modality, by the token's id, by lot. All weights are 1.

And experts without a choice beside others: those of modalities that may choose nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.routing.plan import RouterInputs, RoutingPlan, router
from moejax.routing.select import rank_within


def _nth_allowed(inputs: RouterInputs, number_sn: Int[Array, "s n"]) -> RoutingPlan:
    """The plan that sends each token to the ``number``-th, cyclically, of its allowed experts."""
    may = inputs.may_choose()
    count = may.sum(axis=-1, dtype=jnp.int32)
    wanted = number_sn % jnp.maximum(count, 1)
    # True for the one expert that has exactly ``wanted`` allowed ones before it.
    before = jnp.cumsum(may, axis=-1, dtype=jnp.int32) - may
    here = may & (before == wanted[..., None])
    first = jnp.argmax(here, axis=-1).astype(jnp.int32)
    ids = jnp.where(count > 0, first, inputs.num_experts)[..., None]
    probs = here.astype(inputs.logits.dtype)
    return RoutingPlan(ids, probs.sum(axis=-1, keepdims=True), probs)


@router("forced")
def forced(inputs: RouterInputs) -> RoutingPlan:
    """The first expert that the token's modality may choose: a weight of one's own by modality."""
    return _nth_allowed(inputs, jnp.zeros_like(inputs.modality))


@router("hash")
def hash_of_token(inputs: RouterInputs, *, seed: int = 0) -> RoutingPlan:
    """A fixed expert for each token id (Hash Layers, arXiv 2106.04426, with a random hash)."""
    bits = inputs.token_ids.astype(jnp.uint32) + jnp.uint32(seed % 2**32) * jnp.uint32(0x9E3779B9)
    # The last steps of MurmurHash3: each bit of the id changes about half of the result's.
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> 16)
    return _nth_allowed(inputs, (bits >> 1).astype(jnp.int32))


@router("random_partition")
def random_partition(inputs: RouterInputs) -> RoutingPlan:
    """A random partition of the group's tokens in equal parts (EWA, arXiv 2308.06093).

    Parts of the tokens that may choose the same experts differ by one at most. Without a key they
    are dealt out in order, which stands for nothing: after training the experts of EWA are averaged
    into one.
    """
    if inputs.rng is None:
        draw = jnp.zeros(inputs.valid.shape)
    else:
        draw = jax.random.uniform(inputs.rng, inputs.valid.shape)
    # Modalities are dealt out one by one, as each may have experts of its own; padding comes last.
    class_sn = jnp.where(inputs.valid, inputs.modality, jnp.iinfo(jnp.int32).max)
    return _nth_allowed(inputs, rank_within(class_sn, draw))


def without_score(plan: RoutingPlan, first: int) -> RoutingPlan:
    """The plan with weight 1 for experts from number ``first`` on, wherever they are chosen.

    ProMoE's conditional routing (arXiv 2510.24711): tokens without a condition have an expert of
    their own, which no score is about.
    """
    chosen = (plan.expert_ids >= first) & (plan.expert_ids < plan.probs.shape[-1])
    return dataclasses.replace(plan, weights=jnp.where(chosen, 1, plan.weights))
