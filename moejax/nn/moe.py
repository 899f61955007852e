"""A layer of experts: parameters of scores, experts and controllers around pure functions.

score -> router (a plan) -> capacity -> experts (dispatch) + experts without weights + shared ones.
The plan is made outside of ``shard_map``, from all tokens of a routing group wherever they lie;
experts are run inside it, on each device's own tokens.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax import axes
from moejax.config.moe import CAUSAL_THRESHOLD, SELECT_BIAS, MoEConfig
from moejax.config.trunk import TrunkConfig
from moejax.experts.activations import activate
from moejax.experts.kinds import weightless_output
from moejax.experts.mlp import expert_mlp
from moejax.experts.soft import soft_mlp
from moejax.nn.context import Context
from moejax.nn.film import FilmExperts
from moejax.nn.layers import fan_in_normal, param_dtype, partitioned
from moejax.nn.moe_checks import router_options
from moejax.nn.placement import placement
from moejax.parallel.exchange import Tokens, exchange
from moejax.parallel.local import (
    COLUMNS,
    INNER,
    TOKENS,
    axis_size,
    interleave,
    run_local,
    tensor_sum,
)
from moejax.routing import (
    ROUTER_LOSSES,
    ROUTERS,
    SCORES,
    RouterInputs,
    RoutingPlan,
    SoftPlan,
    add_previous,
    allowed_experts,
    heterogeneous_capacity,
    jitter,
    last_taken,
    limit_capacity,
    modality_attributes,
    pool_mask,
    routing_statistics,
    without_score,
)

# What the layer's key is folded with for all that the first router draws, and one more for the
# next; dropout has smaller numbers.
_DRAW = 16


class ExpertWeights(NamedTuple):
    """MLPs side by side: [e, d, 2f] (gate, then up; [e, d, f] for gelu) and [e, f, d]."""

    wi_edf: jax.Array
    wo_efd: jax.Array


class Experts(nn.Module):
    """The weights of ``num`` experts."""

    config: TrunkConfig
    num: int

    @nn.compact
    def __call__(self) -> ExpertWeights:
        cfg, moe = self.config, self.config.moe
        d, f = cfg.d_model, moe.hidden or max(cfg.ffn_hidden)
        wide = 2 * f if moe.activation == "swiglu" else f
        draw = fan_in_normal((1,))
        init = _repeat_first(draw) if moe.equal_init else draw
        into = (axes.EXPERT, axes.EMBED, axes.MLP)
        out = (axes.EXPERT, axes.MLP, axes.EMBED)
        dtype = param_dtype(cfg)
        return ExpertWeights(
            self.param("wi_edf", partitioned(init, *into), (self.num, d, wide), dtype),
            self.param("wo_efd", partitioned(init, *out), (self.num, f, d), dtype),
        )


def _repeat_first(init):
    def equal(key, shape, dtype):
        return jnp.broadcast_to(init(key, (1, *shape[1:]), dtype), shape)

    return equal


class MoE(nn.Module):
    """``y = sum_k w_k E_{i_k}(x) + shared(x)`` by the group ``model.moe`` of the config.

    With ``iterations`` C the experts are run C times, each time on the result of the time before
    with a router of its own: ``x_c = x_{c-1} + MoE_c(x_{c-1})``, of which ``x_C - x_0`` is returned
    (arXiv 2506.18945 writes ``x_C``; the block adds its own residual, so C = 1 is one layer).
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry: dict, ctx: Context):
        """Returns (output [b, t, d], carry, aux).

        ``carry["router_logits"]`` [b, t, e] are those of the layer before, where scores use them.
        """
        cfg, moe = self.config, self.config.moe
        film = FilmExperts(cfg, name="experts") if moe.kind == "film" else None
        weights = ctx.pool
        if film is None and weights is None:
            weights = Experts(cfg, moe.num_experts, name="experts")()
        shared, constants = self._shared_weights(), self._constant_weights()
        begin, aux = x_btd, {}
        for i in range(moe.iterations):
            name = f"router_{i}" if i else "router"
            rng = None if ctx.rng is None else jax.random.fold_in(ctx.rng, _DRAW + i)
            plan, inputs, carry = Routing(cfg, name=name)(x_btd, carry, ctx.replace(rng=rng))
            if film is not None:
                out = film(plan, x_btd)
            elif isinstance(plan, SoftPlan):
                out = self._run_soft(plan, weights, x_btd)
            else:
                out, plan = self._run(plan, weights, constants, x_btd, ctx)
            if shared is not None:
                out = out + self._run_shared(plan, shared, x_btd)
            aux[name] = routing_aux(moe, plan, inputs, ctx)
            x_btd = x_btd + out if moe.iterations > 1 else out
        return (x_btd - begin if moe.iterations > 1 else x_btd), carry, aux

    def _shared_weights(self) -> ExpertWeights | None:
        """The MLP that every token runs; n competing experts are n parts of its width."""
        cfg, moe = self.config, self.config.moe
        if not moe.shared_hidden:
            return None
        num, d = max(1, moe.shared_competing), cfg.d_model
        f = moe.shared_hidden // num
        wide = 2 * f if moe.activation == "swiglu" else f
        into = partitioned(fan_in_normal((1,)), axes.LOCAL_EXPERT, axes.EMBED, axes.MLP)
        out = partitioned(fan_in_normal((1,)), axes.LOCAL_EXPERT, axes.MLP, axes.EMBED)
        return ExpertWeights(
            self.param("shared_wi_edf", into, (num, d, wide), param_dtype(cfg)),
            self.param("shared_wo_efd", out, (num, f, d), param_dtype(cfg)),
        )

    def _constant_weights(self) -> tuple[jax.Array, jax.Array] | None:
        """Of each constant expert the map to its two weights, and its vector."""
        num, d = self.config.moe.constant_experts, self.config.d_model
        if not num:
            return None
        dtype = param_dtype(self.config)
        gate = partitioned(fan_in_normal((1,)), axes.LOCAL_EXPERT, axes.EMBED, None)
        vector = partitioned(nn.initializers.normal(1.0), axes.LOCAL_EXPERT, axes.EMBED)
        return (
            self.param("constant_gate_edk", gate, (num, d, 2), dtype),
            self.param("constant_ed", vector, (num, d), dtype),
        )

    def _run_soft(self, plan: SoftPlan, weights: ExpertWeights, x_btd):
        groups, n = plan.dispatch.shape[:2]
        dtype = x_btd.dtype
        out = soft_mlp(
            x_btd.reshape(groups, n, -1),
            plan.dispatch.astype(dtype),
            plan.combine.astype(dtype),
            weights.wi_edf.astype(dtype),
            weights.wo_efd.astype(dtype),
            self.config.moe.activation,
        )
        return out.reshape(x_btd.shape)

    def _run(self, plan: RoutingPlan, weights: ExpertWeights, constants, x_btd, ctx: Context):
        cfg, moe = self.config, self.config.moe
        b, t, d = x_btd.shape
        dtype, groups = x_btd.dtype, plan.expert_ids.shape[0]
        ids, gates = plan.expert_ids.reshape(b, t, -1), plan.weights.reshape(b, t, -1)
        seen = x_btd * moe.top_k if moe.scale_input else x_btd

        where = placement(moe, plan, (b, t, d), sum(w.size for w in weights))
        most = None if plan.max_choices is None else plan.max_choices * where.groups
        places = places_of(moe, b * t // groups, ctx.train)

        def local(x, ids, gates, wi, wo):
            def run(tokens: Tokens):
                count, k = tokens.ids.shape
                # A token has no expert twice, and so at most those that lie here.
                bound = count * min(k, wi.shape[0])
                return expert_mlp(
                    tokens.x_td,
                    wi,
                    wo,
                    tokens.ids,
                    tokens.gates,
                    activation=moe.activation,
                    dispatch=moe.dispatch,
                    # Where nobody is dropped, all may choose one expert.
                    capacity=count if places is None else min(where.groups * max(places), count),
                    max_rows=bound if most is None else min(most, bound),
                    expected_share=moe.ffn_share * x.shape[0] * x.shape[1] / count / chunks,
                    backend=cfg.kernel_backend,
                )

            tokens = Tokens(x.reshape(-1, d), *(a.reshape(-1, a.shape[-1]) for a in (ids, gates)))
            chunks = math.gcd(moe.exchange_chunks if where.spread else 1, tokens.x_td.shape[0])
            parts = zip(*(jnp.split(a, chunks) for a in tokens), strict=True)
            done = [
                exchange(where.exchange, run, Tokens(*part), wi.shape[0], moe.exchange_buffer)
                for part in parts
            ]
            out, run_ids = (jnp.concatenate(some) for some in zip(*done, strict=True))
            return tensor_sum(out.reshape(x.shape)), run_ids.reshape(ids.shape)

        wi_edf, wo_efd = (w.astype(dtype) for w in weights)
        if moe.activation == "swiglu":
            wi_edf = interleave(wi_edf, (wi_edf.shape[-1] // 2,) * 2)
        over = "expert" if where.spread else None
        out, run_ids = run_local(
            local,
            (seen, TOKENS),
            (ids, TOKENS),
            (gates, TOKENS),
            (wi_edf, P(over, "fsdp", "tensor")),
            (wo_efd, P(over, "tensor", "fsdp")),
            tokens=(b, t),
            out=TOKENS,
        )
        if moe.weightless:
            vectors = () if constants is None else (w.astype(dtype) for w in constants)
            out = out + weightless_output(
                seen,
                ids - moe.pool,
                gates.astype(dtype),
                moe.zero_experts,
                moe.copy_experts,
                *vectors,
            )
        if moe.exchange_buffer:
            # Choices that were lost on the way count as dropped.
            run_ids = run_ids.reshape(plan.expert_ids.shape)
            plan = dataclasses.replace(plan, expert_ids=run_ids, chosen_ids=plan.chosen())
        return out, plan

    def _run_shared(self, plan: RoutingPlan | SoftPlan, shared: ExpertWeights, x_btd):
        wi_edf, wo_efd = (weight.astype(x_btd.dtype) for weight in shared)
        activation = self.config.moe.activation
        if activation == "swiglu":
            wi_edf = interleave(wi_edf, (wi_edf.shape[-1] // 2,) * 2)
        shared_weights = plan.shared_weights if isinstance(plan, RoutingPlan) else None
        b, t = x_btd.shape[:2]
        weights = () if shared_weights is None else shared_weights.reshape(b, t, -1)

        def local(x_btd, weights, wi_edf, wo_efd):
            hidden = activate(jnp.einsum("btd,edf->btef", x_btd, wi_edf), activation)
            if shared_weights is not None:
                hidden = hidden * weights[..., None].astype(hidden.dtype)
            return tensor_sum(jnp.einsum("btef,efd->btd", hidden, wo_efd))

        if axis_size("tensor") == 1:
            return local(x_btd, weights, wi_edf, wo_efd)
        return run_local(
            local,
            (x_btd, TOKENS),
            (weights, TOKENS),
            (wi_edf, COLUMNS),
            (wo_efd, INNER),
            tokens=(b, t),
            out=TOKENS,
        )


class Routing(nn.Module):
    """From tokens to a plan: the parameters of the score and of the causal router, the bias."""

    config: TrunkConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, carry: dict, ctx: Context):
        """Returns (plan, the inputs that it was made of, carry)."""
        cfg, moe = self.config, self.config.moe
        b, t, d = x_btd.shape
        router = ROUTERS.get(moe.router.name, field="model.moe.router.name")
        options = router_options(moe)
        columns = router.columns(moe.columns, options)
        group = lambda values: values.reshape(groups, b * t // groups, *values.shape[2:])
        groups = b // moe.routing_group if moe.routing_group and b % moe.routing_group == 0 else 1

        previous = carry.get("router_logits")
        rng, seen = ctx.rng, group(self._seen(x_btd, ctx))
        if moe.score.jitter and ctx.train and rng is not None:
            seen = jitter(jax.random.fold_in(rng, _DRAW), seen, moe.score.jitter)
        scored = columns - moe.unscored_experts
        logits, params = self._score(seen, group(ctx.modality_bt), previous, scored, group, ctx)
        if moe.unscored_experts:
            logits = jnp.pad(logits, ((0, 0), (0, 0), (0, moe.unscored_experts)))
        if moe.score.gating_residual:
            carry = {**carry, "router_logits": logits.reshape(b, t, -1)}
        bias_e = None
        if moe.balance.name != "none":
            zeros = partitioned(nn.initializers.zeros, None)
            bias_e = self.param(SELECT_BIAS, zeros, (columns,), param_dtype(cfg))
            bias_e = jax.lax.stop_gradient(bias_e)
        inputs = RouterInputs(
            logits=logits,
            valid=group(ctx.valid_bt),
            modality=group(ctx.modality_bt),
            token_ids=group(ctx.tokens_bt),
            allowed=self._allowed(group(ctx.modality_bt), ctx, columns, rng),
            select_bias=bias_e,
            causal_logits=self._causal(group(x_btd), columns) if moe.causal_router else None,
            causal_threshold=self._causal_threshold(columns),
            tokens=seen,
            score_params=params,
            rng=rng,
            step=ctx.step,
            num_ffn=moe.pool,
            num_zero=moe.zero_experts,
            num_shared=moe.shared_competing,
            num_modalities=len(cfg.modalities),
            sequences=b // groups,
            train=ctx.train,
        )
        plan = router.function(inputs, **options)
        if moe.unscored_experts:
            plan = without_score(plan, scored)
        places = places_of(moe, b * t // groups, ctx.train)
        if places is not None:
            again = moe.capacity_renormalise
            policy = moe.capacity if ctx.train else moe.eval_capacity or moe.capacity
            plan = limit_capacity(plan, inputs, places, policy, rng, renormalise=again)
        return plan, inputs, carry

    def _seen(self, x_btd, ctx: Context) -> jax.Array:
        """What is scored: the tokens, or for each of them what its row is told."""
        which = self.config.moe.score.input
        if which == "token":
            return x_btd
        told_bd = ctx.condition_bd if which == "condition" else ctx.noise_bd
        assert told_bd is not None, "the model puts its condition into the context"
        return jnp.broadcast_to(told_bd[:, None], x_btd.shape)

    def _score(self, x_snd, modality_sn, previous_bte, columns: int, group, ctx: Context):
        cfg, moe = self.config, self.config.moe
        score = SCORES.get(moe.score.name, field="model.moe.score.name")
        modalities = len(cfg.modalities) if moe.score.per_modality else 1
        options = dict(moe.score.options)
        if moe.score.name == "attributes":
            # What is known of a token here is its modality.
            x_snd = modality_attributes(modality_sn, len(cfg.modalities)).astype(x_snd.dtype)
            options["attributes"] = len(cfg.modalities)
        shapes = score.shapes(cfg.d_model, columns, modalities, **options)
        params = {}
        for name, (shape, init) in shapes.items():
            names = (axes.MODALITY, *(None,) * (len(shape) - 1))
            params[name] = self.param(name, partitioned(init, *names), shape, param_dtype(cfg))
        rng = ctx.rng if ctx.train else None
        rng = None if rng is None else jax.random.fold_in(rng, _DRAW + 1)
        logits = score.apply(params, x_snd, modality_sn, rng, **options)
        if moe.score.gating_residual:
            residual_ee = self.param(
                "residual_router_ee",
                partitioned(nn.initializers.zeros, None, None),
                (columns, columns),
                param_dtype(cfg),
            )
            previous = None if previous_bte is None else group(previous_bte)
            logits = add_previous(logits, previous, residual_ee)
        return logits, params

    def _causal(self, x_snd, columns: int):
        """``silu(x W1) W2``, without a gradient to the tokens (arXiv 2407.21770, section 3)."""
        d, dtype = x_snd.shape[-1], param_dtype(self.config)
        f = self.config.moe.causal_router_hidden or d // 2
        wi_df = self.param(
            "causal_router_wi_df",
            partitioned(fan_in_normal((0,)), axes.EMBED, None),
            (d, f),
            dtype,
        )
        wo_fe = self.param(
            "causal_router_wo_fe",
            partitioned(fan_in_normal((0,)), None, None),
            (f, columns),
            dtype,
        )
        x_snd = jax.lax.stop_gradient(x_snd).astype(dtype)
        hidden = nn.silu(jnp.einsum("snd,df->snf", x_snd, wi_df, precision="highest"))
        return jnp.einsum("snf,fe->sne", hidden, wo_fe, precision="highest")

    def _causal_threshold(self, columns: int):
        """[e], which its controller moves and no gradient does; None: a half."""
        if not self.config.moe.causal_router_decay:
            return None
        zeros, dtype = partitioned(nn.initializers.zeros, None), param_dtype(self.config)
        return jax.lax.stop_gradient(self.param(CAUSAL_THRESHOLD, zeros, (columns,), dtype))

    def _allowed(self, modality_sn, ctx: Context, columns: int, rng):
        """Which experts each token may choose [s, n, e]; None where all may choose all."""
        moe = self.config.moe
        allowed = None
        if moe.allowed:
            table = [
                [i in ids or i >= moe.pool + moe.weightless for i in range(columns)]
                for ids in moe.allowed
            ]
            allowed = allowed_experts(jnp.asarray(table), modality_sn)
        if moe.pool_layers > 1 and moe.pool_steps[1] > 0 and ctx.step is not None:
            layers, own = moe.pool_layers, ctx.pool_index
            open_e = pool_mask(ctx.step, moe.num_experts, layers, own, moe.pool_steps, rng)
            open_sne = jnp.broadcast_to(open_e, (*modality_sn.shape, columns))
            allowed = open_sne if allowed is None else allowed & open_sne
        return allowed


def places_of(moe: MoEConfig, tokens: int, train: bool) -> tuple[int, ...] | None:
    """Places of each expert, with weights or without, for a routing group of so many tokens.

    None where nobody is dropped.
    """
    factor = moe.capacity_factor if train else moe.eval_capacity_factor
    if moe.capacity == "none" or not factor:
        return None
    router = ROUTERS.get(moe.router.name, field="model.moe.router.name")
    k = router.choices(moe.pool + moe.weightless, {**router.defaults(), **router_options(moe)})
    return heterogeneous_capacity(
        tokens, k, factor, moe.pool, moe.weightless, moe.capacity_tau, moe.capacity_multiple
    )


def routing_aux(
    moe: MoEConfig, plan: RoutingPlan | SoftPlan, inputs: RouterInputs, ctx: Context
) -> dict:
    """Sums over the tokens for losses and statistics; with ``ctx.record`` the choices as well."""
    b, t = ctx.modality_bt.shape
    if isinstance(plan, SoftPlan):
        aux = {"statistics": routing_statistics(inputs, plan, inputs.num_modalities), "losses": {}}
        if ctx.record:
            # No choice is made; the expert whose slots a token mixes most of stands for one.
            mixed_bte = plan.combine.sum(axis=-1).reshape(b, t, -1)
            heaviest = mixed_bte.argmax(axis=-1, keepdims=True).astype(jnp.int32)
            aux["expert_ids"] = aux["chosen_ids"] = heaviest
            aux["weights"] = mixed_bte.max(axis=-1, keepdims=True)
            aux["logits"] = inputs.logits.reshape(b, t, -1)
        return aux
    aux: dict[str, Any] = {
        "statistics": routing_statistics(inputs, plan, inputs.num_modalities),
        "losses": {
            loss.name: ROUTER_LOSSES.get(loss.name, field="model.moe.losses").statistics(
                inputs, plan, **loss.options
            )
            for loss in moe.losses
        },
    }
    if moe.causal_router_decay and ctx.train:
        aux["statistics"] |= last_taken(inputs, plan)
    if ctx.record:
        aux["expert_ids"] = plan.expert_ids.reshape(b, t, -1)
        aux["chosen_ids"] = plan.chosen().reshape(b, t, -1)
        aux["weights"] = plan.weights.reshape(b, t, -1)
        aux["logits"] = inputs.logits.reshape(b, t, -1)
    return aux
