"""Parameters: total, active for one token, of each modality, and their bytes on each device."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from moejax import axes
from moejax.analysis.experts import ffn_choices
from moejax.config import Config
from moejax.parallel.mesh import check_mesh
from moejax.parallel.rules import state_shardings
from moejax.train.freeze import count_frozen
from moejax.train.optim import make_optimizer

SHARED = "shared"
# A parameter of this size that every device of a sharded mesh holds whole is worth a warning.
LARGE = 1 << 20


@dataclasses.dataclass(frozen=True)
class ParamRow:
    """One parameter.

    Attributes:
      name: its path, ``"stack/segment_0/block_0/ffn/wi_mdf"``.
      shape: its shape, layers stacked in front.
      axes: logical axis names.
      spec: the mesh axes that split each axis, None for a whole axis.
      size: how many numbers it holds.
      owners: how many of them belong to each modality, or to ``"shared"``.
      bytes_per_device: of its shard.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    spec: tuple[Any, ...]
    size: int
    owners: dict[str, int]
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class ParamTable:
    """All parameters of a model on a mesh.

    Attributes:
      rows: one for each parameter.
      mesh: size of each mesh axis.
      total: numbers in all parameters.
      active: those that one token meets, of the modality that meets the most; of experts, as many
        as a token runs on average.
      frozen: those that training never changes (``optim.freeze``).
      per_modality: how many belong to each modality alone, and to ``"shared"``; sums to ``total``.
      bytes_per_device: of the parameters.
      state_bytes_per_device: of parameters, optimizer state and moving average.
    """

    rows: tuple[ParamRow, ...]
    mesh: dict[str, int]
    total: int
    active: int
    frozen: int
    per_modality: dict[str, int]
    bytes_per_device: int
    state_bytes_per_device: int

    def large_replicated(self) -> list[str]:
        """Names of parameters over 1 MiB that are whole on each device of a sharded mesh."""
        if all(size == 1 for name, size in self.mesh.items() if name != "data"):
            return []
        return [
            row.name
            for row in self.rows
            if row.bytes_per_device > LARGE and not any(self._splits(axes) for axes in row.spec)
        ]

    def _splits(self, entry: str | tuple[str, ...] | None) -> bool:
        """Whether an entry of a spec names more than one device."""
        names = entry if isinstance(entry, tuple) else (entry,)
        return any(name is not None and self.mesh[name] > 1 for name in names)


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one microbatch."""
    data = config.data
    rows = data.batch_size // config.optim.accumulation_steps
    if data.image_sizes:
        length, places = data.max_patches, config.images_per_row
        batch = {
            name: jax.ShapeDtypeStruct((rows, places), jnp.int32) for name in ("labels", "index")
        }
        pixels = config.model.patch_size**2 * 3
        return batch | {
            "patches": jax.ShapeDtypeStruct((rows, length, pixels), jnp.uint8),
            "image_id": jax.ShapeDtypeStruct((rows, length), jnp.int32),
            "places": jax.ShapeDtypeStruct((rows, length, 2), jnp.int32),
            "weights": jax.ShapeDtypeStruct((rows, places), jnp.float32),
        }
    if data.format in ("images", "pairs"):
        size = (rows, data.image_size, data.image_size, 3)
        batch = {
            "images": jax.ShapeDtypeStruct(size, jnp.uint8),
            "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
            "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "mirror": jax.ShapeDtypeStruct((rows,), jnp.bool_),
        }
        if data.latents:
            grid = (rows, config.model.image_size, config.model.image_size)
            batch["latents"] = jax.ShapeDtypeStruct((*grid, config.model.in_channels), jnp.float32)
        if data.format == "pairs":
            batch["tokens"] = jax.ShapeDtypeStruct((rows, data.sequence_length), jnp.int32)
            for name in ("family", "concept", "style", "cluster"):
                batch[name] = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return batch
    names = ("tokens", "modality", "segments", "positions", "targets")
    shape = (rows, data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if config.model.latents.channels:
        batch["image_id"] = jax.ShapeDtypeStruct(shape, jnp.int32)
        latents = (*shape, config.model.latents.size)
        batch["latents"] = jax.ShapeDtypeStruct(latents, jnp.float32)
    if data.sources:
        batch["sources"] = jax.ShapeDtypeStruct((rows, len(data.sources)), jnp.float32)
    return batch


def boxed_params(model, config: Config) -> Any:
    """The parameters by shape evaluation, boxed with the logical names of their axes."""

    def init(key, batch):
        return model.init({"params": key, "dropout": key}, batch, train=False)["params"]

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(init, key, abstract_batch(config))


def abstract_params(model, config: Config) -> Any:
    """The parameters by shape evaluation, without boxes."""
    return meta.unbox(boxed_params(model, config))


def param_table(model, config: Config, num_devices: int | None = None) -> ParamTable:
    """Counts, specs and bytes, by shape evaluation; the devices of the mesh need not exist.

    ``num_devices`` is how many there are to be; left out, as many as the mesh of the config asks
    for, and an axis of -1 takes the devices at hand that the others leave.

    Raises:
      UserError: the mesh of the config divides neither batch nor model.
    """
    # A sharding over devices that are not there is as good for counting bytes.
    mesh: Any = abstract_mesh(config, num_devices)
    boxed = boxed_params(model, config)
    modalities = getattr(config.model, "modalities", ())
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box)
    shardings = jax.tree.leaves(state_shardings(mesh, boxed))
    rows = tuple(
        _row(path, leaf, sharding, modalities)
        for (path, leaf), sharding in zip(leaves, shardings, strict=True)
    )
    owned = {name: sum(row.owners.get(name, 0) for row in rows) for name in (SHARED, *modalities)}
    towers = [size for name, size in owned.items() if name != SHARED]
    # The boxes are pytree nodes, so the optimizer's moments keep the names of their parameter.
    optimizer = make_optimizer(config, boxed)
    optimizer_state = jax.eval_shape(optimizer.transform.init, boxed)
    averages = boxed if config.optim.ema_decay > 0 else {}
    return ParamTable(
        rows=rows,
        mesh=dict(mesh.shape),
        total=sum(row.size for row in rows),
        active=owned[SHARED] + max(towers, default=0) - round(_idle(rows, config.model)),
        frozen=count_frozen(optimizer.frozen, boxed),
        per_modality=owned,
        bytes_per_device=sum(row.bytes_per_device for row in rows),
        state_bytes_per_device=sum(
            _shard_bytes(leaf, sharding)
            for tree in (boxed, optimizer_state, averages)
            for leaf, sharding in zip(
                jax.tree.leaves(meta.unbox(tree)),
                jax.tree.leaves(state_shardings(mesh, tree)),
                strict=True,
            )
        ),
    )


def abstract_mesh(config: Config, num_devices: int | None = None) -> AbstractMesh:
    """The mesh of the config over that many devices; see :func:`param_table`."""
    if num_devices is None:
        sizes = config.mesh.axes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        fill = max(1, jax.device_count() // fixed) if -1 in sizes.values() else 1
        num_devices = fixed * fill
    shape = check_mesh(config, num_devices)
    return AbstractMesh(shape, axes.MESH_AXES, axis_types=(AxisType.Auto,) * len(axes.MESH_AXES))


def _idle(rows: tuple[ParamRow, ...], model: Any) -> float:
    """Numbers in the experts that a token does not run, on average."""
    moe = getattr(model, "moe", None)
    if moe is None or not moe.num_experts:
        return 0.0
    idle = 0.0
    for row in rows:
        if axes.EXPERT in row.axes:
            experts = row.shape[row.axes.index(axes.EXPERT)]
            # Layers that share their experts choose from them one after the other.
            runs = moe.iterations * moe.pool_layers * ffn_choices(moe)
            idle += row.size * max(0.0, 1 - runs / experts)
    return idle


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def _row(path, leaf: Any, sharding: NamedSharding, modalities: tuple[str, ...]) -> ParamRow:
    value = meta.unbox(leaf)
    names = tuple(getattr(leaf, "names", (None,) * value.ndim))
    spec = tuple(sharding.spec)
    path = [getattr(key, "key", None) for key in path]
    name = "/".join(key for key in path if isinstance(key, str))
    return ParamRow(
        name=name,
        shape=value.shape,
        dtype=value.dtype.name,
        axes=names,
        spec=spec + (None,) * (value.ndim - len(spec)),
        size=math.prod(value.shape),
        owners=_owners(name, value.shape, names, modalities),
        bytes_per_device=_shard_bytes(value, sharding),
    )


def _owners(name: str, shape, names, modalities: tuple[str, ...]) -> dict[str, int]:
    """Splits a parameter by its modality axis, or by a name that ends in ``_<modality>``."""
    size = math.prod(shape)
    if axes.MODALITY in names:
        towers = shape[names.index(axes.MODALITY)]
        if towers == len(modalities) > 1:
            return {modality: size // towers for modality in modalities}
        # Towers of unequal width are parameters of their own.
        for modality in modalities:
            if name.endswith(f"_{modality}"):
                return {modality: size}
    return {SHARED: size}


def _shard_bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
