"""Compiling ahead of time: the child process, the report, and what is refused in one line."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from moejax.analysis import aot, aot_process
from moejax.cli import main as cli
from moejax.config.load import load_config
from moejax.errors import UserError
from moejax.parallel.topologies import Topology, parse_topology
from moejax.train.setup import prepare_model

TINY = (
    "model.num_layers=2",
    "model.d_model=32",
    "model.vocab_size=512",
    "data.batch_size=16",
    "data.sequence_length=32",
    "optim.accumulation_steps=2",
    "mesh.data=2",
    "mesh.fsdp=4",
)
ARGV = ["compile", "--config", "chameleon", *(f"--config.{one}" for one in TINY)]


def tiny():
    return load_config("chameleon", TINY)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The document and the printed text of one command for eight simulated devices."""
    folder = tmp_path_factory.mktemp("compile")
    command = [sys.executable, "-m", "moejax", *ARGV, "--topology", "cpu8"]
    files = ["--output", str(folder / "report.json"), "--hlo", str(folder / "step.hlo")]
    done = subprocess.run(command + files, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / "report.json").read_text())
    return document, done.stdout, (folder / "step.hlo").read_text()


@pytest.fixture(scope="module")
def compiled():
    """The step itself, compiled for the eight simulated devices of this process."""
    config = tiny()
    setup = prepare_model(config, jax.devices()[:8])
    step = setup.train_step()
    batch = aot.whole_batch(setup)
    assert batch["tokens"].shape == (16, 32)
    with jax.set_mesh(setup.mesh):
        return step.lower(setup.recipe.abstract, batch).compile()


