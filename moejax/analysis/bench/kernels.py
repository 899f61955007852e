"""``moejax bench kernels``: each kernel beside the best that its device does.

A grouped matmul beside one dense matmul of the same rows, a kernel that moves rows beside a copy
of the same bytes.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import (
    combine_rows,
    dispatch_rows,
    gather_tokens,
    grouped_matmul,
    router_topk,
    scatter_tokens,
    sort_by_group,
)

# Timed apart, for XLA would make one gather of a dispatch and its combine.
ROWS, TOKENS = ("dispatch", "combine"), ("gather", "scatter")
SKEWS = ("balanced", "zipf", "worst")
IMPLEMENTATIONS = (
    *("auto", "xla", "tpu", "gpu", "ragged_dot", "one_hot_einsum", "torch_grouped_mm"),
    *("dense_matmul", "copy"),
)
# Platform -> the backends of pallas_kernels that it has.
_BACKENDS = {"tpu": ("tpu",), "gpu": ("gpu",)}


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """What is timed, and at which size.

    Attributes:
      kernel: "matmul", one of ``ROWS`` or ``TOKENS``, or "router".
      groups: of the rows.
      small: rows, width and columns on a CPU.
      large: on an accelerator.
      top_k: choices of a token.
    """

    kernel: str
    groups: int
    small: tuple[int, int, int]
    large: tuple[int, int, int]
    top_k: int = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.small if jax.default_backend() == "cpu" else self.large


_SMALL, _LARGE = (4096, 256, 512), (65536, 2048, 4096)
CASES = {
    **{f"E{e}": KernelCase("matmul", e, _SMALL, _LARGE) for e in (2, 8, 64, 128)},
    **{name: KernelCase(name, 8, (4096, 1024, 0), (16384, 2048, 0)) for name in ROWS},
    **{name: KernelCase(name, 1, (4096, 1024, 0), (65536, 2048, 0)) for name in TOKENS},
    "router": KernelCase("router", 64, (4096, 64, 0), (65536, 64, 0), top_k=8),
    "tiny": KernelCase("matmul", 4, (64, 16, 24), (64, 16, 24)),
}


def group_sizes(case: KernelCase, skew: str) -> np.ndarray:
    """Rows of each group; ``worst``: all in the last."""
    return _sizes(case.shape[0], case.groups, skew)


def _sizes(rows: int, groups: int, skew: str) -> np.ndarray:
    share = {
        "balanced": np.ones(groups),
        "zipf": 1 / np.arange(1, groups + 1),
        "worst": np.eye(groups)[-1],
    }[skew]
    ends = np.round(np.cumsum(share / share.sum()) * rows).astype(int)
    return np.diff(ends, prepend=0).astype(np.int32)


def programs(case: KernelCase, skew: str, dtype: str) -> dict[str, dict[str, Callable]]:
    """By direction, implementation -> a call without arguments; the baseline comes first."""
    make = {
        "matmul": _matmul,
        "dispatch": _dispatch,
        "combine": _combine,
        "gather": _gather,
        "scatter": _scatter,
        "router": _router,
    }
    return make[case.kernel](case, skew, dtype)


def _normal(*shape: int, dtype: str, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _backends() -> tuple[str, ...]:
    return ("auto", "xla", *_BACKENDS.get(jax.default_backend(), ()))


def _both(functions: dict[str, Callable], learnt: tuple, rest: tuple = ()) -> dict[str, dict]:
    """Forward, and forward with the gradients of ``learnt``, of functions of (learnt, rest)."""

    def backward(function):
        def run(learnt, rest):
            out, pullback = jax.vjp(lambda *args: function(*args, *rest), *learnt)
            return out, pullback(out)

        return run

    forward = {name: jax.jit(lambda a, b, f=f: f(*a, *b)) for name, f in functions.items()}
    gradient = {name: jax.jit(backward(f)) for name, f in functions.items()}
    call = lambda jitted: functools.partial(jitted, learnt, rest)
    return {
        "fwd": {name: call(jitted) for name, jitted in forward.items()},
        "fwd_bwd": {name: call(jitted) for name, jitted in gradient.items()},
    }


def _matmul(case: KernelCase, skew: str, dtype: str) -> dict[str, dict[str, Callable]]:
    rows, inner, outer = case.shape
    x = _normal(rows, inner, dtype=dtype)
    w = _normal(case.groups, inner, outer, dtype=dtype, seed=1) * inner**-0.5
    sizes = jnp.asarray(group_sizes(case, skew))
    functions: dict[str, Callable] = {"dense_matmul": lambda x, w, sizes: x @ w[0]}
    for backend in _backends():
        functions[backend] = functools.partial(grouped_matmul, backend=backend)
    # Both are a product with every group there, which would take minutes.
    few, on_cpu = case.groups <= 8, jax.default_backend() == "cpu"
    if few or not on_cpu:
        functions["ragged_dot"] = lax.ragged_dot
    if few:
        functions["one_hot_einsum"] = _one_hot
    found = _both(functions, (x, w), (sizes,))
    if jax.default_backend() == "gpu" and importlib.util.find_spec("torch"):
        for direction, run in _torch(case, skew).items():
            found[direction]["torch_grouped_mm"] = run
    return found


def _one_hot(x, w, sizes):
    """Every group's product, of which each row keeps its own."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    chosen = jax.nn.one_hot(group, w.shape[0], dtype=x.dtype)
    return jnp.einsum("td,edf,te->tf", x, w, chosen)


