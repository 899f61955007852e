"""Parameters of norms, projections and feed-forward layers, shared or one set per modality.

Every parameter has a leading modality axis: of size M when untied, of size 1 when shared, so a
dense model's weights become a Mixture-of-Transformers' by repeating them along it.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config.towers import Tower
from moejax.config.trunk import TrunkConfig
from moejax.experts.activations import activate
from moejax.nn.context import Context
from moejax.ops import norms, untied
from moejax.parallel.local import (
    COLUMNS,
    FEATURES,
    INNER,
    PER_DEVICE,
    TOKENS,
    axis_size,
    interleave,
    run_local,
    tensor_sum,
)


def compute_dtype(config: Any):
    """Of a model's config."""
    return jnp.dtype(config.dtype)


def param_dtype(config: Any):
    """Of a model's config: parameters are float32, or float64 when the computation is."""
    return jnp.promote_types(config.dtype, jnp.float32)


def fan_in_normal(in_axes: tuple[int, ...]):
    """Truncated normal of variance 1 / fan-in, drawn for the whole stack of towers."""

    def init(key, shape, dtype):
        fan_in = math.prod(shape[axis] for axis in in_axes)
        # 0.8796 is the standard deviation of a normal truncated at two of its own.
        unit = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / 0.87962566
        return unit * fan_in**-0.5

    return init


def partitioned(init: Callable, *names: str | None) -> Callable[..., Any]:
    """``init`` with the logical names of the parameter's axes on what it returns."""
    return nn.with_logical_partitioning(init, names)


def dropout(x: jax.Array, rate: float, ctx: Context, index: int) -> jax.Array:
    """``x`` with a share ``rate`` of it zero, in training; ``index`` is a number in the block."""
    if not ctx.train or rate == 0:
        return x
    assert ctx.rng is not None, "dropout needs the rng of the training step"
    keep = jax.random.bernoulli(jax.random.fold_in(ctx.rng, index), 1 - rate, x.shape)
    return x * keep / (1 - rate)


class Norm(nn.Module):
    """RMS or layer norm with a scale (and no bias), shared or per modality.

    With ``towers`` each token's is over the features of its tower, and the others are zero.
    """

    kind: str
    eps: float
    num: int
    param_dtype: jnp.dtype
    towers: tuple[Tower, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, modality_bt: jax.Array) -> jax.Array:
        """[b, t, ..., d] -> the same shape and dtype."""
        names = (axes.MODALITY, axes.EMBED if x.ndim == 3 else axes.HEAD_SIZE)

        def scale_of(suffix: str, num: int, width: int) -> jax.Array:
            ones = partitioned(nn.initializers.ones, *names)
            return self.param(f"scale_md{suffix}", ones, (num, width), self.param_dtype)

        if self.towers:
            out = jnp.zeros_like(x)
            for i, tower in enumerate(self.towers):
                scale_md = scale_of(f"_{tower.name}", 1, tower.width)
                own = norms.normalise(self.kind, x[..., : tower.width], self.eps) * scale_md[None]
                here = (modality_bt == i)[..., None]
                out = jnp.where(here, untied.widen(own.astype(x.dtype), x.shape[-1]), out)
            return out
        scale_md = scale_of("", self.num, x.shape[-1])
        scale = norms.select_by_modality(scale_md, modality_bt)
        scale = scale.reshape(*scale.shape[:2], *(1,) * (x.ndim - 3), x.shape[-1])
        return (norms.normalise(self.kind, x, self.eps) * scale).astype(x.dtype)


def modality_layout_of(config: TrunkConfig, modality_bt: jax.Array):
    """One sort of the tokens for all layers that run on them; None if all projections are shared.

    Returns:
      A :class:`moejax.ops.untied.ModalityLayout` of each device's own tokens.
    """
    if not config.by_modality:
        return None
    num = len(config.modalities)
    return run_local(
        lambda modality_bt: untied.modality_layout(modality_bt, num),
        (modality_bt, TOKENS),
        tokens=modality_bt.shape,
        out=PER_DEVICE,
    )


