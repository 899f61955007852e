"""The "depth" evaluator: which tokens run the blocks that can be skipped, and what causality costs.

Numbers, under ``depth/``:

* ``loss``: nats per target with the causal rule that decoding follows; ``loss_as_trained``: with
  the choices of training, which see later tokens. ``<kind>/loss`` and ``<kind>/loss_as_trained``:
  of the targets of one kind (as of the "likelihood" evaluator). The difference is the price of
  causality: mistakes of the rule, and what training's choices tell of later tokens;
* ``agreement``: tokens for which the rule says what training's choice would have been;
  ``chosen``: tokens that training's choice takes; both over tokens that compete, all blocks;
* ``ran``: tokens that ran, of all tokens and all such blocks (steps; the first, which all run,
  too); ``<modality>/ran``.

It draws the share that ran each block by modality, and single pictures and words with the tokens
that skipped a block faded.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moejax.config.decoder import DecoderConfig
from moejax.config.schema import Config
from moejax.errors import UserError
from moejax.objectives.depth import depth_sums
from moejax.train.evaluate import EVALUATORS, EvalContext, EvalResult
from moejax.train.likelihood import KINDS, kind_of_token, score_tokens
from moejax.train.rows_shown import pictures_of, pieces_of, valid_tokens

# Rows of the first batch whose tokens are shown.
ROWS = 4


@EVALUATORS.register("depth")
def depth(context: EvalContext) -> EvalResult:
    """Who runs which block, the loss with and without later tokens in sight, and pictures."""
    from moejax.train.depth_pictures import draw_blocks, draw_tokens

    model = context.config.model
    kinds_v = kind_of_token(context.pipeline.vocabulary)
    as_told = context.program("depth", functools.partial(_forward, context.model))
    seeing = context.program("depth, seeing", functools.partial(_forward, _seeing(context.model)))
    nats = {name: np.zeros((2, len(KINDS))) for name in ("loss", "loss_as_trained")}
    sums = {name: 0.0 for name in ("agreeing", "chosen", "count")}
    ran_lm: Any = 0.0
    tokens_m = np.zeros(len(model.modalities))
    shown: dict[str, Any] = {}
    for batch, on_device in context.batches():
        told = jax.device_get(as_told(context.params, on_device, kinds_v))
        seen = jax.device_get(seeing(context.params, on_device, kinds_v))
        for name, found in (("loss", told), ("loss_as_trained", seen)):
            scored = found["scored"]
            nats[name] += np.stack([scored["nats"].sum(0), scored["targets"].sum(0)])
        for one in told["sums"].values():
            for name in sums:
                sums[name] += float(one[name].sum())
        valid = valid_tokens(batch)
        layers = kept_of(model, told["kept"])
        kept_lbt = np.stack(list(layers.values()))
        of_modality_mbt = np.stack(
            [valid & (batch["modality"] == i) for i in range(len(model.modalities))]
        )
        # Not of bools: their sum is one.
        ran_lm = ran_lm + np.einsum("lbt,mbt->lm", kept_lbt, of_modality_mbt, dtype=np.float64)
        tokens_m += of_modality_mbt.sum(axis=(1, 2))
        if not shown:
            few = {key: value[:ROWS] for key, value in batch.items()}
            pictures, places, grid = pictures_of(context, few)
            shown = {
                "pieces": pieces_of(context, few["tokens"]),
                "valid": valid[:ROWS],
                "pictures": pictures,
                "places": places,
                "grid": grid,
                "kept": kept_lbt[:, :ROWS],
            }
    share_lm = ran_lm / np.maximum(tokens_m, 1)
    values = {"depth/ran": float(ran_lm.sum() / (tokens_m.sum() * len(ran_lm)))}
    for name, share, count in zip(model.modalities, share_lm.mean(axis=0), tokens_m, strict=True):
        if count:
            values[f"depth/{name}/ran"] = float(share)
    if sums["count"]:
        values["depth/agreement"] = sums["agreeing"] / sums["count"]
        values["depth/chosen"] = sums["chosen"] / sums["count"]
    for name, (total, targets) in nats.items():
        values[f"depth/{name}"] = float(total.sum() / targets.sum())
        for i, kind in enumerate(KINDS):
            if targets[i]:
                values[f"depth/{kind}/{name}"] = float(total[i] / targets[i])
    names = list(layers)
    images = {
        "depth_blocks": draw_blocks(share_lm, names, model.modalities),
        "depth_tokens": draw_tokens(names=names, **shown),
    }
    return EvalResult(values, images)


def check(config: Config) -> None:
    """UserError unless tokens can skip a block of the model."""
    model = config.model
    kinds = model.base_kinds() if isinstance(model, DecoderConfig) else set()
    if not ("mod" in kinds or ("recursive" in kinds and model.recursion.router != "none")):
        raise UserError(
            "eval.metrics: 'depth' needs a block that tokens can skip; leave it out, or name 'mod' "
            "(or 'recursive', with a model.recursion.router) in model.block_pattern"
        )
    if jax.process_count() > 1:
        raise UserError("eval.metrics: 'depth' runs on one host; leave it out, and use moejax eval")


def metric_names(config: Config) -> list[str]:
    """What :func:`depth` can return."""
    model = config.model
    names = ["loss", "loss_as_trained", "agreement", "chosen", "ran"]
    names += [f"{name}/ran" for name in model.modalities]
    kinds = [kind for kind in KINDS if kind in ("structure", *model.modalities)]
    names += [f"{kind}/{name}" for kind in kinds for name in ("loss", "loss_as_trained")]
    return [f"depth/{name}" for name in names]


depth.check = check
depth.metric_names = metric_names


def _seeing(model: Any) -> Any:
    """The model with the choices of training, whatever its causal rule is."""
    config: DecoderConfig = model.config
    rule = dataclasses.replace(config.depth, causal_rule="none")
    return model.clone(config=dataclasses.replace(config, depth=rule))


def _forward(model: Any, params: Any, batch: dict, kinds_v: jax.Array) -> dict[str, Any]:
    out = model.apply({"params": params}, batch, train=False, record=True)
    sums = {name: one["sums"] for name, one in depth_sums(out.aux) if "sums" in one}
    return {
        "scored": score_tokens(out.logits, batch, kinds_v),
        "sums": sums,
        "kept": _kept(out.aux),
    }


def _kept(aux: Mapping[str, Any]) -> dict[str, Any]:
    """``{"segment_0/block_1": [l, (steps,) b, t]}``."""
    return {
        f"{segment}/{block}": value["depth"]["kept"]
        for segment, blocks in aux.items()
        for block, value in blocks.items()
        if "depth" in value
    }


def kept_of(config: DecoderConfig, kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[b, t] of each block that tokens can skip, by its name, in the order of the layers."""
    from moejax.nn.stack import segments_of

    found = []
    for name, value in kept.items():
        segment_name, block_name = name.split("/")
        segment = segments_of(config)[int(segment_name.removeprefix("segment_"))]
        first = segment.first + int(block_name.removeprefix("block_"))
        for index, one in enumerate(value):
            layer = first + index * len(segment.kinds)
            if one.ndim == 2:
                found.append((layer, 0, f"layer {layer}", one))
                continue
            found += [
                (layer, step, f"layer {layer}, step {step + 1}", each)
                for step, each in enumerate(one)
            ]
    return {name: one for _, _, name, one in sorted(found, key=lambda entry: entry[:2])}
