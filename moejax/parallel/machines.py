"""The accelerators that a run can be launched on: how many a host has, what clouds call them."""

import dataclasses
import math

from moejax.errors import UserError, did_you_mean
from moejax.parallel.topologies import split_name


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A generation of TPUs.

    Attributes:
      gke: its label on the nodes of Google Kubernetes Engine.
      vm: its name in the accelerator types of TPU VMs.
      version: the software of its TPU VMs.
      largest: the shape of the largest slice.
    """

    gke: str
    vm: str
    version: str
    largest: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU: its label on the nodes of Google Kubernetes Engine, its name in SkyPilot."""

    gke: str
    sky: str


TPUS = {
    "v4": Tpu("tpu-v4-podslice", "v4", "tpu-ubuntu2204-base", (12, 16, 16)),
    "v5e": Tpu("tpu-v5-lite-podslice", "v5litepod", "v2-alpha-tpuv5-lite", (16, 16)),
    "v5p": Tpu("tpu-v5p-slice", "v5p", "v2-alpha-tpuv5", (16, 16, 24)),
    "v6e": Tpu("tpu-v6e-slice", "v6e", "v2-alpha-tpuv6e", (16, 16)),
}
GPUS = {
    "a100": Gpu("nvidia-a100-80gb", "A100-80GB"),
    "b200": Gpu("nvidia-b200", "B200"),
    "h100": Gpu("nvidia-h100-80gb", "H100"),
    "h200": Gpu("nvidia-h200-141gb", "H200"),
    "l4": Gpu("nvidia-l4", "L4"),
}
GPUS_PER_HOST = 8
# Slices of two dimensions; those of three follow rules.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Machines:
    """The hosts of a run.

    Attributes:
      kind: a name in ``TPUS`` or ``GPUS``.
      shape: how the chips of a TPU slice are joined; (count,) of GPUs.
      hosts: how many machines, each with as many chips.
    """

    kind: str
    shape: tuple[int, ...]
    hosts: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def is_tpu(self) -> bool:
        return self.kind in TPUS


def parse_machines(text: str, nodes: int | None = None) -> Machines:
    """``"v5p:4x4x8"`` or ``"h100:16"`` -> the hosts that hold these chips.

    Args:
      text: a kind, and the shape of a slice or a number of GPUs, as ``moejax compile`` takes it;
        what clouds rent is fewer shapes than what can be compiled for.
      nodes: how many hosts, where the kind leaves it open: GPUs, up to 8 on each.

    Raises:
      UserError: no such kind, no slice of that shape, or chips that do not fill the hosts.
    """
    field = f"--topology {text}"
    found = split_name(text)
    kind, shape = found or (text.partition(":")[0], ())
    if kind not in TPUS and kind not in GPUS:
        raise UserError(f"{field}: no kind {kind!r}{did_you_mean(kind, [*TPUS, *GPUS])}")
    if min(shape, default=0) < 1:
        example = "v5p:4x4x8" if kind in TPUS else "h100:16"
        raise UserError(f"{field}: write the kind and its size, such as {example}")
    if kind in TPUS:
        return _slice(kind, shape, nodes, field)
    if len(shape) > 1:
        raise UserError(f"{field}: write the number of GPUs, such as {kind}:16")
    count = math.prod(shape)
    hosts = nodes or math.ceil(count / GPUS_PER_HOST)
    if count % hosts or count // hosts > GPUS_PER_HOST:
        raise UserError(
            f"{field}: {count} GPUs make no {hosts} equal nodes of at most {GPUS_PER_HOST}; change "
            "the number, or --nodes"
        )
    return Machines(kind, shape, hosts)


def _slice(kind: str, shape: tuple[int, ...], nodes: int | None, field: str) -> Machines:
    size = "x".join(map(str, shape))
    largest = TPUS[kind].largest
    if len(largest) == 2:
        if size not in _FLAT:
            raise UserError(f"{field}: no slice of that shape; choose from: {', '.join(_FLAT)}")
        # Slices of up to eight chips are one machine.
        hosts = max(1, math.prod(shape) // 4) if math.prod(shape) > 8 else 1
    else:
        fits = len(shape) == 3 and all(a <= b for a, b in zip(shape, largest, strict=True))
        cubes = all(axis % 4 == 0 for axis in shape) and list(shape) == sorted(shape)
        if size not in _SMALL and not (fits and cubes):
            raise UserError(
                f"{field}: no slice of that shape; there are {', '.join(_SMALL)}, and AxBxC of "
                f"multiples of 4, A <= B <= C, up to {'x'.join(map(str, largest))}"
            )
        hosts = math.prod(shape) // 4
    if nodes not in (None, hosts):
        raise UserError(f"--nodes {nodes}: {kind}:{size} has {hosts} hosts; leave --nodes out")
    return Machines(kind, shape, hosts)
