"""Image tokenizer: a convolutional autoencoder with finite scalar quantisation, and its codec.

The picture is cut into patches; a few residual blocks on the grid of patches give z numbers for
each, which are rounded to one of ``prod(levels)`` codes (arXiv 2309.15505). The decoder mirrors
the encoder.
"""

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType
from jaxtyping import Int, Int32, UInt8

from moejax import axes
from moejax.config.schema import FSQAutoencoderConfig
from moejax.errors import UserError
from moejax.models.registry import MODELS
from moejax.nn.conv import ConvBlock
from moejax.nn.layers import compute_dtype, fan_in_normal, param_dtype, partitioned
from moejax.ops import fsq
from moejax.ops.augment import augment_images
from moejax.ops.norms import rms_normalise
from moejax.ops.patchify import patchify, unpatchify

_NORM_EPS = 1e-6
CHANNELS = 3


@struct.dataclass
class AutoencoderOutput:
    """``target`` and ``reconstruction`` [b, h, w, 3] in [-1, 1]; ``codes`` [b, t] i32.

    ``target`` is the picture that was encoded: the augmented one in training. The
    reconstruction is not clipped, so that its gradient does not vanish outside of the range.
    """

    target: jax.Array
    reconstruction: jax.Array
    codes: jax.Array


class FSQAutoencoder(nn.Module):
    """See the module docstring."""

    config: FSQAutoencoderConfig

    def setup(self):
        cfg = self.config
        pixels, latents = cfg.patch_size**2 * CHANNELS, len(cfg.levels)
        wide = param_dtype(cfg)
        self.patch_in = _Linear(cfg.width, wide)
        self.encoder = [ConvBlock(_NORM_EPS, wide) for _ in range(cfg.encoder_blocks)]
        self.latent_out = _Linear(latents, wide, normalise=True)
        self.latent_in = _Linear(cfg.width, wide)
        # A vector of its own for each code, beside the linear map of its channels: the decoder is
        # not held to be smooth over the grid of levels.
        self.code_vd = self.param(
            "code_vd",
            partitioned(nn.initializers.zeros, axes.VOCABULARY, axes.EMBED),
            (fsq.num_codes(cfg.levels), cfg.width),
            wide,
        )
        self.decoder = [ConvBlock(_NORM_EPS, wide) for _ in range(cfg.decoder_blocks)]
        self.patch_out = _Linear(pixels, wide, normalise=True)

    def latents(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] in [-1, 1] -> unbounded latents [b, rows, cols, z]."""
        x = patchify(images.astype(compute_dtype(self.config)), self.config.patch_size)
        x = self.patch_in(x)
        for block in self.encoder:
            x = block(x)
        return self.latent_out(x)

    def render(self, channels: jax.Array) -> jax.Array:
        """Quantised channels [b, rows, cols, z] in [-1, 1] -> images [b, h, w, 3]."""
        codes = fsq.channels_to_codes(channels, self.config.levels)
        dtype = compute_dtype(self.config)
        x = self.latent_in(channels.astype(dtype)) + self.code_vd.astype(dtype)[codes]
        for block in self.decoder:
            x = block(x)
        return unpatchify(self.patch_out(x), self.config.patch_size)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] uint8 -> codes [b, t] i32, the grid row by row."""
        return self._codes(self._channels(to_signed(images)))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [b, t] i32 -> images [b, h, w, 3] uint8."""
        side = self.config.image_size // self.config.patch_size
        channels = fsq.codes_to_channels(codes.reshape(-1, side, side), self.config.levels)
        return to_uint8(self.render(channels))

    def __call__(self, batch: dict[str, jax.Array], *, train: bool = False) -> AutoencoderOutput:
        """Reconstructs ``batch["images"]`` [b, h, w, 3] uint8.

        Raises UserError, when it is traced, if the pictures are not of ``model.image_size``.
        """
        size = self.config.image_size
        if batch["images"].shape[1:3] != (size, size):
            raise UserError(
                f"model.image_size={size}: the pictures are of {batch['images'].shape[1]} pixels "
                "(data.image_size); make the two equal"
            )
        images = to_signed(batch["images"])
        if train and self.config.augment:
            images = augment_images(self.make_rng("dropout"), images)
        channels = self._channels(images)
        return AutoencoderOutput(images, self.render(channels), self._codes(channels))

    def _channels(self, images: jax.Array) -> jax.Array:
        return fsq.quantise(self.latents(images), self.config.levels)

    def _codes(self, channels: jax.Array) -> jax.Array:
        codes = fsq.channels_to_codes(channels, self.config.levels)
        return codes.reshape(codes.shape[0], -1)


class _Linear(nn.Module):
    """``[norm] -> W x + bias`` over the last axis."""

    features: int
    param_dtype: jnp.dtype
    normalise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, d = x.dtype, x.shape[-1]
        # Only the side that is as wide as the model gets its logical name.
        names = (axes.EMBED, None) if self.normalise else (None, axes.EMBED)
        w_df = self.param(
            "w_df",
            partitioned(fan_in_normal((0,)), *names),
            (d, self.features),
            self.param_dtype,
        )
        bias_f = self.param(
            "bias_f",
            partitioned(nn.initializers.zeros, names[1]),
            (self.features,),
            self.param_dtype,
        )
        if self.normalise:
            scale_d = self.param(
                "norm_scale_d",
                partitioned(nn.initializers.ones, axes.EMBED),
                (d,),
                self.param_dtype,
            )
            x = (rms_normalise(x, _NORM_EPS) * scale_d[None, None, None]).astype(dtype)
        x = jnp.einsum("bijd,df->bijf", x, w_df.astype(dtype))
        return x + bias_f[None, None, None].astype(dtype)


def to_signed(images: jax.Array) -> jax.Array:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8 in 0..255, rounded and clipped."""
    scaled = jnp.round((images.astype(jnp.float32) + 1.0) * 127.5)
    return jnp.clip(scaled, 0, 255).astype(jnp.uint8)


