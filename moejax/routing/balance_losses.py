"""Losses that ask for experts of equal use; sums and granularity as in losses.py."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array

from moejax.experts.layout import gates_by_expert
from moejax.routing.losses import (
    ROUTER_LOSSES,
    Sums,
    choices,
    num_valid,
    of_modality,
    over,
    probabilities,
    router_loss,
)
from moejax.routing.plan import RouterInputs, RoutingPlan
from moejax.routing.select import largest

PER = ("batch", "group")


def _sums(per: str, fields: Sums, value: Callable[[Mapping[str, Array]], Array]) -> Sums:
    """Sums over all groups of fields [s, ...], or of the groups' values, 0 without tokens."""
    if per == "batch":
        return {name: field.sum(axis=0) for name, field in fields.items()}
    values = value(fields)
    return {
        "values": values.sum(),
        "groups": (fields["tokens"] > 0).sum().astype(values.dtype),
    }


def _mean_or(
    value: Callable[[Mapping[str, Array]], Array],
) -> Callable[[Mapping[str, Array]], Array]:
    """The scalar of either kind of sums."""

    def scalar(sums: Mapping[str, Array]) -> Array:
        return over(sums["values"], sums["groups"]) if "values" in sums else value(sums)

    return scalar


def _switch_value(sums: Mapping[str, Array]) -> Array:
    counts = sums["counts_e"]
    share = over(counts, counts.sum(axis=-1, keepdims=True))
    mean = over(sums["probs_e"], sums["tokens"][..., None])
    return counts.shape[-1] * (share * mean).sum(axis=-1)


@router_loss("switch", _mean_or(_switch_value), per=PER)
def switch(inputs: RouterInputs, plan: RoutingPlan, *, per: str = "batch") -> Sums:
    """``E sum_e f_e P_e`` over the batch, or the mean of it over groups (``per``).

    Switch, arXiv 2101.03961, eq. 4 to 6. For K choices f_e = count_e / (K T), so the value does
    not grow with K. 1 at uniform; E with all choices and all probability on one expert.
    """
    fields = {
        "counts_e": choices(inputs, plan.chosen()).sum(axis=1),
        "probs_e": probabilities(inputs, plan).sum(axis=1),
        "tokens": num_valid(inputs, plan),
    }
    return _sums(per, fields, _switch_value)


# DeepSeekMoE, arXiv 2401.06066, eq. 12 to 14: f_e = E / (K T) count_e there, the same number.
ROUTER_LOSSES.register("deepseek_expert")(ROUTER_LOSSES.get("switch"))


def _gshard_value(sums: Mapping[str, Array]) -> Array:
    tokens = sums["tokens"][..., None]
    product = over(sums["counts_e"], tokens) * over(sums["probs_e"], tokens)
    return sums["counts_e"].shape[-1] * product.sum(axis=-1)


@router_loss("gshard", _mean_or(_gshard_value), per=PER, counted=("first", "all"))
def gshard(
    inputs: RouterInputs,
    plan: RoutingPlan,
    *,
    per: str = "group",
    counted: str = "first",
    chosen_only: bool = False,
    weighted: bool = False,
) -> Sums:
    """``E^2 mean_e(c_e P_e)``, c_e the share of tokens that chose e; the mean over groups.

    GShard, arXiv 2006.16668, algorithm 1, which counts first choices alone: 1 at uniform, E when
    collapsed. With ``counted="all"`` it is K at uniform. ``chosen_only`` (Uni-MoE-2's code, with
    ``counted="all", per="batch"``) takes the probabilities of what was chosen alone; ``weighted``
    (MoDE's code, arXiv 2412.12953, likewise) takes the weights in their place.
    """
    ids = plan.chosen()[..., :1] if counted == "first" else plan.chosen()
    first = choices(inputs, ids)
    probs = probabilities(inputs, plan)
    if chosen_only:
        probs = probs * choices(inputs, plan.chosen())
    if weighted:
        probs = gates_by_expert(plan.expert_ids, plan.weights, inputs.num_routed)
    fields = {
        "counts_e": first.sum(axis=1),
        "probs_e": probs.sum(axis=1),
        "tokens": num_valid(inputs, plan),
    }
    return _sums(per, fields, _gshard_value)


def _device_value(sums: Mapping[str, Array]) -> Array:
    shares = over(sums["counts"], sums["choices"])
    return (shares * over(sums["probs"], sums["tokens"])).sum()


