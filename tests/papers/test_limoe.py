"""LIMoE's losses of entropy on a router's matrix alone: without them a modality collapses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load_config
from moejax.routing import ROUTER_LOSSES, ROUTERS, RouterInputs
from moejax.routing.normalise import entropy

pytestmark = pytest.mark.usefixtures("quick_compiles")
MOE = load_config("limoe").model.moe
STARTS, WIDTH, STEPS, RATE = 4, 16, 2000, 10.0
# Of the task on the router, as weak as the losses of balance.
PULL = 0.005
IMAGE, TEXT = range(2)
MODALITY = np.repeat([IMAGE, TEXT], [48, 9]).astype(np.int32)


def make_start(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, d], which have more in common with their modality than of their own; a router."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(2, WIDTH))
    common *= 3 / np.linalg.norm(common, axis=1, keepdims=True)
    x_nd = common[MODALITY] + rng.normal(scale=0.5, size=(len(MODALITY), WIDTH))
    router_de = rng.normal(scale=0.1, size=(WIDTH, MOE.num_experts))
    return x_nd.astype(np.float32), router_de.astype(np.float32)


def route(router_de, x_nd, rng=None):
    """(inputs, plan) of the config's router, all tokens in one group; noise where ``rng`` is."""
    inputs = RouterInputs(
        logits=(x_nd @ router_de)[None],
        valid=jnp.ones((1, len(MODALITY)), bool),
        modality=jnp.asarray(MODALITY)[None],
        token_ids=jnp.asarray(MODALITY)[None],
        rng=rng,
        num_ffn=MOE.num_experts,
        num_modalities=2,
        train=rng is not None,
    )
    router = ROUTERS.get(MOE.router.name).function
    return inputs, router(inputs, top_k=MOE.top_k, **MOE.router.options)


@functools.partial(jax.jit, static_argnums=2)
def trained(x_snd, router_sde, losses):
    """The routers [s, d, e] after gradient steps on the losses and on a task that feeds itself.

    The task raises the weight of the expert that a token has: an expert gets better at what it is
    given, and is given more of it.
    """

    def loss(router_de, x_nd, rng):
        inputs, plan = route(router_de, x_nd, rng)
        total = -PULL * plan.weights.mean()
        for one in losses:
            known = ROUTER_LOSSES.get(one.name)
            sums = known.statistics(inputs, plan, **one.options)
            total += one.coefficient * known.value(sums, **one.options)
        return total

    def train(x_nd, router_de):
        def step(router_de, number):
            rng = jax.random.fold_in(jax.random.key(0), number)
            return router_de - RATE * jax.grad(loss)(router_de, x_nd, rng), None

        return jax.lax.scan(step, router_de, jnp.arange(STEPS))[0]

    return jax.vmap(train)(x_snd, router_sde)


class Use(NamedTuple):
    """Experts in use, [s, m], as the exponential of an entropy: 1 is a collapse, E all alike."""

    by_choice: np.ndarray
    by_probability: np.ndarray
    of_one_token: np.ndarray


@jax.jit
@jax.vmap
def use(x_nd, router_de) -> Use:
    plan = route(router_de, x_nd)[1]
    mean = lambda values: jnp.stack([values[0, m == MODALITY].mean(axis=0) for m in range(2)])
    chosen = jax.nn.one_hot(plan.expert_ids[..., 0], MOE.num_experts)
    entropies = entropy(mean(chosen)), entropy(mean(plan.probs)), mean(entropy(plan.probs))
    return Use(*map(jnp.exp, entropies))


def test_without_losses_of_entropy_the_words_collapse():
    """From each of the same starts; importance and load are content, as words are few."""
    x_snd, router_sde = map(np.stack, zip(*map(make_start, range(STARTS)), strict=True))
    least = {one.name: one.options for one in MOE.losses}["entropy_global"]["min_experts_each"]
    assert least == (6, 3)
    found = jax.device_get(use(x_snd, trained(x_snd, router_sde, MOE.losses)))
    assert (found.by_probability >= 0.95 * np.asarray(least)).all()
    assert (found.by_choice > [6, 2.5]).all()
    assert (found.of_one_token[:, TEXT] < 1.2).all(), "words are to be sure of their expert"

    others = tuple(one for one in MOE.losses if not one.name.startswith("entropy"))
    assert len(others) == len(MOE.losses) - 2
    found = jax.device_get(use(x_snd, trained(x_snd, router_sde, others)))
    words = found.by_choice[:, TEXT]
    # 1.70 is two of nine words with another expert, which rounding decides in one of the starts.
    assert (words < 1.75).all() and words.mean() < 1.3
    assert (found.by_choice[:, IMAGE] > 5).all()
