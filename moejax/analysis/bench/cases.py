"""What is timed: sizes, inputs, and the implementations of one layer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.experts.mlp import expert_mlp
from moejax.ops.untied import modality_layout, swiglu, untied_swiglu

SKEWS = ("balanced", "zipf")
DIRECTIONS = ("fwd", "fwd_bwd")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a layer: tokens, width, hidden width, experts, experts of a token.

    ``slow`` names implementations that would take minutes, left out unless asked for.
    """

    t: int
    d: int
    f: int
    e: int
    k: int
    slow: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bench:
    """A layer, the sizes at which to time it, and what computes it.

    Attributes:
      cases: by name.
      implementations: name -> ``(x_td, ids_tk, gates_tk, wi, wo) -> out_td``. ``auto`` is the very
        function that training calls; ``dense_mlp`` is the baseline, a SwiGLU of one weight at the
        same FLOPs, and computes something else.
      gated: whether the gates have a gradient; without, they are 1.
    """

    cases: dict[str, Case]
    implementations: dict[str, Callable]
    gated: bool


def inputs(case: Case, skew: str, dtype: str) -> dict[str, jax.Array]:
    """x, ids, gates and weights; ``zipf``: expert i is drawn in proportion to 1 / (i + 1)."""
    rng = np.random.default_rng(0)
    popularity = -np.log(np.arange(1, case.e + 1)) if skew == "zipf" else np.zeros(case.e)
    # The k largest of perturbed scores are k draws without replacement.
    scores = popularity + rng.gumbel(size=(case.t, case.e))
    gates = rng.random((case.t, case.k))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    return {
        "x": normal(case.t, case.d),
        "ids": jnp.asarray(np.argsort(-scores, axis=1)[:, : case.k], jnp.int32),
        "gates": jnp.asarray(gates / gates.sum(axis=1, keepdims=True), dtype),
        "wi": normal(case.e, case.d, 2 * case.f, scale=case.d**-0.5),
        "wo": normal(case.e, case.f, case.d, scale=case.f**-0.5),
        "cotangent": normal(case.t, case.d),
    }


def dense_weights(case: Case, dtype: str) -> dict[str, jax.Array]:
    """Weights of the baseline: the hidden width of all experts of a token together."""
    shapes = {"wi": (case.d, 2 * case.k * case.f), "wo": (case.k * case.f, case.d)}
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(rng.standard_normal(shape) * shape[0] ** -0.5, dtype)
        for name, shape in shapes.items()
    }


def dense_mlp(x, ids, gates, wi, wo):
    """One SwiGLU for all tokens."""
    del ids, gates
    return swiglu(x @ wi) @ wo


def dropless(x, ids, gates, wi, wo):
    """What a MoE layer calls."""
    return expert_mlp(x, wi, wo, ids, gates)


def untied(x, ids, gates, wi, wo):
    """What an untied feed-forward layer calls; the expert of a token is its modality."""
    del gates
    layout = modality_layout(ids.reshape(1, -1), wi.shape[0])
    return untied_swiglu(x[None], (wi,), (wo,), layout)[0]


def ragged_dot(x, ids, gates, wi, wo):
    """Sort, ``lax.ragged_dot``, unsort, by autodiff."""
    t, k = ids.shape
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.bincount(ids.reshape(-1), length=wi.shape[0]).astype(jnp.int32)
    hidden = swiglu(lax.ragged_dot(x[order // k], wi, sizes))
    y = lax.ragged_dot(hidden, wo, sizes)[jnp.argsort(order)].reshape(t, k, -1)
    return jnp.einsum("tkd,tk->td", y, gates)


def one_hot_einsum(capacity: int) -> Callable:
    """Dispatch and combine as products with [t, e, c] (GShard), with room for every choice."""

    def run(x, ids, gates, wi, wo):
        choice = jax.nn.one_hot(ids, wi.shape[0], dtype=jnp.int32)
        flat = choice.reshape(-1, wi.shape[0])
        place = ((jnp.cumsum(flat, axis=0) - flat) * flat).sum(axis=1).reshape(ids.shape)
        slot = jax.nn.one_hot(place, capacity, dtype=x.dtype)
        combine = jnp.einsum("tke,tkc,tk->tec", choice.astype(x.dtype), slot, gates)
        dispatch = jnp.einsum("tke,tkc->tec", choice.astype(x.dtype), slot)
        hidden = swiglu(jnp.einsum("ecd,edf->ecf", jnp.einsum("tec,td->ecd", dispatch, x), wi))
        return jnp.einsum("tec,ecd->td", combine, jnp.einsum("ecf,efd->ecd", hidden, wo))

    return run


def implementation(bench: Bench, name: str, ids: jax.Array) -> Callable:
    """The function of that name; only ``one_hot_einsum`` depends on the routing, for its room."""
    if name == "one_hot_einsum":
        return one_hot_einsum(int(np.bincount(np.asarray(ids).reshape(-1)).max()))
    return bench.implementations[name]


_COMMON = {"dense_mlp": dense_mlp, "ragged_dot": ragged_dot, "one_hot_einsum": one_hot_einsum}
_TINY = {
    "moe_layer": Case(t=64, d=16, f=8, e=4, k=2),
    "untied_ffn": Case(t=64, d=16, f=8, e=2, k=1),
}

BENCHES = {
    "moe_layer": Bench(
        cases={
            "A": Case(t=4096, d=256, f=512, e=8, k=2),
            "B": Case(t=4096, d=256, f=128, e=64, k=8, slow=("ragged_dot", "one_hot_einsum")),
            "tiny": _TINY["moe_layer"],
        },
        implementations={"auto": dropless, **_COMMON},
        gated=True,
    ),
    "untied_ffn": Bench(
        cases={"C": Case(t=4096, d=256, f=1024, e=2, k=1), "tiny": _TINY["untied_ffn"]},
        implementations={"auto": untied, **_COMMON},
        gated=False,
    ),
}
