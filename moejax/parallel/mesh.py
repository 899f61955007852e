"""The device mesh of a config."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.axes import BATCH_AXES, MESH_AXES
from moejax.config.schema import (
    Config,
    DecoderConfig,
    DiTConfig,
    MeshConfig,
    PairConfig,
    PatchesConfig,
    TrunkConfig,
    TwoTowersConfig,
)
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
    sizes: dict[str, int] = dict(zip(MESH_AXES, shape, strict=True))
    shards = math.prod(sizes[name] for name in BATCH_AXES)
    rows = config.data.batch_size // config.optim.accumulation_steps
    if rows % shards:
        accumulation = config.optim.accumulation_steps
        each = f" / optim.accumulation_steps={accumulation}" if accumulation > 1 else ""
        raise UserError(
            f"data.batch_size={config.data.batch_size}{each}: {rows} rows do not divide over "
            f"{shards} devices (mesh.data x mesh.fsdp x mesh.expert)"
        )
    for axis in ("tensor", "sequence"):
        if sizes[axis] > 1 and not isinstance(config.model, TrunkConfig):
            raise UserError(
                f"mesh.{axis}={sizes[axis]}: the model {config.model.name!r} does not split this "
                "axis; use 1"
            )
    for axis, field, size in _split_sizes(config):
        if size % sizes[axis]:
            raise UserError(f"mesh.{axis}={sizes[axis]}: does not divide {field}={size}")
    return shape


def _split_sizes(config: Config) -> Iterator[tuple[str, str, int]]:
    """(mesh axis, field, size) of whatever an axis splits and has to divide."""
    model = config.model
    if isinstance(model, DecoderConfig):
        yield "sequence", "data.sequence_length", config.data.sequence_length
        yield "tensor", "model.vocab_size", model.vocab_size
    if isinstance(model, PatchesConfig):
        yield "sequence", "the tokens of a picture", model.num_tokens
    if isinstance(model, PairConfig) or (isinstance(model, DiTConfig) and model.text_length):
        yield "tensor", "model.vocab_size", model.vocab_size
    if isinstance(model, TwoTowersConfig) or (isinstance(model, DiTConfig) and model.text_length):
        yield "sequence", "model.text_length", model.text_length
        yield from _trunk_sizes(model.text_tower)
    if isinstance(model, DiTConfig) and model.words.num_experts:
        yield "tensor", "model.words.hidden", model.words.hidden
    if isinstance(model, TrunkConfig):
        yield from _trunk_sizes(model)


def _trunk_sizes(model: TrunkConfig) -> Iterator[tuple[str, str, int]]:
    yield "fsdp", "model.d_model", model.d_model
    if model.modulated:
        yield "tensor", "model.d_model", model.d_model
    yield "tensor", "model.num_heads", model.num_heads
    yield "tensor", "model.num_kv_heads", model.kv_heads
    for tower in model.tower_shapes:
        yield "fsdp", "model.towers.widths", tower.width
        for heads in (tower.heads, tower.kv_heads):
            yield "tensor", "model.towers.heads, or keys and values for them", heads
            yield "fsdp", "the features of model.towers.heads", heads * model.head_dim
    for width in model.ffn_hidden:
        yield "tensor", "model.ffn_hidden", width
    kinds = [model.for_block(kind)[1].moe for kind in model.block_kinds()]
    for moe in kinds:
        if not moe.pool:
            continue
        yield "expert", "model.moe.num_experts", moe.pool
        yield "tensor", "model.moe.hidden", moe.hidden or max(model.ffn_hidden)
        if moe.shared_hidden:
            each = moe.shared_hidden // max(1, moe.shared_competing)
            yield "tensor", "model.moe.shared_hidden", each


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


def mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """Sets the mesh that parameters lie on; does nothing where they lie on one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return jax.set_mesh(mesh)
    return contextlib.nullcontext()
