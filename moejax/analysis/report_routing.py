"""The section "Routing" of a report: what the experts of a run were given."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from moejax.analysis.charts import COLORS, Level, Line, line_chart, spread
from moejax.analysis.heatmaps import expert_color, heatmap, ink
from moejax.analysis.report_page import grid, picture_uri, table
from moejax.analysis.routing import DECILES, NONE, co_activation
from moejax.analysis.routing_record import (
    DEAD,
    RoutingRecord,
    consecutive_agreement,
    read_records,
)
from moejax.analysis.run import Run
from moejax.data.vocabulary import NUM_SPECIAL
from moejax.train.writers import read_rows

# Maps of single layers, layers that tokens are coloured for, and columns of a map over steps.
MOST_LAYERS, TOKEN_LAYERS, MOST_STEPS = 6, 6, 80
_TEXTS, _PATCH = 6, 11


def routing_section(run: Run) -> str:
    """The body of the section; "" for a model without experts."""
    if not run.record.get("model", {}).get("moe", {}).get("num_experts"):
        return ""
    parts = [_over_time(run), _loads(read_rows(run.workdir / "routing.jsonl"), run)]
    records = read_records(run.workdir, run.field("eval.split", "val"))
    if not records:
        command = f"moejax eval --workdir {run.workdir} --metrics routing"
        parts.append(
            "<p>Which tokens went to which experts is not recorded yet. Make it with "
            f"<code>{escape(command)}</code>, or in training by adding routing to eval.metrics."
            "</p>"
        )
        return "".join(parts)
    step = max(records)
    return "".join([*parts, *_record_parts(records[step], step), _agreement(records)])


def routing_keys(run: Run) -> set[str]:
    """The values of metrics.jsonl that this section shows."""
    return {key for key in run.keys if key.startswith(("train/router/", "eval/routing/"))}


def _over_time(run: Run) -> str:
    """Values of the routing over the steps, in training and in evaluations."""
    names = [key.split("/", 2)[2] for key in run.keys if key in routing_keys(run)]
    losses = {loss.get("name") for loss in run.record["model"]["moe"].get("losses", ())}
    charts = []
    for name in dict.fromkeys(names):
        if name.startswith("shuffled_"):
            continue
        lines = [
            Line("train", run.points(f"train/router/{name}"), COLORS[0]),
            Line(
                run.field("eval.split", "eval"),
                run.points(f"eval/routing/{name}"),
                COLORS[1],
                dots=True,
            ),
        ]
        lines = [line for line in lines if line.points]
        percent = name.endswith("_fraction")
        if percent and not any(y for line in lines for _, y in line.points):
            continue
        chance = run.last(f"eval/routing/shuffled_{name}")
        levels = [Level("shuffled tokens", chance)] if chance is not None else []
        title = name.replace("_", " ") + " loss" * (name in losses)
        charts.append(
            line_chart(title, lines, levels, last_step=run.step, percent=percent, zero=True)
        )
    return grid(charts)


def _loads(rows: Sequence[Mapping[str, Any]], run: Run) -> str:
    """Step x expert for each layer, from routing.jsonl."""
    rows = [row for row in rows if row.get("layers")]
    if not rows:
        return ""
    groups = np.array_split(np.arange(len(rows)), min(len(rows), MOST_STEPS))
    steps = [str(rows[group[-1]]["step"]) for group in groups]
    layers = rows[-1]["layers"]
    shown = spread(range(len(layers)), MOST_LAYERS)
    shares: list[tuple[str, np.ndarray]] = []
    for i in shown:
        counts = np.asarray([np.asarray(row["layers"][i]["load"]).sum(axis=0) for row in rows])
        joined = np.asarray([counts[group].sum(axis=0) for group in groups], np.float64)
        total = joined.sum(axis=1, keepdims=True)
        share = np.divide(joined, total, out=np.full(joined.shape, np.nan), where=total > 0)
        iteration = layers[i].get("iteration")
        title = f"layer {layers[i]['layer']}" + (
            f", run {iteration + 1}" if iteration is not None else ""
        )
        shares.append((title, share.T))
    top = max(float(np.nanmax(share, initial=0)) for _, share in shares)
    maps = [
        heatmap(
            title, share, [f"{e}" for e in range(len(share))], steps, columns_title="step", top=top
        )
        for title, share in shares
    ]
    note = f", {len(shown)} of {len(layers)} layers" if len(shown) < len(layers) else ""
    return heading(
        f"Load over time{note}",
        "The share of the training tokens' choices that each expert (row) had.",
    ) + grid(maps)


def _record_parts(record: RoutingRecord, step: int) -> list[str]:
    return [
        heading(
            f"Experts by layer and modality, at step {step}",
            f"The share of the choices; {_listed(record)} evaluated.",
        ),
        _by_modality(record),
        heading(
            "Routing by token",
            "Entropies of a choice in nats: H(expert), of all choices; given the modality; given "
            "the token id; and given ids dealt anew among the tokens of a modality, which is what "
            "so few tokens of each id give by chance. Near 0 given the id, routing follows the "
            "token alone."
            + " A patch has its place in the picture for its id."
            * (record.by_patch.size > 0),
        ),
        _entropies(record),
        _by_class(record),
        _by_time(record),
        _by_place(record),
        _drops(record),
        _together(record),
        _texts(record),
        _patches(record),
    ]


def _listed(record: RoutingRecord) -> str:
    counted = zip(record.tokens, record.modalities, strict=True)
    return ", ".join(f"{int(count):,} {name}" for count, name in counted) + " tokens"


def _by_modality(record: RoutingRecord) -> str:
    loads = [("all tokens", record.load())]
    loads += [(str(name), record.load(m)) for m, name in enumerate(record.modalities)]
    top = max(float(np.nanmax(load, initial=0)) for _, load in loads)
    names, columns = record.layer_names, record.expert_names()
    return grid(
        heatmap(title, load, names, columns, columns_title="expert", top=top)
        for title, load in loads
    )


def _by_class(record: RoutingRecord) -> str:
    """Class x expert, for models that know the classes of pictures."""
    if not record.by_class.any():
        return ""
    classes, layers = [str(name) for name in record.classes], record.picture_layers
    maps = _maps(record, record.class_share(), "classes", classes)
    text = (
        "The share of the choices of the tokens of each class's pictures. Given the class, "
        f"H(expert) is {_numbers(record.class_entropy[layers])} nats by layer, in which "
        f"{_numbers(record.dead()[layers], 0)} experts have less than {DEAD:.0%} of an even share."
    )
    return heading("Experts by class", text) + grid(maps)


def _by_time(record: RoutingRecord) -> str:
    """Noise level x expert, for models that denoise."""
    if not record.by_time.any():
        return ""
    names = [f"{time:.3g}" for time in record.times]
    maps = _maps(record, record.time_share(), "times", names)
    text = (
        "The share of the choices of the tokens at each noise level, by the middle of its times, "
        "from data to noise. Given the level, H(expert) is "
        f"{_numbers(record.time_entropy)} nats by layer."
    )
    return heading("Experts by noise level", text) + grid(maps)


def _maps(record: RoutingRecord, shares_lxe: np.ndarray, what: str, rows: list[str]) -> list[str]:
    """A map of each layer shown, with its experts for columns; all of one scale."""
    shown = spread(record.picture_layers, MOST_LAYERS)
    top, columns = float(np.nanmax(shares_lxe[shown])), record.expert_names()
    return [
        heatmap(
            f"{record.layer_names[i]}, {what}",
            shares_lxe[i],
            rows,
            columns,
            columns_title="expert",
            top=top,
        )
        for i in shown
    ]


def _by_place(record: RoutingRecord) -> str:
    """For each layer and expert the grid of patches."""
    if not record.by_patch.any():
        return ""
    rows, columns = map(int, record.grid)
    shares = record.patch_share()
    panels = [
        (f"{record.layer_names[i]}, expert {record.expert_name(i, e)}", shares[i, :, e])
        for i in spread(record.picture_layers, 2)
        for e in spread(range(int(record.experts[i])), TOKEN_LAYERS)
    ]
    top = max(float(np.nanmax(values, initial=0)) for _, values in panels)
    maps = [
        heatmap(
            title,
            values.reshape(rows, columns),
            [f"{r}" for r in range(rows)],
            [f"{c}" for c in range(columns)],
            top=top,
        )
        for title, values in panels
    ]
    text = "The share of the choices of the patches at each place (row and column of patches)."
    return heading("Experts by place", text) + grid(maps)


def _numbers(values: np.ndarray, digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _entropies(record: RoutingRecord) -> str:
    rows = [
        (name, f"{math.log(e):.3f}", *(f"{value:.3f}" for value in values), f"{_share(values):.1%}")
        for name, e, *values in zip(
            record.layer_names,
            record.experts,
            record.expert_entropy,
            record.modality_entropy,
            record.token_entropy,
            record.shuffled_token_entropy,
            strict=True,
        )
    ]
    head = (
        "",
        "most (log E)",
        "H(expert)",
        "given modality",
        "given token id",
        "given shuffled id",
        "explained by the id, over chance",
    )
    return table(head, rows, numbers=range(1, 7))


def _share(values: Sequence[float]) -> float:
    """What the id takes away of the entropy that shuffled ids leave."""
    _, _, given, shuffled = values
    return 1 - given / shuffled if shuffled > 0 else 0.0


def _drops(record: RoutingRecord) -> str:
    title = "Drop rate by position"
    if not record.dropped.any():
        return heading(title, "No choice was dropped.")
    tenths = [f"{10 * i}%" for i in range(DECILES)]
    rates = heatmap(
        "choices dropped", record.drop_rate(), record.layer_names, tenths, columns_title="of a row"
    )
    text = "The share of the choices that a capacity took away, in each tenth of the rows."
    return heading(title, text) + grid([rates])


def _together(record: RoutingRecord) -> str:
    shares = co_activation(record.together)
    if not np.nan_to_num(shares).any():
        return ""
    shown = spread(range(len(shares)), MOST_LAYERS)
    names = record.expert_names()
    top = float(np.nanmax(shares[shown]))
    maps = [
        heatmap(record.layer_names[i], own, names[: len(own)], names, columns_title="also", top=top)
        for i in shown
        for own in [shares[i][: record.experts[i]]]
    ]
    text = "The share of an expert's tokens (row) that have another expert (column) too."
    return heading("Experts chosen together", text) + grid(maps)


def _agreement(records: dict[int, RoutingRecord]) -> str:
    title = "Agreement between evaluations"
    names, values = consecutive_agreement(records)
    if not names:
        text = "Needs two evaluations of the same rows; there is one."
        return heading(title, text)
    layers = records[max(records)].layer_names
    text = (
        f"The share of the tokens of {len(records[max(records)].row_tokens)} fixed rows whose "
        "first expert is the same as in the evaluation before."
    )
    return heading(title, text) + grid(
        [heatmap("same first expert", values, layers, names, columns_title="steps", top=1.0)]
    )


def _legend(record: RoutingRecord) -> str:
    names = [*map(str, range(int(record.num_ffn.max()))), *map(str, record.weightless)]
    chips = [_chip(name, expert_color(i), f"expert {name}") for i, name in enumerate(names)]
    chips.append(_chip("none", expert_color(NONE), "no expert"))
    note = " Point at a token for its number." if len(chips) > 17 else ""
    return f"<p class='tokens'>Expert {''.join(chips)}{note}</p>"


def _color(record: RoutingRecord, layer: int, ids: np.ndarray) -> str:
    """Of a token with these experts."""
    return expert_color(record.color_index(layer, ids[0]))


def _chip(text: str, color: str, title: str) -> str:
    return (
        f'<span style="background:{color};color:{ink(color)}" title="{escape(title)}">'
        f"{escape(text)}</span>"
    )


def _texts(record: RoutingRecord) -> str:
    """Stretches of text of the recorded rows, a line for each layer."""
    found = _stretches(record)[:_TEXTS]
    if not found:
        return ""
    shown = spread(range(len(record.layers)), TOKEN_LAYERS)
    lines = []
    for row, start, end in found:
        for layer in shown:
            chips = [
                _chip(_visible(str(record.row_pieces[row, t])), _color(record, layer, own), names)
                for t in range(start, end)
                for own in [record.row_experts[layer, row, t]]
                for names in [_experts_of(record, layer, own)]
            ]
            name = escape(record.layer_names[layer])
            lines.append(f"<tr><td>{name}</td><td class='tokens'>{''.join(chips)}</td></tr>")
        lines.append("<tr><td colspan='2'></td></tr>")
    text = "Each token in the colour of its expert of the largest weight."
    return (
        heading("Tokens by expert", text)
        + _legend(record)
        + f"<div class='scroll'><table><tbody>{''.join(lines[:-1])}</tbody></table></div>"
    )


def _stretches(record: RoutingRecord) -> list[tuple[int, int, int]]:
    """(row, first, past the last) of tokens with a text in a row, marks at the ends included."""
    found = []
    for row, pieces in enumerate(record.row_pieces):
        written = (pieces != "") & record.row_valid[row]
        edges = np.flatnonzero(np.diff(written.astype(int), prepend=0, append=0))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            # A stretch of marks alone says nothing.
            if (record.row_tokens[row, start:end] >= NUM_SPECIAL).any():
                found.append((row, int(start), int(end)))
    return found


def _visible(piece: str) -> str:
    """Spaces and line ends of a token, so that they can be seen."""
    return piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(
        " ", "\N{NO-BREAK SPACE}"
    )


def _experts_of(record: RoutingRecord, layer: int, ids: np.ndarray) -> str:
    names = [record.expert_name(layer, e) for e in ids if e != NONE]
    return f"{record.layer_names[layer]}: " + ("expert " + ", ".join(names) if names else "none")


def _patches(record: RoutingRecord) -> str:
    """The pictures of the recorded rows; for each layer their tokens in the experts' colours."""
    if not len(record.pictures):
        return ""
    shown = spread(record.picture_layers, TOKEN_LAYERS)
    rows, columns = map(int, record.grid)
    size = f'width="{columns * _PATCH}" height="{rows * _PATCH}"'
    heads = "".join(
        f'<td><svg {size}><image id="picture{i}" {size} href="{picture_uri(picture)}"/></svg></td>'
        for i, picture in enumerate(record.pictures)
    )
    lines = [f"<tr><td>picture</td>{heads}</tr>"]
    for layer in shown:
        cells = []
        for i, (row, start) in enumerate(record.places):
            own = record.row_experts[layer, row, start : start + rows * columns]
            squares = "".join(
                f'<rect x="{p % columns * _PATCH}" y="{p // columns * _PATCH}" width="{_PATCH}" '
                f'height="{_PATCH}" fill="{_color(record, layer, ids)}">'
                f"<title>{escape(_experts_of(record, layer, ids))}</title></rect>"
                for p, ids in enumerate(own)
            )
            use = f'<use href="#picture{i}"/>'
            cells.append(f'<td><svg {size}>{use}<g class="over">{squares}</g></svg></td>')
        lines.append(f"<tr><td>{escape(record.layer_names[layer])}</td>{''.join(cells)}</tr>")
    text = "Pictures as their tokens hold them, each token in the colour of its first expert."
    return (
        heading("Pictures by expert", text)
        + _legend(record)
        + "<div class='scroll'><table class='patches'><tbody>"
        + f"{''.join(lines)}</tbody></table></div>"
    )


def heading(title: str, text: str) -> str:
    """A part of the section."""
    return f"<h3>{escape(title)}</h3><p>{escape(text)}</p>"
