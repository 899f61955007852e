"""A vision transformer of two small blocks, for the tests of vision models."""

import dataclasses

from moejax.config.moe import MoEConfig
from moejax.config.vision import ViTConfig

PATCH, SIDE, CLASSES = 4, 16, 5
EXPERTS = MoEConfig(num_experts=4, hidden=24, routing_group=0)

# The sizes of a config of pictures, with a text or without, by field.
SMALL_FIELDS = {
    "model.image_size": 8,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.ffn_hidden": (24,),
    "model.kernel_backend": "reference",
    "data.image_size": 8,
    "data.batch_size": 8,
}


def make_config(**changes) -> ViTConfig:
    config = ViTConfig(
        image_size=SIDE,
        patch_size=PATCH,
        num_classes=CLASSES,
        num_layers=2,
        d_model=16,
        num_heads=2,
        ffn_hidden=(24,),
        kernel_backend="reference",
    )
    return dataclasses.replace(config, **changes)
