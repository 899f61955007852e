"""The child process in which a step is compiled for another platform.

Each platform has environment variables of its own, which a plugin reads once; a plugin that is
loaded stays. So the command line never loads one: the child does, and is gone afterwards.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import moejax
from moejax.config import Config
from moejax.config.convert import to_dict
from moejax.config.packages import imported_packages
from moejax.errors import UserError
from moejax.parallel.topologies import Topology

# platform -> (module that is there when the plugin is, moejax's extra, what it is)
_PLUGINS = {
    "tpu": ("libtpu", "tpu", "libtpu"),
    "cuda": ("jax_cuda13_plugin", "gpu", "jax's CUDA plugin"),
}


def compile_in_child(config: Config, topology: Topology, hlo_file: str = "") -> dict[str, Any]:
    """:func:`moejax.analysis.aot.compile_step` in a process with its own environment.

    Raises:
      UserError: the plugin is not installed, the config does not fit the topology, or the process
        was ended from outside (by a machine that is out of memory, mostly).
      RuntimeError: with the last lines of what the child said, if it came to no result.
    """
    check_plugin(topology)
    job = {
        "config": to_dict(config),
        "topology": topology.name,
        "imports": imported_packages(),
        "hlo": os.path.abspath(hlo_file) if hlo_file else "",
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "moejax.analysis.aot", str(result), str(os.getpid())],
            input=json.dumps(job),
            env=child_environment(topology, os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if result.exists():
            document = json.loads(result.read_text(encoding="utf-8"))
        elif done.returncode == -9:
            raise UserError(
                f"--topology {topology.name}: the compiler was killed; it needs more memory than "
                "this machine has free"
            )
        else:
            said = "\n".join(done.stdout.splitlines()[-40:])
            raise RuntimeError(f"the compiling process ended with {done.returncode}:\n{said}")
    if "user_error" in document:
        raise UserError(document["user_error"])
    return document


def check_plugin(topology: Topology) -> None:
    """UserError that names the extra if the compiler of the platform is not installed."""
    if topology.chip.platform not in _PLUGINS:
        return
    module, extra, what = _PLUGINS[topology.chip.platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"--topology {topology.name}: compiling for it needs {what}, but no such chip; "
            f"pip install 'moejax[{extra}]'"
        )
    if topology.chip.platform == "cuda":
        jax, plugin = (importlib.metadata.version(name) for name in ("jax", "jax-cuda13-plugin"))
        if jax != plugin:
            raise UserError(
                f"--topology {topology.name}: jax is {jax} and jax-cuda13-plugin {plugin}; "
                f"pip install 'moejax[{extra}]' makes them equal"
            )


def child_environment(topology: Topology, environment: Any) -> dict[str, str]:
    """The variables of the child: no accelerator is looked for, and each platform's own."""
    env = dict(environment)
    # Where moejax is imported from, also when that is the current folder of a checkout.
    source = str(Path(moejax.__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (source, env.get("PYTHONPATH"))))
    # The host; the devices to compile for are asked for by name.
    env["JAX_PLATFORMS"] = "cpu"
    count = topology.num_devices if topology.chip.platform == "cpu" else 1
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", env.get("XLA_FLAGS", ""))
    env["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    if topology.chip.platform == "tpu":
        # Else libtpu asks the network of Google Cloud what machine this is.
        env["TPU_SKIP_MDS_QUERY"] = "1"
        env["TPU_WORKER_HOSTNAMES"] = "localhost"
        # Nothing is run, so another process may use the chips of this machine.
        env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    if topology.chip.platform == "cuda":
        # No driver, cuDNN or GPU is needed to compile.
        env["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    return env
