"""The jitted grouped matmuls of each backend, with what they cost.

XLA's is a loop over row tiles on CPU, whose length depends on the data, and ``lax.ragged_dot``
elsewhere; on TPUs ``auto`` is the Pallas kernel. Autodiff sees none of them, the op has a
``custom_vjp``.
"""

import functools
from typing import Any, NamedTuple

from pallas_kernels.backends import backend_program
from pallas_kernels.costs import Cost
from pallas_kernels.grouped_matmul import gpu, tpu
from pallas_kernels.grouped_matmul.loop import loop_matmul, loop_matmul_t
from pallas_kernels.grouped_matmul.ragged import ragged_matmul, ragged_matmul_t
from pallas_kernels.tiles import worst_case_rows


def grouped_matmul(
    x_td, w_edf, group_sizes, *, group_offset, transpose_rhs, out_dtype, backend, interpret
):
    """``out[r] = x[r] @ w[group(r) - group_offset]``, zero for rows of other groups."""
    inner, outer = w_edf.shape[1:] if not transpose_rhs else w_edf.shape[:0:-1]
    shape = _Shape(x_td.shape[0], inner, outer, w_edf.shape[0], group_sizes.shape[0])
    run = _program(
        "grouped_matmul",
        shape,
        backend,
        interpret,
        group_offset=group_offset,
        transpose_rhs=transpose_rhs,
        out_dtype=out_dtype,
    )
    return run(x_td, w_edf, group_sizes)


def grouped_matmul_t(
    x_td, y_tf, group_sizes, *, group_offset, num_local, out_dtype, backend, interpret
):
    """``out[e] = x[rows of e].T @ y[rows of e]``, exactly zero for empty groups."""
    rows, inner = x_td.shape
    shape = _Shape(rows, inner, y_tf.shape[1], num_local, group_sizes.shape[0])
    options = {"group_offset": group_offset, "num_local": num_local, "out_dtype": out_dtype}
    run = _program("grouped_matmul_t", shape, backend, interpret, **options)
    return run(x_td, y_tf, group_sizes)


class _Shape(NamedTuple):
    rows: int
    inner: int
    outer: int
    num_local: int
    num_groups: int

    def name(self, kernel: str) -> str:
        sizes = f"{self.rows}x{self.inner}x{self.outer}"
        return f"moejax_{kernel}_{sizes}_{self.num_local}of{self.num_groups}"

    def cost(self) -> Cost:
        """With a part of the groups, nominal is their share of evenly filled groups."""
        per_row = 2.0 * self.inner * self.outer
        return Cost(
            nominal=per_row * self.rows * self.num_local / self.num_groups,
            visited=per_row * worst_case_rows(self.rows, self.num_local),
        )


# kernel -> (XLA's on CPU, XLA's elsewhere, Pallas's on TPU, Pallas's on GPU)
_KERNELS = {
    "grouped_matmul": (loop_matmul, ragged_matmul, tpu.grouped_matmul, gpu.grouped_matmul),
    "grouped_matmul_t": (
        *(loop_matmul_t, ragged_matmul_t),
        *(tpu.grouped_matmul_t, gpu.grouped_matmul_t),
    ),
}


@functools.cache
def _program(kernel: str, shape: _Shape, backend: str, interpret: Any, **options):
    """The jitted kernel of these shapes and static options."""
    name, cost = shape.name(kernel), shape.cost()
    return backend_program(_KERNELS[kernel], backend, interpret, name, cost, **options)
