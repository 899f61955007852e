"""Rates over the time that counts, and the peak that utilisation is measured against."""

import types

import jax
import numpy as np
import pytest

from moejax.config.schema import MeshConfig
from moejax.parallel.mesh import make_mesh
from moejax.train import throughput
from moejax.train.progress import Progress, describe, format_count


def test_peak_by_data_sheet_and_by_measurement():
    def devices(kind, count=1):
        return [types.SimpleNamespace(device_kind=kind, platform="gpu")] * count

    assert throughput.peak_flops(devices("NVIDIA H100 80GB HBM3", 8)) == 8 * 989e12
    assert throughput.peak_flops(devices("TPU v5 lite")) == 197e12
    assert throughput.peak_flops(devices("TPU v5p")) == 459e12
    assert throughput.peak_flops(devices("NVIDIA L40S")) == 362e12
    # Simulated devices share one processor, and the loop measures inside its own mesh.
    with jax.set_mesh(make_mesh(MeshConfig())):
        peak = throughput.peak_flops(jax.devices())
    assert peak == throughput.measured_flops(jax.devices()[0]) > 1e6


def test_clock_leaves_out_padding_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock = throughput.Clock(flops_per_token=10.0, peak=1000.0)
    clock.restart()
    segments = np.array([[1, 1, 2, 0], [1, 0, 0, 0]])
    now[0] = 1.0
    clock.step({"segments": segments}, waited=0.5)
    with clock.paused():
        now[0] = 50.0
    now[0] = 51.0
    assert clock.read() == {
        "train/seconds_per_step": 2.0,
        "train/input_wait_fraction": 0.25,
        "train/tokens_per_second": 4 / 2,
        # All 8 places are computed: 80 FLOPs in 2 s, of 1000 a second.
        "train/utilisation": pytest.approx(0.04),
    }
    now[0] = 53.0
    clock.step({"weights": np.ones(6)}, waited=0.0)
    assert clock.read()["train/examples_per_second"] == 3.0
    assert (clock.total_seconds, clock.total_waited) == (4.0, 0.5), "of the run, without pauses"


def test_eta_and_line(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("moejax.train.progress.time.monotonic", lambda: now[0])
    progress = Progress(total=110, start=9, losses=("text",))
    progress.begin()
    assert progress.eta(10) == "?"
    now[0] = 4.0
    assert progress.eta(20) == "0:36"
    values = {"train/loss": 2.0, "train/loss/text": 1.0, "train/loss/z": 9.0, "train/skipped": 2}
    progress.row(20, values)
    assert capsys.readouterr().out == (
        "step 20/110  loss 2.0000 (text 1.000)  skipped 2  ETA 0:36\n"
    )
    values = {"train/tokens_per_second": 12345.0, "train/input_wait_fraction": 0.004}
    assert describe(values) == "12.3k tokens/s  input wait 0.4%"
    assert format_count(7.24e9) == "7.24B"
