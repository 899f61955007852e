"""What importing moejax costs: never TensorFlow or torch, and no jax to print the help."""

import subprocess
import sys

import pytest


def loaded_after(code: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter that ran ``code``."""
    # The help is printed on stdout too: the modules are its last line.
    report = "; import sys; print('\\n' + ' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_import_loads_neither_tensorflow_nor_torch():
    modules = loaded_after("import moejax; moejax.load_config; moejax.build; moejax.train")
    assert "moejax" in modules
    assert not modules & {"tensorflow", "torch", "clu", "tensorflow_datasets"}


@pytest.mark.parametrize(
    "argv", [["--help"], *([name, "--help"] for name in ("train", "inspect", "launch"))]
)
def test_help_does_not_import_jax(argv):
    code = (
        "import contextlib\n"
        "from moejax.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    main({argv!r})\n"
        "pass"
    )
    modules = loaded_after(code)
    assert "moejax" in modules
    assert not modules & {"jax", "flax", "optax", "orbax", "tensorflow", "torch"}


def test_python_m_moejax_prints_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "moejax", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("train", "eval", "sample", "inspect", "list"):
        assert f"\n  {command} " in done.stdout
