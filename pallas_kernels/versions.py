"""What differs between the versions of jax that moejax runs with, as far as Pallas is concerned."""

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.varying import varying_axes

# TPU v5p.
_SMALLEST_VMEM = 64 << 20


def out_struct(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the manual mesh axes, inside ``shard_map``, as ``like`` does."""
    manual = getattr(jax.typeof(like), "manual_axis_type", None)
    if manual is None or not varying_axes(like):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)


def target_platform() -> str | None:
    """What a program is traced for: the platform of the mesh that is set, None without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def vmem_capacity() -> int:
    """Bytes of VMEM of the TPU that a program is traced for; if it is not known, of the smallest."""
    if target_platform() == "tpu" or (target_platform() is None and pltpu.is_tpu_device()):
        return pltpu.get_tpu_info().vmem_capacity_bytes
    return _SMALLEST_VMEM


def tpu_params(*semantics: str, vmem_bytes: int | None = None) -> pltpu.CompilerParams:
    """How the dimensions of a grid run ("parallel" or "arbitrary"), and the VMEM that is allowed."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes)
