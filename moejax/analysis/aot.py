"""A training step compiled ahead of time for devices that are not here, and what it would take.

    python -m moejax.analysis.aot RESULT PARENT < job.json

is the child process of :mod:`moejax.analysis.aot_process`: plugins for TPUs and GPUs are loaded
here and nowhere else.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from moejax.analysis.flops import token_flops
from moejax.analysis.hlo import collectives, largest_buffers
from moejax.analysis.jaxpr_arrays import largest_arrays
from moejax.analysis.jaxpr_flops import UncountableError, count_jaxpr
from moejax.analysis.params import abstract_batch, param_table
from moejax.config import Config
from moejax.config.convert import freeze
from moejax.config.packages import import_packages
from moejax.errors import UserError
from moejax.parallel.mesh import batch_sharding
from moejax.parallel.topologies import Topology, parse_topology
from moejax.train.leaves import path_name
from moejax.train.setup import ModelSetup, prepare_model

# How many of the largest tensors are named.
_LARGEST = 10


def compile_step(config: Config, topology: Topology, hlo_file: str = "") -> dict[str, Any]:
    """Compiles the train step of ``config`` (optimizer included) for ``topology``.

    Args:
      config: the experiment; its batch, sequence length, mesh, accumulation and ``model.remat``.
      topology: the devices, none of which need be here.
      hlo_file: where to write the optimized program, "" for nowhere.

    Returns:
      The document of ``moejax compile --json`` (docs/scale.md). A program that exceeds the memory
      of a device is a result too: ``fits`` is False.

    Raises:
      UserError: the mesh of the config does not divide the devices, the batch or the model.
    """
    # A program that is read from a cache may say nothing of its memory.
    train = dataclasses.replace(config.train, compilation_cache_dir="none")
    config = dataclasses.replace(config, train=train)
    devices = topology_devices(topology)
    start = time.perf_counter()
    setup = prepare_model(config, devices)
    step = setup.train_step()
    with jax.set_mesh(setup.mesh):
        traced = step.trace(setup.recipe.abstract, whole_batch(setup))
        lowered = traced.lower()
    lowered_at = time.perf_counter()
    document = _facts(setup, topology, traced.jaxpr)
    begin = time.perf_counter()
    try:
        program = _compiled(lowered.compile(), topology, hlo_file)
    except jax.errors.JaxRuntimeError as error:
        program = _refused(str(error), document, traced.jaxpr)
    seconds = {
        "lower_seconds": lowered_at - start,
        "compile_seconds": time.perf_counter() - begin,
    }
    return {**document, **program, **seconds}


def topology_devices(topology: Topology) -> list[Any]:
    """Devices of a topology: those of this process for the CPU, else to compile for alone.

    Raises:
      UserError: the plugin knows no such topology.
    """
    if topology.chip.platform == "cpu":
        return jax.devices("cpu")[: topology.num_devices]
    from jax.experimental import topologies

    name, options = topology.description()
    try:
        return topologies.get_topology_desc(name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--topology {topology.name}: the plugin refuses it: {first}") from error


def whole_batch(setup: ModelSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch of a step, all microbatches of it, with shardings."""
    optim = dataclasses.replace(setup.config.optim, accumulation_steps=1)
    shapes = abstract_batch(dataclasses.replace(setup.config, optim=optim))
    sharding = batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in shapes.items()
    }


def _facts(setup: ModelSetup, topology: Topology, jaxpr: Any) -> dict[str, Any]:
    """What is known without the compiler; ``jaxpr`` is that of the step."""
    config = setup.config
    table = param_table(setup.model, config, topology.num_devices)
    length = config.data.sequence_length if config.data.format == "tokens" else None
    positions = config.data.batch_size * (length or config.images_per_row)
    try:
        counted = count_jaxpr(jaxpr)
    except UncountableError:
        # A kernel of the user's own whose cost is not registered.
        counted = None
    formula, peak = token_flops(config), topology.peak_flops
    flops = positions * formula.training if formula else None
    return {
        "config": config.about.name,
        "topology": topology.name,
        "devices": topology.num_devices,
        "device_kind": topology.chip.device_kind,
        "mesh": table.mesh,
        "batch_size": config.data.batch_size,
        "accumulation_steps": config.optim.accumulation_steps,
        "sequence_length": length,
        "hbm_bytes_per_device": topology.memory,
        "state_bytes_per_device": table.state_bytes_per_device,
        "flops": flops,
        "counted_flops": counted.nominal if counted else None,
        "visited_flops": counted.visited if counted else None,
        "seconds_at_peak": flops / peak if flops and peak else None,
        "shardings": {
            row.name: {
                "shape": list(row.shape),
                "dtype": row.dtype,
                "spec": list(row.spec),
                "bytes_per_device": row.bytes_per_device,
            }
            for row in table.rows
        },
        "largest_state": _largest_state(setup),
        "warnings": [
            f"{name}: more than 1 MiB, and whole on each device of a sharded mesh"
            for name in table.large_replicated()
        ],
        "versions": _versions(topology),
    }


