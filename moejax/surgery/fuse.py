"""Chosen experts as one wide MLP: what layers of experts are where their choice is known (MoDE).

A router that sees the noise level alone (arXiv 2412.12953, "expert caching") chooses the same
experts for all tokens at that level. Their hidden units side by side, with each expert's weight in
its second matrix, are one dense layer: a sampler with given noise levels runs dense models, one for
each level (moejax/generate/cached_experts.py; ``moejax sample --cache-experts``). Departure: the
authors' code averages the cached experts; here they keep the weights of the router.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config.checks import require
from moejax.config.contrastive import TextSizes
from moejax.config.moe import MoEConfig
from moejax.config.trunk import TrunkConfig
from moejax.surgery.layers import as_stack, layers_of

Trunk = TypeVar("Trunk", bound=TrunkConfig)


def fuse_experts(
    wi_edf: Float[Array, "e d _"],
    wo_efd: Float[Array, "e f d"],
    ids_k: Int[Array, " k"],
    weights_k: Float[Array, " k"],
    activation: str,
) -> tuple[Float[Array, "d _"], Float[Array, "_ d"]]:
    """The MLP ``x -> sum_k w_k E_{ids_k}(x)``: [d, k f] (twice as wide for swiglu) and [k f, d].

    Ids that are no expert add nothing: their part of the second matrix is 0.
    """
    num, d = wi_edf.shape[:2]
    none = (ids_k < 0) | (ids_k >= num)
    scale_k = jnp.where(none, 0, weights_k).astype(wo_efd.dtype)
    ids_k = jnp.where(none, 0, ids_k)
    halves = 2 if activation == "swiglu" else 1
    # Gates of all experts side by side, then what they gate.
    wi_kdgf = wi_edf[ids_k].reshape(len(ids_k), d, halves, -1)
    wi_df = wi_kdgf.transpose(1, 2, 0, 3).reshape(d, -1)
    wo_kfd = wo_efd[ids_k] * scale_k[:, None, None]
    return wi_df, wo_kfd.reshape(-1, d)


def fuse_at(model: Trunk, params: Mapping[str, Any], aux: Mapping[str, Any]) -> tuple[Trunk, dict]:
    """The dense model that ``model`` is for rows whose tokens all choose as they did in ``aux``.

    Those of all noise levels are of one config, so that their parameters can be stacked.

    Args:
      model: its blocks are "moe", or "dense" ones of the width that fused experts have.
      params: its parameters, without boxes.
      aux: of a forward pass outside of training with ``record=True``, in which all rows have one
        noise level.

    Returns:
      The config, with blocks "dense" alone, and its parameters.

    Raises:
      UserError: experts that are no plain MLPs, or tokens that chose differently.
    """
    moe, plain, kinds = model.moe, MoEConfig(), model.base_kinds()
    require(
        "moe" in kinds and kinds <= {"moe", "dense"},
        "model.block_pattern",
        f"only blocks 'moe', beside 'dense' ones, can be fused; got {sorted(kinds)}",
    )
    names = ("zero_experts", "copy_experts", "constant_experts", "shared_competing", "kind")
    for name in (*names, "iterations", "pool_layers", "scale_input"):
        same = getattr(moe, name) == getattr(plain, name)
        require(same, f"model.moe.{name}", "only plain experts with weights can be fused")
    # A model that reads texts says apart what its tower of texts did.
    chosen = layers_of(model, aux.get("image", aux))
    layers = [
        _fused_layer(moe, layer, own.get("moe"))
        for layer, own in zip(layers_of(model, params["stack"]), chosen, strict=True)
    ]
    widths = {layer["ffn"]["wo_mfd"].shape[1] for layer in layers}
    activations = {moe.activation} | ({model.ffn_activation} if "dense" in kinds else set())
    require(
        len(widths) == len(activations) == 1,
        "model.moe.hidden",
        f"the dense layers beside the experts have another width or activation ({sorted(widths)})",
    )
    dense = lambda blocks: tuple("dense" for _ in blocks)
    config = dataclasses.replace(
        model,
        block_pattern=("dense",),
        first_blocks=dense(model.first_blocks),
        last_blocks=dense(model.last_blocks),
        ffn_hidden=(widths.pop(),),
        ffn_activation=moe.activation,
        moe=plain,
        **_text_as_it_is(model),
    )
    return config, {**params, "stack": as_stack(config, layers)}


def _text_as_it_is(model: Any) -> dict[str, TextSizes]:
    """The field ``text``, where there is one, with the sizes that it takes from other fields."""
    if not hasattr(model, "text"):
        return {}
    hidden = model.text.ffn_hidden or model.ffn_hidden[0]
    activation = model.text.ffn_activation or model.ffn_activation
    return {"text": dataclasses.replace(model.text, ffn_hidden=hidden, ffn_activation=activation)}


def _fused_layer(moe: MoEConfig, layer: Mapping[str, Any], aux: Any) -> dict[str, Any]:
    """A block's parameters with "ffn" for "moe"."""
    if "moe" not in layer:
        return dict(layer)
    own, choice = layer["moe"], aux["router"]
    experts = own["experts"]
    ids, weights = (
        np.asarray(choice[name]).reshape(-1, choice[name].shape[-1])
        for name in ("expert_ids", "weights")
    )
    # Padding has no experts.
    real = ids.min(axis=-1) < len(experts["wi_edf"])
    ids, weights = ids[real], weights[real]
    alike = len(ids) > 0 and (ids == ids[:1]).all() and np.allclose(weights, weights[:1])
    require(
        bool(alike),
        "model.moe.score.input",
        "tokens chose differently: only what is routed by the noise, at one level, can be fused",
    )
    wi_df, wo_fd = fuse_experts(
        experts["wi_edf"],
        experts["wo_efd"],
        jnp.asarray(ids[0]),
        jnp.asarray(weights[0]),
        moe.activation,
    )
    if "shared_wi_edf" in own:
        # One more expert, with weight 1.
        parts = (own["shared_wi_edf"], own["shared_wo_efd"], jnp.zeros(1, jnp.int32), jnp.ones(1))
        shared_wi_df, shared_wo_fd = fuse_experts(*parts, moe.activation)
        split = 2 if moe.activation == "swiglu" else 1
        halves = zip(jnp.split(wi_df, split, 1), jnp.split(shared_wi_df, split, 1), strict=True)
        wi_df = jnp.concatenate([half for pair in halves for half in pair], axis=1)
        wo_fd = jnp.concatenate([wo_fd, shared_wo_fd])
    rest = {name: leaf for name, leaf in layer.items() if name != "moe"}
    return {**rest, "ffn": jax.tree.map(lambda w: w[None], {"wi_mdf": wi_df, "wo_mfd": wo_fd})}
