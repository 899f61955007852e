"""Several processes, one run: how they start, agree, and end together.

``jax.distributed`` is started once, before any device is asked for, when it is asked for
(``--distributed``, ``MOEJAX_DISTRIBUTED``) or when jax finds the cluster that this process is part
of (SLURM, Open MPI, Cloud TPU, Kubernetes). Every process then runs the same program. What one of
them alone can know (a mistake in its files, a signal) is made known to all before anyone acts on
it, so that none waits for another. Where jax.distributed was not started, all of this does nothing.
"""

import atexit
import contextlib
import functools
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError

FLAG, VARIABLE = "--distributed", "MOEJAX_DISTRIBUTED"
FORM = "auto, off or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID"
# How long the processes of a run wait for each other at the start.
START_SECONDS = 300
# A process that was not heard of for so long is dead, and jax's runtime ends the others. A broken
# connection tells of most deaths within a second.
HEARTBEAT_SECONDS = 30
# How long one that is done waits for the others to be done.
END_SECONDS = 60

# The runtime ends a process by abort() when another one died, which no Python code sees.
DIED = "a process of this run died; start the same command on all hosts to resume"
_MESSAGE_BYTES = 2048


class Address(NamedTuple):
    """Where the processes meet, how many there are, and which one this is."""

    coordinator: str
    processes: int
    process: int


def parse_spec(text: str, field: str = FLAG) -> str | Address:
    """``"auto"``, ``"off"`` or the :class:`Address` that ``"10.0.0.1:1234,4,0"`` gives.

    Raises:
      UserError: it is none of these; the message begins with ``field``.
    """
    if text in ("auto", "off"):
        return text
    match = re.fullmatch(r"(\S+:(\d+)),(\d+),(\d+)", text)
    if match is None:
        raise UserError(f"{field}={text}: is not {FORM}")
    address = Address(match[1], int(match[3]), int(match[4]))
    if not 0 < int(match[2]) < 2**16:
        raise UserError(f"{field}={text}: {match[2]} is no port")
    if address.process >= address.processes:
        raise UserError(
            f"{field}={text}: PROCESS_ID {address.process} is not below NUM_PROCESSES "
            f"{address.processes}"
        )
    return address


def start(flag: str | None = None, timeout: int = START_SECONDS) -> None:
    """Joins this process to the others of its run; call it before any device is asked for.

    Args:
      flag: the value of ``--distributed``; None leaves it to ``MOEJAX_DISTRIBUTED``, then "auto".
      timeout: seconds to wait for the others. A process that waited in vain says so and exits with
        1: the runtime would abort it.

    Raises:
      UserError: a spec that is none, or a cluster that was found but cannot be joined.
    """
    field, text = (FLAG, flag) if flag is not None else (VARIABLE, os.environ.get(VARIABLE, "auto"))
    spec = parse_spec(text, field)
    if spec == "off" or jax.distributed.is_initialized():
        return
    if isinstance(spec, Address):
        _join(f"{field}={text}", spec, timeout)
    elif not _join_cluster(f"{field}={text}", timeout):
        return
    _watch()


def _join(given: str, address: Address, timeout: int) -> None:
    host, _, port = address.coordinator.rpartition(":")
    if address.process == 0:
        # A taken port can end jax's runtime by a fault of memory.
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UserError(
                f"{given}: port {port} cannot be opened ({_line(error)}); name a free one"
            ) from error

    def why() -> str:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"{given}: no coordinator answered within {timeout} s ({_line(error)}); it is the "
                "process with PROCESS_ID 0, on the host that is named"
            )
        return (
            f"{given}: not all {address.processes} processes came within {timeout} s; start one "
            f"for each PROCESS_ID from 0 to {address.processes - 1}"
        )

    with _deadline(why, timeout):
        _initialize(
            timeout,
            coordinator_address=address.coordinator,
            num_processes=address.processes,
            process_id=address.process,
            cluster_detection_method="deactivate",
        )


