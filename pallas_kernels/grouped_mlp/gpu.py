"""What NVIDIA GPUs run where the Pallas kernels are asked for: XLA's activation between them."""

import functools
from typing import Any

from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_mlp import ragged
from pallas_kernels.grouped_mlp.operands import Operands


def forward(of: Operands, *, interpret: Any = False, **options):
    matmul = functools.partial(gpu.grouped_matmul, interpret=interpret)
    return ragged.forward(of, matmul=matmul, **options)


def backward(of: Operands, h_rf, dout_td, *, interpret: Any = False, **options):
    return ragged.backward(
        of,
        h_rf,
        dout_td,
        matmul=functools.partial(gpu.grouped_matmul, interpret=interpret),
        matmul_t=functools.partial(gpu.grouped_matmul_t, interpret=interpret),
        **options,
    )
