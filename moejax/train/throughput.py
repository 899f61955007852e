"""How fast a run goes: tokens per second, waiting for input, share of the device's peak."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from moejax.parallel.topologies import data_sheet_peak


def peak_flops(devices: list[Any]) -> float:
    """FLOP/s that utilisation is measured against, all ``devices`` together.

    The data sheet's where it is known; else what a 1024^3 float32 matrix product reaches here. CPU
    devices of a process are simulated on one and the same processor, so they count once.
    """
    peak = data_sheet_peak(devices[0].device_kind)
    if peak is not None:
        return peak * len(devices)
    # Another host's device computes nothing for this one.
    measured = measured_flops(jax.local_devices(backend=devices[0].platform)[0])
    if devices[0].platform == "cpu":
        return measured * len({device.process_index for device in devices})
    return measured * len(devices)


@functools.lru_cache(maxsize=1)
def measured_flops(device: Any, size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of a float32 matrix product of three sides ``size``: the best of ``repeats``."""
    # A mesh of its own: the caller's may be of many devices.
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=[device])
    product = jax.jit(jnp.matmul)
    best = float("inf")
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((size, size), np.float32), device)
        product(x, x).block_until_ready()
        for _ in range(repeats):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclasses.dataclass
class Clock:
    """Time and work since the last metrics row; evaluation and saving do not count.

    Attributes:
      flops_per_token: of one training step (forward and backward); 0 if not known.
      peak: FLOP/s to compare with.
      share: how much of each batch it is shown; the other hosts' rows are taken to be like these.
      total_seconds: of all rows that were read, and total_waited those of them spent waiting.
    """

    flops_per_token: float
    peak: float
    share: float = 1.0
    seconds: float = 0.0
    waited: float = 0.0
    tokens: float = 0
    slots: float = 0
    examples: float = 0
    steps: int = 0
    total_seconds: float = 0.0
    total_waited: float = 0.0
    _since: float = dataclasses.field(default_factory=time.perf_counter)

    def step(self, batch: dict, waited: float) -> None:
        """Notes a step that waited ``waited`` seconds for ``batch`` (numpy, this host's rows)."""
        self.waited += waited
        self.steps += 1
        if "segments" in batch:
            self.tokens += int(np.count_nonzero(batch["segments"])) / self.share
            self.slots += batch["segments"].size / self.share
        else:
            # A row can have places for several pictures.
            self.examples += int(np.count_nonzero(batch["weights"])) / self.share

    def restart(self) -> None:
        """Forgets what was counted so far, and starts again now."""
        self.seconds = self.waited = 0.0
        self.tokens = self.slots = self.examples = self.steps = 0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        self.seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """The fields of a metrics row; starts anew."""
        seconds = self.seconds + time.perf_counter() - self._since
        values: dict[str, float] = {}
        if self.steps:
            values["train/seconds_per_step"] = seconds / self.steps
            values["train/input_wait_fraction"] = self.waited / seconds
        if self.tokens:
            values["train/tokens_per_second"] = self.tokens / seconds
        if self.examples:
            values["train/examples_per_second"] = self.examples / seconds
        if self.flops_per_token and self.slots:
            # Padding is computed too, so every slot counts as work of the device.
            values["train/utilisation"] = self.flops_per_token * self.slots / seconds / self.peak
        self.total_seconds += seconds
        self.total_waited += self.waited
        self.restart()
        return values
