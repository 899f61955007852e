"""Times implementations of a layer in turns, in one process, and divides by the baseline."""

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from moejax.analysis.bench import decode, kernels
from moejax.analysis.bench.cases import (
    BENCHES,
    DIRECTIONS,
    SKEWS,
    Bench,
    dense_weights,
    implementation,
    inputs,
)
from moejax.errors import UserError, did_you_mean

BASELINE = "dense_mlp"
KERNELS, DECODE = "kernels", "decode"


def bench(
    name: str,
    *,
    cases: Sequence[str] = (),
    implementations: Sequence[str] = (),
    repeats: int = 10,
    dtype: str = "float32",
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rows of ``moejax bench NAME``, for every case, skew, direction and implementation.

    Args:
      name: of the bench.
      cases: by default all but ``tiny``.
      implementations: by default all that do not take minutes; the baseline always runs.
      repeats: timings of each, of which the median counts.
      dtype: of inputs and weights.
      say: told what is being timed, and what is left out.

    Raises:
      UserError: unknown bench, case, implementation or dtype, or no repeats.
    """
    chosen = _named("bench", name, {**BENCHES, KERNELS: None, DECODE: None})
    if name == KERNELS:
        return _kernel_rows(cases, implementations, repeats, dtype, say)
    if name == DECODE:
        return _decode_rows(cases, implementations, repeats, dtype, say)
    cases = cases or [case for case in chosen.cases if case != "tiny"]
    for case in cases:
        _named("--cases", case, chosen.cases)
    for other in implementations:
        _named("--implementations", other, chosen.implementations)
    _check_options(dtype, repeats)
    rows = []
    for case in cases:
        names = _names(chosen, case, implementations, say)
        for skew in SKEWS:
            say(f"{name} {case} {skew}: {', '.join(names)}")
            rows += _rows(name, chosen, case, skew, names, repeats, dtype)
    return rows


def _check_options(dtype: str, repeats: int) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose from: bfloat16, float32")
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: needs at least 1")


def _kernel_rows(
    cases: Sequence[str], wanted: Sequence[str], repeats: int, dtype: str, say
) -> list[dict[str, Any]]:
    _check_options(dtype, repeats)
    for case in cases:
        _named("--cases", case, kernels.CASES)
    for name in wanted:
        _named("--implementations", name, dict.fromkeys(kernels.IMPLEMENTATIONS))
    rows = []
    for case in cases or [case for case in kernels.CASES if case != "tiny"]:
        chosen = kernels.CASES[case]
        for skew in kernels.SKEWS if chosen.kernel in ("matmul", *kernels.ROWS) else ("balanced",):
            for direction, programs in kernels.programs(chosen, skew, dtype).items():
                baseline = next(iter(programs))
                if wanted:
                    programs = {k: run for k, run in programs.items() if k in (baseline, *wanted)}
                # Torch's draws operands of its own.
                apart = (baseline, "torch_grouped_mm")
                same = {(direction, k): run for k, run in programs.items() if k not in apart}
                _check_agreement(same, dtype)
                say(f"{KERNELS} {case} {skew} {direction}: {', '.join(programs)}")
                times = _interleaved(programs, repeats)
                rows += [
                    _row(KERNELS, case, skew, direction, name, baseline, times) for name in programs
                ]
    return rows


def _decode_rows(
    cases: Sequence[str], wanted: Sequence[str], repeats: int, dtype: str, say
) -> list[dict[str, Any]]:
    _check_options(dtype, repeats)
    for case in cases:
        _named("--cases", case, decode.CASES)
    rows = []
    for case in cases or [case for case in decode.CASES if case != "tiny"]:
        known = decode.models(decode.CASES[case])
        for name in wanted:
            _named("--implementations", name, known)
        say(f"{DECODE} {case}: {', '.join(known)}")
        found = decode.programs(decode.CASES[case], dtype)
        if wanted:
            found = {k: v for k, v in found.items() if k in (decode.BASELINE, *wanted)}
        times = _interleaved({name: call for name, (call, _) in found.items()}, repeats)
        for name, (_, shares) in found.items():
            row = _row(DECODE, case, "balanced", "decode", name, decode.BASELINE, times)
            rows.append(row | {"tokens": decode.CASES[case].new, **shares})
    return rows


def _named(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise UserError(f"{what} {name!r}: there is none of this name{did_you_mean(name, known)}")
    return known[name]


def _names(chosen: Bench, case: str, wanted: Sequence[str], say) -> list[str]:
    slow = chosen.cases[case].slow
    names = list(wanted) or [name for name in chosen.implementations if name not in slow]
    if not wanted and slow:
        say(f"{case}: without {', '.join(slow)}, which take minutes; name them to time them")
    return names if BASELINE in names else [BASELINE, *names]


def _rows(name, chosen, case, skew, names, repeats, dtype) -> Iterator[dict[str, Any]]:
    values = inputs(chosen.cases[case], skew, dtype)
    functions = {other: implementation(chosen, other, values["ids"]) for other in names}
    arguments = {
        other: {**values, **dense_weights(chosen.cases[case], dtype)}
        if other == BASELINE
        else values
        for other in names
    }
    programs = {
        (direction, other): _program(function, direction, arguments[other], chosen.gated)
        for direction in DIRECTIONS
        for other, function in functions.items()
    }
    _check_agreement(programs, dtype)
    for direction in DIRECTIONS:
        times = _interleaved({other: programs[direction, other] for other in names}, repeats)
        for other in names:
            yield _row(name, case, skew, direction, other, BASELINE, times)


def _row(bench, case, skew, direction, name, baseline, times) -> dict[str, Any]:
    return {
        "bench": bench,
        "case": case,
        "skew": skew,
        "direction": direction,
        "implementation": name,
        "baseline": baseline,
        "ms_median": times[name],
        "ratio": times[name] / times[baseline],
        "device": _device(),
        "versions": _versions(),
    }


def _program(
    function: Callable, direction: str, values: dict[str, jax.Array], gated: bool
) -> Callable:
    """A call without arguments: of the layer, or of it and its gradients."""
    jitted = _jitted(function, direction, gated)
    return lambda: jitted(values)


@functools.cache
def _jitted(function: Callable, direction: str, gated: bool) -> Callable:
    """Of the dict of inputs; compiled once for the routings of a case."""
    learnt = ("x", "wi", "wo", *(("gates",) if gated else ()))

    def forward(values):
        return function(*(values[name] for name in ("x", "ids", "gates", "wi", "wo")))

    def backward(values):
        run = lambda some: forward({**values, **some})
        out, pullback = jax.vjp(run, {name: values[name] for name in learnt})
        return out, pullback(values["cotangent"])

    return jax.jit(forward if direction == "fwd" else backward)


def _check_agreement(programs: dict[tuple[str, str], Callable], dtype: str) -> None:
    """What is timed computes the same, value and gradients, but for the baseline."""
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for direction in DIRECTIONS:
        others = [name for way, name in programs if way == direction and name != BASELINE]
        if not others:
            continue
        first = jax.tree.leaves(programs[direction, others[0]]())
        for other in others[1:]:
            for a, b in zip(first, jax.tree.leaves(programs[direction, other]()), strict=True):
                error = float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-30))
                if not error <= tolerance:
                    raise AssertionError(
                        f"{other} and {others[0]} differ by {error:.1e} ({direction})"
                    )


def _interleaved(programs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, timed in turns so that a slow minute slows all.

    Each is called twice and timed the second time: what the one before it left in the caches and
    in the allocator's hands would count for or against it.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            jax.block_until_ready(program())
            began = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(values) for name, values in times.items()}


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
