"""Memory of the host that a step gives back is kept for the next one, not fetched anew."""

import ctypes
import os
import sys

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
# Environment variables by which a user says how memory is allocated.
_CHOSEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tells the C library to keep what is freed; returns whether it was told.

    A step on a CPU allocates its arrays and frees them again. glibc gives large pieces back to the
    system at once, which then clears each page for the next step: a third of the time of a small
    model (docs/profiling.md). Kept, the process holds the most that it ever used. Call it before
    jax starts its threads: what they allocate comes from heaps of their own otherwise.

    Does nothing on a C library other than glibc, or where the environment already says how memory
    is allocated (``MALLOC_*``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``).
    """
    chosen = any(name.startswith(_CHOSEN) for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl has no mallopt.
    if mallopt is None:
        return False
    settings = {
        # Pieces of every size come from one heap, whose end is not given back.
        _ARENA_MAX: 1,
        _MMAP_MAX: 0,
        _TRIM_THRESHOLD: 2**31 - 1,
        _TOP_PAD: 64 << 20,
    }
    return all([mallopt(name, value) for name, value in settings.items()])
