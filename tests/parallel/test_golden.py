"""Where each parameter lies and what a step exchanges, as files: a change of a rule is a diff.

``MOEJAX_UPDATE_GOLDEN=1 pytest tests/parallel/test_golden.py -m ''`` writes them anew.
"""

import json
import os
from pathlib import Path

import jax
import pytest

from moejax.analysis.aot import compile_step
from moejax.config import load_config
from moejax.parallel.topologies import parse_topology

FOLDER = Path(__file__).parent / "golden"
NARROW = {
    "model.d_model": 32,
    "model.num_heads": 4,
    "model.num_layers": 2,
    "model.ffn_hidden": (32,),
    "data.batch_size": 8,
    "data.sequence_length": 16,
}
EXPERTS = {"model.moe.hidden": 16}
CASES = {
    "mot_fsdp2_tensor2_sequence2": ("mot", {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, {}),
    "moma_fsdp2_expert4": ("moma:4t4i", {"data": 1, "fsdp": 2, "expert": 4}, EXPERTS),
    "deepseek_v3_expert8_ring": (
        "deepseek_v3",
        {"data": 1, "expert": 8},
        {**EXPERTS, "model.moe.exchange": "ring"},
    ),
    "deepseek_v3_expert8_all_to_all": (
        "deepseek_v3",
        {"data": 1, "expert": 8},
        {**EXPERTS, "model.moe.exchange": "all_to_all"},
    ),
}
# A compiler of another version may choose other collectives.
VERSION = ".".join(jax.__version__.split(".")[:2])


def measured(case):
    name, mesh, overrides = CASES[case]
    mesh = {f"mesh.{axis}": size for axis, size in mesh.items()}
    config = load_config(name, {**NARROW, **overrides, **mesh})
    document = compile_step(config, parse_topology("cpu8"))
    assert not document["unread_loops"]
    counts = {kind: one["count"] for kind, one in document["collectives"].items()}
    specs = {}
    for name, one in document["shardings"].items():
        axes = ", ".join(axis or "-" for axis in one["spec"])
        specs[name] = f"{'x'.join(map(str, one['shape']))} over {axes}"
    return specs, counts


def check(case):
    path = FOLDER / f"{case}.json"
    golden = json.loads(path.read_text()) if path.exists() else {"collectives": {}}
    specs, count = measured(case)
    if os.environ.get("MOEJAX_UPDATE_GOLDEN"):
        versions = {**golden["collectives"], VERSION: count}
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps({"specs": specs, "collectives": versions}, indent=1) + "\n")
        return
    # As text, so that a failure shows the lines that differ.
    assert json.dumps(specs, indent=1) == json.dumps(golden["specs"], indent=1)
    if VERSION in golden["collectives"]:
        assert count == golden["collectives"][VERSION]


def test_a_step_of_mot_exchanges_what_it_did():
    check("mot_fsdp2_tensor2_sequence2")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("mot")])
def test_a_step_of_experts_exchanges_what_it_did(case):
    check(case)
