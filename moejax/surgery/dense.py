"""A model with experts becomes a dense one: each layer of experts the mean of its experts.

The end of Experts Weights Averaging (EWA, arXiv 2308.06093). Where the experts are equal, and the
weights of a token's experts sum to 1, the outputs are those of the model with experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config.checks import require
from moejax.config.moe import MoEConfig
from moejax.config.schema import Config
from moejax.config.training import TrainConfig
from moejax.config.trunk import TrunkConfig
from moejax.surgery.layers import as_stack, layers_of

# Routers that give each token one expert, with weight 1.
_WEIGHT_ONE = ("forced", "hash", "random_partition")


def dense_config(config: Config) -> Config:
    """``config`` with a dense block for each block "moe", and without what is about experts.

    Nor does it have where the run began, or rules of the optimizer for parameters by their names.

    Raises:
      UserError: the model has no experts, or is no sum of MLPs whose weights sum to 1.
    """
    model = config.model
    require(
        isinstance(model, TrunkConfig) and "moe" in model.base_kinds(),
        "model.block_pattern",
        "has no block 'moe': there are no experts to average",
    )
    moe, kinds = model.moe, model.base_kinds()
    require(
        kinds <= {"moe", "dense"},
        "model.block_pattern",
        f"blocks {sorted(kinds - {'moe', 'dense'})} cannot be made dense; only 'moe' can",
    )
    one = moe.router.name in _WEIGHT_ONE or (
        moe.router.options.get("renormalise", False) and moe.router.options.get("scale", 1) == 1
    )
    require(
        one,
        "model.moe.router.name",
        f"the weights of router {moe.router.name!r} do not sum to 1, so that no one layer can "
        "stand for its experts",
    )
    weightless = ("zero_experts", "copy_experts", "constant_experts")
    for name in (*weightless, "shared_hidden", "iterations", "pool_layers", "kind", "scale_input"):
        same = getattr(moe, name) == getattr(MoEConfig(), name)
        require(same, f"model.moe.{name}", "only a layer of plain MLPs becomes one of them")
    width, activation = moe.hidden or max(model.ffn_hidden), moe.activation
    alone = kinds == {"moe"}
    require(
        alone or (max(model.ffn_hidden), model.ffn_activation) == (width, activation),
        "model.moe.hidden",
        "the dense layers beside the experts have another width or activation",
    )
    dense = lambda blocks: tuple("dense" for _ in blocks)
    changed = dataclasses.replace(
        model,
        block_pattern=dense(model.block_pattern),
        first_blocks=dense(model.first_blocks),
        last_blocks=dense(model.last_blocks),
        ffn_hidden=(width,),
        ffn_activation=activation,
        moe=MoEConfig(),
    )
    optim = dataclasses.replace(config.optim, share_rate=0.0, share_steps=0, freeze=(), groups=())
    begin = {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.name.startswith("init_")
    }
    train = dataclasses.replace(config.train, **begin)
    about = dataclasses.replace(config.about, mechanism_test="", approximate=())
    return dataclasses.replace(config, model=changed, optim=optim, train=train, about=about)


def dense_params(params: Mapping[str, Any], here: TrunkConfig, there: TrunkConfig) -> dict:
    """The parameters of the dense model: the means of the experts, and all else as it is.

    Args:
      params: of the model with experts, without boxes.
      here: the config of the dense model.
      there: the config of the model with experts.
    """
    layers = [_dense_layer(layer) for layer in layers_of(there, params["stack"])]
    return {**params, "stack": as_stack(here, layers)}


def _dense_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A block's parameters with "ffn" for "moe"."""
    if "moe" not in layer:
        return dict(layer)
    experts = layer["moe"]["experts"]
    mean = lambda weight: weight.mean(axis=0, keepdims=True)
    rest = {name: leaf for name, leaf in layer.items() if name != "moe"}
    ffn = {"wi_mdf": mean(experts["wi_edf"]), "wo_mfd": mean(experts["wo_efd"])}
    return {**rest, "ffn": ffn}
