"""Writes the unmeasured lines of the tables of tiles, for the layers of the largest configs.

    python -m pallas_kernels.tabulate

Needs no accelerator. Tiles that a chip shows to be better go into the table by hand, with the name
of the measurement for their ``source``; this leaves them there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.grouped_matmul import gpu as gpu_matmul
from pallas_kernels.grouped_matmul import tpu as tpu_matmul
from pallas_kernels.grouped_mlp import gpu as gpu_mlp
from pallas_kernels.grouped_mlp import tpu as tpu_mlp
from pallas_kernels.grouped_mlp.operands import Operands
from pallas_kernels.tile_table import searching, write_table

# chip -> (table, platform, what jax calls the device)
CHIPS = {
    "v5e": ("tpu", "tpu", "TPU v5 lite"),
    "v5p": ("tpu", "tpu", "TPU v5"),
    "v6e": ("tpu", "tpu", "TPU v6 lite"),
    "h100": ("gpu", "cuda", "NVIDIA H100 80GB HBM3"),
    "h200": ("gpu", "cuda", "NVIDIA H200"),
}
_BFLOAT16 = jnp.bfloat16


class Layer(NamedTuple):
    """What one device computes of a SwiGLU layer, in bfloat16.

    Attributes:
      name: of the config.
      t: tokens.
      k: choices of each.
      d: width.
      f: hidden width.
      e: groups.
      gated: whether choices have gates.
      projections: (inner, outer) of untied projections beside it.
    """

    name: str
    t: int
    k: int
    d: int
    f: int
    e: int
    gated: bool = True
    projections: tuple[tuple[int, int], ...] = ()


# As experiments/scale compiles them; experts that one device holds, and rows for each as there.
LAYERS = (
    Layer("mot:7b", 24576, 1, 4096, 11008, 2, False, ((4096, 12288), (4096, 4096))),
    Layer("moma:1.4b", 32768, 1, 2048, 5461, 1),
    Layer("deepseek_moe:16b", 8192, 6, 2048, 1408, 4),
    Layer("deepseek_moe:16b on one device", 8192, 6, 2048, 1408, 64),
    Layer("Mixtral 8x7B", 8192, 2, 4096, 14336, 8),
)


def layers_of(chip: str) -> list[Layer]:
    """Those that its kernels know: GPUs copy eight columns at once."""
    return [layer for layer in LAYERS if CHIPS[chip][0] == "tpu" or layer.f % 8 == 0]


def program(layer: Layer, table: str) -> tuple[Callable, tuple[tuple[tuple[int, ...], Any], ...]]:
    """All that a step runs of the layer, and (shape, dtype) of its arguments.

    Evaluation, which keeps no hidden layer, and value and gradients of training, by the kernels for
    "tpu" or "gpu".
    """
    mlp, matmul = {"tpu": (tpu_mlp, tpu_matmul), "gpu": (gpu_mlp, gpu_matmul)}[table]
    rows = layer.t * layer.k

    def run(x, wi, wo, token, row, sizes, scale, dout, *projections):
        of = Operands(x, wi, wo, token, row, sizes, scale if layer.gated else None)
        options = {"activation": _swiglu, "group_offset": 0}
        evaluated, _ = mlp.forward(of, keep_hidden=False, **options)
        out, h = mlp.forward(of, keep_hidden=True, **options)
        results = [evaluated, out, mlp.backward(of, h, dout, **options)]
        for x_td, w_edf, dout_tf in zip(*[iter(projections)] * 3, strict=True):
            options = {"group_offset": 0, "out_dtype": _BFLOAT16, "interpret": False}
            for rows_td, transposed in ((x_td, False), (dout_tf, True)):
                multiplied = matmul.grouped_matmul(
                    rows_td, w_edf, sizes, transpose_rhs=transposed, **options
                )
                results.append(multiplied)
            results.append(
                matmul.grouped_matmul_t(x_td, dout_tf, sizes, num_local=layer.e, **options)
            )
        return results

    floats = [(layer.t, layer.d), (layer.e, layer.d, 2 * layer.f), (layer.e, layer.f, layer.d)]
    more = [
        shape
        for inner, outer in layer.projections
        for shape in ((rows, inner), (layer.e, inner, outer), (rows, outer))
    ]
    return run, (
        *((shape, _BFLOAT16) for shape in floats),
        *((shape, jnp.int32) for shape in ((rows,), (layer.t, layer.k), (layer.e,))),
        ((rows,), jnp.float32),
        ((layer.t, layer.d), _BFLOAT16),
        *((shape, _BFLOAT16) for shape in more),
    )


def searched(layer: Layer, chip: str) -> dict[Any, Any]:
    """{key: blocks} that the layer takes on the chip without a table."""
    table, platform, kind = CHIPS[chip]
    device = AbstractDevice(kind, 1, platform)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    run, shapes = program(layer, table)
    with jax.sharding.use_abstract_mesh(mesh), searching() as found:
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return found


def unmeasured(table: str) -> dict[Any, dict[str, int]]:
    """{key: sizes} of all layers on all chips of "tpu" or "gpu"."""
    chips = [chip for chip, (name, *_) in CHIPS.items() if name == table]
    found: dict[Any, Any] = {}
    for chip in chips:
        for layer in layers_of(chip):
            # Of two layers with one key the first.
            found = searched(layer, chip) | found
    return {key: _sizes(blocks) for key, blocks in sorted(found.items())}


def _sizes(blocks) -> dict[str, int]:
    """What a table states of them: the limit of the memory follows from the chip."""
    return {name: size for name, size in dataclasses.asdict(blocks).items() if size is not None}


def _swiglu(h_tf):
    gate, up = jnp.split(h_tf, 2, axis=-1)
    return jax.nn.silu(gate) * up


if __name__ == "__main__":
    for name in ("tpu", "gpu"):
        write_table(name, unmeasured(name))
