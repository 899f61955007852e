"""Where rows and pictures go: files, TensorBoard, Weights & Biases without network or account."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from moejax.config.schema import LogConfig
from moejax.errors import UserError
from moejax.train import writers
from moejax.train.evaluate import EVALUATORS, EvalResult
from moejax.train.loop import train
from moejax.train.writers import MetricWriter, TensorBoard, check_writers, save_images, wandb_mode

from .conftest import make_config

PICTURE = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)


def test_pictures_are_files_by_step_and_name(tmp_path):
    paths = save_images(tmp_path, 30, {"val/view": PICTURE, "deep/er/view": PICTURE})
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "samples/step_30/val_view.png",
        "samples/step_30/deep_er_view.png",
    ]
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), PICTURE)
    assert save_images(tmp_path / "none", 30, {}) == []
    assert not (tmp_path / "none").exists()


def test_tensorboard_has_values_and_pictures(tmp_path, monkeypatch):
    """Every call that reaches tensorboardX, and a file that it really wrote."""
    import tensorboardX

    calls = []
    for name in ("add_scalar", "add_image"):
        real = getattr(tensorboardX.SummaryWriter, name)

        def noted(self, tag, value, step, *, _real=real, **options):
            calls.append((tag, step))
            return _real(self, tag, value, step, **options)

        monkeypatch.setattr(tensorboardX.SummaryWriter, name, noted)
    writer = MetricWriter(tmp_path, 0, [TensorBoard(tmp_path, 0)])
    writer.write(5, {"train/loss": 2.0, "train/bad": float("nan")})
    writer.images(5, {"val/view": PICTURE})
    writer.close()
    assert calls == [("train/loss", 5), ("eval/val/view", 5)]
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"eval/val/view" in content and b"\x89PNG" in content


@pytest.mark.parametrize(
    ("environ", "mode", "why"),
    [
        ({}, "offline", "no account"),
        ({"WANDB_MODE": "online"}, "offline", "no account"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline", ""),
        ({"WANDB_MODE": "disabled"}, "disabled", ""),
        ({"WANDB_API_KEY": "k"}, "online", ""),
        ({"WANDB_BASE_URL": "https://wandb.example.org:8080"}, "online", ""),
    ],
)
def test_wandb_mode_needs_no_answer(tmp_path, monkeypatch, environ, mode, why):
    """Where there is no account the run goes offline, whatever WANDB_MODE says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password key\n")
    found, reason = wandb_mode(environ)
    assert found == mode
    assert reason.startswith(why) and bool(reason) == bool(why)


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.metrics, self.finished = options, [], [], False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module in the place of wandb; ``runs`` are those begun, ``fails`` the modes refused."""
    module = types.ModuleType("wandb")
    module.runs, module.fails, module.torn_down = [], set(), []

    class Error(Exception):
        pass

    class Settings:
        model_fields = {"console": None, "init_timeout": None}

        def __init__(self, **fields):
            assert fields.keys() <= self.model_fields.keys()
            self.fields = fields

    def init(**options):
        if options["mode"] in module.fails:
            raise Error("server\ndoes not answer")
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init, module.Settings = init, Settings
    module.teardown = lambda exit_code: module.torn_down.append(exit_code)
    module.Image = lambda image: ("image", image.shape)
    module.errors = types.SimpleNamespace(Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_wandb_run_is_gone_on_with_under_its_id(fake_data, wandb, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EVALUATORS, "_entries", dict(EVALUATORS._entries))
    EVALUATORS.register("view")(lambda context: EvalResult({"v": 1.0}, {"view": PICTURE}))
    config = make_config(
        log__wandb=True, log__wandb_project="mine", eval__metrics=("view",), train__steps=6
    )
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "W&B: no account on this machine (wandb login); written offline; upload with" in said
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    train(longer, tmp_path / "run")

    first, second = wandb.runs
    assert first.finished and second.finished
    assert first.options["id"] == second.options["id"] != ""
    assert first.options["mode"] == "offline" and first.options["project"] == "mine"
    assert first.options["config"]["train"]["steps"] == 6
    assert first.options["settings"].fields == {"console": "off", "init_timeout": 30.0}
    # Steps are an axis of their own: rows below the last step are not refused.
    assert first.metrics == [("step", None), ("*", "step")]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    for row in rows:
        del row["wall_time"]
    logged = [values for run in wandb.runs for values in run.logged]
    assert [values for values in logged if "eval/val/view" not in values] == rows
    assert {"step": 6, "eval/val/view": ("image", (2, 4, 3))} in first.logged
    assert (tmp_path / "run/samples/step_6/val_view.png").is_file()


def test_wandb_online_resumes_and_falls_back(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    config = make_config(log__wandb=True)
    sink = writers.WandB(config, tmp_path)
    assert sink.note == ""
    assert wandb.runs[0].options["resume"] == "allow"
    wandb.fails.add("online")
    sink = writers.WandB(config, tmp_path)
    assert sink.note.startswith("W&B: no connection (server does not answer); written offline")
    assert wandb.runs[1].options["mode"] == "offline"
    assert wandb.torn_down == [1], "the service held the id of the run that did not begin"
    assert wandb.runs[1].options["id"] == wandb.runs[0].options["id"]


def test_missing_packages_are_named_before_anything_is_written(fake_data, tmp_path, monkeypatch):
    def without(package, module=None):
        monkeypatch.setitem(sys.modules, package, module)

    without("wandb")
    with pytest.raises(UserError, match=r"log.wandb: needs wandb; pip install 'moejax\[wandb\]'"):
        train(make_config(log__wandb=True), tmp_path / "run")
    # A folder called wandb in the current one can be imported, and is not the package.
    without("wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match="log.wandb: needs wandb"):
        check_writers(LogConfig(wandb=True))
    without("tensorboardX")
    with pytest.raises(UserError, match=r"tensorboardX; pip install 'moejax\[tensorboard\]'"):
        check_writers(LogConfig(tensorboard=True))
    check_writers(LogConfig())
    assert not (tmp_path / "run").exists()


def test_wandb_mode_that_means_nothing_is_refused(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(UserError, match="WANDB_MODE: 'offlin' is none of online, offline"):
        check_writers(LogConfig(wandb=True))
