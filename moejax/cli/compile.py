"""``moejax compile``: the training step, ahead of time, for devices that are not here."""

import json
import sys
from pathlib import Path
from typing import Any

from moejax.cli.common import command_parser, config_from, print_json
from moejax.cli.text import columns, show_bytes, show_count, show_spec
from moejax.errors import UserError
from moejax.parallel.topologies import PRESETS, parse_topology

_DESCRIPTION = """Compiles the real training step (optimizer included, at the config's batch and
sequence length) for a slice of TPUs or for GPUs, without one: does it fit in the memory of a
device, what does it exchange, how many FLOPs are it. It takes a minute or several, and no data.

    moejax compile --config mot:7b --topology v5p:4x4x8
    moejax compile --config mot:1.5b --topology h200:8 --config.optim.accumulation_steps=16
    moejax compile --config quickstart --topology cpu8

TPUs need libtpu (pip install 'moejax[tpu]'), GPUs jax's CUDA plugin ('moejax[gpu]'). Exit code 0:
it fits; 1: it does not, the largest tensors are printed; 2: a mistake in the command or config."""


def run(argv: list[str]) -> int:
    """Runs ``moejax compile`` and returns the exit code: 1 for a program that does not fit."""
    parser = command_parser("compile", _DESCRIPTION)
    parser.add_argument(
        "--topology", default="", metavar="CHIP:SHAPE", help=f"{', '.join(PRESETS)}, h100:16, ..."
    )
    parser.add_argument("--output", default="", metavar="FILE", help="write the JSON document here")
    parser.add_argument("--hlo", default="", metavar="FILE", help="write the program (HLO) here")
    args = parser.parse(argv)
    if not args.topology:
        raise UserError(f"--topology: give one, such as {' or '.join(PRESETS[-3:])}")
    topology = parse_topology(args.topology)
    for flag, file in (("--output", args.output), ("--hlo", args.hlo)):
        if file and not Path(file).absolute().parent.is_dir():
            raise UserError(f"{flag} {file}: no such folder")
    config = config_from(args)

    from moejax.analysis.aot_process import check_plugin, compile_in_child

    check_plugin(topology)
    print(
        f"moejax: compiling {config.about.name} for {topology.name} "
        f"({topology.num_devices} devices); large models take minutes",
        file=sys.stderr,
        flush=True,
    )
    document = compile_in_child(config, topology, args.hlo)
    if args.output:
        Path(args.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print_json(document)
    else:
        print(_text(document), end="")
    for warning in document["warnings"]:
        print(f"moejax: warning: {warning}", file=sys.stderr)
    return 0 if document["fits"] else 1


def _text(document: dict[str, Any]) -> str:
    mesh = " x ".join(f"{name}={size}" for name, size in document["mesh"].items() if size > 1)
    memory, peak = document["hbm_bytes_per_device"], document["peak_bytes_per_device"]
    used = "more" if peak is None else show_bytes(peak)
    verdict = "fits" if document["fits"] else "DOES NOT FIT"
    lines = [
        *_shardings(document),
        "",
        f"{document['config']} on {document['topology']}: {verdict}: {used} of "
        f"{show_bytes(memory)} a device",
        f"mesh          {mesh or '1 device'}",
        f"batch         {document['batch_size']} {_rows(document['sequence_length'])}, in "
        f"{document['accumulation_steps']} part(s)",
        *_memory(document),
        *_flops(document),
        *_exchange(document),
        f"compiled in   {document['compile_seconds']:.0f} s"
        + f" ({', '.join(f'{k} {v}' for k, v in document['versions'].items())})",
    ]
    if not document["fits"]:
        lines += _largest(document)
    return "\n".join(lines) + "\n"


def _rows(sequence_length: int | None) -> str:
    return "pictures" if sequence_length is None else f"rows of {sequence_length:,} tokens"


def _shardings(document: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            "x".join(map(str, row["shape"])),
            show_spec(row["spec"]),
            show_bytes(row["bytes_per_device"]),
        )
        for name, row in document["shardings"].items()
    ]
    return columns([("parameter", "shape", "split over", "per device"), *rows], right=(3,))


def _memory(document: dict[str, Any]) -> list[str]:
    state = f"{show_bytes(document['state_bytes_per_device'])} of parameters and optimizer state"
    sizes = document["memory"]
    if sizes is None:
        return [f"memory        {state}", f"              {document['compiler_says']}"]
    return [
        f"memory        arguments {show_bytes(sizes['arguments'])} ({state}), temporaries "
        f"{show_bytes(sizes['temporaries'])}, outputs {show_bytes(sizes['outputs'])}, of these "
        f"{show_bytes(sizes['aliases'])} in the place of arguments"
    ]


def _flops(document: dict[str, Any]) -> list[str]:
    parts = []
    if (flops := document["flops"]) is not None:
        seconds = document["seconds_at_peak"]
        least = "" if seconds is None else f" ({seconds:.3g} s at the data sheet's bfloat16 peak)"
        parts.append(f"{show_count(flops)} by formula{least}")
    if (counted := document["counted_flops"]) is not None:
        more = document["visited_flops"] / counted - 1
        parts.append(
            f"{show_count(counted)} in the program, with what is computed again; padding adds at "
            f"most {100 * more:.1f}%"
        )
    return [f"FLOPs/step    {'; '.join(parts) or 'not known'}"]


def _exchange(document: dict[str, Any]) -> list[str]:
    found = document["collectives"]
    if found is None:
        return []
    if not found:
        return ["collectives   none"]
    rows = [(kind, f"{one['count']:,}", show_bytes(one["bytes"])) for kind, one in found.items()]
    lines = columns([("collectives", "a step", "received by a device"), *rows], right=(1, 2))
    loops = ", ".join(f"{n} of {times}" for times, n in document["loops"].items())
    if loops:
        lines.append(f"              loops with collectives, counted as often as they run: {loops}")
    if document["unread_loops"]:
        names = ", ".join(document["unread_loops"])
        lines.append(f"              loops of unknown length, counted once: {names}")
    return lines


def _largest(document: dict[str, Any]) -> list[str]:
    state = [
        (
            row["name"],
            f"{row['dtype']}[{','.join(map(str, row['shape']))}]",
            show_spec(row["spec"]),
            show_bytes(row["bytes_per_device"]),
        )
        for row in document["largest_state"]
    ]
    buffers = [
        (row["shape"], show_bytes(row["bytes"]), row["from"]) for row in document["largest_buffers"]
    ]
    return [
        "",
        *columns([("largest of the state", "whole", "split over", "per device"), *state], (3,)),
        "",
        *columns([("largest buffers", "per device", "from"), *buffers], (1,)),
        "",
        "Smaller: more mesh.fsdp, model.remat=full, more optim.accumulation_steps, a smaller "
        "data.batch_size or data.sequence_length.",
    ]
