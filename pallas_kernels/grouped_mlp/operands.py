"""What every grouped MLP multiplies: tokens, weights and where their rows lie."""

from typing import NamedTuple

import jax

from pallas_kernels.dtypes import sum_dtype


class Operands(NamedTuple):
    """Arrays of one call; ``scale`` is the gate of each row, zero for rows of nobody, or None."""

    x_td: jax.Array
    wi_edf: jax.Array
    wo_efd: jax.Array
    token: jax.Array
    row: jax.Array
    group_sizes: jax.Array
    scale: jax.Array | None

    @property
    def num_rows(self) -> int:
        return self.token.shape[0]

    @property
    def sum_dtype(self):
        return sum_dtype(self.x_td, self.wi_edf)
