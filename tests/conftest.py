"""What every test runs under: 8 simulated CPU devices, checked shapes, no silent broadcasting.

A test that starts a process of its own inherits these environment variables; it takes XLA_FLAGS out
of the environment where it needs the one device of a laptop.
"""

import gc
import os
from pathlib import Path

# Before the first import of jax: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# The configs under test are those that come with moejax.
os.environ.pop("MOEJAX_CONFIG_PATH", None)

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The annotations of the pure packages are checked at each call, in tests only.
_HOOK = install_import_hook(
    [
        "moejax.depth",
        "moejax.experts",
        "moejax.ops",
        "moejax.objectives",
        "moejax.routing",
        "pallas_kernels",
    ],
    "beartype.beartype",
)

# (3,) + (2, 3) is an error: a missing axis must be written out.
jax.config.update("jax_numpy_rank_promotion", "raise")


# Linux gives a process 65,530 mappings by default, and the one that cannot be made is a
# segmentation fault inside XLA.
_MANY_MAPPINGS = 16_000


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_make_room():
    """Programs of the files before are let go once they hold many mappings of memory."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compiles():
    """Programs that run once need not be fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def float64_stays_inside():
    """A run in float64 sets it for its process; the next test begins without."""
    wide = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", wide)
