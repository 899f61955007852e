"""Several processes on this machine's loopback: they equal one, agree, and end together."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.config.schema import MeshConfig
from moejax.errors import UserError
from moejax.parallel import distributed
from moejax.parallel.batches import host_rows, put_batch
from moejax.parallel.mesh import make_mesh
from moejax.train.checkpoint import Checkpoints, saved_steps
from moejax.train.writers import TIME_FIELDS, read_rows

HERE = Path(__file__).resolve().parent
BIGRAM = [str(HERE / "bigram.py"), "train", "--config", str(HERE / "bigram.py")]
QUICKSTART = ["-m", "moejax", "train", "--config", "quickstart"]
TINY = (
    "model.num_layers=1",
    "model.d_model=32",
    "model.num_heads=2",
    "model.ffn_hidden=(64,)",
    "model.dtype=float64",
    "data.batch_size=8",
    "data.sequence_length=128",
    "train.steps=12",
    "train.checkpoint_every=4",
    "train.checkpoint_keep=9",
    "log.every=2",
    "eval.every=6",
    "eval.batches=2",
    # Experts over two devices, with a loss and biases that look at the whole batch.
    "model.block_pattern=('moe',)",
    "model.moe.num_experts=4",
    "model.moe.hidden=32",
    "model.moe.balance.name=sign",
    "mesh.expert=2",
)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


class Job:
    """The processes of one run, each with simulated devices of its own; all gone at the end.

    ``own`` gives arguments of a single process by its number.
    """

    def __init__(self, command, workdir, logs, processes, devices, overrides=(), own=None):
        logs.mkdir(parents=True, exist_ok=True)
        self.workdir = workdir
        self.logs = [logs / f"{i}.log" for i in range(processes)]
        env = {name: x for name, x in os.environ.items() if name != distributed.VARIABLE}
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        flags = [f"--config.{override}" for override in overrides]
        address = f"localhost:{free_port()},{processes}"
        self.processes = []
        for i, log in enumerate(self.logs):
            spec = ["--distributed", f"{address},{i}"] if processes > 1 else []
            with log.open("wb") as file:
                line = [sys.executable, *command, *flags, "--workdir", str(workdir), *spec]
                self.processes.append(
                    subprocess.Popen(
                        [*line, *(own or {}).get(i, [])],
                        env=env,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def codes(self, timeout=300):
        """The exit codes, once all have ended."""
        until = time.monotonic() + timeout
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def said(self):
        return [log.read_text(errors="replace") for log in self.logs]

    def await_step(self, step, timeout=300):
        """Waits for a metrics row of ``step`` or later."""
        until = time.monotonic() + timeout
        while True:
            with contextlib.suppress(ValueError):
                if any(row["step"] >= step for row in read_rows(self.workdir / "metrics.jsonl")):
                    return
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < until, self.said()
            time.sleep(0.1)


def finish(*args, **kwargs):
    """Runs a job to its end; its workdir."""
    with Job(*args, **kwargs) as job:
        assert job.codes() == [0] * len(job.processes), "\n".join(job.said())
        # The first process alone speaks.
        assert not any("step" in text for text in job.said()[1:])
        assert "trained to step 12" in job.said()[0]
    return job.workdir


def assert_same_rows(ours, theirs):
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, another in zip(ours, theirs, strict=True):
        assert row.keys() - set(TIME_FIELDS) == another.keys() - set(TIME_FIELDS)
        for name in row.keys() - set(TIME_FIELDS):
            np.testing.assert_allclose(row[name], another[name], 1e-9, err_msg=name)


def assert_same_curve(one, other):
    """All rows, and the parameters at the end."""
    assert_same_rows(*(read_rows(workdir / "metrics.jsonl") for workdir in (one, other)))
    ours, theirs = (saved_params(workdir / "checkpoints", 12) for workdir in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], 1e-9, atol=1e-12, err_msg=name)


def saved_params(folder, step):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        with jax.enable_x64():
            wanted = {
                name: jax.ShapeDtypeStruct(shape, np.float64, sharding=here)
                for name, shape in checkpoints.param_shapes(step).items()
            }
            return checkpoints.restore_params(step, wanted)
    finally:
        checkpoints.close()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("auto", "auto"),
        ("off", "off"),
        ("10.0.0.1:1234,4,3", ("10.0.0.1:1234", 4, 3)),
        ("[::1]:80,1,0", ("[::1]:80", 1, 0)),
    ],
)
def test_spec(text, expected):
    assert distributed.parse_spec(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "--distributed=: is not auto, off or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID"),
        ("on", "is not auto, off"),
        ("host,2,0", "is not auto, off"),
        ("host:1,2", "is not auto, off"),
        ("host:1,2,-1", "is not auto, off"),
        ("host:70000,2,0", "70000 is no port"),
        ("host:1,2,2", "PROCESS_ID 2 is not below NUM_PROCESSES 2"),
        ("host:1,0,0", "PROCESS_ID 0 is not below NUM_PROCESSES 0"),
    ],
)
def test_a_spec_that_is_none_is_named(text, message):
    with pytest.raises(UserError, match=message):
        distributed.parse_spec(text)


def test_the_flag_wins_over_the_variable(monkeypatch):
    monkeypatch.setenv(distributed.VARIABLE, "nonsense")
    distributed.start("off")
    with pytest.raises(UserError, match="MOEJAX_DISTRIBUTED=nonsense: is not auto"):
        distributed.start()
    assert not jax.distributed.is_initialized() and distributed.primary()


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "variables, processes",
    [
        ({}, 1),
        (SLURM, 4),
        # A pod of its own is no job of several.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),
    ],
)
def test_detection_is_that_of_jax(monkeypatch, variables, processes):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.detect() == processes


def test_a_job_of_one_task_is_not_joined(monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    distributed.start("auto")
    assert not jax.distributed.is_initialized()


def test_a_pod_that_cannot_look_up_the_others_says_so(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match=r"auto: .*jax\[k8s\].*--distributed off to run alone"):
        distributed.start("auto")


@pytest.mark.parametrize("process, why", [(0, "not all 2 processes came"), (1, "no coordinator")])
def test_waiting_in_vain_is_one_line(process, why):
    code = f"from moejax.parallel.distributed import start; start(timeout=1); print({'started'!r})"
    env = {**os.environ, distributed.VARIABLE: f"localhost:{free_port()},2,{process}"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert result.returncode == 1
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("moejax: error: MOEJAX_DISTRIBUTED=localhost:") and why in line
    assert b"started" not in result.stdout


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be opened .*; name a free one"):
            distributed.start(f"localhost:{port},2,0")


def test_one_process_holds_every_row():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    rows = host_rows(mesh, 16)
    assert rows == (16, tuple(range(16)))
    x = np.arange(32).reshape(16, 2)
    np.testing.assert_array_equal(put_batch({"x": x}, mesh, rows)["x"], x)


def test_two_processes_equal_one(tmp_path):
    logs = tmp_path / "logs"
    with Job(BIGRAM, tmp_path / "one", logs / "one", 1, 4) as one:
        two = finish(BIGRAM, tmp_path / "two", logs / "two", 2, 2)
        assert one.codes() == [0], one.said()
    assert_same_curve(one.workdir, two)
    rows = read_rows(two / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/loss" in row] == [6, 12]
    assert saved_steps(two / "checkpoints") == [4, 8, 12]


@pytest.mark.slow
def test_a_run_of_two_goes_on_in_one_and_in_four(tmp_path):
    logs = tmp_path / "logs"
    one = finish(QUICKSTART, tmp_path / "one", logs / "one", 1, 4, TINY)
    two = finish(QUICKSTART, tmp_path / "two", logs / "two", 2, 2, TINY)
    assert_same_curve(one, two)
    for processes, devices in ((1, 2), (4, 1)):
        resumed = tmp_path / f"two_then_{processes}"
        shutil.copytree(two, resumed)
        # As if it had been killed after step 4.
        for step in (8, 12):
            shutil.rmtree(resumed / "checkpoints" / str(step))
        finish(QUICKSTART, resumed, logs / str(processes), processes, devices, TINY)
        assert "resumed from step 4" in (logs / str(processes) / "0.log").read_text()
        assert_same_curve(one, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_the_other_and_one_goes_on(tmp_path, killed):
    endless, logs = ["train.steps=1000000"], tmp_path / "logs"
    with Job(BIGRAM, tmp_path / "run", logs / "first", 2, 2, endless) as job:
        job.await_step(6)
        # A checkpoint is written beside the steps.
        while not saved_steps(job.workdir / "checkpoints"):
            job.await_step(6)
            time.sleep(0.1)
        job.processes[killed].kill()
        began = time.monotonic()
        code = job.processes[1 - killed].wait(60)
        seconds = time.monotonic() - began
        # Its last words come from another process.
        time.sleep(1)
        said = job.said()[1 - killed]
        print(f"killed {killed}: the other ended with {code} after {seconds:.1f} s")
        assert code != 0
        assert f"moejax: error: {distributed.DIED}" in said.splitlines(), said
    for name in ("run", "other"):
        with Job(BIGRAM, tmp_path / name, logs / name, 1, 4, endless) as job:
            job.await_step(30)
            job.processes[0].terminate()
            assert job.codes() == [130]
    assert "resumed from step" in (logs / "run" / "0.log").read_text()
    rows, others = (
        [row for row in read_rows(tmp_path / name / "metrics.jsonl") if row["step"] <= 30]
        for name in ("run", "other")
    )
    assert_same_rows(rows, others)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step(tmp_path):
    with Job(BIGRAM, tmp_path / "run", tmp_path / "logs", 2, 2, ["train.steps=1000000"]) as job:
        job.await_step(6)
        job.processes[1].terminate()
        assert job.codes(60) == [130, 130]
        (line,) = [line for line in job.said()[0].splitlines() if line.startswith("stopped at")]
    assert int(line.split()[3].rstrip(";")) == saved_steps(tmp_path / "run" / "checkpoints")[-1]


@pytest.mark.parametrize(
    "overrides, own, message",
    [
        # More processes than rows.
        (["data.batch_size=2", "optim.accumulation_steps=1"], {}, "data.batch_size=2: 2 rows do"),
        # The mistake of one is said by all.
        ([], {1: ["--workdir", "/dev/null"]}, "--workdir /dev/null: is a file"),
        pytest.param(
            *(["mesh.fsdp=3"], {}, "mesh.data=-1: the other axes need 3 devices"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *([], {1: ["--config.train.seed=5"]}, "--config: is not the same in all 2 processes"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rows", "workdir", "mesh", "config"],
)
def test_a_mistake_is_one_line_in_every_process(tmp_path, overrides, own, message):
    with Job(BIGRAM, tmp_path / "run", tmp_path / "logs", 2, 2, overrides, own) as job:
        assert job.codes(120) == [2, 2], job.said()
        for text in job.said():
            (line,) = [x for x in text.splitlines() if x.startswith("moejax: error:")]
            assert message in line
            assert "Traceback" not in text
    assert not (tmp_path / "run").exists()
