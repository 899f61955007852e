"""The "routing" evaluator: what the experts of a model were given, on a split.

Numbers, each the mean over the layers of experts (under ``routing/``):

* ``entropy``, ``margin``, ``max_violation``, ``drop_fraction``, ``null_fraction``,
  ``experts_per_token``: as they are logged in training (moejax.routing.stats.summarise);
* ``expert_entropy``: H(expert), how evenly the choices are spread, in nats;
* ``token_entropy``: H(expert | token id). Far below it, routing follows the token alone
  (OpenMoE, arXiv 2402.01739, section 4.1); beside it ``shuffled_token_entropy`` for token ids dealt
  anew within each modality, which is what counting few tokens of each id gives by chance;
* ``modality_entropy``: H(expert | modality);
* ``dead_experts``: experts with weights that have less than a hundredth of the even share;
* ``MODALITY/experts_used``: exp H(expert) of the choices of a modality: as many experts, all alike
  in use, would be as uneven. 1 where all its tokens are with one expert, 0 without a choice.

A vision transformer has a token's place in the picture for its id, and ``class_entropy``, H(expert
| class), for pictures with labels. A diffusion transformer too: it is shown every picture at
``TIMES`` noise levels, spread as in training, and has ``time_entropy``, H(expert | noise level). A
model of several tasks is asked for each of them about every picture; they are its modalities. Of
soft routing the choice of a token is the expert whose slots it mixes most of.

The tokens of two towers are those of a picture and then those of its text, as if they were one row;
a layer counts those of its own tower, and ``MODALITY/experts_used`` and ``class_entropy`` are means
over the layers that are given such tokens.

It draws the load of the experts by modality and which are chosen together, for models of patches
also the experts of each class, place and noise level, and those on pictures; and leaves its counts
and the choices of a few rows in ``workdir/arrays`` for ``moejax report``.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.routing import (
    NONE,
    LayerCounts,
    agreement,
    by_weight,
    entropy,
    overlap,
    shuffled_within,
)
from moejax.analysis.routing_record import NAME, RoutingRecord
from moejax.config.schema import Config, DiTConfig, PairConfig, PatchesConfig, TaskViTConfig
from moejax.errors import UserError
from moejax.objectives.multitask import with_task
from moejax.objectives.routing import routings
from moejax.ops.diffusion_times import quantile_times
from moejax.parallel.batches import put_batch
from moejax.routing import summarise
from moejax.train.denoising import noisy_pictures
from moejax.train.evaluate import EVALUATORS, EvalContext, EvalResult
from moejax.train.routing_log import RoutingLayer, has_experts, routing_layers
from moejax.train.rows_shown import (
    PICTURES,
    check_one_size,
    in_whole_rows,
    modalities_of,
    pictures_of,
    pieces_of,
    token_rows,
    valid_tokens,
)

# Rows of the first batch whose choices are kept; where a row is a picture, PICTURES.
ROWS = 4
# Noise levels at which a diffusion model is asked.
TIMES = 8
SUMMARIES = (
    "entropy",
    "margin",
    "max_violation",
    "drop_fraction",
    "null_fraction",
    "experts_per_token",
)
ENTROPIES = ("expert_entropy", "token_entropy", "shuffled_token_entropy", "modality_entropy")


@EVALUATORS.register("routing")
def routing(context: EvalContext) -> EvalResult:
    """Load, entropies and drops of the experts: numbers, pictures and what a report shows."""
    from moejax.train.routing_pictures import (
        draw_classes,
        draw_experts,
        draw_patches,
        draw_places,
        draw_times,
        draw_together,
    )

    model = context.config.model
    rng = np.random.default_rng(0)
    layers: list[RoutingLayer] = []
    counts: dict[RoutingLayer, LayerCounts] = {}
    sums: Any = None
    rows: dict[str, np.ndarray] = {}
    for batch, recorded in recorded_batches(context):
        valid = valid_tokens(batch)
        if sums is None:
            layers = routing_layers(model, depths(recorded))
            for layer in layers:
                experts = num_experts(recorded, layer, model)
                counts[layer] = LayerCounts(experts, len(modalities_of(model)))
        statistics = {name: value["statistics"] for name, value in recorded.items()}
        statistics = jax.tree.map(lambda x: np.asarray(x, np.float64), statistics)
        sums = statistics if sums is None else jax.tree.map(np.add, sums, statistics)
        dealt = shuffled_within(batch["tokens"][valid], batch["modality"][valid], rng)
        for layer, counted in counts.items():
            chosen, kept = choices_of(recorded, layer, counted.experts)
            counted.add(
                chosen,
                kept,
                valid,
                batch["tokens"],
                dealt,
                batch["modality"],
                batch.get("token_labels"),
                batch.get("token_times"),
            )
        if not rows:
            rows = _rows(context, batch, valid, recorded, counts)
    tokens_lm = _tokens(model, sums, layers)
    record = _record(context, counts, tokens_lm.max(axis=0), rows)
    images = {f"{NAME}_experts": draw_experts(record)}
    if record.by_class.any():
        images[f"{NAME}_classes"] = draw_classes(record)
    if record.by_patch.any():
        images[f"{NAME}_places"] = draw_places(record)
        images[f"{NAME}_patches"] = draw_patches(record)
    if record.by_time.any():
        images[f"{NAME}_times"] = draw_times(record)
    # Where a token has one expert, none are chosen together.
    if (record.together.sum(axis=(1, 2)) > np.trace(record.together, axis1=1, axis2=2)).any():
        images[f"{NAME}_together"] = draw_together(record)
    return EvalResult(_values(record, sums, layers, tokens_lm), images, {NAME: record.arrays()})


def check(config: Config) -> None:
    """UserError unless the model has experts, and tokens that can be shown."""
    if not has_experts(config.model):
        raise UserError(
            f"eval.metrics: 'routing' needs a model with experts, and model.name="
            f"{config.model.name} has none; leave it out, or set model.moe.num_experts and a "
            "block such as 'moe' in model.block_pattern"
        )
    if config.data.format != "tokens" and not isinstance(config.model, PatchesConfig):
        raise UserError(
            "eval.metrics: 'routing' shows tokens of sequences or patches, and model.name="
            f"{config.model.name} has none; leave it out (train/router/... is logged anyway)"
        )
    check_one_size(config, NAME)
    if jax.process_count() > 1:
        raise UserError(
            "eval.metrics: 'routing' runs on one host; leave it out, and use moejax eval"
        )


def metric_names(config: Config) -> list[str]:
    """What :func:`routing` returns."""
    used = [f"{name}/experts_used" for name in modalities_of(config.model)]
    names = (*SUMMARIES, *ENTROPIES, "dead_experts", *used)
    if getattr(config.model, "num_classes", 0) or isinstance(config.model, PairConfig):
        names = (*names, "class_entropy")
    if isinstance(config.model, DiTConfig):
        names = (*names, "time_entropy")
    return [f"routing/{name}" for name in names]


routing.check = check
routing.metric_names = metric_names


def recorded_batches(context: EvalContext):
    """(numpy batch, what :func:`moejax.nn.moe.routing_aux` records of it) over the split."""
    config, model = context.config, context.config.model
    noisy = (
        functools.partial(noisy_pictures, config.objective, model.num_classes)
        if isinstance(model, DiTConfig)
        else None
    )
    forward = context.program("routing", functools.partial(_forward, context.model, noisy))
    for rows, on_device, time in _asked(context):
        recorded = jax.device_get(forward(context.params, on_device, time))
        if not recorded:
            raise UserError(
                "eval.metrics: 'routing' needs a block with experts; model.block_pattern="
                f"{model.block_pattern} has none"
            )
        yield rows, in_whole_rows(model, recorded)


def _asked(context: EvalContext) -> Iterator[tuple[dict, dict, int]]:
    """(rows of tokens, batch on the device, number of its noise level) over the split.

    Each batch comes once, or for each noise level of a model that denoises, or for each task.
    """
    model = context.config.model
    ask = context.program("routing task", functools.partial(_for_task, context.config))
    for batch, on_device in context.batches():
        if isinstance(model, TaskViTConfig):
            for task in range(len(model.modalities)):
                asked = jax.device_get(ask(on_device, jnp.int32(task)))
                # Classes are those of the pictures, whatever is asked.
                rows = token_rows(model, {**asked, "labels": batch["labels"]})
                yield rows, put_batch(asked, context.mesh), 0
        elif isinstance(model, DiTConfig):
            rows = token_rows(model, batch)
            for time in range(TIMES):
                yield {**rows, "token_times": np.full_like(rows["tokens"], time)}, on_device, time
        else:
            yield token_rows(model, batch), on_device, 0


def _for_task(config: Config, batch: dict, task: jax.Array) -> dict[str, jax.Array]:
    """The batch whose pictures are all asked for a task, by its number."""
    task_b = jnp.full(batch["labels"].shape, task, jnp.int32)
    groups = getattr(config.objective, "groups", ())
    return with_task(batch, config.model.modalities, task_b, batch["index"], groups)


def _forward(model: Any, noisy: Any, params: Any, batch: dict, time: Any) -> dict[str, dict]:
    if noisy is not None:
        batch = noisy(batch, time, TIMES)[0]
    if "segments" in batch:
        # Rows that only fill up the batch count for nothing: padding.
        real = (batch["weights"] > 0).any(axis=1, keepdims=True)
        batch = {**batch, "segments": jnp.where(real, batch["segments"], 0)}
    aux = model.apply({"params": params}, batch, train=False, record=True).aux
    return {name: _inner(aux, name) for name, _ in routings(aux)}


def _inner(aux: Mapping[str, Any], name: str) -> dict[str, Any]:
    for part in name.split("/"):
        aux = aux[part]
    wanted = ("statistics", "expert_ids", "chosen_ids", "weights")
    return {key: aux[key] for key in wanted}


def depths(recorded: Mapping[str, dict]) -> dict[str, int]:
    """How many layers lie under each name."""
    return {name: len(value["expert_ids"]) for name, value in recorded.items()}


def num_experts(recorded: Mapping[str, dict], layer: RoutingLayer, model: Any) -> int:
    """What a token of the layer chooses from: all columns but shared experts."""
    return recorded[layer.name]["statistics"]["chosen_me"].shape[-1] - model.moe.shared_competing


def choices_of(
    recorded: Mapping[str, dict], layer: RoutingLayer, experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """([b, t, k] chosen, kept) in a layer; what is kept in the order of the weights.

    NONE stands where there is no choice.
    """
    own = {key: recorded[layer.name][key] for key in ("expert_ids", "chosen_ids", "weights")}
    ids, chosen, weights = (value[layer.index] for value in own.values())
    return np.where(chosen < experts, chosen, NONE), by_weight(ids, weights, experts)


def routing_agreement(context: EvalContext, params: Any, others: Any) -> dict[str, np.ndarray]:
    """How far two sets of parameters route the tokens of a split alike.

    For example, between two checkpoints of a run::

        first, last = moejax.load(workdir, 80), moejax.load(workdir)
        routing_agreement(last.eval_context(), first.params, last.params)["first"]

    Returns:
      For each layer of experts, [l]: ``first``, the share of tokens whose expert of the largest
      weight is the same, and ``overlap``, the share of their experts that tokens have in both.
    """
    found: list[list[tuple[float, float, int]]] = []
    model = context.config.model
    with jax.set_mesh(context.mesh):
        both = (recorded_batches(context.with_params(each)) for each in (params, others))
        for (batch, ours), (_, theirs) in zip(*both, strict=True):
            valid = valid_tokens(batch)
            row = []
            for layer in routing_layers(model, depths(ours)):
                experts = num_experts(ours, layer, model)
                a, b = (choices_of(each, layer, experts)[1][valid] for each in (ours, theirs))
                # Tokens of the other tower have no choice in either.
                given = ((a != NONE) | (b != NONE)).any(axis=-1).sum()
                row.append((agreement(a, b), overlap(a, b), given))
            found.append(row)
    values_blq = np.asarray(found, np.float64)
    weights = values_blq[..., 2:]
    mean = np.nansum(values_blq[..., :2] * weights, axis=0) / np.maximum(weights.sum(axis=0), 1)
    return {"first": mean[:, 0], "overlap": mean[:, 1]}


def _rows(
    context: EvalContext,
    batch: Mapping[str, np.ndarray],
    valid: np.ndarray,
    recorded: Mapping[str, dict],
    counts: Mapping[RoutingLayer, LayerCounts],
) -> dict[str, np.ndarray]:
    """The part of a record that shows single tokens."""
    shown = PICTURES if isinstance(context.config.model, PatchesConfig) else ROWS
    tokens = batch["tokens"][:shown]
    kept = [
        choices_of(recorded, layer, counted.experts)[1][:shown] for layer, counted in counts.items()
    ]
    most = max(ids.shape[-1] for ids in kept)
    full = lambda ids: np.pad(ids, [(0, 0)] * 2 + [(0, most - ids.shape[-1])], constant_values=NONE)
    pictures, places, grid = pictures_of(context, {k: v[:shown] for k, v in batch.items()})
    return {
        "row_tokens": tokens,
        "row_modality": batch["modality"][:shown],
        "row_valid": valid[:shown],
        "row_pieces": pieces_of(context, tokens),
        "row_experts": np.stack([*map(full, kept)]),
        "pictures": pictures,
        "places": places,
        "grid": grid,
    }


def _record(
    context: EvalContext,
    counts: dict[RoutingLayer, LayerCounts],
    tokens_m: np.ndarray,
    rows: dict,
) -> RoutingRecord:
    model = context.config.model
    widest = max(counted.experts for counted in counts.values())

    def stacked(name: str, axes: int) -> np.ndarray:
        values = [getattr(counted, name) for counted in counts.values()]
        pads = [
            [(0, 0)] * (value.ndim - axes) + [(0, widest - value.shape[-1])] * axes
            for value in values
        ]
        return np.stack([np.pad(v, pad) for v, pad in zip(values, pads, strict=True)])

    of_token = [counted.by_token.entropies() for counted in counts.values()]
    moe = model.moe
    kinds = {"zero": moe.zero_experts, "copy": moe.copy_experts, "constant": moe.constant_experts}
    experts = np.asarray([counted.experts for counted in counts.values()], np.int32)
    return RoutingRecord(
        layers=np.asarray([layer.layer for layer in counts], np.int32),
        iterations=np.asarray([layer.iteration for layer in counts], np.int32),
        experts=experts,
        num_ffn=experts - np.int32(moe.weightless),
        modalities=np.asarray(modalities_of(model)),
        weightless=np.asarray(
            [f"{kind} {i}" for kind, number in kinds.items() for i in range(number)], "U16"
        ),
        tokens=tokens_m,
        chosen=stacked("chosen", 1),
        kept=stacked("kept", 1),
        together=stacked("together", 2),
        dropped=stacked("dropped", 0),
        choices=stacked("choices", 0),
        expert_entropy=np.asarray([marginal for marginal, _ in of_token]),
        token_entropy=np.asarray([given for _, given in of_token]),
        shuffled_token_entropy=np.asarray([c.by_shuffled.entropies()[1] for c in counts.values()]),
        modality_entropy=np.asarray([c.by_modality.entropies()[1] for c in counts.values()]),
        **(_of_pictures(context, counts, widest) if isinstance(model, PatchesConfig) else {}),
        **rows,
    )


def _of_pictures(
    context: EvalContext, counts: Mapping[RoutingLayer, LayerCounts], widest: int
) -> dict[str, np.ndarray]:
    """The part of a record that is about classes and patches."""
    model: Any = context.config.model
    names = getattr(context.pipeline.source, "categories", ()) or range(model.num_classes)
    wide = lambda table: np.pad(table, [(0, 0), (0, widest - table.shape[1])])
    first = model.first_patch
    return {
        "classes": np.asarray([str(name) for name in names], "U32"),
        "by_class": np.stack([wide(c.by_label.table(len(names))) for c in counts.values()]),
        "by_patch": np.stack(
            [wide(c.by_token.table(first + model.num_patches)[first:]) for c in counts.values()]
        ),
        "class_entropy": np.asarray([c.by_label.entropies()[1] for c in counts.values()]),
        **(_of_times(context, counts, wide) if isinstance(model, DiTConfig) else {}),
    }


def _of_times(context: EvalContext, counts: Mapping[RoutingLayer, LayerCounts], wide) -> dict:
    """The part of a record that is about noise levels: the middle of each."""
    middles = (jnp.arange(TIMES) + 0.5) / TIMES
    return {
        "times": np.asarray(quantile_times(context.config.objective, middles)),
        "by_time": np.stack([wide(c.by_time.table(TIMES)) for c in counts.values()]),
        "time_entropy": np.asarray([c.by_time.entropies()[1] for c in counts.values()]),
    }


def _tokens(model: Any, sums: Any, layers: list[RoutingLayer]) -> np.ndarray:
    """[l, m]: the tokens of each modality that layers were given; a tower knows its own alone."""
    tokens_lm = np.zeros((len(layers), len(modalities_of(model))))
    for tokens_m, layer in zip(tokens_lm, layers, strict=True):
        own = sums[layer.name]["tokens_m"][layer.index]
        first = len(tokens_m) - len(own) if layer.name.startswith("text/") else 0
        tokens_m[first : first + len(own)] = own
    return tokens_lm


def _values(
    record: RoutingRecord, sums: Any, layers: list[RoutingLayer], tokens_lm: np.ndarray
) -> dict[str, float]:
    by_layer = []
    for layer, num_ffn in zip(layers, record.num_ffn, strict=True):
        own = jax.tree.map(lambda x, i=layer.index: jnp.asarray(x[i]), sums[layer.name])
        by_layer.append(summarise(own, num_ffn=int(num_ffn)))
    values = {
        f"routing/{name}": float(np.mean([float(found[name]) for found in by_layer]))
        for name in SUMMARIES
    }
    entropies = {f"routing/{name}": float(np.mean(getattr(record, name))) for name in ENTROPIES}
    values = {**values, **entropies, "routing/dead_experts": float(record.dead().mean())}
    used_lm = np.exp(entropy(record.chosen)) * record.chosen.any(axis=-1)
    used_m = used_lm.sum(axis=0) / np.maximum((tokens_lm > 0).sum(axis=0), 1)
    for name, used in zip(record.modalities, used_m, strict=True):
        values[f"routing/{name}/experts_used"] = float(used)
    if np.isfinite(record.class_entropy).any():
        values["routing/class_entropy"] = float(np.nanmean(record.class_entropy))
    if np.isfinite(record.time_entropy).any():
        values["routing/time_entropy"] = float(record.time_entropy.mean())
    return values
