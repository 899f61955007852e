"""Portable grouped MLP: a loop over row tiles on CPU, ``lax.ragged_dot`` elsewhere."""

import functools
from typing import NamedTuple

from jax import lax

from pallas_kernels.costs import Cost, costed_jit
from pallas_kernels.grouped_mlp import loop, ragged
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.tiles import worst_case_rows


def forward(of: Operands, *, expected_share, **options):
    """(out [t, d], h [rows, _] or None): tokens' sums, and what the first matrix gave.

    ``options`` are ``activation``, ``group_offset`` and ``keep_hidden``.
    """
    return _program("forward", _Shape.of(of, expected_share), **options)(of)


def backward(of: Operands, h_rf, dout_td, *, expected_share, **options):
    """(dx [t, d], dwi, dwo, dscale [rows] or None); ``options`` without ``keep_hidden``."""
    return _program("backward", _Shape.of(of, expected_share), **options)(of, h_rf, dout_td)


class _Shape(NamedTuple):
    rows: int
    d: int
    wide: int
    f: int
    num_local: int
    num_groups: int
    expected_rows: int

    @classmethod
    def of(cls, of: Operands, expected_share: float):
        e, d, wide = of.wi_edf.shape
        rows, groups = of.num_rows, of.group_sizes.shape[0]
        # With a part of the groups: their share of evenly filled ones.
        expected = round(rows * expected_share * e / groups)
        return cls(rows, d, wide, of.wo_efd.shape[1], e, groups, expected)

    def name(self, direction: str) -> str:
        sizes = f"{self.rows}x{self.d}x{self.wide}x{self.f}"
        groups = f"{self.num_local}of{self.num_groups}"
        return f"moejax_grouped_mlp_{direction}_{sizes}_{groups}_{self.expected_rows}"

    def cost(self, direction: str) -> Cost:
        """Nominal counts the expected rows."""
        per_row = 2.0 * self.d * (self.wide + self.f) * (2 if direction == "backward" else 1)
        return Cost(
            nominal=per_row * self.expected_rows,
            visited=per_row * worst_case_rows(self.rows, self.num_local),
        )


# direction -> (on CPU, elsewhere)
_KERNELS = {
    "forward": (loop.forward, ragged.forward),
    "backward": (loop.backward, ragged.backward),
}


@functools.cache
def _program(direction: str, shape: _Shape, **options):
    """The jitted kernel of these shapes and static options."""
    on_cpu, elsewhere = (functools.partial(run, **options) for run in _KERNELS[direction])

    def run(*operands):
        return lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere)

    return costed_jit(run, shape.name(direction), shape.cost(direction))
