"""What every block of a stack can read."""

from typing import Any

import jax
from flax import struct

from moejax.ops.untied import ModalityLayout


class Context(struct.PyTreeNode):
    """Read-only inputs of a block; the same for all layers.

    ``mask_bts`` is [b, t, s], over these tokens (those in a cache are no part of it);
    ``segments_bt`` (0: padding) and ``image_id_bt`` are what it is made of: the two are equal where
    all tokens of a segment see each other. ``positions_bt`` is [b, t], or [b, t, axes] where a
    place has several. ``valid_bt`` is False for padding. ``rng`` is folded with the layer index by
    the stack; None when nothing is random. ``step`` is that of the training run, or None. ``pool``
    holds the weights of experts that several layers share, of which this is number ``pool_index``;
    ``depth_router`` those of a router of all blocks that skip tokens. ``ffn_gate_bt`` multiplies
    what a block's feed-forward branch adds. ``condition_bd`` is what a row is told beside its
    tokens, of which ``noise_bd`` is how noisy they are; None for models that are told nothing.
    ``words_bsz`` are the tokens of a text that it is told, of another width, ``said_bs`` False for
    padding among them. With
    ``record``, blocks give what they decided for each token in their aux, and queries beside their
    keys; with ``keep_rows`` keys and values, in training too. ``layer`` is the number of the block;
    ``row_length`` how many tokens a row is going to have, where these are the first of it;
    ``place_bc`` where in the row the tokens stand, if their keys replace given ones. In decoding
    ``stored`` has the parameters of a block, stacked with those of the other layers of its segment,
    of which it is number ``repeats`` (of segments inside of segments one number each): what skips a
    block need not read them. ``skippable`` layers are not run at all where no token is valid. In
    ``separate`` layers tokens see those of their own modality alone.
    """

    tokens_bt: jax.Array
    positions_bt: jax.Array
    modality_bt: jax.Array
    valid_bt: jax.Array
    segments_bt: jax.Array
    image_id_bt: jax.Array | None
    mask_bts: jax.Array
    layout: ModalityLayout | None
    rng: jax.Array | None
    step: jax.Array | None = None
    ffn_gate_bt: jax.Array | None = None
    condition_bd: jax.Array | None = None
    noise_bd: jax.Array | None = None
    words_bsz: jax.Array | None = None
    said_bs: jax.Array | None = None
    place_bc: jax.Array | None = None
    depth_router: Any = None
    pool: Any = None
    stored: Any = None
    repeats: tuple[jax.Array, ...] = ()
    pool_index: int = struct.field(pytree_node=False, default=0)
    train: bool = struct.field(pytree_node=False, default=False)
    record: bool = struct.field(pytree_node=False, default=False)
    keep_rows: bool = struct.field(pytree_node=False, default=False)
    skippable: bool = struct.field(pytree_node=False, default=False)
    separate: bool = struct.field(pytree_node=False, default=False)
    layer: jax.Array | int = 0
    row_length: int | None = struct.field(pytree_node=False, default=None)