def _torch(case: KernelCase, skew: str) -> dict[str, Callable]:
    """The grouped matmul of torch, in bfloat16, forward and with gradients."""
    import torch

    rows, inner, outer = case.shape
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    x = torch.randn(rows, inner, **options)
    w = torch.randn(case.groups, inner, outer, **options)
    ends = torch.tensor(np.cumsum(group_sizes(case, skew)), device="cuda", dtype=torch.int32)

    def forward():
        with torch.no_grad():
            torch._grouped_mm(x, w, offs=ends)
        torch.cuda.synchronize()

    def backward():
        out = torch._grouped_mm(x, w, offs=ends)
        torch.autograd.grad(out, (x, w), out.detach())
        torch.cuda.synchronize()

    return {"fwd": forward, "fwd_bwd": backward}


def _moved(run: Callable, operands: tuple, moved_rows: int, dtype: str, backends) -> dict:
    """``run(backend, *operands)`` beside a copy, which reads and writes ``moved_rows`` rows."""
    block = _normal(moved_rows, operands[0].shape[-1], dtype=dtype, seed=4)
    functions = {
        "copy": lambda *args: jnp.copy(args[-1]),
        **{name: lambda *args, name=name: run(name, *args[:-1]) for name in backends},
    }
    return {"fwd": _both(functions, operands, (block,))["fwd"]}


def _dispatch(case: KernelCase, skew: str, dtype: str) -> dict[str, dict[str, Callable]]:
    """A row for each choice, read and written."""
    t, d, _ = case.shape
    token, row = _choices(case, skew)
    run = lambda backend, x: dispatch_rows(x, token, row, backend=backend)
    operands = (_normal(t, d, dtype=dtype),)
    return _moved(run, operands, t * case.top_k, dtype, _row_backends(d, dtype))


def _combine(case: KernelCase, skew: str, dtype: str) -> dict[str, dict[str, Callable]]:
    """A row for each choice read, and one for each token written."""
    t, d, _ = case.shape
    k = case.top_k
    token, row = _choices(case, skew)
    run = lambda backend, y, gates: combine_rows(y, token, row, gates, backend=backend)
    operands = _normal(t * k, d, dtype=dtype), jax.random.uniform(jax.random.key(3), (t, k))
    return _moved(run, operands, (t * k + t) // 2, dtype, _row_backends(d, dtype))


def _choices(case: KernelCase, skew: str) -> tuple[jax.Array, jax.Array]:
    """The token of each row, and the row of each choice."""
    t, k = case.shape[0], case.top_k
    sizes = _sizes(t * k, case.groups, skew)
    groups = jax.random.permutation(jax.random.key(2), jnp.repeat(jnp.arange(case.groups), sizes))
    by_group = sort_by_group(groups, case.groups)
    return by_group.order // k, by_group.inverse.reshape(t, k)


def _gather(case: KernelCase, skew: str, dtype: str) -> dict[str, dict[str, Callable]]:
    """An eighth of the tokens taken out: read and written."""
    del skew
    x, index = _some_tokens(case, dtype)
    run = lambda backend, x: gather_tokens(x, index, backend=backend)
    return _moved(run, (x,), index.size, dtype, _row_backends(x.shape[-1], dtype))


def _scatter(case: KernelCase, skew: str, dtype: str) -> dict[str, dict[str, Callable]]:
    """An eighth of the tokens added to a copy of all: three rows for each, and all once."""
    del skew
    x, index = _some_tokens(case, dtype)
    update = _normal(*index.shape, x.shape[-1], dtype=dtype, seed=5)
    run = lambda backend, x, update: scatter_tokens(x, update, index, backend=backend)
    moved = x.shape[0] * x.shape[1] + 3 * index.size // 2
    return _moved(run, (x, update), moved, dtype, _row_backends(x.shape[-1], dtype))


def _some_tokens(case: KernelCase, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Eight sequences, and which tokens of each."""
    t, d, _ = case.shape
    b, c = 8, t // 64
    keys = jax.random.split(jax.random.key(2), b)
    index = jnp.sort(jax.vmap(lambda key: jax.random.permutation(key, t // b)[:c])(keys))
    return _normal(b, t // b, d, dtype=dtype), index


def _router(case: KernelCase, skew: str, dtype: str) -> dict[str, dict[str, Callable]]:
    """Beside a copy of the logits."""
    del skew, dtype
    t, e, _ = case.shape
    logits = _normal(t, e, dtype="float32")

    def run(backend, logits):
        found = router_topk(logits, case.top_k, renormalise=True, backend=backend)
        return found.gates, found.lse, found.score_sum

    backends = ("auto", "tpu") if jax.default_backend() == "tpu" else ("auto",)
    functions = {
        "copy": jnp.copy,
        **{name: functools.partial(run, name) for name in backends},
    }
    return {"fwd": _both(functions, (logits,))["fwd"]}


def _row_backends(d: int, dtype: str) -> tuple[str, ...]:
    whole = d % (2048 if dtype == "bfloat16" else 1024) == 0
    return ("auto", "tpu") if jax.default_backend() == "tpu" and whole else ("auto",)
