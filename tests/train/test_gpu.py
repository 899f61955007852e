"""Training on a GPU beside training on the CPU of the same machine."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


def losses(folder, platform, config, steps, *flags):
    """Of each step of a run in a process of its own, in full float32."""
    env = {**os.environ, "JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "moejax", "train", "--config", config, "--workdir", folder]
    command += [f"--config.train.steps={steps}", "--config.log.every=1", "--config.eval.batches=1"]
    command += ["--config.data.batch_size=4", "--config.train.checkpoint_every=3", *flags]
    subprocess.run([str(part) for part in command], env=env, check=True)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("config", ["quickstart", "moma:4t4i", "deepseek_v3"])
def test_training_on_a_gpu_follows_the_cpu(config, tmp_path):
    on_gpu = losses(tmp_path / "gpu", "cuda", config, 6)
    on_cpu = losses(tmp_path / "cpu", "cpu", config, 6)
    assert len(on_gpu) == 6
    # Sums of another order, six optimizer steps apart.
    assert on_gpu == pytest.approx(on_cpu, rel=2e-4)


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path):
    # XLA's scatter-adds on GPU add in any order unless told otherwise.
    whole = losses(tmp_path / "whole", "cuda", "moma:4t4i", 6)
    losses(tmp_path / "parts", "cuda", "moma:4t4i", 3)
    resumed = losses(tmp_path / "parts", "cuda", "moma:4t4i", 6)
    assert resumed[-3:] == pytest.approx(whole[-3:], rel=1e-5)
