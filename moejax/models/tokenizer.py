"""Frozen image tokenizers: pictures <-> codes (ImageCodec) or continuous latents (LatentCodec).

The autoencoders that they are made of are in moejax/models/autoencoder.py;
tools/export_image_tokenizer.py writes the one of a finished run to an .npz file.
"""

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType
from jaxtyping import Float, Float32, Int, Int32, UInt8

from moejax.config.schema import AutoencoderConfig, FSQAutoencoderConfig, KLAutoencoderConfig
from moejax.errors import UserError

# Importing it registers the models that the codecs are made of.
from moejax.models.autoencoder import CHANNELS
from moejax.models.registry import MODELS
from moejax.ops import fsq

# Pictures per call of the compiled programs; the last call is filled up with zeros.
_CHUNK = 64
_FORMAT = 1
_FIELD = "data.image_tokenizer"


@dataclasses.dataclass(frozen=True, eq=False)
class _Codec:
    """A frozen autoencoder on the first local device.

    Both directions treat one picture at a time inside of one compiled program, in float32 at full
    matmul precision. So what a picture becomes depends neither on the pictures beside it nor on
    how many there are.

    Attributes:
      config: of the autoencoder.
      params: its parameters, float32.
      version: 16 hexadecimal digits: hash of the config and the numbers.
    """

    config: Any
    params: dict
    version: str

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid

    def _checked(self, images: np.ndarray) -> np.ndarray:
        size = self.config.image_size
        images = np.asarray(images)
        if images.shape[1:] != (size, size, CHANNELS) or images.dtype != np.uint8:
            raise ValueError(
                f"expected uint8 images [n, {size}, {size}, 3], "
                f"got {images.dtype} {list(images.shape)}"
            )
        return images

    def _run(self, method: str, inputs: np.ndarray) -> np.ndarray:
        program = _program(self.config, method)
        device = jax.local_devices()[0]
        # A mesh of its own: the caller's may have other devices (the training loop's has).
        mesh = jax.sharding.Mesh([device], ("data",), axis_types=(AxisType.Auto,))
        outputs = []
        with jax.set_mesh(mesh):
            params = jax.device_put(self.params, device)
            # One call for no pictures at all gives the empty result its shape.
            for start in range(0, max(len(inputs), 1), _CHUNK):
                chunk = inputs[start : start + _CHUNK]
                filler = np.zeros((_CHUNK - len(chunk), *inputs.shape[1:]), inputs.dtype)
                whole = jax.device_put(np.concatenate([chunk, filler]), device)
                outputs.append(np.asarray(program(params, whole))[: len(chunk)])
        return np.concatenate(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageCodec(_Codec):
    """A frozen image tokenizer: uint8 pictures <-> codes. See :class:`_Codec`."""

    config: FSQAutoencoderConfig

    @property
    def num_codes(self) -> int:
        return fsq.num_codes(self.config.levels)

    @property
    def codes_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int32[np.ndarray, "n t"]:
        """Codes in [0, num_codes) of each picture, the grid row by row.

        Raises ValueError if ``images`` is not uint8 of the codec's size.
        """
        return self._run("encode", self._checked(images))

    def decode(self, codes: Int[np.ndarray, "n t"]) -> UInt8[np.ndarray, "n h w 3"]:
        """The picture of each row of codes. Raises ValueError if a code is out of range."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image:
            raise ValueError(f"expected codes [n, {self.codes_per_image}], got {list(codes.shape)}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.num_codes:
            raise ValueError(
                f"codes must be in [0, {self.num_codes}), got {codes.min()}..{codes.max()}"
            )
        return self._run("decode", codes.astype(np.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCodec(_Codec):
    """A frozen autoencoder without quantiser: uint8 pictures <-> latents. See :class:`_Codec`.

    Attributes:
      mean_z: [z] float32, mean of each channel over the pictures that it was normalised with.
      std_z: [z] float32, its standard deviation there.
    """

    config: KLAutoencoderConfig
    mean_z: np.ndarray
    std_z: np.ndarray

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    @property
    def latents_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n t z"]:
        """Posterior means, the grid row by row; each channel of mean 0, variance 1 over ``train``.

        Raises ValueError if ``images`` is not uint8 of the codec's size.
        """
        return (self._run("encode", self._checked(images)) - self.mean_z) / self.std_z

    def decode(self, latents: Float[np.ndarray, "n t z"]) -> UInt8[np.ndarray, "n h w 3"]:
        """The picture of each row of (normalised) latents. Raises ValueError on another shape."""
        latents = np.asarray(latents, np.float32)
        expected = (self.latents_per_image, self.channels)
        if latents.ndim != 3 or latents.shape[1:] != expected:
            raise ValueError(
                f"expected latents [n, {expected[0]}, {expected[1]}], got {list(latents.shape)}"
            )
        return self._run("decode", latents * self.std_z + self.mean_z)


@functools.lru_cache(maxsize=8)
def _program(config: AutoencoderConfig, method: str) -> Callable:
    """The jitted ``method`` of the autoencoder: (params, [_CHUNK, ...]) -> [_CHUNK, ...]."""
    model = MODELS.get(config.name)(config)

    def run(params, inputs):
        def one(row):
            return model.apply({"params": params}, row[None], method=method)[0]

        with jax.default_matmul_precision("highest"):
            return jax.lax.map(one, inputs)

    return jax.jit(run)


def builtin_codec_path(name: str = "fsq") -> Path:
    """Where the weights of ``builtin:fsq`` or ``builtin:kl`` lie."""
    return Path(__file__).resolve().parent.parent / "data" / "builtin" / f"{name}.npz"


def save_image_codec(path: str | Path, config: FSQAutoencoderConfig, params: dict) -> ImageCodec:
    """Writes config and parameters (as float16) to an .npz; returns the codec that it holds.

    The version is a hash of the rounded parameters, so writing the codec again keeps it.
    """
    _write(path, config, _rounded(params))
    return load_image_codec(str(path))


def save_latent_codec(
    path: str | Path,
    config: KLAutoencoderConfig,
    params: dict,
    images: UInt8[np.ndarray, "n h w 3"],
) -> LatentCodec:
    """Writes config, parameters (as float16) and latent statistics; returns what the file holds.

    The statistics are those of the posterior means of ``images`` (the training split) by the
    rounded parameters.
    """
    rounded = _rounded(params)
    ones = np.ones(config.latent_channels, np.float32)
    plain = LatentCodec(config, _widened(rounded), "", 0 * ones, ones)
    latents = plain.encode(images).reshape(-1, config.latent_channels).astype(np.float64)
    statistics = {
        "latents/mean_z": latents.mean(axis=0).astype(np.float32),
        "latents/std_z": np.maximum(latents.std(axis=0), 1e-6).astype(np.float32),
    }
    _write(path, config, rounded, statistics)
    return load_latent_codec(str(path))


def load_image_codec(spec: str) -> ImageCodec:
    """The frozen image tokenizer ``builtin:fsq``, or the one in an .npz file.

    Raises UserError if there is no such file, or if it holds something else.
    """
    config, flat, _, version = _read(spec, "fsq", "image tokenizer", FSQAutoencoderConfig)
    return ImageCodec(config, _widened(flat), version)


def load_latent_codec(spec: str) -> LatentCodec:
    """The frozen autoencoder ``builtin:kl``, or the one in an .npz file.

    Raises UserError if there is no such file, or if it holds something else.
    """
    kind = "latent autoencoder"
    config, flat, statistics, version = _read(spec, "kl", kind, KLAutoencoderConfig)
    shape = (config.latent_channels,)
    if {name: leaf.shape for name, leaf in statistics.items()} != {"mean_z": shape, "std_z": shape}:
        raise _wrong(spec, kind)
    return LatentCodec(config, _widened(flat), version, statistics["mean_z"], statistics["std_z"])


def _rounded(params: dict) -> dict[str, np.ndarray]:
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return {name: np.asarray(leaf, np.float16) for name, leaf in flat.items()}


def _widened(flat: dict[str, np.ndarray]) -> dict:
    return unflatten_dict({name: leaf.astype(np.float32) for name, leaf in flat.items()}, sep="/")


def _write(
    path: str | Path,
    config: AutoencoderConfig,
    flat: dict[str, np.ndarray],
    statistics: dict[str, np.ndarray] | None = None,
) -> None:
    arrays: dict[str, Any] = {f"params/{name}": leaf for name, leaf in flat.items()}
    arrays |= statistics or {}
    head = json.dumps({"format": _FORMAT, "config": dataclasses.asdict(config)}, sort_keys=True)
    with open(path, "wb") as file:
        np.savez_compressed(file, head=np.asarray(head), **arrays)


def _wrong(spec: str, kind: str) -> UserError:
    return UserError(
        f"{_FIELD}: {spec!r} is no {kind}; make one with tools/export_image_tokenizer.py"
    )


def _read(
    spec: str, builtin: str, kind: str, config_class: type
) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """(config, parameters, latent statistics, version) of a built-in or a file."""
    if spec.startswith("builtin:"):
        if spec != f"builtin:{builtin}":
            raise UserError(f"{_FIELD}: no built-in {kind} {spec!r}; choose builtin:{builtin}")
        path = builtin_codec_path(builtin)
    else:
        path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(
            f"{_FIELD}: no file {str(path)!r}; choose builtin:{builtin} or an .npz file"
        )
    wrong = _wrong(str(path), kind)
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        head = json.loads(str(stored.pop("head")))
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in head["config"].items()
        }
        config = config_class(**options)
        known = head["format"] == _FORMAT and config.name == config_class().name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise wrong from error
    flat = _under("params/", stored)
    if not known or {k: v.shape for k, v in flat.items()} != _param_shapes(config):
        raise wrong
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    statistics = _under("latents/", stored)
    for name, leaf in [*sorted(flat.items()), *sorted(statistics.items())]:
        digest.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
    return config, flat, statistics, digest.hexdigest()[:16]


def _under(prefix: str, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}


def _param_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    model = MODELS.get(config.name)(config)
    size = (1, config.image_size, config.image_size, CHANNELS)
    batch = {"images": jax.ShapeDtypeStruct(size, jnp.uint8)}
    abstract = jax.eval_shape(model.init, jax.random.key(0), batch)
    flat: dict[str, Any] = flatten_dict(meta.unbox(abstract["params"]), sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}
