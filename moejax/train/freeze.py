"""``optim.freeze``: parameters that training never changes, or one modality's tower of them.

A rule is a regular expression that is looked for in the path of a parameter, or such an expression
and the modality whose tower is meant::

    optim.freeze = ("embedding_vd", "head_dv", "stack/.*@text")
    --config.optim.freeze=stack                              # one rule on the command line
    --config.optim.freeze="('embedding_vd', '@text')"        # several

``PATTERN@text`` freezes the rows of ``text`` in the untied parameters (those with a tower for each
modality) and leaves shared ones alone; ``@text`` is all of that tower. What is frozen keeps its
bytes: no update, weight decay or moving average reaches it. It adds nothing to the gradient norm
that is clipped and reported. A parameter that is frozen as a whole is not differentiated and has no
optimizer state; one with frozen rows has both, its gradient being zero there.

A mask is a tree like the parameters' of False (trained), True (frozen), or a bool array
that broadcasts against the parameter (True in the rows that are frozen).
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.errors import UserError, did_you_mean
from moejax.train.leaves import (
    is_box,
    modality_axis,
    named_leaves,
    nearest_names,
    path_name,
    shape_of,
    towers_of,
)


def freeze_masks(params: Any, rules: tuple[str, ...], modalities: tuple[str, ...]) -> Any:
    """The mask of each parameter.

    Args:
      params: parameters or their shapes, boxed with the logical names of their axes.
      rules: ``optim.freeze``.
      modalities: ``model.modalities``; () for a model without.

    Raises:
      UserError: a rule that freezes nothing, a modality that is not there, or nothing is left.
    """
    frozen = {name: np.zeros((), bool) for name in named_leaves(params)}
    for rule in rules:
        rows = _rows_of(rule, params, modalities)
        if not rows:
            raise UserError(f"optim.freeze: {rule!r} {_why_nothing(rule, params)}")
        for name, found in rows.items():
            frozen[name] = frozen[name] | found
    if frozen and all(found.all() for found in frozen.values()):
        raise UserError("optim.freeze: leaves no parameter to train; take a rule away")

    def mask(path, leaf) -> Any:
        rows = frozen[path_name(path)]
        return rows if rows.any() and not rows.all() else bool(rows.all())

    return jax.tree_util.tree_map_with_path(mask, params, is_leaf=is_box)


def trainable(masks: Any, params: Any) -> Any:
    """``params`` with ``optax.MaskedNode`` (no leaf at all) for what is frozen as a whole."""
    nothing = optax.MaskedNode()
    return jax.tree.map(lambda mask, leaf: nothing if mask is True else leaf, masks, params)


def combine(masks: Any, old: Any, new: Any) -> Any:
    """What is frozen from ``old``, the rest from ``new`` (a tree of :func:`trainable`).

    A frozen value is taken over, never computed: adding a zero would turn -0.0 into 0.0.
    """

    def one(mask, old_leaf, new_leaf):
        if mask is True:
            return old_leaf
        return new_leaf if mask is False else jnp.where(mask, old_leaf, new_leaf)

    return jax.tree.map(one, masks, old, new)


def count_frozen(masks: Any, params: Any) -> int:
    """How many numbers of ``params`` are frozen."""

    def one(mask, leaf) -> int:
        shape = shape_of(leaf)
        rows = np.asarray(mask)
        return int(rows.sum()) * (math.prod(shape) // rows.size)

    return sum(jax.tree.leaves(jax.tree.map(one, masks, params)))


def _rows_of(rule: str, params: Any, modalities: tuple[str, ...]) -> dict[str, np.ndarray]:
    """``{path: mask}`` of the parameters that one rule freezes."""
    pattern, at, tower = _split(rule)
    if at and tower not in modalities:
        there = did_you_mean(tower, modalities) if modalities else "; this model has none"
        raise UserError(f"optim.freeze: {rule!r} names no modality of the model{there}")
    rows = {}
    for name, leaf in named_leaves(params).items():
        if not re.search(pattern, name):
            continue
        if not at:
            rows[name] = np.ones((), bool)
            continue
        owners, axis = towers_of(name, leaf, modalities), modality_axis(leaf)
        if tower in owners and axis is not None:
            own = np.array([owner == tower for owner in owners])
            others = tuple(i for i in range(len(shape_of(leaf))) if i != axis)
            rows[name] = np.expand_dims(own, others)
    return rows


def _why_nothing(rule: str, params: Any) -> str:
    pattern, _, tower = _split(rule)
    names = named_leaves(params)
    if any(re.search(pattern, name) for name in names):
        return (
            f"freezes nothing: no parameter it is found in has a tower for {tower} alone "
            f"(model.untie); without @{tower} it freezes what all modalities share"
        )
    return f"is found in no parameter{nearest_names(pattern, names)}"


def _split(rule: str) -> tuple[str, str, str]:
    """``"PATTERN@MODALITY"`` -> its parts; paths of parameters hold no ``@``."""
    return rule.partition("@")
