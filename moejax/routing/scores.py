"""From tokens to logits: functions, and the parameters that they need.

All in float32 or wider, whatever the type of the tokens: a bfloat16 logit has three digits, and
experts are told apart by less.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from moejax.config.checks import require
from moejax.config.registry import Registry
from moejax.routing.plan import accepted, keyword_defaults

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
      choices: the values that an option may have, for options that are names.
      draws: whether the function takes a fourth argument, a key to draw from, or None where
        nothing is to be drawn (evaluation).
    """

    function: Callable[..., Array]
    parameters: Callable[..., Shapes]
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    draws: bool = False

    def defaults(self) -> dict[str, Any]:
        """The options and their default values."""
        return {**keyword_defaults(self.parameters), **keyword_defaults(self.function)}

    def shapes(self, d: int, e: int, m: int = 1, **options: Any) -> Shapes:
        """Parameters for width d, e columns of logits, and m modalities (1: shared by all)."""
        return self.parameters(d, e, m, **accepted(self.parameters, options))

    def apply(
        self,
        params: Params,
        x_snd: Array,
        modality_sn: Array,
        rng: Array | None = None,
        **options: Any,
    ) -> Float[Array, "s n e"]:
        """The logits of tokens [s, n, d], or of what a score reads in their place."""
        drawn = (rng,) if self.draws else ()
        return self.function(params, x_snd, modality_sn, *drawn, **accepted(self.function, options))


SCORES: Registry[Score] = Registry("score")


def score(
    name: str, parameters: Callable[..., Shapes], draws: bool = False, **choices: tuple[str, ...]
) -> Callable[[Callable], Callable]:
    """Decorator that registers a function as the score ``name``; see :class:`Score`."""

    def add(function: Callable) -> Callable:
        SCORES.register(name)(Score(function, parameters, choices, draws))
        return function

    return add


def select_by_modality(
    table_m: Float[Array, " m"], modality_sn: Int[Array, "s n"]
) -> Float[Array, "s n"]:
    """``table[modality]``, or its one value; a masked sum, whose gradient is no scatter."""
    if table_m.shape[0] == 1:
        return jnp.broadcast_to(table_m[None], modality_sn.shape)
    here = jax.nn.one_hot(modality_sn, table_m.shape[0], dtype=bool)
    return jnp.where(here, table_m[None, None], 0).sum(axis=-1)


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


