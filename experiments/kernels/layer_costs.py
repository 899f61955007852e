"""FLOPs and bytes of a whole MoE layer, forward and backward, beside the floor of both.

    python experiments/kernels/layer_costs.py v6e v5e v5p

What the Pallas kernels do is counted from the visits that they run, at the tiles that they ship
with; what XLA does between them (gathers and sums of rows) by what has to be read and written.
Nothing is compiled or run, and no TPU is needed.
"""

import sys
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.ops.untied import swiglu
from moejax.parallel.topologies import CHIPS
from pallas_kernels.grouped_mlp import tpu
from pallas_kernels.grouped_mlp.operands import Operands

BFLOAT16 = 2


class Layer(NamedTuple):
    """Tokens, choices of each, width, hidden width of an expert, and experts."""

    name: str
    t: int
    k: int
    d: int
    f: int
    e: int


LAYERS = (
    Layer("Mixtral 8x7B", 8192, 2, 4096, 14336, 8),
    Layer("DeepSeekMoE 16B", 8192, 6, 2048, 1408, 64),
)


def sizes_of(layer: Layer, skew: str) -> np.ndarray:
    """Rows of each expert: even, or falling as 1 / rank."""
    rows = layer.t * layer.k
    share = np.ones(layer.e) if skew == "even" else 1 / np.arange(1, layer.e + 1)
    ends = np.round(np.cumsum(share / share.sum()) * rows).astype(int)
    return np.diff(ends, prepend=0).astype(np.int32)


def kernel_costs(jaxpr) -> list[tuple[str, int, int]]:
    """(name, FLOPs, bytes) of every Pallas call."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            cost = equation.params["cost_estimate"]
            found.append((equation.params["name"], cost.flops, cost.bytes_accessed))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            if equation.primitive.name != "pallas_call":
                found += kernel_costs(inner)
    return found


def layer_costs(layer: Layer, skew: str) -> tuple[int, int]:
    """FLOPs and bytes of the layer, forward and backward, on the chip of the mesh that is set."""
    rows = layer.t * layer.k
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    sizes = sizes_of(layer, skew)

    def run(x, wi, wo, token, row, scale, dout):
        of = Operands(x, wi, wo, token, row, sizes, scale)
        options = {"activation": swiglu, "group_offset": 0}
        out, h = tpu.forward(of, keep_hidden=True, **options)
        return out, tpu.backward(of, h, dout, **options)

    integers = (shape(rows, dtype=jnp.int32), shape(layer.t, layer.k, dtype=jnp.int32))
    x = shape(layer.t, layer.d)
    weights = shape(layer.e, layer.d, 2 * layer.f), shape(layer.e, layer.f, layer.d)
    scale = shape(rows, dtype=jnp.float32)
    traced = jax.make_jaxpr(run)(x, *weights, *integers, scale, x)
    costs = kernel_costs(traced.jaxpr)
    # Gathered: x twice and the cotangent, read and written. Summed: the outputs, and dx.
    between = 3 * 2 * rows * layer.d + 2 * (rows + layer.t) * layer.d
    return sum(cost[1] for cost in costs), sum(cost[2] for cost in costs) + BFLOAT16 * between


def floor(layer: Layer) -> tuple[int, int]:
    """FLOPs of the products, and bytes if rows were gathered and summed inside of them.

    Forward: x read for each row, h kept, u and y between the products, weights once. Backward: x,
    the cotangent and h read, u and the gradients of h and of rows between the products, weights
    read once, their gradients written.
    """
    rows = layer.t * layer.k
    wide, tokens = rows * layer.d, layer.t * layer.d
    hidden = rows * layer.f
    weights = 3 * layer.e * layer.d * layer.f
    forward = 2 * wide + 2 * hidden + 2 * tokens + 2 * hidden + weights
    backward = 2 * wide + 2 * hidden + 2 * 3 * hidden + 2 * wide + tokens + 2 * weights
    return 18 * rows * layer.d * layer.f, BFLOAT16 * (forward + backward)


def main(chips: list[str]) -> None:
    print("| layer | chip | rows | FLOPs over the products' | bytes over the fused floor |")
    print("| --- | --- | --- | --: | --: |")
    for name in chips:
        device = AbstractDevice(CHIPS[name].device_kind, 1, "tpu")
        mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            for layer in LAYERS:
                least = floor(layer)
                for skew in ("even", "zipf"):
                    flops, moved = layer_costs(layer, skew)
                    print(
                        f"| {layer.name} | {name} | {skew} | {flops / least[0]:.3f} "
                        f"| {moved / least[1]:.2f} |"
                    )


if __name__ == "__main__":
    main(sys.argv[1:] or ["v6e"])
