"""The "attention_rank" evaluator: whose attention says least, and which blocks to skip with it.

Numbers: ``attention_rank/layer_N``, gamma-MoD's ARank of layer N (moejax.depth.attention_rank), the
mean over heads and rows; of a block with two attentions over both.

It proposes to make mixtures of depths of the layers of the lowest rank: of all but four, as the
release does, and of half the layers where that is more. What it proposes is a note with fields for
the command line, and a picture. It is no more than a proposal: the rank is that of one model on a
few rows, and no other number of layers was tried.

Blocks that only some tokens run, and those that are run again, have no rank that could be compared
with the others'. They are left as they are.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config.decoder import DecoderConfig
from moejax.config.schema import Config
from moejax.config.trunk import AROUND_OTHERS
from moejax.depth import attention_rank as rank_of_maps
from moejax.depth import layers_of_lowest_rank, shortest_pattern
from moejax.errors import UserError
from moejax.ops.attention import attention_maps, multimodal_mask
from moejax.train.evaluate import EVALUATORS, EvalContext, EvalResult

NAME = "attention_rank"
# Rows of each of the first batches that are looked at: a rank takes time as the cube of the length.
ROWS, BATCHES = 4, 2
# Layers that the release leaves as they are (the first three and the last).
LEFT = 4


@EVALUATORS.register(NAME)
def attention_rank(context: EvalContext) -> EvalResult:
    """The rank of each layer's attention, and which layers to make mixtures of depths of."""
    from moejax.train.rank_picture import draw_ranks

    model = context.config.model
    program = context.program(NAME, functools.partial(_ranks, context.model))
    sums: dict[int, float] = {}
    rows, length = 0, 0
    for batch, on_device in itertools.islice(context.batches(), BATCHES):
        real = (batch["weights"] > 0).any(axis=1)[:ROWS]
        rows, length = rows + int(real.sum()), batch["tokens"].shape[1]
        for layer, ranks in jax.device_get(program(context.params, on_device)).items():
            sums[layer] = sums.get(layer, 0.0) + float(ranks[real].sum())
    if not sums:
        raise UserError(_refusal(model))
    ranks = {layer: total / rows for layer, total in sorted(sums.items())}
    proposed = propose(model, ranks)
    fields = " ".join(overrides(model, proposed))
    done = [_base(kind) for kind in model.block_kinds()].count("mod")
    note = f"{NAME}: nothing to propose beside the {done} layers that are mixtures of depths"
    if proposed:
        numbers = ", ".join(map(str, proposed))
        note = f"{NAME}: layers of the lowest rank: {numbers}; as mixtures of depths: {fields}"
    images = {NAME: draw_ranks(ranks, model.block_kinds(), proposed, rows, length, fields)}
    values = {f"{NAME}/layer_{layer}": rank for layer, rank in ranks.items()}
    return EvalResult(values, images, notes=(note,))


def check(config: Config) -> None:
    """UserError unless there is attention that all tokens take part in."""
    model = config.model
    if not (isinstance(model, DecoderConfig) and _measured(model)):
        raise UserError(_refusal(model))
    if model.moe.pool_layers > 1:
        raise UserError(
            f"eval.metrics: {NAME!r} proposes other blocks for some layers, which those that share "
            "their experts cannot be; leave it out, or set model.moe.pool_layers=1"
        )
    if jax.process_count() > 1:
        raise UserError(
            f"eval.metrics: {NAME!r} runs on one host; leave it out, and use moejax eval"
        )


def metric_names(config: Config) -> list[str]:
    """What :func:`attention_rank` can return."""
    return [f"{NAME}/layer_{layer}" for layer in _measured(config.model)]


attention_rank.check = check
attention_rank.metric_names = metric_names


