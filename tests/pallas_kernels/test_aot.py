"""Every kernel at real shapes, compiled for TPUs and GPUs that are not here.

The compilers are extras of moejax; without them these tests are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.analysis.aot_process import check_plugin, child_environment
from moejax.errors import UserError
from moejax.parallel.topologies import parse_topology

SCRIPT = Path(__file__).with_name("aot_cases.py")


def compiled(name: str, folder: Path, *cases: str) -> dict:
    topology = parse_topology(name)
    try:
        check_plugin(topology)
    except UserError as error:
        pytest.skip(str(error))
    out = folder / "found.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, str(out), *cases],
        env=child_environment(topology, os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100:1", "h200:1"])
def test_every_kernel_and_entry_of_the_table_compiles(name, tmp_path):
    found = compiled(name, tmp_path)
    assert found
    failed = {case: facts["error"] for case, facts in found.items() if "error" in facts}
    assert not failed
    for facts in found.values():
        assert facts["calls"] > 0 and facts["chip"] == parse_topology(name).chip.name


@pytest.mark.slow
def test_the_layer_computes_what_it_must_and_no_more(tmp_path):
    """The gradient of the weights by ragged_dot is a product of every row with every group."""
    found = compiled("v6e:2x2", tmp_path, "mlp many", "mlp many, ragged_dot")
    products = 18 * 24576 * 2048 * 1408
    assert found["mlp many"]["flops"] < 1.1 * products
    assert found["mlp many, ragged_dot"]["flops"] > 10 * products
