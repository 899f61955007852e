"""``moejax inspect``: what a config makes, by shape evaluation; nothing is allocated or trained."""

import dataclasses
import sys
from typing import Any

from moejax.cli.common import command_parser, config_from, print_json
from moejax.config.schema import Config

_DESCRIPTION = """Parameters, FLOPs per token, and bytes and sharding on each device of a config (or
of the run in --workdir), by shape evaluation.

FLOPs are of the forward; training takes three times as many, plus what model.remat computes
again. The formula counts every matmul that a token takes part in (attention in full, as the
program multiplies it; the causal half is given too). The count is read off the program, with
the rows that padding adds in the worst case shown apart."""


def run(argv: list[str]) -> int:
    """Runs ``moejax inspect`` and returns the exit code."""
    parser = command_parser("inspect", _DESCRIPTION)
    args = parser.parse(argv)
    report = inspect(config_from(args))
    if args.json:
        print_json(report["json"])
    else:
        print(report["text"], end="")
    for warning in report["json"]["warnings"]:
        print(f"moejax: warning: {warning}", file=sys.stderr)
    return 0


def inspect(config: Config) -> dict[str, Any]:
    """``{"json": the document of --json, "text": the table of the terminal}``."""
    from moejax.analysis.decoding import decode_cost
    from moejax.analysis.flops import counted_flops, flops_by_modality, token_flops
    from moejax.analysis.params import param_table
    from moejax.api import build
    from moejax.train.setup import configure_jax

    configure_jax(config)
    model = build(config)[0]
    table = param_table(model, config)
    formula, counted = token_flops(config), counted_flops(config)
    by_modality = flops_by_modality(config) or {}
    decode = decode_cost(model, config, formula, table)
    warnings = [
        f"{name}: more than 1 MiB, and whole on each device of a sharded mesh"
        for name in table.large_replicated()
    ]
    document = {
        "config": config.about.name,
        "total_params": table.total,
        "active_params": table.active,
        "frozen_params": table.frozen,
        "params_per_modality": table.per_modality,
        "flops_per_token": formula.forward if formula else None,
        "causal_flops_per_token": formula.causal if formula else None,
        "training_flops_per_token": formula.training if formula else None,
        "flops_per_token_by_modality": {name: f.forward for name, f in by_modality.items()},
        "counted_flops_per_token": counted.forward.nominal,
        "counted_training_flops_per_token": counted.training.nominal,
        "visited_flops_per_token": counted.forward.visited,
        "visited_training_flops_per_token": counted.training.visited,
        "decode": dataclasses.asdict(decode) if decode else None,
        "flops_per": "image" if config.data.format == "images" else "token",
        "mesh": table.mesh,
        "bytes_per_device": table.bytes_per_device,
        "state_bytes_per_device": table.state_bytes_per_device,
        "specs": {row.name: list(row.spec) for row in table.rows},
        "warnings": warnings,
    }
    return {"json": document, "text": _text(document, table)}


def _text(document: dict[str, Any], table) -> str:
    lines = [
        (
            row.name,
            "x".join(map(str, row.shape)),
            row.dtype,
            f"{row.size:,}",
            _spec(row.spec),
            _bytes(row.bytes_per_device),
        )
        for row in table.rows
    ]
    head = ("parameter", "shape", "dtype", "count", "split over", "per device")
    per = document["flops_per"]
    mesh = " x ".join(f"{name}={size}" for name, size in table.mesh.items() if size > 1)
    owned = ", ".join(f"{name} {_count(size)}" for name, size in table.per_modality.items())
    text = [
        *_columns([head, *lines], right=(3, 5)),
        "",
        f"parameters    {table.total:,} total, {table.active:,} active for one token"
        + (f", {table.frozen:,} frozen" if table.frozen else ""),
        f"              {owned}",
        f"per device    {_bytes(table.bytes_per_device)} of parameters, "
        f"{_bytes(table.state_bytes_per_device)} with optimizer state (mesh {mesh or '1 device'})",
    ]
    if document["flops_per_token"] is not None:
        text.append(
            f"FLOPs/{per}   formula: forward {_count(document['flops_per_token'])} "
            f"({_count(document['causal_flops_per_token'])} with attention counted causally), "
            f"training {_count(document['training_flops_per_token'])}"
        )
    waste = document["visited_flops_per_token"] / document["counted_flops_per_token"] - 1
    text.append(
        f"FLOPs/{per}   counted: forward {_count(document['counted_flops_per_token'])}, "
        f"training {_count(document['counted_training_flops_per_token'])}; "
        f"padding adds at most {100 * waste:.1f}%"
    )
    if decode := document["decode"]:
        text.append(
            f"decoding      {_count(decode['flops'])} FLOPs for the last token of a full row, "
            f"{_count(decode['mean_flops'])} for the mean one; {_bytes(decode['cache_bytes'])} "
            f"of keys and values, {_bytes(decode['weight_bytes'])} of active weights"
        )
    return "\n".join(text) + "\n"


def _columns(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _spec(spec: tuple) -> str:
    return ", ".join("-" if axis is None else str(axis) for axis in spec)


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
