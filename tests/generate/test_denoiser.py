"""Pictures of a diffusion model: what they depend on, and what ``moejax sample`` writes of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.cli.main import main
from moejax.config import load_config
from moejax.errors import UserError
from moejax.generate.denoiser import Drawing, PictureSampler, draw_pictures
from moejax.models import build_model
from moejax.train.loop import train

pytestmark = pytest.mark.usefixtures("quick_compiles")
TINY = {
    "data.source": "builtin:emoji32",
    "data.image_size": 32,
    "data.batch_size": 8,
    "model.image_size": 32,
    "model.patch_size": 16,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.ffn_hidden": (16,),
    "objective.augment.flip": "none",
}
RUN = {"train.steps": 1, "train.checkpoint_every": 1, "eval.metrics": (), "optim.ema_decay": 0.0}


@pytest.fixture(scope="module")
def sampler() -> PictureSampler:
    """Of a model whose prediction depends on everything it is told."""
    config = load_config("sit", TINY)
    model = build_model(config)
    batch = {"x_t": np.zeros((1, 32, 32, 3)), "times": np.zeros(1), "labels": np.zeros(1, int)}
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype)
    drawing = Drawing(steps=2, guidance=2.0)
    return PictureSampler(
        model, jax.tree.map(draw, shapes), config.objective, drawing=drawing, batch_size=3
    )


def test_a_picture_is_of_its_seed_number_and_class_alone(sampler):
    together = draw_pictures(sampler, [0, 1, 2, None], seed=1).pictures
    alone = draw_pictures(sampler, [2], seed=1, row_ids=[2]).pictures
    np.testing.assert_array_equal(alone[0], together[2])
    others = draw_pictures(sampler, [0, 0, 0, None], seed=1).pictures
    np.testing.assert_array_equal(others[[0, 3]], together[[0, 3]])
    assert (others[1] != together[1]).mean() > 0.1
    another_seed = draw_pictures(sampler, [0], seed=2).pictures
    assert (another_seed[0] != together[0]).mean() > 0.1


def test_guidance_goes_from_nothing_said_through_the_class(sampler):
    same = dict(seed=0, row_ids=[0, 0, 0])
    swept = draw_pictures(sampler, [4] * 3, guidance=[0.0, 1.0, 2.0], **same).pictures
    plain = draw_pictures(sampler, [None, 4, 4], guidance=1.0, **same).pictures
    np.testing.assert_array_equal(swept[:2], plain[:2])
    assert (swept[2] != swept[1]).any()
    own = draw_pictures(sampler, [4] * 3, **same).pictures
    np.testing.assert_array_equal(own[2], swept[2])


def test_the_last_picture_on_the_way_is_the_sample(sampler):
    drawn = draw_pictures(sampler, [3, 5], keep=(0, 1))
    assert drawn.kept.shape == (2, 2, 32, 32, 3)
    np.testing.assert_array_equal(drawn.kept[1], drawn.pictures)
    np.testing.assert_allclose(drawn.times, [1.0, 0.5])


@pytest.mark.parametrize(
    "conditions, changes, message",
    [
        ([10], {}, "label 10: the model has 10 classes"),
        (["a cat"], {}, "reads no texts"),
        ([0], {"steps": 0}, "--denoise-steps: must be positive, got 0"),
        ([0], {"sampler": "dim"}, "--sampler: .*did you mean 'ddim'"),
        ([0], {"guidance": -1.0}, "--guidance: must be 0 or more"),
    ],
)
def test_mistakes(sampler, conditions, changes, message):
    drawing = dataclasses.replace(sampler.drawing, **changes)
    with pytest.raises(UserError, match=message):
        draw_pictures(dataclasses.replace(sampler, drawing=drawing), conditions)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of one step of training: of classes, and of texts."""
    folder = tmp_path_factory.mktemp("denoiser")
    text = {**TINY, "data.sequence_length": 24}
    train(load_config("dit", {**TINY, **RUN}), folder / "classes")
    train(load_config("sit:text", {**text, **RUN}), folder / "texts")
    return folder


def test_every_mode_by_command(runs, capsys):
    common = ["--n", "10", "--denoise-steps", "3", "--sampler", "heun", "--json"]
    assert main(["sample", "--workdir", str(runs / "classes"), *common]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["modes"]) == {"class2image", "unconditional", "denoising", "guidance"}
    assert document["sampler"] == "heun"
    for mode, written in document["modes"].items():
        files = [runs / "classes/samples/step_1" / f"{mode}.{kind}" for kind in ("png", "txt")]
        assert all(file.stat().st_size for file in files), mode
        assert written["rows"], mode
    classes = document["modes"]["class2image"]["rows"]
    assert [row["label"] for row in classes] == list(range(10))
    assert classes[0]["samples"][0]["nearest"]["distance"] > 0


def test_texts_by_command(runs, capsys):
    common = ["--workdir", str(runs / "texts"), "--denoise-steps", "2", "--json"]
    assert main(["sample", *common, "--n", "2", "--prompt", "red apple"]) == 0
    modes = json.loads(capsys.readouterr().out)["modes"]
    assert list(modes) == ["text2image"]
    assert modes["text2image"]["rows"][0]["prompt"] == "red apple"
    assert len(modes["text2image"]["rows"][0]["samples"]) == 2


@pytest.mark.parametrize(
    "run, flags, message",
    [
        ("classes", ["--mode", "text2image"], "use class2image or unconditional"),
        ("texts", ["--mode", "class2image"], "use text2image or unconditional"),
        ("classes", ["--sampler", "eular"], "did you mean 'euler'"),
        ("classes", ["--denoise-steps", "1001"], "--denoise-steps"),
        ("classes", ["--prompt", "shoe", "--mode", "class2image"], "--prompt: goes with"),
    ],
)
def test_mistakes_of_the_command(runs, capsys, run, flags, message):
    assert main(["sample", "--workdir", str(runs / run), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
