"""EfficientNet-Lite0: what a small network trained on ImageNet sees in pictures.

Tan & Le 2019, arXiv:1905.11946, in its Lite form: no squeeze-excite, ReLU6, stem and head of the
smallest model. 16 blocks of a 1x1 expansion, a depthwise convolution and a 1x1 projection; 1,280
features, the mean over all places of what the head gives. Padding is TensorFlow's "SAME".

Weights are those of a state dict (moejax/data/prepare/efficientnet.py reads one), with the batch
norms folded into the convolutions. 1x1 convolutions are matmuls, and depthwise ones sums of shifted
products: on a CPU XLA's grouped convolution takes many times as long.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

FEATURES = 1280
BN_EPSILON = 1e-3

# (expansion, stride of the first, repeats); widths and sizes of kernels follow from the weights.
STAGES = ((1, 1, 1), (6, 2, 2), (6, 2, 2), (6, 2, 3), (6, 1, 3), (6, 2, 4), (6, 1, 1))


def fold_batch_norms(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The weights that :func:`efficientnet_features` takes, of a state dict.

    ``stem``, ``head`` and the parts of each of ``blocks`` are pairs (kernel, bias). Kernels are
    [i, j, c, d] in the stem, [c, d] of 1x1 convolutions and [i, j, d] of depthwise ones.
    """

    def folded(convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """Kernel [d, c, i, j] and bias [d]."""
        values = (state[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean"))
        gain, bias, mean = (np.asarray(value, np.float64) for value in values)
        scale = gain / np.sqrt(np.asarray(state[f"{norm}.running_var"], np.float64) + BN_EPSILON)
        kernel = state[f"{convolution}.weight"] * scale[:, None, None, None]
        return kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)

    def pointwise(convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        kernel, bias = folded(convolution, norm)
        return kernel[:, :, 0, 0].T, bias

    def depthwise(convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        kernel, bias = folded(convolution, norm)
        return kernel[:, 0].transpose(1, 2, 0), bias

    blocks = []
    for expansion, _, repeats in STAGES:
        for _ in range(repeats):
            name = f"_blocks.{len(blocks)}"
            block = {
                "depthwise": depthwise(f"{name}._depthwise_conv", f"{name}._bn1"),
                "project": pointwise(f"{name}._project_conv", f"{name}._bn2"),
            }
            if expansion > 1:
                block["expand"] = pointwise(f"{name}._expand_conv", f"{name}._bn0")
            blocks.append(block)
    stem, bias = folded("_conv_stem", "_bn0")
    head = pointwise("_conv_head", "_bn1")
    return {"stem": (stem.transpose(2, 3, 1, 0), bias), "blocks": blocks, "head": head}


def efficientnet_features(
    weights: Mapping[str, Any], images: Num[Array, "b h w 3"]
) -> Float[Array, "b features"]:
    """The features of RGB pictures of values from 0 to 255, float32."""
    x = (images.astype(jnp.float32) - 127) / 128
    kernel, bias = weights["stem"]
    x = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    x = _relu6(x + _last(bias))
    blocks = iter(weights["blocks"])
    for _, first_stride, repeats in STAGES:
        for repeat in range(repeats):
            x = _block(next(blocks), x, first_stride if repeat == 0 else 1, skips=repeat > 0)
    return _relu6(_pointwise(weights["head"], x)).mean(axis=(1, 2))


def _block(block: Mapping[str, Any], x: jax.Array, stride: int, *, skips: bool) -> jax.Array:
    before = x
    if "expand" in block:
        x = _relu6(_pointwise(block["expand"], x))
    kernel, bias = block["depthwise"]
    x = _relu6(depthwise(x, kernel, stride) + _last(bias))
    x = _pointwise(block["project"], x)
    return x + before if skips else x


def depthwise(
    x: Float[Array, "b h w d"], kernel_ijd: Float[Any, "i j d"], stride: int
) -> Float[Array, "b hs ws d"]:
    """Each channel convolved with its own kernel, padded to the size of x over ``stride``."""
    kernels = kernel_ijd.shape[:2]
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    reach = [(size - 1) * stride for size in sizes]
    # Of an odd number of pixels the larger part goes last.
    totals = [max(r + k - size, 0) for r, k, size in zip(reach, kernels, x.shape[1:3], strict=True)]
    padded = jnp.pad(x, [(0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)])
    out = jnp.zeros((x.shape[0], *sizes, x.shape[3]), x.dtype)
    for i, j in itertools.product(*map(range, kernels)):
        window = padded[:, i : i + reach[0] + 1 : stride, j : j + reach[1] + 1 : stride]
        out += window * _last(kernel_ijd[i, j])
    return out


def _pointwise(weights: tuple[Any, Any], x: jax.Array) -> jax.Array:
    kernel, bias = weights
    return jnp.matmul(x, kernel, precision="highest") + _last(bias)


def _last(value_d: Any) -> jax.Array:
    """Broadcasts along the last axis of a picture."""
    return jnp.asarray(value_d)[None, None, None]


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)
