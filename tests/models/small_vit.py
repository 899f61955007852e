"""A vision transformer of two small blocks, for the tests of vision models."""

import dataclasses

from moejax.config.moe import MoEConfig
from moejax.config.vision import ViTConfig

PATCH, SIDE, CLASSES = 4, 16, 5
EXPERTS = MoEConfig(num_experts=4, hidden=24, routing_group=0)


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