def _largest_state(setup: ModelSetup) -> list[dict[str, Any]]:
    """The largest shards of parameters, optimizer state and moving average."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(setup.recipe.abstract):
        shard = leaf.sharding.shard_shape(leaf.shape)
        rows.append(
            {
                "name": path_name(path),
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "spec": [axis if axis is None else str(axis) for axis in leaf.sharding.spec],
                "bytes_per_device": math.prod(shard) * leaf.dtype.itemsize,
            }
        )
    return sorted(rows, key=lambda row: -row["bytes_per_device"])[:_LARGEST]


def _compiled(compiled: Any, topology: Topology, hlo_file: str) -> dict[str, Any]:
    """Memory, collectives and buffers of a compiled program."""
    text = compiled.as_text()
    if hlo_file:
        Path(hlo_file).write_text(text, encoding="utf-8")
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    peak = sizes["arguments"] + sizes["temporaries"] + sizes["outputs"] - sizes["aliases"]
    found = collectives(text, topology.num_devices)
    return {
        "compiled": True,
        "fits": peak <= topology.memory,
        "peak_bytes_per_device": peak,
        "memory": sizes,
        "collectives": {
            kind: {"count": count, "bytes": round(found.received[kind])}
            for kind, count in found.count.items()
        },
        "loops": {str(times): number for times, number in found.loops.items()},
        "unread_loops": list(found.unread),
        "largest_buffers": [
            {"shape": buffer.shape, "bytes": buffer.bytes, "from": buffer.scope or buffer.opcode}
            for buffer in largest_buffers(text, _LARGEST)
        ],
        "compiler_says": "",
    }


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _bytes(text: str) -> int:
    """``"12.50G"`` as the compiler writes bytes."""
    number = text.rstrip("KMGT")
    return int(float(number) * _UNITS[text[len(number) :]])


_ALLOCATION = re.compile(
    r"Size: ([\d.]+[KMGT]?)\n\s+"
    r'(?:Operator: [^\n]*?op_name="([^"]*)"[^\n]*\n\s+)?'
    r"Shape: (\S+)"
)


def _refused(message: str, document: dict[str, Any], jaxpr: Any) -> dict[str, Any]:
    """What is known of a program that exceeds the memory of a device.

    The compiler names its largest buffers if it comes so far; else they are the largest arrays of
    the program, as if each device held its part of them.

    Raises:
      RuntimeError: the compiler refuses the program for another reason.
    """
    of_all = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", message)
    of_temporaries = re.search(
        r"temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", message
    )
    said = of_all or of_temporaries
    if "RESOURCE_EXHAUSTED" not in message or said is None:
        raise RuntimeError(f"the compiler refuses the program: {message}")
    buffers = [
        {"shape": re.sub(r"\{.*", "", shape), "bytes": _bytes(size), "from": scope}
        for size, scope, shape in _ALLOCATION.findall(message)
    ] or [
        {
            "shape": f"{array.dtype}[{','.join(map(str, array.shape))}]",
            "bytes": array.bytes // document["devices"],
            "from": array.scope,
        }
        for array in largest_arrays(jaxpr, _LARGEST)
    ]
    state = 0 if of_all else document["state_bytes_per_device"]
    return {
        "compiled": False,
        "fits": False,
        "peak_bytes_per_device": _bytes(said[1]) + state,
        "hbm_bytes_per_device": _bytes(said[2]),
        "memory": None,
        "collectives": None,
        "loops": {},
        "unread_loops": [],
        "largest_buffers": buffers[:_LARGEST],
        "compiler_says": message.splitlines()[0],
    }


def _versions(topology: Topology) -> dict[str, str]:
    names = ["jax", "jaxlib"]
    names += {"tpu": ["libtpu"], "cuda": ["jax-cuda13-plugin"]}.get(topology.chip.platform, [])
    return {name: importlib.metadata.version(name) for name in names}


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, which may be killed while the compiler runs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Reads the job from stdin, writes the document (or what the user can mend) to a file."""
    result_file, parent = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    job = json.load(sys.stdin)
    try:
        import_packages(job["imports"])
        result = compile_step(freeze(job["config"]), parse_topology(job["topology"]), job["hlo"])
    except UserError as error:
        result = {"user_error": str(error)}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