def project(
    x_btd: jax.Array,
    w_mdf: jax.Array,
    ctx: Context,
    backend: str,
    parts: tuple[int, ...],
    tower: int | None = None,
) -> jax.Array:
    """``x @ w``, by modality if ``w`` has more than one tower; [b, t, d] -> [b, t, f].

    Columns are split over the tensor axis, in the order of :func:`interleave` for ``parts``. With
    ``tower`` the weight is that tower's alone, and tokens of others get zeros.
    """
    w_mdf = interleave(w_mdf.astype(x_btd.dtype), parts)
    if w_mdf.shape[0] == 1 and tower is None:
        return jnp.einsum("btd,df->btf", x_btd, w_mdf[0])
    return run_local(
        lambda x, layout, w: untied.untied_linear(x, w, layout, backend, group_offset=tower or 0),
        (x_btd, TOKENS),
        (ctx.layout, PER_DEVICE),
        (w_mdf, COLUMNS),
        tokens=x_btd.shape[:2],
        out=FEATURES,
    )


def project_back(
    x_btf: jax.Array, w_mfd: jax.Array, ctx: Context, backend: str, tower: int | None = None
) -> jax.Array:
    """``x @ w``, as :func:`project`, where the tensor axis splits what is summed over."""
    w_mfd = w_mfd.astype(x_btf.dtype)
    if w_mfd.shape[0] == 1 and tower is None:
        return jnp.einsum("btf,fd->btd", x_btf, w_mfd[0])

    def local(x, layout, w):
        return tensor_sum(untied.untied_linear(x, w, layout, backend, group_offset=tower or 0))

    return run_local(
        local,
        (x_btf, FEATURES),
        (ctx.layout, PER_DEVICE),
        (w_mfd, INNER),
        tokens=x_btf.shape[:2],
        out=TOKENS,
    )


class FeedForward(nn.Module):
    """Two matrices around ``model.ffn_activation``, of which SwiGLU's first is two side by side.

    ``widths`` has one hidden width, or one for each modality.
    """

    config: TrunkConfig
    num: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x_btd: jax.Array, ctx: Context) -> jax.Array:
        cfg, towers = self.config, self.config.tower_shapes
        gated = cfg.ffn_activation == "swiglu"

        def weights(suffix: str, num: int, width: int, d: int = x_btd.shape[-1]):
            wi = self.param(
                f"wi_mdf{suffix}",
                partitioned(fan_in_normal((1,)), axes.MODALITY, axes.EMBED, axes.MLP),
                (num, d, 2 * width if gated else width),
                param_dtype(cfg),
            )
            wo = self.param(
                f"wo_mfd{suffix}",
                partitioned(fan_in_normal((1,)), axes.MODALITY, axes.MLP, axes.EMBED),
                (num, width, d),
                param_dtype(cfg),
            )
            return wi.astype(x_btd.dtype), wo.astype(x_btd.dtype)

        widths = self.widths
        if towers:
            widths = widths if len(widths) > 1 else widths * len(towers)
            pairs = zip(towers, widths, strict=True)
            stacks = [weights(f"_{own.name}", 1, width, own.width) for own, width in pairs]
        elif len(set(widths)) > 1:
            pairs = zip(cfg.modalities, widths, strict=True)
            stacks = [weights(f"_{name}", 1, width) for name, width in pairs]
        else:
            widths = widths[:1]
            stacks = [weights("", self.num, widths[0])]
        if gated:
            stacks = [
                (interleave(wi, (width, width)), wo)
                for (wi, wo), width in zip(stacks, widths, strict=True)
            ]
        wi, wo = tuple(zip(*stacks, strict=True))
        if self.num == 1 and axis_size("tensor") == 1:
            hidden = activate(jnp.einsum("btd,df->btf", x_btd, wi[0][0]), cfg.ffn_activation)
            return jnp.einsum("btf,fd->btd", hidden, wo[0][0])

        def local(x, layout, wi, wo):
            if self.num == 1:
                return tensor_sum(activate(x @ wi[0][0], cfg.ffn_activation) @ wo[0][0])
            return tensor_sum(untied.untied_swiglu(x, wi, wo, layout, cfg.kernel_backend))

        return run_local(
            local,
            (x_btd, TOKENS),
            (ctx.layout if self.num > 1 else (), PER_DEVICE),
            (wi, COLUMNS),
            (wo, INNER),
            tokens=x_btd.shape[:2],
            out=TOKENS,
        )
