"""What differs between the versions of jax that moejax runs with, as far as Pallas is concerned."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.varying import varying_axes

# TPU v5p.
_SMALLEST_VMEM = 64 << 20
_H100_MULTIPROCESSORS = 132


def out_struct(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the manual mesh axes, inside ``shard_map``, as ``like`` does."""
    manual = getattr(jax.typeof(like), "manual_axis_type", None)
    if manual is None or not varying_axes(like):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)


def target_platform() -> str | None:
    """What a program is traced for: the platform of the mesh that is set, or TPUs if there are any.

    None without either: a program that is lowered for TPUs on another machine needs a mesh that
    says for which ones.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    return "tpu" if jax.default_backend() == "tpu" else None


def target_chip() -> str | None:
    """The chip that a program is traced for, as in "v5e", "h100"; None if that is open."""
    if target_platform() == "tpu":
        return str(pltpu.get_tpu_info().chip_version)
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "gpu":
        device = jax.devices()[0]
    maker, *model = device.device_kind.split() if device is not None else ("",)
    return model[0].lower() if maker == "NVIDIA" and model else None


def vmem_capacity() -> int:
    """Bytes of VMEM of the TPU that a program is traced for; of the smallest if that is open."""
    if target_platform() == "tpu":
        return pltpu.get_tpu_info().vmem_capacity_bytes
    return _SMALLEST_VMEM


def tpu_params(*semantics: Any, vmem_bytes: int | None = None) -> pltpu.CompilerParams:
    """How the dimensions of a grid run ("parallel", "arbitrary"), and the VMEM that is allowed."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes)


def multiprocessors() -> int:
    """Of the GPU that a program is traced for; if it is not known, those of an H100."""
    if target_platform() is None and jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return _H100_MULTIPROCESSORS


def gpu_kernel(body, out_shape, like: jax.Array, *, name: str, interpret):
    """A kernel that runs once on each multiprocessor, along the axis "sm"."""
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_struct(out_shape.shape, out_shape.dtype, like),
        grid=(multiprocessors(),),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret or None,
    )


def transposed(ref):
    """A tile in shared memory, seen the other way round."""
    if jax.__version_info__ < (0, 12):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))
