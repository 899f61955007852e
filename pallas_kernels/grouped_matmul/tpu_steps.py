"""What both Pallas grouped matmuls for TPU are made of."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.grouped_matmul.blocks import Blocks
from pallas_kernels.visits import even_sizes


def check_dtypes(*arrays) -> None:
    """NotImplementedError for what is summed in float32 here and must not be, or does not lower."""
    for array in arrays:
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(
                f"the tpu backend multiplies float32 or bfloat16, not {array.dtype}"
            )


def known_sizes(group_sizes, rows: int) -> np.ndarray:
    """The sizes that the cost is stated for: those given, if they are, else even ones."""
    if isinstance(group_sizes, np.ndarray):
        return group_sizes
    return even_sizes(rows, group_sizes.shape[0])


def in_steps(multiply: Callable[[int, int], None], low, high, blocks: Blocks) -> None:
    """``multiply(first, height)`` for rows ``low ... high - 1`` of a tile, whole or in steps."""
    whole = (low <= 0) & (high >= blocks.rows)
    pl.when(whole)(lambda: multiply(0, blocks.rows))
    for first in range(0, blocks.rows, blocks.step):
        touched = (low < first + blocks.step) & (high > first) & (high > low)
        pl.when(touched & ~whole)(functools.partial(multiply, first, blocks.step))


def dot(x, w, contract):
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, w, (contract, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
