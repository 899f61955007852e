"""docs/extend.md: its files, written outside of the repository, do what the page says."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.analysis.flops import BLOCK_FLOPS
from moejax.analysis.params import boxed_params
from moejax.api import build
from moejax.cli.main import main
from moejax.config import load_config, packages
from moejax.config.convert import _build
from moejax.config.schema import MODEL_CONFIGS, OBJECTIVE_CONFIGS
from moejax.data.sources import SOURCES, RecordSource, open_source
from moejax.errors import UserError
from moejax.generate.cache import init_cache, write_rows
from moejax.models import MODELS
from moejax.nn.block import BLOCKS
from moejax.objectives import OBJECTIVES
from moejax.train.evaluate import EVALUATORS
from moejax.train.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
TINY = {
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.ffn_hidden": (32,),
    "data.batch_size": 8,
    "train.steps": 4,
    "log.every": 2,
    "eval.batches": 1,
}


def write_files(folder: Path) -> list[str]:
    """Writes every python block of the page under the name in its first line."""
    names = []
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        name = code.partition("\n")[0].removeprefix("# ")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")
        names.append(name)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    write_files(folder)
    return folder


@pytest.fixture
def imported(folder, monkeypatch):
    """The package registered in this process, for one test."""
    registries = (BLOCKS, BLOCK_FLOPS, EVALUATORS, MODELS, OBJECTIVES, OPTIMIZERS, SOURCES)
    for registry in (*registries, MODEL_CONFIGS, OBJECTIVE_CONFIGS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(packages, "_IMPORTED", [])
    monkeypatch.syspath_prepend(str(folder))
    packages.import_packages(["my_package"])
    yield importlib.import_module("my_package")
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def command(tmp_path):
    """Runs ``python -m moejax`` in another folder, on the one device of a laptop."""

    def run(*argv, path):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
        return subprocess.run(
            [sys.executable, "-m", "moejax", *argv],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def test_every_file_of_the_list_is_on_the_page(tmp_path):
    listed = re.findall(r"^(my_\S+\.py) ", PAGE, re.MULTILINE)
    assert len(listed) == 8
    assert sorted(write_files(tmp_path)) == sorted(listed)


def test_trains_and_evaluates_from_the_command_line(folder, command, tmp_path):
    flags = [f"--config.{name}={value}" for name, value in TINY.items()]
    config = ["--import", "my_package", "--config", str(folder / "my_config.py")]
    done = command("train", *config, *flags, "--workdir", "run", path=[folder])
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["made_with"]["imports"] == ["my_package"]
    assert record["model"]["name"] == "scaled_decoder"
    assert record["model"]["initial_scale"] == 0.2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    first, last = rows[0], rows[-1]
    assert {"train/loss/token", "train/loss/text", "train/loss/image"} <= set(first)
    assert last["step"] == 4 and 0 <= last["eval/image/top5"] <= 1
    assert np.isfinite(last["eval/image/loss"])

    # The run knows its packages.
    done = command("eval", "--workdir", "run", "--json", path=[folder])
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["image/top5"] == last["eval/image/top5"]
    assert metrics["image/loss"] == pytest.approx(last["eval/image/loss"], rel=1e-5)

    # And names the one that is not there.
    done = command("eval", "--workdir", "run", path=[])
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "--workdir run was made with --import my_package: no such package; install" in line


def test_other_commands_know_the_package(imported, folder, tmp_path, monkeypatch, capsys):
    assert main(["list", "blocks", "--import", "my_package"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "parallel Attention and feed-forward side by side." in listed
    flags = [f"--config.{name}={value}" for name, value in TINY.items()]
    monkeypatch.setenv("MOEJAX_CONFIG_PATH", str(folder))
    assert main(["inspect", "--config", "my_config", *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    # A model config of one's own has no formula; the program is counted all the same.
    assert document["flops_per_token"] is None and document["counted_flops_per_token"] > 0
    assert "stack/segment_0/block_1/scale_d" in document["specs"]
    # In a decoder the block has the formula that it registers, and the program agrees.
    flags += ["--config.model.kernel_backend=reference", "--config.model.block_pattern=parallel"]
    assert main(["inspect", "--config", "chameleon", *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["counted_flops_per_token"] == pytest.approx(document["flops_per_token"])


def test_sweep_of_the_config(imported, folder, capsys):
    argv = ["train", "--import", "my_package", "--config", str(folder / "my_config.py")]
    assert main([*argv, "--sweep", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "--import my_package" in lines[0]
    assert lines[0].endswith("--workdir runs/my_config_sweep/learning_rate=0.0001,seed=0")


def test_mistakes_name_the_field(imported, folder, capsys):
    config = ["inspect", "--config", str(folder / "my_config.py")]
    for flag, message in (
        ("--config.model.initial_scale=-1", "model.initial_scale: must be positive"),
        ("--config.model.initial_scal=1", "did you mean 'initial_scale'?"),
        ("--config.objective.smoothing=2", "objective.smoothing: must be in [0, 1)"),
    ):
        assert main([*config, flag]) == 2
        assert message in capsys.readouterr().err


def test_a_field_of_another_type_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Options:
        rate: float | None = 0.1

    with pytest.raises(UserError, match=r"model.rate: a config field is a bool.*not float \| None"):
        _build(Options, {"rate": 0.2}, "model")


def test_source(imported):
    splits = {name: open_source("squares:cold", name) for name in ("train", "val", "test")}
    assert all(isinstance(source, RecordSource) for source in splits.values())
    texts = [record["text"] for source in splits.values() for record in source]
    assert len(texts) == len(set(texts)) == 60
    record = splits["val"][0]
    assert (record["image"].shape, record["image"].dtype) == ((32, 32, 3), np.uint8)
    versions = {open_source(f"squares:{rest}", "val").version for rest in ("warm", "cold")}
    assert len(versions) == 2
    with pytest.raises(UserError, match="no palette 'cod'; did you mean 'cold'"):
        open_source("squares:cod", "val")


@pytest.mark.parametrize("kind", ["parallel", "scaled"])
def test_block_is_causal_and_decodes(imported, folder, kind):
    overrides = {**TINY, "model.block_pattern": (kind,), "model.vocab_size": 40}
    config = load_config(str(folder / "my_config.py"), overrides)
    model = build(config)[0]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype),
        meta.unbox(boxed_params(model, config)),
    )
    length, known = 8, 5
    tokens = rng.integers(16, 40, (2, length)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "modality": (tokens > 28).astype(np.int32),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
    }
    forward = jax.jit(lambda batch, **cache: model.apply({"params": params}, batch, **cache))
    whole = forward(batch).logits

    changed = tokens.copy()
    changed[:, known] = 16 + (tokens[:, known] - 15) % 24
    other = forward({**batch, "tokens": changed}).logits
    np.testing.assert_array_equal(other[:, :known], whole[:, :known])
    assert np.abs(other[:, known:] - whole[:, known:]).max() > 1e-3

    part = lambda first, last: {name: value[:, first:last] for name, value in batch.items()}
    cache = init_cache(model, params, 2, length)
    cache = write_rows(cache, forward(part(0, known)).rows, np.full(2, known, np.int32))
    for t in range(known, length):
        out = forward(part(t, t + 1), cache=cache.rows)
        np.testing.assert_allclose(out.logits[:, 0], whole[:, t], atol=1e-4)
        cache = write_rows(cache, out.rows, np.ones(2, np.int32))
