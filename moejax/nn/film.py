"""The layer of experts of kind "film": shared weights, and two vectors for each expert."""

import flax.linen as nn
import jax

from moejax import axes
from moejax.config.trunk import TrunkConfig
from moejax.experts.film import film_mlp
from moejax.experts.layout import gates_by_expert
from moejax.nn.layers import fan_in_normal, param_dtype, partitioned
from moejax.routing import RoutingPlan

# How far scales lie from 1 and shifts from 0 at first; equal ones give the router no gradient.
_SPREAD = 0.02


class FilmExperts(nn.Module):
    """``model.moe`` with ``kind="film"`` (moejax/experts/film.py).

    E experts have 2 E d parameters beside the shared ones. Departure from the authors' code: there
    scale and shift are linear functions of the features (2 E d^2 parameters). All weights are
    shared by all tokens, and so nothing is exchanged between devices.
    """

    config: TrunkConfig

    @nn.compact
    def __call__(self, plan: RoutingPlan, x_btd: jax.Array) -> jax.Array:
        """[b, t, d] -> the same, of the plan's choices."""
        cfg, moe = self.config, self.config.moe
        d, f, num = cfg.d_model, moe.hidden or max(cfg.ffn_hidden), moe.num_experts
        spread = 0.0 if moe.equal_init else _SPREAD

        def around(value: float):
            draw = nn.initializers.normal(spread)
            return lambda key, shape, dtype: value + draw(key, shape, dtype)

        def weight(name: str, init, shape: tuple[int, ...], *names: str | None) -> jax.Array:
            value = self.param(name, partitioned(init, *names), shape, param_dtype(cfg))
            return value.astype(x_btd.dtype)

        matrix, vectors = fan_in_normal((0,)), (axes.LOCAL_EXPERT, axes.EMBED)
        b, t = x_btd.shape[:2]
        ids, gates = (a.reshape(b, t, -1) for a in (plan.expert_ids, plan.weights))
        return film_mlp(
            x_btd,
            gates_by_expert(ids, gates, num).astype(x_btd.dtype),
            weight("base_dz", matrix, (d, 2 * d), axes.EMBED, axes.MLP),
            weight("scale_ed", around(1.0), (num, d), *vectors),
            weight("shift_ed", around(0.0), (num, d), *vectors),
            weight("adaptor_wi_df", matrix, (d, f), axes.EMBED, axes.MLP),
            weight("adaptor_wo_fd", matrix, (f, d), axes.MLP, axes.EMBED),
        )