@router_loss("deepseek_device", _device_value)
def deepseek_device(inputs: RouterInputs, plan: RoutingPlan, *, devices: int = 1) -> Sums:
    """``sum_i f'_i P'_i`` over groups i of experts, over the batch.

    DeepSeekMoE, arXiv 2401.06066, eq. 15 to 17: f'_i is the mean of E / (K T) count_e in the group,
    P'_i the sum of P_e. 1 at uniform. Experts with weights are cut in ``devices`` equal groups of
    neighbours; those without are one more group (LongCat-Flash, arXiv 2509.01322).
    """
    e, num_ffn = inputs.num_routed, inputs.num_ffn or inputs.num_routed
    size = max(1, num_ffn // devices)
    group_e = jnp.minimum(jnp.arange(num_ffn) // size, devices - 1)
    group_e = jnp.concatenate([group_e, jnp.full((e - num_ffn,), devices, group_e.dtype)])
    member_ie = (jnp.arange(devices + 1)[:, None] == group_e[None]).astype(plan.probs.dtype)
    counts_e = choices(inputs, plan.chosen()).sum(axis=(0, 1))
    probs_e = probabilities(inputs, plan).sum(axis=(0, 1))
    return {
        "counts": over(e * (member_ie @ counts_e), member_ie.sum(axis=-1)),
        "probs": member_ie @ probs_e,
        "choices": counts_e.sum(),
        "tokens": num_valid(inputs, plan).sum(),
    }


@router_loss("deepseek_sequence", _mean_or(_switch_value))
def deepseek_sequence(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """``E sum_e f_e P_e`` of each sequence, the mean over the sequences that have tokens.

    DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20: f_e counts the K largest scores without bias,
    whatever was chosen, and P_e is of scores over their sum. 1 at uniform. A group of several
    sequences is cut in ``inputs.sequences`` parts; a packed row is one sequence.
    """
    k = min(plan.expert_ids.shape[-1], inputs.num_routed)
    ids = largest(plan.probs, inputs.may_choose(), k)
    unbiased = choices(inputs, ids)
    cut = lambda values: values.reshape(
        inputs.valid.shape[0] * inputs.sequences, -1, *values.shape[2:]
    )
    fields = {
        "counts_e": cut(unbiased).sum(axis=1),
        "probs_e": cut(probabilities(inputs, plan)).sum(axis=1),
        "tokens": cut(inputs.valid).sum(axis=1).astype(plan.probs.dtype),
    }
    return _sums("group", fields, _switch_value)


def _heterogeneous_value(sums: Mapping[str, Array]) -> Array:
    tokens = sums["tokens"]
    return (over(sums["weighted_counts_e"], tokens) * over(sums["probs_e"], tokens)).sum()


@router_loss("heterogeneous", _heterogeneous_value)
def heterogeneous(inputs: RouterInputs, plan: RoutingPlan, *, tau: float = 0.75) -> Sums:
    """``sum_e eta_e f_e P_e`` over the batch, eta = 1 for experts with weights, else tau.

    MoE++, arXiv 2410.07348. f_e is the share of tokens that choose e (sum K), and
    there is no factor E: K (num_ffn + tau num_null) / E^2 at uniform. Least where an expert with
    weights is chosen tau times as often as one without.
    """
    has_weights = jnp.arange(inputs.num_routed) < inputs.num_ffn
    counts_e = choices(inputs, plan.chosen()).sum(axis=(0, 1))
    return {
        "weighted_counts_e": jnp.where(has_weights, counts_e, tau * counts_e),
        "probs_e": probabilities(inputs, plan).sum(axis=(0, 1)),
        "tokens": num_valid(inputs, plan).sum(),
    }


def _per_modality_value(sums: Mapping[str, Array]) -> Array:
    counts_me, tokens_m = sums["counts_me"], sums["tokens_m"]
    share = over(counts_me, counts_me.sum(axis=-1, keepdims=True))
    mean = over(sums["probs_me"], tokens_m[:, None])
    return (over(sums["experts_m"], tokens_m) * (share * mean).sum(axis=-1)).sum()


@router_loss("switch_per_modality", _per_modality_value)
def switch_per_modality(inputs: RouterInputs, plan: RoutingPlan) -> Sums:
    """``sum_m E_m sum_e f_me P_me`` over the batch: each modality among its own E_m experts.

    MoIIE, arXiv 2508.09779. At uniform 1 for each modality that has tokens.
    """
    member = of_modality(inputs, plan)
    may = inputs.may_choose().astype(plan.probs.dtype)
    by_modality = lambda values: jnp.einsum("snm,sne->me", member, values, precision="highest")
    return {
        "counts_me": by_modality(choices(inputs, plan.chosen())),
        "probs_me": by_modality(probabilities(inputs, plan)),
        "experts_m": by_modality(may).sum(axis=-1),
        "tokens_m": member.sum(axis=(0, 1)),
    }


def _variation_value(sums: Mapping[str, Array]) -> Array:
    """Squared coefficient of variation over experts, from sums [..., e]."""
    mean = sums["use_e"].mean(axis=-1)
    variance = jnp.square(sums["use_e"] - mean[..., None]).mean(axis=-1)
    return over(variance, jnp.square(mean))


@router_loss("importance", _mean_or(_variation_value), per=PER)
def importance(inputs: RouterInputs, plan: RoutingPlan, *, per: str = "group") -> Sums:
    """``CV(sum_t p_t)^2`` over experts, the mean over groups (V-MoE, arXiv 2106.05974).

    Of probabilities without noise. 0 at uniform, its minimum; E - 1 when collapsed.
    """
    fields = {
        "use_e": probabilities(inputs, plan).sum(axis=1),
        "tokens": num_valid(inputs, plan),
    }
    return _sums(per, fields, _variation_value)


@router_loss("load", _mean_or(_variation_value), per=PER)
def load(inputs: RouterInputs, plan: RoutingPlan, *, per: str = "group") -> Sums:
    """``CV(sum_t P(e wins t))^2``, the mean over groups (V-MoE, arXiv 2106.05974).

    An expert wins a token if, with its noise drawn anew, its logit is at least the K-th largest.
    0 where all win as often, at most E - 1. 0 too where the router drew no gaussian noise.
    """
    tokens = num_valid(inputs, plan)
    if "wins_se" in plan.statistics:
        use_e = plan.statistics["wins_se"][:, : inputs.num_routed]
    else:
        use_e, tokens = jnp.zeros_like(plan.probs[:, 0]), jnp.zeros_like(tokens)
    return _sums(per, {"use_e": use_e, "tokens": tokens}, _variation_value)