def propose(model: DecoderConfig, ranks: Mapping[int, float]) -> tuple[int, ...]:
    """The layers to make mixtures of depths of, in their order; none if there are enough."""
    bases = [_base(kind) for kind in model.block_kinds()]
    wanted = max(len(bases) - LEFT, len(bases) // 2)
    return layers_of_lowest_rank(ranks, wanted - bases.count("mod"))


def overrides(model: DecoderConfig, layers: tuple[int, ...]) -> list[str]:
    """``--config.model.block_pattern="('untied','mod')"``, ...: the fields that differ then."""
    kinds = list(model.block_kinds())
    for layer in layers:
        kinds[layer] = "mod" if kinds[layer] == model.depth.block else f"mod:{kinds[layer]}"
    names = ("first_blocks", "block_pattern", "last_blocks")
    return [
        f'--config.model.{name}="{_tuple_text(value)}"'
        for name, value in zip(names, shortest_pattern(kinds), strict=True)
        if value != getattr(model, name)
    ]


def _tuple_text(kinds: tuple[str, ...]) -> str:
    inside = ",".join(map(repr, kinds))
    return f"({inside},)" if len(kinds) == 1 else f"({inside})"


def _base(kind: str) -> str:
    return kind.partition(":")[0]


def _measured(model: DecoderConfig) -> list[int]:
    kinds = enumerate(model.block_kinds())
    return [layer for layer, kind in kinds if _base(kind) not in AROUND_OTHERS]


def _refusal(model: Any) -> str:
    blocks = f"model.block_pattern={getattr(model, 'block_pattern', ())}"
    return (
        f"eval.metrics: {NAME!r} needs blocks with attention that all tokens run, and model.name="
        f"{model.name} with {blocks} has none; leave it out, or name 'untied' or 'dense' there"
    )


def _ranks(model: Any, params: Any, batch: dict) -> dict[int, jax.Array]:
    """[b] of each layer, of the first rows of the batch."""
    from moejax.models.decoder import pictures_seen_as_one

    rows = model.apply({"params": params}, batch, train=False, record=True).rows
    seen_as_one = pictures_seen_as_one(model.config, batch)
    mask_bts = multimodal_mask(batch["segments"], seen_as_one)[:ROWS]
    found = {}
    for layers, state in _blocks(model.config, rows):
        each = [_of_attention(own, mask_bts) for own in _attentions(state)]
        if each:
            found.update(zip(layers, jnp.stack(each).mean(axis=0), strict=True))
    return found


def _blocks(config: DecoderConfig, rows: dict) -> Iterator[tuple[range, dict]]:
    """(numbers of the layers, what they return for a cache) of blocks that all tokens run."""
    from moejax.nn.stack import segments_of

    for i, segment in enumerate(segments_of(config)):
        stride = len(segment.kinds)
        for j, kind in enumerate(segment.kinds):
            first = segment.first + j
            if _base(kind) not in AROUND_OTHERS:
                layers = range(first, first + segment.repeats * stride, stride)
                yield layers, rows[f"segment_{i}"][f"block_{j}"]


def _attentions(state: dict) -> list[dict]:
    """Those of a block that gave their queries."""
    if "q" in state:
        return [state]
    inner = [value for value in state.values() if isinstance(value, dict)]
    return [found for value in inner for found in _attentions(value)]


def _of_attention(own: dict, mask_bts: jax.Array) -> jax.Array:
    """[l, b]. The maps of one layer and one row at a time."""
    if "modality" in own:
        # A layer in which tokens see those of their own modality alone.
        modality_bt = own["modality"][0, :ROWS]
        mask_bts &= modality_bt[:, :, None] == modality_bt[:, None, :]

    def of_row(args):
        q_tnh, k_tgh, kept_t, mask_ts = args
        maps_bntt = attention_maps(q_tnh[None], k_tgh[None], mask_ts[None])
        return rank_of_maps(maps_bntt, kept_t[None])[0]

    def of_layer(args):
        return jax.lax.map(of_row, (*args, mask_bts))

    return jax.lax.map(of_layer, tuple(own[name][:, :ROWS] for name in ("q", "k", "kept")))
