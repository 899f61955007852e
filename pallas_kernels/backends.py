"""Which code runs an op: named by the caller, or chosen for what a program is compiled for."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from jax import lax

from pallas_kernels.costs import Cost, costed_jit
from pallas_kernels.versions import target_platform

BACKENDS = ("auto", "reference", "xla", "tpu", "gpu")
# Of the kernels that move rows: XLA's gathers are what GPUs run.
ROW_BACKENDS = ("auto", "reference", "xla", "tpu")

_logger = logging.getLogger(__name__)


def check_backend(op: str, backend: str, backends: tuple[str, ...] = BACKENDS) -> None:
    """ValueError if ``op`` has no such backend."""
    if backend not in backends:
        known = f"{', '.join(backends[:-1])} or {backends[-1]}"
        raise ValueError(f"{op} has no backend {backend!r}: {known}")


def select(
    backend: str, *, cpu: Callable, tpu: Callable, gpu: Callable, default: Callable
) -> Callable:
    """The function of a backend: ``auto`` takes that of the platform a program is traced for.

    Args:
      backend: "xla" (``cpu`` or ``default``), "tpu", "gpu", or "auto": ``tpu`` where it can, on
        TPUs, and XLA elsewhere. The kernel for GPUs has not been measured yet.
      cpu: what XLA runs on a CPU.
      tpu: the Pallas kernel for TPUs; raises NotImplementedError for what it does not know.
      gpu: that for NVIDIA GPUs; the same.
      default: what XLA runs elsewhere.
    """
    if backend in ("tpu", "gpu"):
        return {"tpu": tpu, "gpu": gpu}[backend]
    on_tpu = _or_else(tpu, default) if backend == "auto" else default
    target = target_platform()
    if target is None:
        return functools.partial(lax.platform_dependent, cpu=cpu, default=default)
    return {"cpu": cpu, "tpu": on_tpu}.get(target, default)


def backend_program(
    kernels: tuple[Callable, ...], backend: str, interpret: Any, name: str, cost: Cost, **options
) -> Callable:
    """The jitted op of a backend, with its cost on record.

    Args:
      kernels: XLA's on CPU, XLA's elsewhere, Pallas's on TPU, Pallas's on GPU.
      backend: as in :func:`select`.
      interpret: of the Pallas kernels.
      name: of the program, with its shapes.
      cost: of one call.
      **options: static arguments of every kernel.
    """
    cpu, default, *pallas = (functools.partial(run, **options) for run in kernels)
    tpu, gpu = (functools.partial(run, interpret=interpret) for run in pallas)

    def run(*operands):
        # Chosen when it is traced: only then is it known for which platform.
        return select(backend, cpu=cpu, tpu=tpu, gpu=gpu, default=default)(*operands)

    return costed_jit(run, name, cost)


def _or_else(tpu: Callable, default: Callable) -> Callable:
    def run(*operands):
        try:
            return tpu(*operands)
        except NotImplementedError as error:
            _warn_once(str(error))
            return default(*operands)

    return run


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning("%s; lax.ragged_dot is used", message)
