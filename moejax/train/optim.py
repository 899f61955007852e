"""The optimizer of a config: schedule, groups of parameters, weight decay, what is frozen."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax.config.schema import Config, OptimConfig
from moejax.errors import UserError
from moejax.train.balance import controlled_rules
from moejax.train.freeze import freeze_masks, trainable
from moejax.train.leaves import is_box, named_leaves, nearest_names, own_axes, path_name
from moejax.train.optimizers import OPTIMIZERS, Schedule

__all__ = ["OPTIMIZERS", "Optimizer", "decay_mask", "make_optimizer", "make_schedule", "path_name"]

# The label of the parameters that are in no group of optim.groups.
_REST = "rest"
# No leaf at all: what an optimizer has nothing to do with.
_NONE = optax.MaskedNode()


class Optimizer(NamedTuple):
    """What changes the parameters.

    Attributes:
      transform: clipping and learning rates included. It takes parameters and gradients with or
        without the leaves that are frozen as a whole, and gives updates without them.
      schedule: the learning rate of a group of scale 1.
      frozen: the masks of moejax.train.freeze, a tree with the structure of the bare parameters.
    """

    transform: optax.GradientTransformation
    schedule: Schedule
    frozen: Any


def make_optimizer(config: Config, params: Any) -> Optimizer:
    """The optimizer of ``config``.

    Args:
      config: the experiment; ``train.steps`` is the length of the schedule.
      params: parameters or their shapes, boxed with the logical names of their axes where there
        are any.

    Raises:
      UserError: an optimizer that is not registered, or a rule that no parameter meets.
    """
    optim = config.optim
    schedule = make_schedule(optim, config.train.steps)
    rules = (*optim.freeze, *controlled_rules(params))
    frozen = freeze_masks(params, rules, getattr(config.model, "modalities", ()))
    inner = _grouped(optim, schedule, trainable(frozen, params))
    if optim.clip_norm > 0:
        inner = optax.chain(optax.clip_by_global_norm(optim.clip_norm), inner)

    def init(params):
        return inner.init(trainable(frozen, params))

    def update(updates, state, params=None):
        return inner.update(trainable(frozen, updates), state, trainable(frozen, params))

    return Optimizer(optax.GradientTransformation(init, update), schedule, frozen)


def _grouped(optim: OptimConfig, schedule: Schedule, params: Any) -> optax.GradientTransformation:
    """The optimizer of each parameter: that of its group, else ``optim.name``."""
    OPTIMIZERS.get(optim.name, field="optim.name")
    labels = _labels(optim, params)
    settings = {_REST: (optim, 1.0)}
    for i, group in enumerate(optim.groups):
        OPTIMIZERS.get(group.name or optim.name, field=f"optim.groups[{i}].name")
        decay = group.weight_decay if group.weight_decay >= 0 else optim.weight_decay
        own = dataclasses.replace(optim, name=group.name or optim.name, weight_decay=decay)
        settings[_group(i)] = own, group.scale

    def make(label: str) -> optax.GradientTransformation:
        own, scale = settings[label]
        only = jax.tree.map(lambda x, leaf: leaf if x == label else _NONE, labels, params)
        rate = schedule if scale == 1 else lambda count: scale * schedule(count)
        return OPTIMIZERS.get(own.name)(own, rate, decay_mask(only, own.no_decay), only)

    used = sorted(set(jax.tree.leaves(labels))) or [_REST]
    if used == [_REST]:
        return make(_REST)
    return optax.partition({label: make(label) for label in used}, labels)


def _labels(optim: OptimConfig, params: Any) -> Any:
    """For each parameter the label of the first group whose pattern is found in its path."""
    names = named_leaves(params)
    found = {
        name: next((i for i, group in enumerate(optim.groups) if re.search(group.match, name)), -1)
        for name in names
    }
    for i, group in enumerate(optim.groups):
        if i in found.values():
            continue
        why = f"is found in no parameter that is trained{nearest_names(group.match, names)}"
        if any(re.search(group.match, name) for name in names):
            why = "only in parameters of the groups before it; put it first"
        raise UserError(f"optim.groups[{i}].match: {group.match!r} {why}")

    def label(path, _) -> str:
        number = found[path_name(path)]
        return _group(number) if number >= 0 else _REST

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_box)


def _group(number: int) -> str:
    return f"group_{number}"


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
        return len(own_axes(leaf)) > 1

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_box)
