"""The device mesh of a config."""

import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.axes import BATCH_AXES, MESH_AXES
from moejax.config.schema import Config, MeshConfig
from moejax.errors import UserError


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, ...]:
    """Devices on each of ``MESH_AXES``; -1 takes what the others leave.

    Raises UserError if the axes do not multiply to the number of devices.
    """
    sizes = config.axes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            if device_count % fixed:
                raise UserError(
                    f"mesh.{name}=-1: the other axes need {fixed} devices, "
                    f"which does not divide the {device_count} at hand"
                )
            sizes[name] = device_count // fixed
    total = math.prod(sizes.values())
    if total != device_count:
        given = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size > 1)
        raise UserError(
            f"{given or 'mesh'}: makes {total} device(s), but there are {device_count}; "
            "set one axis to -1 to take what is left"
        )
    return tuple(sizes[name] for name in MESH_AXES)


def check_mesh(config: Config, device_count: int) -> tuple[int, ...]:
    """The mesh shape, after checking that batch and model divide over it (UserError if not)."""
    shape = mesh_shape(config.mesh, device_count)
    sizes = dict(zip(MESH_AXES, shape, strict=True))
    for name in ("tensor", "sequence"):
        if sizes[name] > 1:
            raise UserError(f"mesh.{name}={sizes[name]}: no model shards this axis yet; use 1")
    shards = math.prod(sizes[name] for name in BATCH_AXES)
    rows = config.data.batch_size // config.optim.accumulation_steps
    if rows % shards:
        accumulation = config.optim.accumulation_steps
        each = f" / optim.accumulation_steps={accumulation}" if accumulation > 1 else ""
        raise UserError(
            f"data.batch_size={config.data.batch_size}{each}: {rows} rows do not divide over "
            f"{shards} devices (mesh.data x mesh.fsdp x mesh.expert)"
        )
    width = getattr(config.model, "d_model", None)
    if width is not None and width % sizes["fsdp"]:
        raise UserError(f"mesh.fsdp={sizes['fsdp']}: does not divide model.d_model={width}")
    for experts in _expert_counts(config.model):
        if experts % sizes["expert"]:
            raise UserError(
                f"mesh.expert={sizes['expert']}: does not divide model.moe.num_experts={experts}"
            )
    return shape


def _expert_counts(model: Any) -> set[int]:
    """Experts with weights in each kind of block that has some."""
    if getattr(model, "moe", None) is None:
        return set()
    return {model.for_block(kind)[1].moe.pool for kind in model.block_kinds()} - {0}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over ``devices`` (all of them by default) with the axes ``MESH_AXES``.

    Axis types are named because jax's default, Explicit, asks for a sharding of every operand.
    """
    devices = devices if devices is not None else jax.devices()
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # A slice of TPUs whose own axes are not products of these, 16x16 for 64 x 4: cut them.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data, fsdp and expert axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
