"""The shape of the source: imports point downwards, and a few names are kept in their place."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted((ROOT / "moejax").rglob("*.py")) + sorted((ROOT / "pallas_kernels").rglob("*.py"))
ALL = [
    path
    for folder in ("moejax", "pallas_kernels", "configs", "tests", "tools", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# Low to high: a package imports from its own layer and from lower ones.
LAYERS = (
    ("errors", "axes", "config", "host_memory", "pallas_kernels"),
    ("ops", "routing", "experts", "depth", "parallel"),
    ("nn",),
    ("models", "objectives", "data"),
    ("train", "generate", "analysis", "surgery", "api"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NEVER = {"tensorflow", "torch", "clu", "pallas"}


def imported(path: Path) -> list[tuple[str, int]]:
    """(absolute dotted name, line) of every import in the file, those inside functions too."""
    names = []
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package[: len(package) - node.level + 1]
                base = ".".join((*parents, base)).rstrip(".")
            # `from moejax import data` names a package just as `import moejax.data` does.
            names += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return names


def part(name: str) -> str | None:
    """``moejax.nn.attention`` -> ``nn``; ``pallas_kernels.x`` -> ``pallas_kernels``; else None."""
    words = name.split(".")
    if words[0] == "pallas_kernels":
        return "pallas_kernels"
    if words[0] == "moejax" and len(words) > 1:
        return words[1]
    return None


def part_of_file(path: Path) -> str | None:
    return part(".".join(path.relative_to(ROOT).with_suffix("").parts))


def offences(rule) -> list[str]:
    """``file:line name`` of each import in the code for which ``rule(path, name)`` is true."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in CODE
        for name, line in imported(path)
        if rule(path, name)
    ]


def test_every_package_has_a_layer():
    found = {part_of_file(path) for path in CODE} - {None, "__init__", "__main__"}
    assert found <= set(LEVEL), f"give these a layer: {sorted(found - set(LEVEL))}"


def test_imports_point_downwards():
    def upwards(path, name):
        here, there = LEVEL.get(part_of_file(path) or ""), LEVEL.get(part(name) or "")
        return here is not None and there is not None and there > here

    assert offences(upwards) == []


def test_data_never_imports_models():
    banned = {"models", "nn", "objectives", "train"}
    assert offences(lambda path, name: part_of_file(path) == "data" and part(name) in banned) == []


def test_flax_linen_only_in_nn_and_models():
    def linen(path, name):
        return name.startswith("flax.linen") and part_of_file(path) not in ("nn", "models")

    assert offences(linen) == []


def test_orbax_only_in_checkpoint():
    checkpoint = ROOT / "moejax" / "train" / "checkpoint.py"
    assert offences(lambda path, name: name.startswith("orbax") and path != checkpoint) == []


def test_no_tensorflow_torch_or_clu():
    # The bench of the kernels times torch's beside them, where there is one.
    bench = ROOT / "moejax" / "analysis" / "bench" / "kernels.py"
    beside = lambda path, name: path == bench and name == "torch"
    never = lambda path, name: name.split(".")[0] in NEVER and not beside(path, name)
    assert offences(never) == []


def test_no_dependency_of_a_banned_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[^A-Za-z0-9._-]", item)[0].lower() for item in wanted}
    assert {"jax", "flax"} <= names
    # The registry's `pallas` is another project: Pallas is a part of jax.
    assert not names & {*NEVER, "tokamax", "google-tunix", "aqtp", "hydra-core"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_enough(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_rules_see_through_every_form_of_import(tmp_path, monkeypatch):
    """The reader itself: absolute, from, relative, and inside a function."""
    file = tmp_path / "moejax" / "ops" / "probe.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import moejax.nn.attention\n"
        "from moejax import data\n"
        "from ..models import decoder\n"
        "def f():\n"
        "    from flax import linen as nn\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    names = [name for name, _ in imported(file)]
    assert names == [
        "moejax.nn.attention",
        "moejax.data",
        "moejax.models.decoder",
        "flax.linen",
    ]
    assert [part(name) for name in names] == ["nn", "data", "models", None]
