"""``moejax inspect``: what a config makes, by shape evaluation; nothing is allocated or trained."""

import dataclasses
import sys
from typing import Any

from moejax.cli.common import command_parser, config_from, print_json
from moejax.cli.text import columns, show_bytes, show_count, show_spec
from moejax.config.schema import Config
from moejax.parallel.topologies import Topology, parse_topology

_DESCRIPTION = """Parameters, FLOPs per token, and bytes and sharding on each device of a config (or
of the run in --workdir), by shape evaluation.

FLOPs are of the forward; training takes three times as many, plus what model.remat computes
again. The formula counts every matmul that a token takes part in (attention in full, as the
program multiplies it; the causal half is given too). The count is read off the program, with
the rows that padding adds in the worst case shown apart.

    moejax inspect --config mot:7b --mesh v5p_4x4x8      # as it would lie on devices not at hand"""


def run(argv: list[str]) -> int:
    """Runs ``moejax inspect`` and returns the exit code."""
    parser = command_parser("inspect", _DESCRIPTION)
    parser.add_argument(
        "--mesh",
        default="",
        metavar="TOPOLOGY",
        help="the devices of the mesh: cpu8, h200x8, v5p_4x4x8, v6e:16x16, ... (default: those at "
        "hand)",
    )
    args = parser.parse(argv)
    topology = parse_topology(args.mesh, "--mesh") if args.mesh else None
    report = inspect(config_from(args), topology)
    if args.json:
        print_json(report["json"])
    else:
        print(report["text"], end="")
    for warning in report["json"]["warnings"]:
        print(f"moejax: warning: {warning}", file=sys.stderr)
    return 0


def inspect(config: Config, topology: Topology | None = None) -> dict[str, Any]:
    """``{"json": the document of --json, "text": the table of the terminal}``.

    With a ``topology`` specs and bytes are those on a mesh of its devices.
    """
    from moejax.analysis.decoding import decode_cost
    from moejax.analysis.flops import counted_flops, flops_by_modality, token_flops
    from moejax.analysis.params import param_table
    from moejax.api import build
    from moejax.train.setup import configure_jax

    configure_jax(config)
    model = build(config)[0]
    table = param_table(model, config, topology.num_devices if topology else None)
    formula, counted = token_flops(config), counted_flops(config)
    by_modality = flops_by_modality(config) or {}
    # Of models whose tokens all see each other there is no half.
    causal = getattr(config.model, "causal", True)
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
        "causal_flops_per_token": formula.causal if formula and causal else None,
        "training_flops_per_token": formula.training if formula else None,
        "flops_per_token_by_modality": {name: f.forward for name, f in by_modality.items()},
        "counted_flops_per_token": counted.forward.nominal,
        "counted_training_flops_per_token": counted.training.nominal,
        "visited_flops_per_token": counted.forward.visited,
        "visited_training_flops_per_token": counted.training.visited,
        "decode": dataclasses.asdict(decode) if decode else None,
        "flops_per": {"images": "image", "pairs": "pair"}.get(config.data.format, "token"),
        "topology": topology.name if topology else None,
        "mesh": table.mesh,
        "bytes_per_device": table.bytes_per_device,
        "state_bytes_per_device": table.state_bytes_per_device,
        "hbm_bytes_per_device": topology.memory if topology else None,
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
            show_spec(row.spec),
            show_bytes(row.bytes_per_device),
        )
        for row in table.rows
    ]
    head = ("parameter", "shape", "dtype", "count", "split over", "per device")
    per = document["flops_per"]
    mesh = " x ".join(f"{name}={size}" for name, size in table.mesh.items() if size > 1)
    owned = ", ".join(f"{name} {show_count(size)}" for name, size in table.per_modality.items())
    text = [
        *columns([head, *lines], right=(3, 5)),
        "",
        f"parameters    {table.total:,} total, {table.active:,} active for one token"
        + (f", {table.frozen:,} frozen" if table.frozen else ""),
        f"              {owned}",
        f"per device    {show_bytes(table.bytes_per_device)} of parameters, "
        f"{show_bytes(table.state_bytes_per_device)} with optimizer state "
        f"(mesh {mesh or '1 device'})",
    ]
    if memory := document["hbm_bytes_per_device"]:
        text.append(
            f"              {document['topology']} has {show_bytes(memory)} each; activations and "
            "gradients come on top (moejax compile)"
        )
    if document["flops_per_token"] is not None:
        half = document["causal_flops_per_token"]
        text.append(
            f"FLOPs/{per}   formula: forward {show_count(document['flops_per_token'])}"
            + (f" ({show_count(half)} with attention counted causally)" if half else "")
            + f", training {show_count(document['training_flops_per_token'])}"
        )
    waste = document["visited_flops_per_token"] / document["counted_flops_per_token"] - 1
    text.append(
        f"FLOPs/{per}   counted: forward {show_count(document['counted_flops_per_token'])}, "
        f"training {show_count(document['counted_training_flops_per_token'])}; "
        f"padding adds at most {100 * waste:.1f}%"
    )
    if decode := document["decode"]:
        text.append(
            f"decoding      {show_count(decode['flops'])} FLOPs for the last token of a full row, "
            f"{show_count(decode['mean_flops'])} for the mean one; "
            f"{show_bytes(decode['cache_bytes'])} of keys and values, "
            f"{show_bytes(decode['weight_bytes'])} of active weights"
        )
    return "\n".join(text) + "\n"