def test_memory_is_what_jax_says_of_the_step(report, compiled):
    document, memory = report[0], compiled.memory_analysis()
    assert document["memory"]["arguments"] == memory.argument_size_in_bytes
    assert document["memory"]["outputs"] == memory.output_size_in_bytes
    assert document["memory"]["temporaries"] == memory.temp_size_in_bytes
    # The state is given away to the step, and comes back in its place.
    state = document["state_bytes_per_device"]
    assert state <= document["memory"]["aliases"] == memory.alias_size_in_bytes
    assert document["peak_bytes_per_device"] == (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def test_report_of_a_step_that_fits(report):
    document, text, hlo = report
    assert document["fits"] and document["compiled"]
    assert (document["topology"], document["devices"]) == ("cpu:8", 8)
    assert (document["batch_size"], document["sequence_length"]) == (16, 32)
    assert document["mesh"]["fsdp"] == 4
    assert document["peak_bytes_per_device"] < document["hbm_bytes_per_device"]
    embedding = document["shardings"]["embedding_vd"]
    assert embedding["spec"][1] == "fsdp"
    assert embedding["bytes_per_device"] == 4 * 512 * 32 // 4
    # Forward and twice that backward; each microbatch is computed again for its gradient.
    assert document["counted_flops"] == pytest.approx(document["flops"] * 4 / 3, rel=0.02)
    # Weights are split over 4 devices, gradients summed over 8, in 2 layers and 2 microbatches.
    assert document["collectives"]["all-gather"]["count"] > 0
    assert document["collectives"]["all-reduce"]["bytes"] > 0
    # Scans over 2 layers and over 2 microbatches.
    assert document["loops"]["2"] >= 3 and not document["unread_loops"]
    assert hlo.startswith("HloModule jit_step")
    assert "chameleon on cpu:8: fits: " in text
    assert "mesh          data=2 x fsdp=4\n" in text
    assert "all-gather" in text and "embedding_vd" in text


def test_a_step_that_does_not_fit(compiled, monkeypatch, capsys):
    monkeypatch.setattr(Topology, "memory", property(lambda self: 100_000))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: compiled)
    kept = jax.config.jax_compilation_cache_dir
    try:
        document = aot.compile_step(tiny(), parse_topology("cpu8"))
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    assert document["compiled"] and not document["fits"]
    sizes = [row["bytes_per_device"] for row in document["largest_state"]]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 10
    assert document["largest_state"][0]["name"].endswith(("embedding_vd", "head_dv", "wi_mdf"))
    assert document["largest_buffers"][0]["bytes"] >= max(sizes)

    monkeypatch.setattr(aot_process, "compile_in_child", lambda *_: document)
    assert cli.main([*ARGV, "--topology", "cpu8"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "of 97.7 KiB a device" in text
    assert "largest of the state" in text and "largest buffers" in text
    assert cli.main([*ARGV, "--topology", "cpu8", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


# The first as libtpu 0.0.42 says it, before it has placed buffers; the second as other versions do.
TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(293.50G) exceeds available HBM (15.75G)."
)
ALLOCATIONS = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.

Total hbm usage >= 17.76G:
    reserved        258.00M

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_type="dot" op_name="jit(step)/attention/dot_general" stack_frame_id=123
     Shape: f32[32,4096,4096]{2,1,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[65536,4096]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M
"""  # noqa: E501


def test_what_the_compiler_says_of_a_step_that_does_not_fit():
    jaxpr = jax.make_jaxpr(lambda x: jax.numpy.outer(x, x))(jax.numpy.ones(64))
    facts = {"devices": 16, "state_bytes_per_device": 1 << 30}
    named = aot._refused(ALLOCATIONS, facts, jaxpr)
    assert (named["compiled"], named["fits"]) == (False, False)
    assert named["peak_bytes_per_device"] == 17.5 * (1 << 30)
    assert named["hbm_bytes_per_device"] == 15.75 * (1 << 30)
    attention = "jit(step)/attention/dot_general"
    assert named["largest_buffers"] == [
        {"shape": "f32[32,4096,4096]", "bytes": 2 << 30, "from": attention},
        {"shape": "bf16[65536,4096]", "bytes": 512 << 20, "from": ""},
    ]
    unnamed = aot._refused(TEMPORARIES, facts, jaxpr)
    # Temporaries, and beside them the state.
    assert unnamed["peak_bytes_per_device"] == 294.5 * (1 << 30)
    # The program's own largest array, a part on each device.
    assert unnamed["largest_buffers"][0]["shape"] == "float32[64,64]"
    assert unnamed["largest_buffers"][0]["bytes"] == 64 * 64 * 4 // 16
    with pytest.raises(RuntimeError, match="refuses the program: INTERNAL: Mosaic failed"):
        aot._refused("INTERNAL: Mosaic failed", facts, jaxpr)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--topology: give one, such as"),
        (["--topology", "v5q:2x2"], "--topology v5q:2x2: no chip 'v5q'"),
        (["--topology", "cpu8", "--output", "nowhere/x.json"], "--output nowhere/x.json: no such"),
        (["--topology", "cpu8", "--config.mesh.data=3"], "mesh.data=3, mesh.fsdp=4: makes 12"),
        (["--topology", "cpu8", "--config.optim.nme=x"], "optim has no field 'nme'"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    assert cli.main([*ARGV, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("moejax: error: ") and message in error


@pytest.mark.parametrize(
    "topology, line",
    [
        ("v5p:4x4x8", "needs libtpu, but no such chip; pip install 'moejax[tpu]'"),
        ("h200:8", "needs jax's CUDA plugin, but no such chip; pip install 'moejax[gpu]'"),
    ],
)
def test_a_plugin_that_is_not_installed(topology, line, monkeypatch, capsys):
    find = importlib.util.find_spec
    absent = ("libtpu", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name)
    )
    assert cli.main([*ARGV, "--topology", topology]) == 2
    error = capsys.readouterr().err
    assert error == f"moejax: error: --topology {topology}: compiling for it {line}\n"


def ended(code):
    return lambda *_, **__: subprocess.CompletedProcess([], code, "line 1\nthe last line")


def test_a_child_that_comes_to_no_result(monkeypatch):
    topology = parse_topology("cpu8")
    monkeypatch.setattr(subprocess, "run", ended(1))
    with pytest.raises(RuntimeError, match="ended with 1:\nline 1\nthe last line"):
        aot_process.compile_in_child(tiny(), topology)
    monkeypatch.setattr(subprocess, "run", ended(-9))
    with pytest.raises(UserError, match="more memory than this machine has free"):
        aot_process.compile_in_child(tiny(), topology)


def test_a_child_ends_with_its_parent(tmp_path):
    """A command that is killed leaves no compiler behind."""
    not_its_parent = "1" if os.getpid() != 1 else "2"
    command = [sys.executable, "-m", "moejax.analysis.aot", str(tmp_path / "x"), not_its_parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        # It waits for its job.
        assert child.wait(timeout=100) == 1


def test_each_platform_has_an_environment_of_its_own():
    ours = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3 --xla_a=1", "HOME": "/h"}
    cpu = aot_process.child_environment(parse_topology("cpu:4"), ours)
    assert cpu["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_force_host_platform_device_count=4"]
    tpu = aot_process.child_environment(parse_topology("v5e:2x2"), ours)
    assert tpu["TPU_SKIP_MDS_QUERY"] == "1" and "TPU_SKIP_MDS_QUERY" not in cpu
    # Devices to compile for are asked for by name: none of the machine's own is opened.
    assert {env["JAX_PLATFORMS"] for env in (cpu, tpu)} == {"cpu"}
    assert tpu["HOME"] == "/h"


def accelerator(topology: str, *flags: str) -> dict:
    """The document of a real compile of a small model."""
    config = load_config("mot", (*TINY, "model.dtype=bfloat16", *flags))
    return aot_process.compile_in_child(config, parse_topology(topology))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'moejax[tpu]'",
)
def test_a_step_for_tpus():
    # Eight of a mesh axis are no product of axes of a 4x4 slice.
    document = accelerator("v6e:4x4", "mesh.fsdp=8", "data.batch_size=32")
    assert document["fits"] and document["device_kind"] == "TPU v6 lite"
    assert document["collectives"]["all-reduce"]["bytes"] > 0
    assert not document["unread_loops"]
    refused = accelerator("v5e:2x4", "data.sequence_length=65536", "data.batch_size=64")
    assert not refused["compiled"] and not refused["fits"]
    assert refused["peak_bytes_per_device"] > refused["hbm_bytes_per_device"] > 15 << 30
    assert refused["largest_buffers"][0]["bytes"] > 1 << 30


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax's CUDA plugin is not installed: pip install 'moejax[gpu]'",
)
def test_a_step_for_gpus():
    document = accelerator("h200:8")
    assert document["fits"] and document["device_kind"] == "NVIDIA H200"
    assert document["collectives"]["all-gather"]["bytes"] > 0
    refused = accelerator("h100:8", "data.sequence_length=65536", "data.batch_size=64")
    assert not refused["fits"]
    assert refused["peak_bytes_per_device"] > refused["hbm_bytes_per_device"]
