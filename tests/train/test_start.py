"""Where a run begins: resume before train.init_from before scratch; the LMFusion recipe."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from moejax.config.schema import DecoderConfig, UntieConfig
from moejax.config.training import GroupConfig
from moejax.errors import UserError
from moejax.train.checkpoint import Checkpoints
from moejax.train.load import load
from moejax.train.loop import train
from moejax.train.setup import prepare
from moejax.train.start import plan_start
from moejax.train.writers import TIME_FIELDS, read_rows

from .conftest import make_config


class Stopped(BaseException):
    """Stands for a crash: nothing in moejax catches it."""


@pytest.fixture
def source(fake_data, tmp_path):
    """A run of three steps with a moving average, saved at steps 2 and 3."""
    config = make_config(
        train__steps=3, train__checkpoint_every=2, eval__metrics=(), optim__ema_decay=0.9
    )
    train(config, tmp_path / "source")
    return tmp_path / "source"


def saved_params(workdir, step):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    arrays = checkpoints.arrays(step)
    checkpoints.close()
    return {k.removeprefix("params/"): np.array(v) for k, v in arrays.items() if "params/" in k[:7]}


def begun(config, workdir):
    """The state that a new run of ``config`` begins with."""
    setup = prepare(config)
    start = plan_start(setup, workdir)
    return setup, start, start.create(setup.recipe)


def test_parameters_alone_are_loaded_in_place(source, tmp_path):
    spec = {"train__init_from": f"{source}@2", "train__seed": 5, "optim__ema_decay": 0.9}
    config = make_config(mesh__data=2, mesh__fsdp=4, **spec)
    setup, start, state = begun(config, tmp_path / "new")
    expected = saved_params(source, 2)
    assert expected.keys() == {"embedding_vd", "gain_md", "head_dv"}
    for name, value in expected.items():
        np.testing.assert_array_equal(state.params[name], value)
        np.testing.assert_array_equal(state.ema[name], value)
        assert state.params[name].sharding == setup.recipe.shardings.params[name]
    fresh = setup.recipe.create()
    for field in ("step", "opt_state", "rng", "skipped"):
        same = jax.tree.map(np.array_equal, getattr(state, field), getattr(fresh, field))
        assert jax.tree.all(same), field
    assert start.describe() == f"init_from {source}@2: loaded 3 of 3 parameters (9.12k values)"
    assert not (tmp_path / "new").exists()


def test_forms_of_naming_a_checkpoint(source, tmp_path):
    for spec, step in (("", 3), ("@2", 2), ("/checkpoints/2", 2)):
        setup = prepare(make_config(train__init_from=f"{source}{spec}"))
        start = plan_start(setup, tmp_path / "new")
        assert (start.step, start.plan.label) == (step, f"{source}@{step}")


def test_what_does_not_fit_is_said_and_stays_as_drawn(source, tmp_path, capsys):
    options = {"train__steps": 1, "eval__metrics": (), "model__vocab_size": 300}
    train(make_config(train__init_from=str(source), **options), tmp_path / "new")
    said = capsys.readouterr().out
    assert f"init_from {source}@3: loaded 1 of 3 parameters (32 values)\n" in said
    assert "  not loaded  embedding_vd: [284,16] there, [300,16] here\n" in said
    report = json.loads((tmp_path / "new/init_report.json").read_text())
    assert report["init_from"] == f"{source}@3" and report["step"] == 3
    assert list(report["loaded"]) == ["gain_md"]
    assert report["skipped"].keys() == {"embedding_vd", "head_dv"}
    assert report["unused"] == ["embedding_vd", "head_dv"]
    # The rest is what a run from scratch draws.
    config = make_config(train__init_from=str(source), **options)
    setup, _, state = begun(config, tmp_path / "other")
    np.testing.assert_array_equal(state.params["head_dv"], setup.recipe.create().params["head_dv"])


def test_one_parameter_can_begin_two(fake_data, tmp_path):
    """Where embedding and head have one shape; nothing else is loaded."""
    square = prepare(make_config(model__num_heads=2, model__d_model=284))
    checkpoints = Checkpoints(tmp_path / "square/checkpoints")
    saved = square.recipe.create()
    checkpoints.save(1, saved, {}, square.mesh)
    checkpoints.close()
    config = make_config(
        model__num_heads=2,
        model__d_model=284,
        train__seed=7,
        train__init_from=str(tmp_path / "square"),
        train__init_rename=(("head_dv", "embedding_vd"), ("gain_md", "")),
    )
    setup, start, state = begun(config, tmp_path / "new")
    assert start.plan.skipped == {"gain_md": "left out by train.init_rename"}
    assert start.plan.unused == ("gain_md", "head_dv")
    for name in ("embedding_vd", "head_dv"):
        np.testing.assert_array_equal(state.params[name], saved.params["embedding_vd"])


def test_mistakes_leave_no_workdir(source, tmp_path):
    (tmp_path / "empty").mkdir()
    for fields, message in (
        ({"init_from": str(tmp_path / "nowhere")}, "init_from=.*nowhere: there is no folder"),
        ({"init_from": str(tmp_path / "empty")}, "init_from=.*: no checkpoint in"),
        ({"init_from": f"{source}@7"}, "init_from=.*@7: no step 7 in .*; there are: 2, 3"),
        ({"init_rename": (("hed", "x"),)}, r"init_rename\[0\]: 'hed' is found in no parameter"),
        ({"init_rename": (("h(", "x"),)}, r"init_rename: 'h\(' is no regular expression"),
        ({"init_rename": (("h",),)}, r"init_rename\[0\]: \('h',\) is no pair"),
        ({"init_rename": ((".", "x"),)}, "init_from: nothing of .*source@3 fits this model"),
        (
            {"init_towers": (("imag", "text"),)},
            "init_towers.*no modality 'imag'; did you mean",
        ),
        ({"init_from": "", "init_broadcast": True}, "init_broadcast: needs train.init_from"),
    ):
        fields = {f"train__{name}": value for name, value in fields.items()}
        with pytest.raises(UserError, match=f"train.{message}") as error:
            train(make_config(**{"train__init_from": str(source), **fields}), tmp_path / "new")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()


def rows(workdir):
    return [
        {name: value for name, value in row.items() if name not in TIME_FIELDS}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def test_resume_comes_before_init_from(source, fake_data, tmp_path, capsys):
    """Once begun a run needs the other no more; before its first checkpoint it begins as it did."""
    config = make_config(
        train__init_from=str(source), train__steps=6, train__checkpoint_every=4, eval__metrics=()
    )
    train(config, tmp_path / "whole")

    def crash(step):
        if step == crash.at:
            raise Stopped

    fake_data.before = staticmethod(crash)
    crash.at = 2
    with pytest.raises(Stopped):
        train(config, tmp_path / "run")
    # The other run goes on meanwhile.
    crash.at = None
    longer = make_config(
        train__steps=4, train__checkpoint_every=2, eval__metrics=(), optim__ema_decay=0.9
    )
    train(longer, source)
    crash.at = 5
    capsys.readouterr()
    with pytest.raises(Stopped):
        train(config, tmp_path / "run")
    assert f"init_from {source}@3: loaded 3 of 3" in capsys.readouterr().out
    shutil.rmtree(source)
    crash.at = None
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "resumed from step 4" in said and "init_from" not in said
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    jax.tree.map(
        np.testing.assert_array_equal,
        load(tmp_path / "run").params,
        load(tmp_path / "whole").params,
    )


DENSE = DecoderConfig(vocab_size=284, num_layers=2, d_model=16, num_heads=2, ffn_hidden=(24,))
UNTIED = UntieConfig(qkv=True, out=True, ffn=True, norms=True, final_norm=True)
MOT = dataclasses.replace(DENSE, untie=UNTIED)


def text_logits(model, params):
    """Logits of a batch of text alone."""
    tokens = np.random.default_rng(1).integers(100, 200, (8, 16)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "modality": np.zeros_like(tokens),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
    }
    return np.array(jax.jit(lambda p: model.apply({"params": p}, batch).logits)(params))


@pytest.mark.slow
def test_lmfusion_recipe(fake_data, tmp_path, capsys):
    """LMFusion (arXiv 2412.15188): the image tower begins as the text tower; it alone moves."""
    options = {"eval__metrics": (), "train__checkpoint_every": 3, "optim__weight_decay": 0.3}
    base = make_config(train__steps=4, **options)
    train(dataclasses.replace(base, model=DENSE), tmp_path / "dense")
    freeze = ("embedding_vd", "head_dv", "@text")
    begin = {"train__init_from": str(tmp_path / "dense"), "train__init_broadcast": True}
    config = make_config(
        # State of an optimizer of another shape has to survive the kill as well.
        optim__groups=(GroupConfig(match="ffn/", name="adafactor", scale=0.5),),
        train__steps=8,
        train__seed=9,
        optim__freeze=freeze,
        optim__ema_decay=0.9,
        **begin,
        **options,
    )
    config = dataclasses.replace(config, model=MOT)

    setup, _, state = begun(config, tmp_path / "new")
    before = jax.device_get(state.params)
    dense = load(tmp_path / "dense")
    with jax.set_mesh(setup.mesh):
        logits = text_logits(setup.model, state.params)
        expected = text_logits(dense.model, dense.params)
    # Two copies of one tower are the dense model, whichever of them a token meets.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

    crashes = [5]

    def crash(step):
        if crashes and step == crashes[0]:
            crashes.clear()
            raise Stopped

    train(config, tmp_path / "whole")
    fake_data.before = staticmethod(crash)
    with pytest.raises(Stopped):
        train(config, tmp_path / "killed")
    train(config, tmp_path / "killed")
    assert "resumed from step 3" in capsys.readouterr().out
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    arrays = {}
    for name in ("whole", "killed"):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", read_only=True)
        arrays[name] = {k: np.array(v) for k, v in checkpoints.arrays(8).items()}
        checkpoints.close()
    assert arrays["whole"].keys() == arrays["killed"].keys()
    for name, value in arrays["whole"].items():
        assert value.tobytes() == arrays["killed"][name].tobytes(), name

    loaded = load(tmp_path / "killed")
    with jax.set_mesh(loaded.setup.mesh):
        np.testing.assert_array_equal(text_logits(loaded.model, loaded.params), logits)
    flat = jax.tree_util.tree_leaves_with_path(before)
    for path, old in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for kind in ("params", "ema"):
            new = arrays["killed"][f"{kind}/{name}"]
            if name in freeze:
                assert new.tobytes() == old.tobytes(), name
                continue
            axis = 1 if name.startswith("stack") else 0
            text, image = np.moveaxis(new, axis, 0)
            old_text, old_image = np.moveaxis(old, axis, 0)
            np.testing.assert_array_equal(old_text, old_image)
            assert text.tobytes() == old_text.tobytes(), name
            assert not np.array_equal(image, old_image), name
    assert not any("mu/embedding_vd" in name for name in arrays["killed"])
    assert any("mu/stack" in name for name in arrays["killed"])
