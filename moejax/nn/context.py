"""What every block of a stack can read."""

import jax
from flax import struct

from moejax.ops.untied import ModalityLayout


class Context(struct.PyTreeNode):
    """Read-only inputs of a block; the same for all layers.

    ``mask_bts`` is [b, t, s]: over the sequence itself in training, over [cache, new tokens] when
    decoding. ``rng`` is folded with the layer index by the stack; None when nothing is random.
    """

    positions_bt: jax.Array
    modality_bt: jax.Array
    mask_bts: jax.Array
    layout: ModalityLayout | None
    rng: jax.Array | None
    train: bool = struct.field(pytree_node=False, default=False)