def _join_cluster(given: str, timeout: int) -> bool:
    """Joins the cluster job that jax finds this process in; False if there is none."""
    mend = f"give {FLAG} COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID, or {FLAG} off to run alone"
    found = f"{given}: this is a process of a cluster job"
    late = f"{found}, and not all others came within {timeout} s; {mend}"
    try:
        if detect() < 2:
            return False
        with _deadline(lambda: late, timeout):
            _initialize(timeout)
    # What a detection raises is nowhere said.
    except Exception as error:
        raise UserError(f"{found}, but {_line(error)}; {mend}") from error
    return True


def detect() -> int:
    """How many processes the cluster job has that jax finds this process in; 1 where it finds none.

    jax would join a job of one as well, and several jobs of one on a host would take one port.
    """
    from jax._src import clusters

    # A pod is not always one of several; where it is, its number is there.
    indexed = "JOB_COMPLETION_INDEX" in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in clusters.ClusterEnv._cluster_types:
            if kind.opt_in_only_method or (kind is clusters.K8sCluster and not indexed):
                continue
            if kind.is_env_present():
                return kind.get_process_count()
    if "KUBERNETES_SERVICE_HOST" in os.environ and indexed:
        raise ModuleNotFoundError("jax looks its pods up by kubernetes: pip install 'jax[k8s]'")
    return 1


def _initialize(timeout: int, **address: Any) -> None:
    # Else a handler of its own takes the SIGTERM that StopSignals answers.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **address,
        # jax's own aborts the process: that of _deadline comes first.
        initialization_timeout=timeout + 30,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=END_SECONDS,
    )


@contextlib.contextmanager
def _deadline(why: Callable[[], str], timeout: int) -> Iterator[None]:
    """Says ``why()`` and exits with 1 where what is inside takes more than ``timeout`` seconds.

    Not with 2, which says that the input is wrong and no restart will help: a host may be slow.
    """

    def give_up() -> None:
        print(f"moejax: error: {why()}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _watch() -> None:
    """Leaves a shell behind that says DIED once this process is gone without having ended."""
    script = f"read -r _ || echo 'moejax: error: {DIED}' >&2"
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # Ctrl-C is for the run, whose last words are still to come.
        start_new_session=True,
    )
    assert watcher.stdin is not None
    atexit.register(watcher.communicate, b"ended\n")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def several() -> bool:
    """Whether this process is one of several of a run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def primary() -> bool:
    """Whether this is the process that prints and writes."""
    return not several() or jax.process_index() == 0


def share(value: np.ndarray) -> jax.Array:
    """``[devices, ...]``: the ``value`` of each device's process, whole on every device.

    A collective: every process calls it, with values of one shape and type. It returns at once;
    ``np.asarray`` of the result waits for the others.
    """
    sharded, whole = _shardings()
    shape = (jax.device_count(), *value.shape)
    own = jax.make_array_from_callback(shape, sharded, lambda index: value[None])
    return _copy(whole)(own)


@functools.cache
def _shardings() -> tuple[NamedSharding, NamedSharding]:
    devices = np.asarray(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("devices",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())


@functools.cache
def _copy(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A UserError in one process, inside, is raised in all of them: none waits for another."""
    if not several():
        yield
        return
    message = b""
    try:
        yield
    except UserError as error:
        message = str(error).encode() or b"?"
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    padded[: len(message[:_MESSAGE_BYTES])] = list(message[:_MESSAGE_BYTES])
    for row in np.asarray(share(padded)):
        if row.any():
            raise UserError(bytes(row).rstrip(b"\0").decode(errors="replace"))


def check_same(facts: Mapping[str, str]) -> None:
    """UserError unless every process has the same ``facts``; names the first that differs."""
    if not several():
        return
    hashes = np.asarray([zlib.crc32(text.encode()) for text in facts.values()], np.uint32)
    for name, column in zip(facts, np.asarray(share(hashes)).T, strict=True):
        if (column != column[0]).any():
            raise UserError(
                f"{name}: is not the same in all {jax.process_count()} processes of this run; "
                "start the same command everywhere, with data and a --workdir that all hosts see"
            )


@contextlib.contextmanager
def ends_at_once(*expected: type[BaseException]) -> Iterator[None]:
    """An exception inside that is not ``expected`` ends this process of several at once, with 1.

    Closing files and leaving in good order would wait for the others, which wait for this one.
    """
    try:
        yield
    except expected:
        raise
    except BaseException:
        if not several():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
