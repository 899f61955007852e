"""The optimizers that a config can name, each over all parameters that it is given.

Parameters are stacks: ``[l, m, d, n, h]`` holds a matrix ``[d, n h]`` for each layer and modality.
Optimizers that see more than single numbers (Muon, Adafactor) treat each of these matrices by
itself, as if the layers and towers were not stacked.

A package of the user's own adds one with a decorated function::

    @OPTIMIZERS.register("mine")
    def mine(optim, schedule, decay_mask, params) -> optax.GradientTransformation: ...

``optim`` is ``config.optim`` with the name and the weight decay of the group, ``schedule`` the
learning rate as a function of the number of updates, ``decay_mask`` a tree of bools (True where
weight decay applies), ``params`` the shapes of the group's parameters, boxed with the logical names
of their axes. The learning rate is part of the transform, clipping is not.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax
from flax.core import meta

from moejax import axes
from moejax.config import Registry
from moejax.config.schema import OptimConfig
from moejax.train.leaves import axis_names, is_box, own_axes, shape_of

Schedule = Callable[[Any], jax.Array]

OPTIMIZERS: Registry[Callable[..., optax.GradientTransformation]] = Registry("optimizer")

# What brings a Muon update to the size of an AdamW update (arXiv 2502.16982, section 2.2).
_ADAMW_RMS = 0.2
# No leaf at all: what an optimizer has nothing to do with.
_NONE = optax.MaskedNode()


@OPTIMIZERS.register("adamw")
def adamw(optim: OptimConfig, schedule: Schedule, decay_mask: Any, params: Any):
    """AdamW (Loshchilov and Hutter, 2019), decay scaled by the learning rate."""
    del params
    return optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )


@OPTIMIZERS.register("lion")
def lion(optim: OptimConfig, schedule: Schedule, decay_mask: Any, params: Any):
    """Lion (arXiv 2302.06675): the sign of a momentum; b2 is 0.99 in the paper."""
    del params
    return optax.lion(
        schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, mask=decay_mask
    )


@OPTIMIZERS.register("sgd")
def sgd(optim: OptimConfig, schedule: Schedule, decay_mask: Any, params: Any):
    """Gradient descent with momentum b1 (0: none), decay scaled by the learning rate."""
    del params
    momentum = optax.trace(optim.b1) if optim.b1 > 0 else optax.identity()
    return optax.chain(momentum, *_decay_and_rate(optim, schedule, decay_mask))


@OPTIMIZERS.register("adafactor")
def adafactor(optim: OptimConfig, schedule: Schedule, decay_mask: Any, params: Any):
    """Adafactor (arXiv 1804.04235) without momentum; the rate is relative to each matrix's RMS."""
    one_matrix = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return optax.chain(
        each_matrix(one_matrix, params), *_decay_and_rate(optim, schedule, decay_mask)
    )


@OPTIMIZERS.register("muon")
def muon(optim: OptimConfig, schedule: Schedule, decay_mask: Any, params: Any):
    """Muon for hidden matrices, momentum b1, updates as large as AdamW's (arXiv 2502.16982).

    Vectors, embedding and head (what has a vocabulary axis) go to AdamW with the same rate.
    """

    def label(leaf) -> str:
        hidden = matrix_axes(leaf) is not None and axes.VOCABULARY not in axis_names(leaf)
        return "muon" if hidden else "adamw"

    labels = jax.tree.map(label, params, is_leaf=is_box)

    def only(name: str, tree: Any) -> Any:
        return jax.tree.map(lambda label, x: x if label == name else _NONE, labels, tree)

    def dimensions(leaf) -> optax.contrib.MuonDimensionNumbers:
        into, out = matrix_axes(leaf) or ((), ())
        return optax.contrib.MuonDimensionNumbers(into, out)

    # optax.contrib.muon is not used whole: its own division of the parameters knows no boxes.
    numbers = jax.tree.map(dimensions, only("muon", params), is_leaf=is_box)
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(
            optax.contrib.scale_by_muon(beta=optim.b1, weight_dimension_numbers=numbers),
            optax.stateless(lambda updates, _: jax.tree.map(_to_adamw_size, updates, numbers)),
            *_decay_and_rate(optim, schedule, only("muon", decay_mask)),
        ),
        "adamw": adamw(optim, schedule, only("adamw", decay_mask), params),
    }
    return optax.partition(transforms, labels)


def _to_adamw_size(update: jax.Array, numbers: Any) -> jax.Array:
    sides = (math.prod(update.shape[axis] for axis in side) for side in numbers)
    return _ADAMW_RMS * max(sides) ** 0.5 * update


def _decay_and_rate(optim: OptimConfig, schedule: Schedule, decay_mask: Any):
    yield optax.add_decayed_weights(optim.weight_decay, decay_mask)
    yield optax.scale_by_learning_rate(schedule)


def matrix_axes(leaf: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The axes that the matrices of a parameter map from and to; None for vectors.

    ``qkv_mdnh`` maps d to (n, h), ``out_mnhd`` (n, h) to d, a convolution (height, width, in) to
    out: a model axis in front is mapped from, else the last axis is mapped to. Axes of GROUP_AXES
    count matrices.
    """
    own = own_axes(leaf)
    if len(own) < 2:
        return None
    split = 1 if axis_names(leaf)[own[0]] == axes.EMBED else len(own) - 1
    return own[:split], own[split:]


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A parameter as a stack of its matrices [c, i, o], or of its vectors [c, i]."""

    order: tuple[int, ...]
    permuted: tuple[int, ...]
    stacked: tuple[int, ...]

    def split(self, x: jax.Array) -> jax.Array:
        return x.transpose(self.order).reshape(self.stacked)

    def join(self, x: Any) -> jax.Array:
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape(self.permuted).transpose(back)


def _stack(leaf: Any) -> _Stack:
    shape, own = shape_of(leaf), own_axes(leaf)
    counting = tuple(i for i in range(len(shape)) if i not in own)
    parts = (counting, *(matrix_axes(leaf) or (own,)))
    order = tuple(i for part in parts for i in part)
    stacked = tuple(math.prod(shape[i] for i in part) for part in parts)
    return _Stack(order, tuple(shape[i] for i in order), stacked)


def each_matrix(inner: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
    """``inner`` on each matrix and vector of ``params`` by itself.

    Its state is replicated over the mesh: meant for state that is small, as Adafactor's is.
    """
    stacks = jax.tree.map(_stack, params, is_leaf=is_box)

    def init(params):
        # Without boxes: a row or column sum has not the axes of its parameter.
        return jax.tree.map(
            lambda stack, x: jax.vmap(inner.init)(stack.split(x)), stacks, meta.unbox(params)
        )

    def update(updates, state, params=None):
        def one(stack: _Stack, update, state, param):
            new, state = jax.vmap(inner.update)(stack.split(update), state, stack.split(param))
            return stack.join(new), state

        pairs = jax.tree.map(one, stacks, updates, state, params)
        part = lambda i: jax.tree.map(lambda _, pair: pair[i], stacks, pairs)
        return part(0), part(1)

    return optax.GradientTransformation(init, update)
