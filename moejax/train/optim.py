"""Optimizers and learning-rate schedules, and which parameters are decayed."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from moejax import axes
from moejax.config import Registry
from moejax.config.schema import Config, OptimConfig

Schedule = Callable[[Any], jax.Array]

# optim.name -> function(config.optim, schedule, decay_mask) -> optax.GradientTransformation.
OPTIMIZERS: Registry[Callable[..., optax.GradientTransformation]] = Registry("optimizer")

# Axes that count parameters of one kind; the rest are the shape of a single parameter.
GROUP_AXES = (axes.LAYERS, axes.MODALITY)


class Optimizer(NamedTuple):
    """The optax transform (clipping and learning rate included) and its schedule."""

    transform: optax.GradientTransformation
    schedule: Schedule


def make_optimizer(config: Config, params: Any) -> Optimizer:
    """The optimizer of ``config``.

    Args:
      config: the experiment; ``train.steps`` is the length of the schedule.
      params: parameters or their shapes, boxed with the logical names of their axes where there
        are any.

    Raises:
      UserError: ``optim.name`` is not registered.
    """
    optim = config.optim
    schedule = make_schedule(optim, config.train.steps)
    make = OPTIMIZERS.get(optim.name, field="optim.name")
    transform = make(optim, schedule, decay_mask(params, optim.no_decay))
    if optim.clip_norm > 0:
        transform = optax.chain(optax.clip_by_global_norm(optim.clip_norm), transform)
    return Optimizer(transform, schedule)


@OPTIMIZERS.register("adamw")
def adamw(optim: OptimConfig, schedule: Schedule, decay_mask: Any):
    """AdamW (Loshchilov and Hutter, 2019), decay scaled by the learning rate."""
    return optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )


def make_schedule(optim: OptimConfig, steps: int) -> Schedule:
    """The learning rate as a function of the number of updates made before.

    Warm-up is linear and reaches the peak with update ``warmup_steps``: the first update is made
    with ``learning_rate / warmup_steps``, not with zero. After it, with ``p`` in [0, 1] the share
    of the remaining steps that is behind, and ``f`` the final fraction of the peak:

    * cosine: ``f + (1 - f) * (1 + cos(pi p)) / 2``
    * linear: ``1 - (1 - f) p``
    * constant: 1
    * wsd (warm-up, stable, decay): 1, then linear to ``f`` over the last ``decay_fraction`` of all
      steps.
    """
    warmup, final = optim.warmup_steps, optim.final_fraction
    decay_steps = max(1.0, optim.decay_fraction * steps)

    def schedule(count) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        p = jnp.clip((count - warmup) / max(1, steps - warmup), 0.0, 1.0)
        if optim.schedule == "cosine":
            fraction = final + (1 - final) * (1 + jnp.cos(jnp.pi * p)) / 2
        elif optim.schedule == "linear":
            fraction = 1 - (1 - final) * p
        elif optim.schedule == "wsd":
            left = jnp.clip((steps - count) / decay_steps, 0.0, 1.0)
            fraction = final + (1 - final) * left
        else:
            fraction = jnp.ones_like(p)
        rising = jnp.minimum(1.0, (count + 1) / max(1, warmup))
        return (optim.learning_rate * fraction * rising).astype(jnp.float32)

    return schedule


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """True where weight decay applies: a tree of bools with the structure of the bare parameters.

    A parameter is left alone when a pattern of ``no_decay`` is found in its path
    (``"blocks/attn_norm/scale"``), or when it is a vector: at most one axis beside the layer and
    modality axes that stack several of a kind.
    """
    patterns = [re.compile(pattern) for pattern in no_decay]

    def decays(path, leaf) -> bool:
        name = path_name(path)
        if any(pattern.search(name) for pattern in patterns):
            return False
        return _own_axes(leaf) > 1

    is_box = lambda x: isinstance(x, meta.AxisMetadata)
    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_box)


def path_name(path) -> str:
    """``"blocks/ffn/wi_mdf"`` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _own_axes(leaf: Any) -> int:
    names = getattr(leaf, "names", None)
    if names is None:
        return len(meta.unbox(leaf).shape)
    return sum(name not in GROUP_AXES for name in names)
