"""Freed memory stays with the process, unless the environment says how memory is allocated."""

import os
import subprocess
import sys

import pytest

# Frees 64 MiB in pieces that glibc would give back one by one; prints what was told and is kept.
SCRIPT = """
import numpy as np
from moejax.host_memory import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

told = keep_freed_memory()
pieces = [np.ones(2**20) for _ in range(8)]
before = resident()
del pieces
print(told, before - resident())
"""


def kept(**environment: str) -> tuple[str, int]:
    """(what was told, bytes that were given back) of a process of its own."""
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    told, given_back = process.stdout.split()
    return told, int(given_back)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_freed_stays():
    told, given_back = kept()
    assert told == "True"
    assert given_back < 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_environment_comes_first():
    told, given_back = kept(MALLOC_ARENA_MAX="8")
    assert told == "False"
    assert given_back > 60 << 20
