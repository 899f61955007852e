"""Every shipped config, with every argument: it builds, and what it says of itself is so."""

import ast
import json
from pathlib import Path

import jax
import pytest

from moejax.analysis.params import abstract_batch, abstract_params, param_table
from moejax.api import build
from moejax.cli.list import config_args
from moejax.config import freeze, load_config, to_json
from moejax.config.load import config_module, short_names

ROOT = Path(__file__).resolve().parent.parent
NAMES = tuple(short_names())
CASES = [(name, arg) for name in NAMES for arg in config_args(name)]


@pytest.fixture(params=CASES, ids=[f"{name}:{arg}" if arg else name for name, arg in CASES])
def config(request):
    name, arg = request.param
    return load_config(f"{name}:{arg}" if arg else name)


def test_counts_are_those_declared(config):
    table = param_table(build(config)[0], config)
    about = config.about
    assert (table.total, table.active) == (about.total_params, about.active_params)
    assert sum(table.per_modality.values()) == table.total


def test_loss_by_shape_evaluation(config):
    model, objective = build(config)

    def loss(params, batch, key):
        batch = objective.prepare(batch, key)
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": key})
        return objective(outputs, batch, key).total()

    key = jax.eval_shape(lambda: jax.random.key(0))
    total = jax.eval_shape(loss, abstract_params(model, config), abstract_batch(config), key)
    assert total.shape == ()


def test_is_the_same_after_a_trip_through_config_json(config):
    assert freeze(json.loads(to_json(config))) == config


def test_approximate_names_fields(config):
    for name in config.about.approximate:
        node = config
        for part in name.split("."):
            assert hasattr(node, part), name
            node = getattr(node, part)


def test_mechanism_test_exists(config):
    """Its distinguishing option has a test of its own."""
    assert config.about.mechanism_test, "name the test in config.about.mechanism_test"
    file, _, function = config.about.mechanism_test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function.partition("[")[0] in functions


@pytest.mark.parametrize("name", NAMES)
def test_file_says_what_it_is(name):
    path = short_names()[name]
    doc = config_module(path).__doc__ or ""
    assert f"moejax train --config {name}" in doc, "give the command"
    if path.parent.name == "papers":
        assert "arXiv" in doc
        assert "Claim:" in doc
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("name", [name for name in NAMES if "small" in config_args(name)])
def test_small_is_the_default_in_float32(name):
    plain, small = load_config(name), load_config(f"{name}:small")
    assert plain.model == small.model
    assert plain.model.dtype == "float32"
    # Pictures with labels come from a package of the system.
    vision = plain.model.name in ("vit", "task_vit", "dit")
    assert plain.data.source.startswith("fashion_mnist:" if vision else "builtin:")


def test_mot_and_chameleon_differ_in_sharing_alone():
    assert set(config_args("chameleon")) < set(config_args("mot"))
    for arg in config_args("chameleon"):
        spec = f":{arg}" if arg else ""
        shared = {f"model.untie.{name}": False for name in ("qkv", "out", "ffn", "norms")}
        mot = load_config(f"mot{spec}", {**shared, "model.untie.final_norm": False})
        chameleon = load_config(f"chameleon{spec}")
        for group in ("model", "data", "objective", "optim", "mesh", "train"):
            assert getattr(mot, group) == getattr(chameleon, group)


def test_mot_and_transfusion_differ_in_sharing_and_the_place_of_norms():
    sizes = [arg.partition("_")[2] for arg in config_args("mot") if "_" in arg]
    assert len(sizes) > 1
    for size in sizes:
        shared = {f"model.untie.{name}": False for name in ("qkv", "out", "ffn", "norms")}
        shared |= {"model.untie.final_norm": False, "model.norm_placement": "pre"}
        mot = load_config(f"mot:transfusion_{size}", shared)
        dense = load_config(f"transfusion:{size}")
        for group in ("model", "data", "objective", "optim", "mesh", "train", "eval"):
            assert getattr(mot, group) == getattr(dense, group)
        assert mot.about.active_params == dense.about.total_params


@pytest.mark.parametrize("arg", ["37m", "94m", "443m", "880m", "1.5b", "7b"])
def test_paper_sizes_are_the_active_parameters(arg):
    """The paper's names of its sizes round what our formula counts."""
    unit = {"m": 1e6, "b": 1e9}[arg[-1]]
    active = load_config(f"mot:{arg}").about.active_params
    assert active / unit == pytest.approx(float(arg[:-1]), rel=0.01)
    assert load_config(f"chameleon:{arg}").about.total_params == active
