"""Accelerators that a config can be compiled for without having them, by name.

``v5p:4x4x8`` is a slice of TPUs by its shape, ``h200:8`` so many GPUs, ``cpu:8`` simulated devices
of this machine. In file names and presets the colon is ``_`` or ``x``: ``v5p_4x4x8``, ``h200x8``.
"""

import dataclasses
import math
import os
import re
from typing import Any

from moejax.errors import UserError, did_you_mean

# Dense bfloat16 FLOP/s of one device, by the start of jax's device_kind (data sheets).
DATA_SHEET_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}


def data_sheet_peak(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device of that kind, None where the table does not have it."""
    names = [name for name in DATA_SHEET_PEAK if device_kind.startswith(name)]
    return DATA_SHEET_PEAK[max(names, key=len)] if names else None


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device.

    Attributes:
      name: as in ``v5p:4x4x8``.
      platform: ``"cpu"``, ``"tpu"`` or ``"cuda"``.
      device_kind: what jax calls it.
      memory: bytes that a program may use. TPU: a little below the data sheet's; v5e's is what
        the compiler (libtpu 0.0.42) states when a program exceeds it, the others are not checked.
        GPU: what such a device reports, a little above the data sheet's. 0 for the CPU: the
        memory of the machine is shared.
      rank: how many axes the shape of a slice has.
    """

    name: str
    platform: str
    device_kind: str
    memory: int
    rank: int


_GIB = 1 << 30

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("cpu", "cpu", "cpu", 0, 1),
        Chip("v5e", "tpu", "TPU v5 lite", int(15.75 * _GIB), 2),
        Chip("v5p", "tpu", "TPU v5", int(95.74 * _GIB), 3),
        Chip("v6e", "tpu", "TPU v6 lite", int(31.25 * _GIB), 2),
        Chip("h100", "cuda", "NVIDIA H100 80GB HBM3", 84_978_434_048, 1),
        Chip("h200", "cuda", "NVIDIA H200", 150_000_000_000, 1),
    )
}
PRESETS = ("cpu1", "cpu8", "h200x8", "v5e_4x4", "v5p_4x4x8", "v6e_16x16")
# One host has so many GPUs.
_GPUS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they lie: ``shape`` is that of the slice, or their number."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """``"v5p:4x4x8"``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """Bytes of one device; simulated devices share those of the machine."""
        if self.chip.platform == "cpu":
            machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return machine // self.num_devices
        return self.chip.memory

    @property
    def peak_flops(self) -> float | None:
        """bfloat16 FLOP/s of all devices together; None for the CPU."""
        peak = data_sheet_peak(self.chip.device_kind)
        return None if peak is None else peak * self.num_devices

    def description(self) -> tuple[str, dict[str, Any]]:
        """(topology_name, other arguments) of ``jax.experimental.topologies.get_topology_desc``."""
        if self.chip.platform == "tpu":
            return self.name, {"platform": "tpu"}
        per_host = min(self.num_devices, _GPUS_OF_A_HOST)
        # Slices x hosts of one x devices of one.
        shape = f"1x{self.num_devices // per_host}x{per_host}"
        target = _GPU_TARGETS[self.chip.name]
        return self.chip.name, {"platform": "cuda", "topology": shape, "target_config": target}


def split_name(text: str) -> tuple[str, tuple[int, ...]] | None:
    """``v5p:4x4x8``, ``v5p_4x4x8`` -> ("v5p", (4, 4, 8)); None where it is not of that form."""
    found = re.fullmatch(r"(cpu(?=\d)|[a-z]\w*?(?=[:_x]\d))[:_x]?(\d+(?:x\d+)*)", text)
    return None if found is None else (found[1], tuple(map(int, found[2].split("x"))))


def parse_topology(text: str, flag: str = "--topology") -> Topology:
    """``v5p:4x4x8``, ``v5p_4x4x8``, ``h200:8``, ``h200x8``, ``cpu8``, ... -> Topology.

    Raises:
      UserError: naming ``flag``: an unknown chip, or a shape that it does not come in.
    """
    found = split_name(text)
    if found is None:
        raise UserError(
            f"{flag} {text}: write CHIP:SHAPE, such as v5p:4x4x8, v6e:16x16 or h200:8"
            f"{did_you_mean(text, PRESETS)}"
        )
    name, shape = found
    if name not in CHIPS:
        raise UserError(f"{flag} {text}: no chip {name!r}{did_you_mean(name, CHIPS)}")
    chip = CHIPS[name]
    if len(shape) != chip.rank or min(shape) < 1:
        example = next(preset for preset in PRESETS + ("h100:8",) if preset.startswith(name))
        raise UserError(
            f"{flag} {text}: the shape of {name} is {chip.rank} number(s), such as {example}"
        )
    if chip.platform == "tpu" and (shape[0] % 2 or shape[1] % 2):
        raise UserError(f"{flag} {text}: a host has 2x2 chips, so the first two must be even")
    if chip.platform == "cuda" and shape[0] > _GPUS_OF_A_HOST and shape[0] % _GPUS_OF_A_HOST:
        raise UserError(f"{flag} {text}: over 8, a multiple of 8 (GPUs of a host)")
    return Topology(chip, shape)


def _gpu_target(memory: int, bandwidth: int, l2_cache: int, description: str) -> str:
    """XLA's GpuTargetConfig of a Hopper GPU.

    All three numbers are per device; threads, cores, registers, clock and shared memory are those
    that XLA itself has recorded of an H100 (the H200 has the same processor).
    """
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{description}"
"""


_GPU_TARGETS = {
    # Bandwidth: 3.35 TB/s on the data sheet, as an H100 reports it.
    "h100": _gpu_target(
        CHIPS["h100"].memory, 3_352_320_000_000, 52_428_800, CHIPS["h100"].device_kind
    ),
    # Bandwidth: 4.8 TB/s, data sheet.
    "h200": _gpu_target(
        CHIPS["h200"].memory, 4_800_000_000_000, 62_914_560, CHIPS["h200"].device_kind
    ),
}
