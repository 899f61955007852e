"""Fewer experts: those that a task or a modality uses, out of a model that has more.

Modular vision (arXiv 2306.17165) and Mod-Squad (arXiv 2212.08066) train one model for all tasks, of
which each task then takes the part that it uses.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.config.checks import require
from moejax.config.moe import MoEConfig
from moejax.config.trunk import TrunkConfig
from moejax.routing import ROUTERS

# Parameters of a router whose last axis counts experts, and others.
_COLUMNS = ("router_mde", "router_wo_mfe", "prototype_mde", "select_bias_e")
_OTHERS = ("attribute_mzd", "router_wi_mdf", "scale_m")


def most_used(counts_le: Float[np.ndarray, "l e"], num: int) -> Int[np.ndarray, "l k"]:
    """The ``num`` experts of each layer with the largest counts, by their numbers."""
    best = np.argsort(-np.asarray(counts_le), axis=1, kind="stable")[:, :num]
    return np.sort(best, axis=1)


def prune_experts(
    model: TrunkConfig, params: Mapping[str, Any], keep: Mapping[str, Int[np.ndarray, "l k"]]
) -> tuple[TrunkConfig, dict]:
    """The model with k experts in each layer, and its parameters.

    A token that chose none of the others, and whose weights are those of its choice alone
    (``renormalise``, or probabilities of the others that are 0), gets what it got before.

    Args:
      model: a config whose blocks "moe" choose from experts with weights alone.
      params: its parameters, without boxes.
      keep: the experts that stay in each layer, by the place of the layers of experts
        (``"segment_0/block_1/moe"``, as in the aux of the model); all of one number k.

    Raises:
      UserError: other experts than MLPs, a place that is left out, or fewer than ``top_k`` stay.
    """
    moe, plain = model.moe, MoEConfig()
    names = ("zero_experts", "copy_experts", "constant_experts", "shared_competing", "kind")
    for name in (*names, "iterations", "pool_layers", "allowed"):
        same = getattr(moe, name) == getattr(plain, name)
        require(same, f"model.moe.{name}", "only plain experts with weights can be taken out")
    soft = ROUTERS.get(moe.router.name).slots is not None
    require(not soft, "model.moe.router.name", "every expert of soft routing is used")
    sizes = {np.shape(ids)[1] for ids in keep.values()}
    require(len(sizes) == 1, "keep", f"each layer keeps as many experts, got {sorted(sizes)}")
    (num,) = sizes
    require(num >= moe.top_k, "model.moe.top_k", f"{moe.top_k} of {num} cannot be chosen")
    left = set(keep)

    def pruned(tree: Mapping[str, Any], path: str) -> dict:
        out = {}
        for name, value in tree.items():
            here = f"{path}/{name}" if path else name
            if name == "moe":
                require(here in keep, "keep", f"says nothing of {here}")
                left.discard(here)
                value = _prune_layer(value, np.asarray(keep[here]))
            elif isinstance(value, Mapping):
                value = pruned(value, here)
            out[name] = value
        return out

    stack = pruned(params["stack"], "")
    require(not left, "keep", f"there are no experts in {sorted(left)}")
    config = dataclasses.replace(model, moe=dataclasses.replace(moe, num_experts=num))
    return config, {**params, "stack": stack}


def _prune_layer(layer: Mapping[str, Any], ids_lk: Int[np.ndarray, "l k"]) -> dict:
    """A stack of layers of experts with these of them."""

    def take(leaf, axis: int):
        shape = [1] * leaf.ndim
        shape[0], shape[axis] = ids_lk.shape
        return jnp.take_along_axis(leaf, jnp.asarray(ids_lk).reshape(shape), axis=axis)

    router = {}
    for name, leaf in layer["router"].items():
        require(name in (*_COLUMNS, *_OTHERS), f"moe/router/{name}", "no expert can be taken out")
        router[name] = take(leaf, leaf.ndim - 1) if name in _COLUMNS else leaf
    experts = {name: take(leaf, 1) for name, leaf in layer["experts"].items()}
    return {**layer, "router": router, "experts": experts}