def uniform_by_fan_in(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """``U(-1/sqrt(d), 1/sqrt(d))`` for weights [m, d, e]."""
    limit = shape[1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _linear_parameters(
    d: int, e: int, m: int, *, init: str = "normal", init_std: float = 0.02, alike: int = 1
) -> Shapes:
    require(
        alike > 0 and e % alike == 0,
        "model.moe.score.options.alike",
        f"{alike} columns that begin alike do not divide the {e} of the router",
    )
    draw = uniform_by_fan_in if init == "uniform" else initializers.normal(init_std)

    def draw_alike(key, shape, dtype):
        return jnp.repeat(draw(key, (*shape[:-1], e // alike), dtype), alike, axis=-1)

    return {"router_mde": ((m, d, e), draw if alike == 1 else draw_alike)}


@score("linear", _linear_parameters, init=("normal", "uniform"))
def linear(
    params: Params, x_snd: Float[Array, "s n d"], modality_sn: Int[Array, "s n"]
) -> Float[Array, "s n e"]:
    """``x W``, without bias; W is "normal" with ``init_std``, or "uniform" up to 1 / sqrt(d).

    Of every ``alike`` columns the weights begin equal (Dynamic-DINO, arXiv 2507.17436, where they
    are those of the slices of one feed-forward layer: the k = ``alike`` best of them then are one
    whole layer).
    """
    return project(x_snd, params["router_mde"], modality_sn)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def _mlp_parameters(
    d: int, e: int, m: int, *, hidden: int = 0, init_std: float = 0.02, wi_std: float = 0.0
) -> Shapes:
    hidden = hidden or 8 * e
    return {
        "router_wi_mdf": ((m, d, hidden), initializers.normal(wi_std or d**-0.5)),
        "router_wo_mfe": ((m, hidden, e), initializers.normal(init_std)),
    }


@score("mlp", _mlp_parameters, activation=tuple(ACTIVATIONS))
def mlp(
    params: Params,
    x_snd: Float[Array, "s n d"],
    modality_sn: Int[Array, "s n"],
    *,
    activation: str = "tanh",
) -> Float[Array, "s n e"]:
    """``act(x W_1) W_2``, without biases.

    The code of MoE++ (arXiv 2410.07348) has ``hidden`` = 8 E, which 0 stands for, and tanh. A
    ``wi_std`` of 0 is ``d^-0.5``.
    """
    hidden = ACTIVATIONS[activation](project(x_snd, params["router_wi_mdf"], modality_sn))
    return project(hidden, params["router_wo_mfe"], modality_sn)


def _cosine_parameters(
    d: int,
    e: int,
    m: int,
    *,
    learn_scale: bool = False,
    temperature: float = 1.0,
    init_std: float = 0.0,
) -> Shapes:
    draw = initializers.normal(init_std or d**-0.5)
    shapes: Shapes = {"prototype_mde": ((m, d, e), draw)}
    if learn_scale:
        shapes["scale_m"] = ((m,), initializers.constant(1 / temperature))
    return shapes


def unit_length(values: Float[Array, "*rows"], axis: int) -> Float[Array, "*rows"]:
    """Vectors over their lengths; 0 where they are 0, which has a gradient too.

    As in Soft MoE's code: no division by zero, and unit length but for 1e-6.
    """
    return values * lax.rsqrt(jnp.square(values).sum(axis=axis, keepdims=True) + 1e-6)


@score("cosine", _cosine_parameters)
def cosine(
    params: Params,
    x_snd: Float[Array, "s n d"],
    modality_sn: Int[Array, "s n"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "s n e"]:
    """``cos(x, mu_e) / temperature``: whatever the lengths of x and mu.

    X-MoE, arXiv 2204.09179 (there in a narrower space). Soft MoE, arXiv 2308.00951,
    is ``learn_scale``: 1 / temperature is where the learned scale begins. ProMoE's prototypes
    (arXiv 2510.24711) have no temperature and ``init_std`` 0.02; an ``init_std`` of 0 is
    ``d^-0.5``.
    """
    dtype = jnp.promote_types(x_snd.dtype, jnp.float32)
    prototype_mde = unit_length(params["prototype_mde"], 1)
    logits = project(unit_length(x_snd.astype(dtype), -1), prototype_mde, modality_sn)
    if "scale_m" not in params:
        return logits / temperature
    scale_m = params["scale_m"].astype(logits.dtype)
    return logits * select_by_modality(scale_m, modality_sn)[..., None]


def _attribute_parameters(
    d: int, e: int, m: int, *, attributes: int = 8, init_std: float = 0.02
) -> Shapes:
    return {
        "attribute_mzd": ((m, attributes, d), initializers.normal(1.0)),
        "router_mde": ((m, d, e), initializers.normal(init_std)),
    }


@score("attributes", _attribute_parameters)
def attributes(
    params: Params, attributes_snz: Float[Array, "s n z"], modality_sn: Int[Array, "s n"]
) -> Float[Array, "s n e"]:
    """``LN(gelu(a W_a)) W`` of a vector a that says what the token is, never of the token itself.

    Uni-Perceiver-MoE, arXiv 2206.04674, where a holds 8 bits: the task, the modality,
    whether attention is causal. Tokens of equal attributes then have equal experts. The norm has
    no scale, which the matrix after it makes up for. :func:`modality_attributes` is the simplest a.
    """
    hidden = jax.nn.gelu(project(attributes_snz, params["attribute_mzd"], modality_sn))
    hidden = hidden - hidden.mean(axis=-1, keepdims=True)
    hidden = hidden * lax.rsqrt(jnp.square(hidden).mean(axis=-1, keepdims=True) + 1e-5)
    return project(hidden, params["router_mde"], modality_sn)


def modality_attributes(modality_sn: Int[Array, "s n"], num: int) -> Float[Array, "s n z"]:
    """The modality alone as attributes: 1 at its place of ``num``."""
    return jax.nn.one_hot(modality_sn, num)


def add_previous(
    logits_sne: Float[Array, "s n e"],
    previous_sne: Float[Array, "s n e"] | None,
    residual_ee: Float[Array, "e e"],
) -> Float[Array, "s n e"]:
    """``G_l = W x + W_g G_{l-1}`` (MoE++, arXiv 2410.07348); the first layer has no G_{l-1}.

    G are logits, without softmax, and the gradient goes through all layers.
    """
    if previous_sne is None:
        return logits_sne
    previous_sne = previous_sne.astype(logits_sne.dtype)
    return logits_sne + jnp.einsum(
        "sne,ef->snf", previous_sne, residual_ee.astype(logits_sne.dtype), precision="highest"
    )


def allowed_experts(
    table_me: Bool[Array, "m e"], modality_sn: Int[Array, "s n"]
) -> Bool[Array, "s n e"]:
    """For each token the experts that its modality may choose."""
    here = jax.nn.one_hot(modality_sn, table_me.shape[0], dtype=bool)
    return (here[..., None] & table_me[None, None]).any(axis=2)
