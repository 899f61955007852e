"""Where compiled programs are kept, so that a second start of the same program compiles nothing."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from moejax.data.image_codes import cache_folder


def use_compilation_cache(folder: str) -> None:
    """Applies ``train.compilation_cache_dir`` to this process; call before anything is compiled.

    Args:
      folder: a folder, or one of a bucket (gs://BUCKET/FOLDER); "none" keeps no programs; "" leaves
        ``JAX_COMPILATION_CACHE_DIR`` as it is, or without it takes a folder of moejax's own
        (:func:`default_folder`).
    """
    if folder == "none":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    # Settings are attributes that jax makes at run time.
    settings: Any = jax.config
    if not folder and settings.jax_compilation_cache_dir:
        return
    if "://" in folder:
        # jax writes to buckets itself, by etils.epath.
        jax.config.update("jax_compilation_cache_dir", folder)
        return
    path = Path(folder).expanduser() if folder else default_folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    # A read-only home only costs compiling again; a folder that was asked for is jax's to report.
    if writable or folder:
        jax.config.update("jax_compilation_cache_dir", str(path))


def default_folder() -> Path:
    """``jax/<kind of machine>`` in moejax's cache folder; may be deleted at any time.

    A program for a CPU holds instructions that another one may lack, and a home can be shared by
    several kinds of machine: each kind has its own folder.
    """
    kind = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        # The instruction sets, as x86 and ARM call them.
        kind += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind += platform.processor()
    return cache_folder() / "jax" / hashlib.sha256(kind.encode()).hexdigest()[:12]
