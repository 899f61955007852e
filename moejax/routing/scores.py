"""From tokens to logits: functions, and the parameters that they need.

All in float32 or wider, whatever the type of the tokens: a bfloat16 logit has three digits, and
experts are told apart by less.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from moejax.config.registry import Registry
from moejax.routing.plan import keyword_defaults

# Parameter name (with axis letters) -> (shape, initializer).
Shapes = dict[str, tuple[tuple[int, ...], Callable]]
Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Score:
    """A registered score.

    Attributes:
      function: ``(params, x_snd, modality_sn, **options) -> logits [s, n, e]``.
      parameters: ``(d, e, m, **options) -> Shapes``; all have a leading axis m, which is 1 where
        one set of parameters serves every modality.
    """

    function: Callable[..., Array]
    parameters: Callable[..., Shapes]

    def defaults(self) -> dict[str, Any]:
        """The options and their default values."""
        return {**keyword_defaults(self.parameters), **keyword_defaults(self.function)}

    def shapes(self, d: int, e: int, m: int = 1, **options: Any) -> Shapes:
        """Parameters for width d, e columns of logits, and m modalities (1: shared by all)."""
        return self.parameters(d, e, m, **_accepted(self.parameters, options))

    def apply(
        self, params: Params, x_snd: Array, modality_sn: Array, **options: Any
    ) -> Float[Array, "s n e"]:
        """The logits of tokens [s, n, d]."""
        return self.function(params, x_snd, modality_sn, **_accepted(self.function, options))


def _accepted(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    names = keyword_defaults(function)
    return {name: value for name, value in options.items() if name in names}


SCORES: Registry[Score] = Registry("score")


def score(name: str, parameters: Callable[..., Shapes]) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as the score ``name``; see :class:`Score`."""

    def add(function: Callable) -> Callable:
        SCORES.register(name)(Score(function, parameters))
        return function

    return add


def project(
    x_snd: Float[Array, "s n d"], w_mde: Float[Array, "m d e"], modality_sn: Int[Array, "s n"]
) -> Float[Array, "s n e"]:
    """``x @ w[modality]``, in float32 or wider.

    All m products are computed in one matmul and one is kept. Router matrices are thin: m * e
    columns beside the thousands of the experts' hidden widths.
    """
    m, d, e = w_mde.shape
    dtype = jnp.promote_types(jnp.promote_types(x_snd.dtype, w_mde.dtype), jnp.float32)
    x_snd, w_mde = x_snd.astype(dtype), w_mde.astype(dtype)
    if m == 1:
        return jnp.einsum("snd,de->sne", x_snd, w_mde[0], precision="highest")
    w_de = jnp.swapaxes(w_mde, 0, 1).reshape(d, m * e)
    all_snme = jnp.einsum("snd,de->sne", x_snd, w_de, precision="highest")
    all_snme = all_snme.reshape(*x_snd.shape[:2], m, e)
    here = jax.nn.one_hot(modality_sn, m, dtype=bool)
    return jnp.where(here[..., None], all_snme, 0).sum(axis=2)


def _linear_parameters(d: int, e: int, m: int, *, init_std: float = 0.02) -> Shapes:
    return {"router_mde": ((m, d, e), initializers.normal(init_std))}


@score("linear", _linear_parameters)
def linear(
    params: Params, x_snd: Float[Array, "s n d"], modality_sn: Int[Array, "s n"]
) -> Float[Array, "s n e"]:
    """``x W``, without bias."""
    return project(x_snd, params["router_mde"], modality_sn)


def allowed_experts(
    table_me: Bool[Array, "m e"], modality_sn: Int[Array, "s n"]
) -> Bool[Array, "s n e"]:
    """For each token the experts that its modality may choose."""
    here = jax.nn.one_hot(modality_sn, table_me.shape[0], dtype=bool)
    return (here[..., None] & table_me[None, None]).any(axis=2)
