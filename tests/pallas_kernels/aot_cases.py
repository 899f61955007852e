"""The kernels at real shapes, compiled for chips that are not here: a script, run by test_aot.py.

    python tests/pallas_kernels/aot_cases.py TOPOLOGY OUT.json [CASE ...]

Writes {case: {"chip": whose tiles it takes, "calls": Pallas calls in the program, "flops": of XLA's
count, "error": ...}}. The cases "table, LAYER" take every entry of the chip's tile table.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from moejax.analysis.aot import topology_devices
from moejax.ops.untied import swiglu
from moejax.parallel.topologies import Chip, parse_topology
from pallas_kernels import (
    gather_tokens,
    grouped_matmul,
    grouped_mlp,
    router_topk,
    scatter_tokens,
)
from pallas_kernels.rows.tpu import gather_rows, sum_rows
from pallas_kernels.tabulate import layers_of, program
from pallas_kernels.versions import target_chip

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
# Rows, width, hidden width, experts and choices: of a layer with few and with many experts.
FEW = (8192, 4096, 14336, 8, 2)
MANY = (24576, 2048, 1408, 64, 6)


def gradient(run, count):
    """Value and gradients of the first ``count`` arguments of ``run(*arguments)``."""

    def both(*arguments):
        out, pullback = jax.vjp(lambda *first: run(*first, *arguments[count:]), *arguments[:count])
        return out, pullback(out)

    return both


def matmul(shape, dtype, backend, transpose_rhs=False):
    rows, d, f, e, _ = shape
    run = lambda x, w, sizes: grouped_matmul(
        x, w, sizes, transpose_rhs=transpose_rhs, backend=backend
    )
    weight = (e, f, d) if transpose_rhs else (e, d, f)
    return gradient(run, 2), (((rows, d), dtype), (weight, dtype), ((e,), I32))


def mlp(shape, backend):
    rows, d, f, e, k = shape
    t = rows // k
    run = lambda x, wi, wo, gates, token, row, sizes: grouped_mlp(
        x, wi, wo, token, row, sizes, gates, activation=swiglu, backend=backend
    )
    floats = (((t, d), BF16), ((e, d, 2 * f), BF16), ((e, f, d), BF16), ((t, k), F32))
    return gradient(run, 4), (*floats, ((rows,), I32), ((t, k), I32), ((e,), I32))


def tokens(b, t, c, d):
    def run(x, weight, index):
        taken = gather_tokens(x, index, backend="tpu")
        return scatter_tokens(x, taken, index, weight, backend="tpu")

    return gradient(run, 2), (((b, t, d), BF16), ((b, c), F32), ((b, c), I32))


def router(t, e, k, scores):
    def run(logits, bias):
        found = router_topk(logits, k, bias, scores=scores, renormalise=True, backend="tpu")
        return found.gates, found.ids, found.lse, found.score_sum, found.load

    return run, (((t, e), F32), ((e,), F32))


TPU = {
    "matmul few": lambda: matmul(FEW, BF16, "tpu"),
    "matmul many": lambda: matmul(MANY, BF16, "tpu"),
    "matmul transposed": lambda: matmul(MANY, BF16, "tpu", transpose_rhs=True),
    "matmul float32": lambda: matmul(MANY, F32, "tpu"),
    "matmul off tile": lambda: matmul((1000, 200, 328, 3, 1), BF16, "tpu"),
    "mlp few": lambda: mlp(FEW, "tpu"),
    "mlp many": lambda: mlp(MANY, "tpu"),
    "mlp many, ragged_dot": lambda: mlp(MANY, "xla"),
    "gather rows": lambda: (
        lambda x, token: gather_rows(x, token),
        (((4096, 2048), BF16), ((8192,), I32)),
    ),
    "sum rows": lambda: (
        lambda y, row, gates: sum_rows(y, row, gates),
        (((32768, 2048), BF16), ((4096, 8), I32), ((4096, 8), F32)),
    ),
    "tokens": lambda: tokens(8, 1024, 256, 2048),
    "router softmax": lambda: router(4096, 64, 6, "softmax"),
    "router sigmoid": lambda: router(4096, 256, 8, "sigmoid"),
}
CUDA = {
    "matmul few": lambda: matmul(FEW, BF16, "gpu"),
    "matmul many": lambda: matmul(MANY, BF16, "gpu"),
    "matmul transposed": lambda: matmul(MANY, BF16, "gpu", transpose_rhs=True),
    "mlp many": lambda: mlp(MANY, "gpu"),
}
CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}


def cases_of(chip: Chip) -> dict[str, Callable]:
    kernels, table = {"tpu": (TPU, "tpu"), "cuda": (CUDA, "gpu")}[chip.platform]
    layers = layers_of(chip.name)
    return kernels | {
        f"table, {layer.name}": functools.partial(program, layer, table) for layer in layers
    }


def main(name: str, out: str, wanted: list[str]) -> None:
    topology = parse_topology(name)
    platform = topology.chip.platform
    device = topology_devices(topology)[0]
    sharding = SingleDeviceSharding(device)
    found = {}
    with jax.set_mesh(Mesh([device], ("x",), axis_types=(AxisType.Auto,))):
        for case, make in cases_of(topology.chip).items():
            if wanted and case not in wanted:
                continue
            run, shapes = make()
            arguments = (jax.ShapeDtypeStruct(*one, sharding=sharding) for one in shapes)
            try:
                compiled = jax.jit(run).lower(*arguments).compile()
            except Exception as error:  # All of them, so that one run tells of every case.
                found[case] = {"error": f"{type(error).__name__}: {error}"[:2000]}
                continue
            analysis = compiled.cost_analysis() or {}
            calls = compiled.as_text().count(f'custom_call_target="{CALLS[platform]}')
            flops = analysis.get("flops")
            found[case] = {"chip": target_chip(), "calls": calls, "flops": flops}
            print(case, found[case], flush=True)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