@MODELS.register("fsq_autoencoder")
def build_autoencoder(config: FSQAutoencoderConfig) -> FSQAutoencoder:
    return FSQAutoencoder(config)


# Pictures per call of the compiled programs; the last call is filled up with zeros.
_CHUNK = 64
_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class ImageCodec:
    """A frozen image tokenizer: uint8 pictures <-> codes, on the first local device.

    Both directions treat one picture at a time inside of one compiled program, in float32 at full
    matmul precision. So the codes of a picture depend neither on the pictures beside it nor on
    how many there are.

    Attributes:
      config: of the autoencoder.
      params: its parameters, float32.
      version: 16 hexadecimal digits: hash of the config and the parameters.
    """

    config: FSQAutoencoderConfig
    params: dict
    version: str

    @property
    def num_codes(self) -> int:
        return fsq.num_codes(self.config.levels)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def codes_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int32[np.ndarray, "n t"]:
        """Codes in [0, num_codes) of each picture, the grid row by row.

        Raises ValueError if ``images`` is not uint8 of the codec's size.
        """
        size = self.config.image_size
        images = np.asarray(images)
        if images.shape[1:] != (size, size, CHANNELS) or images.dtype != np.uint8:
            raise ValueError(
                f"expected uint8 images [n, {size}, {size}, 3], "
                f"got {images.dtype} {list(images.shape)}"
            )
        return self._run("encode", images)

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


@functools.lru_cache(maxsize=8)
def _program(config: FSQAutoencoderConfig, method: str) -> Callable:
    """The jitted ``method`` of the autoencoder: (params, [_CHUNK, ...]) -> [_CHUNK, ...]."""
    model = FSQAutoencoder(config)

    def run(params, inputs):
        def one(row):
            return model.apply({"params": params}, row[None], method=method)[0]

        with jax.default_matmul_precision("highest"):
            return jax.lax.map(one, inputs)

    return jax.jit(run)


def builtin_codec_path() -> Path:
    """Where the weights of ``builtin:fsq`` lie."""
    return Path(__file__).resolve().parent.parent / "data" / "builtin" / "fsq.npz"


def save_image_codec(path: str | Path, config: FSQAutoencoderConfig, params: dict) -> ImageCodec:
    """Writes config and parameters (as float16) to an .npz; returns the codec that it holds.

    The version is a hash of the rounded parameters, so writing the codec again keeps it.
    """
    flat = flatten_dict(params, sep="/")
    arrays: dict[str, Any] = {
        f"params/{name}": np.asarray(leaf, np.float16) for name, leaf in flat.items()
    }
    head = json.dumps({"format": _FORMAT, "config": dataclasses.asdict(config)}, sort_keys=True)
    path = Path(path)
    with open(path, "wb") as file:
        np.savez_compressed(file, head=np.asarray(head), **arrays)
    return load_image_codec(str(path))


def load_image_codec(spec: str) -> ImageCodec:
    """The frozen image tokenizer ``builtin:fsq``, or the one in an .npz file.

    Raises UserError if there is no such file, or if it holds something else.
    """
    field = "data.image_tokenizer"
    if spec.startswith("builtin:"):
        if spec != "builtin:fsq":
            raise UserError(f"{field}: no built-in image tokenizer {spec!r}; choose builtin:fsq")
        path = builtin_codec_path()
    else:
        path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"{field}: no file {str(path)!r}; choose builtin:fsq or an .npz file")
    wrong = UserError(
        f"{field}: {str(path)!r} is no image tokenizer; "
        "make one with tools/export_image_tokenizer.py"
    )
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        head = json.loads(str(stored.pop("head")))
        options = {**head["config"], "levels": tuple(head["config"]["levels"])}
        config = FSQAutoencoderConfig(**options)
        known = head["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise wrong from error
    flat = {name.removeprefix("params/"): leaf for name, leaf in stored.items()}
    if not known or {k: v.shape for k, v in flat.items()} != _param_shapes(config):
        raise wrong
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(flat):
        digest.update(name.encode() + np.ascontiguousarray(flat[name]).tobytes())
    params = unflatten_dict({name: leaf.astype(np.float32) for name, leaf in flat.items()}, sep="/")
    return ImageCodec(config, params, digest.hexdigest()[:16])


def _param_shapes(config: FSQAutoencoderConfig) -> dict[str, tuple[int, ...]]:
    size = (1, config.image_size, config.image_size, CHANNELS)
    batch = {"images": jax.ShapeDtypeStruct(size, jnp.uint8)}
    abstract = jax.eval_shape(FSQAutoencoder(config).init, jax.random.key(0), batch)
    flat: dict[str, Any] = flatten_dict(meta.unbox(abstract["params"]), sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}
