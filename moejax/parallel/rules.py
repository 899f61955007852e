"""One table: logical parameter axis -> mesh axis."""

import flax.core.meta as meta
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import axes

RULES: dict[str, str | None] = {
    # Stacked layers stay whole: a scan step reads one slice of every leaf.
    axes.LAYERS: None,
    # Towers are few (2 or 3) and each device holds tokens of all of them.
    axes.MODALITY: None,
    # Each device keeps a part of the experts; model.moe.exchange says how tokens meet the others.
    axes.EXPERT: "expert",
    # All tokens meet shared experts, and the others of this kind are vectors.
    axes.LOCAL_EXPERT: None,
    # The one axis that every weight has: sharded for memory, gathered before use.
    axes.EMBED: "fsdp",
    # A layer's hidden units, heads or words, each computed where its weights are.
    axes.MLP: "tensor",
    axes.HEADS: "tensor",
    axes.VOCABULARY: "tensor",
    axes.HEAD_SIZE: None,
    # Convolutions are small, and their channels differ from layer to layer.
    axes.CHANNELS: None,
}


def spec(names: tuple[str | None, ...]) -> P:
    """PartitionSpec of a parameter with these logical axes."""
    return P(*(RULES[name] if name is not None else None for name in names))


def state_shardings(mesh: Mesh, abstract):
    """NamedSharding of every leaf; leaves without logical names are replicated.

    ``abstract`` is the output of ``jax.eval_shape`` on an init: leaves are boxed with the logical
    axis names that the modules declare.
    """

    def one(leaf):
        names = getattr(leaf, "names", ())
        return NamedSharding(mesh, spec(tuple(names)))

    return jax.tree.map(one, abstract, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
