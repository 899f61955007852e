"""The jitted grouped MLPs of each backend, with what they cost.

XLA's is a loop over row tiles on CPU and ``lax.ragged_dot`` elsewhere; on TPUs ``auto`` is Pallas.
"""

import functools
from typing import Any, NamedTuple

from pallas_kernels.backends import backend_program
from pallas_kernels.costs import Cost
from pallas_kernels.grouped_mlp import gpu, loop, ragged, tpu
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.tiles import worst_case_rows


def forward(of: Operands, *, expected_share, **options):
    """(out [t, d], h or None): tokens' sums, and what the first matrix gave, for ``backward``.

    ``options`` are ``activation``, ``group_offset``, ``keep_hidden``, ``backend``, ``interpret``.
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


# direction -> (XLA's on CPU, XLA's elsewhere, Pallas's on TPU, Pallas's on GPU)
_KERNELS = {
    "forward": (loop.forward, ragged.forward, tpu.forward, gpu.forward),
    "backward": (loop.backward, ragged.backward, tpu.backward, gpu.backward),
}


@functools.cache
def _program(direction: str, shape: _Shape, backend: str, interpret: Any, **options):
    """The jitted kernel of these shapes and static options."""
    name, cost = shape.name(direction), shape.cost(direction)
    return backend_program(_KERNELS[direction], backend, interpret, name, cost, **options)
