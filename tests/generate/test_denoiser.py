"""Pictures of a diffusion model: what they depend on, and what ``moejax sample`` writes of them."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest
from flax.core import meta

from moejax.cli.main import main
from moejax.config import load_config
from moejax.config.diffusion import Diffusion, TimeSampling
from moejax.data.build import open_records
from moejax.errors import UserError
from moejax.generate import denoiser
from moejax.generate.denoiser import Drawing, PictureSampler, check_drawing, draw_pictures
from moejax.generate.samples import Example, Neighbour, neighbour_tile
from moejax.models import build_model
from moejax.train.fidelity import FILLER, draw_denoised
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


EXPERTS = {**TINY, "model.num_layers": 2, "model.moe.hidden": 16}


def sampler_of(name: str, changes: dict, **fields) -> PictureSampler:
    """Of a model whose prediction depends on everything it is told."""
    config = load_config(name, changes)
    model = build_model(config)
    batch = {"x_t": np.zeros((1, 32, 32, 3)), "times": np.zeros(1), "labels": np.zeros(1, int)}
    batch |= {"tokens": np.zeros((1, model.config.text_length), int)}
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype)
    drawing = Drawing(steps=2, guidance=2.0)
    fields = {"drawing": drawing, "batch_size": 3, **fields}
    return PictureSampler(model, jax.tree.map(draw, shapes), config.objective, **fields)


@pytest.fixture(scope="module")
def sampler() -> PictureSampler:
    return sampler_of("sit", TINY)


@pytest.mark.parametrize("name, changes", [("sit", TINY), ("dit_moe", EXPERTS)])
def test_a_picture_is_of_its_seed_number_and_class_alone(name, changes):
    sampler = sampler_of(name, changes)
    together = draw_pictures(sampler, [0, 1, 2, None], seed=1).pictures
    alone = draw_pictures(sampler, [2], seed=1, row_ids=[2]).pictures
    np.testing.assert_array_equal(alone[0], together[2])
    others = draw_pictures(sampler, [0, 0, 0, None], seed=1).pictures
    np.testing.assert_array_equal(others[[0, 3]], together[[0, 3]])
    assert (others[1] != together[1]).mean() > 0.1
    another_seed = draw_pictures(sampler, [0], seed=2).pictures
    assert (another_seed[0] != together[0]).mean() > 0.1


def test_rows_that_fill_up_a_batch_change_nothing():
    """Also where experts take their share of the patches of the whole batch."""
    sampler = sampler_of("diffmoe", EXPERTS, batch_size=2)
    plain = draw_pictures(sampler, [0, 1], seed=1).pictures
    wide = dataclasses.replace(sampler, batch_size=4)
    np.testing.assert_array_equal(draw_pictures(wide, [0, 1], seed=1, fill=True).pictures, plain)
    # Other rows do.
    together = draw_pictures(wide, [0, 1, 7, 8], seed=1).pictures
    assert (together[:2] != plain).any()


EDM = {
    "objective.process": "edm",
    "objective.direction": "to_noise",
    "objective.times.distribution": "log_normal",
}


@pytest.mark.parametrize("changes, low, top", [({}, 0.6, 1.0), (EDM, 0.01, 80.0)])
def test_guidance_in_an_interval_of_times(changes, low, top):
    """Of t, also where the network is told 1 - t (SiT) or log(t) / 4 (EDM); steps at top, below."""
    sampler = sampler_of("sit", {**TINY, **changes})

    def first_and_last(**changes):
        """The picture in mind at the first of two steps, and the sample."""
        drawing = dataclasses.replace(sampler.drawing, **changes)
        own = dataclasses.replace(sampler, drawing=drawing)
        return draw_pictures(own, [3], keep=(0, 1)).kept

    everywhere, nowhere = first_and_last(), first_and_last(guidance=1.0)
    early, late = (first_and_last(interval=ends) for ends in ((low, 2 * top), (0.0, low)))
    np.testing.assert_array_equal(first_and_last(interval=(0.0, 2 * top)), everywhere)
    np.testing.assert_array_equal(first_and_last(interval=(2 * top, 3 * top)), nowhere)
    np.testing.assert_array_equal(early[0], everywhere[0])
    np.testing.assert_array_equal(late[0], nowhere[0])
    assert (everywhere[0] != nowhere[0]).any()
    assert (early[1] != everywhere[1]).any() and (late[1] != nowhere[1]).any()


def test_labels_that_a_model_has_not_are_not_asked_for():
    """The drawing of "fidelity" by a model of texts on labelled pictures: with nothing said."""
    text = {**TINY, "data.sequence_length": 24}
    found = sampler_of("sit:text", text)
    config = load_config("sit:text", text)
    context = types.SimpleNamespace(config=config, with_params=lambda params: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "denoiser_of", lambda loaded: found)
        draw = draw_denoised(context)
    labels = np.int32([3, -1, 0, FILLER])
    pictures = draw(found.params, labels, jax.random.key(0))
    assert pictures.shape == (3, 32, 32, 3)
    silent = draw(found.params, np.int32([-1, -1, -1, FILLER]), jax.random.key(0))
    np.testing.assert_array_equal(pictures, silent)


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
        ([0], {"shift": 0.0}, "--shift: must be positive and finite, got 0.0"),
        ([0], {"shift": math.nan}, "--shift: must be positive and finite, got nan"),
        ([0], {"shift": math.inf}, "--shift: must be positive and finite, got inf"),
        ([0], {"spacing": "rho"}, "--spacing: .*use uniform"),
        ([0], {"interval": (0.5, 0.5)}, "--guidance-interval: need 0 <= the lower"),
        ([0], {"interval": (0.5, math.nan)}, "--guidance-interval: .*, got 0.5 and nan"),
        ([], {}, "conditions: there are none"),
    ],
)
def test_mistakes(sampler, conditions, changes, message):
    drawing = dataclasses.replace(sampler.drawing, **changes)
    with pytest.raises(UserError, match=message):
        draw_pictures(dataclasses.replace(sampler, drawing=drawing), conditions)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"guidance": [1.0, 2.0]}, "guidance: 3 pictures, and 2 of these"),
        ({"row_ids": [1]}, "row_ids: 3 pictures, and 1 of these"),
        ({"guidance": [1.0, -2.0, 1.0]}, "--guidance: must be 0 or more, got -2.0"),
        ({"guidance": math.nan}, "--guidance: must be 0 or more, got nan"),
    ],
)
def test_mistakes_of_a_call(sampler, given, message):
    with pytest.raises(UserError, match=message):
        draw_pictures(sampler, [0, 1, 2], **given)


def test_a_shift_is_not_of_edm():
    edm = Diffusion("edm", times=TimeSampling("log_normal"))
    with pytest.raises(UserError, match="--shift: leave it 1 for 'edm'"):
        check_drawing(Drawing(shift=2.0), edm)
    assert check_drawing(Drawing(spacing="exponential"), edm).spacing == "exponential"


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
    common += ["--guidance-interval", "0.2", "1", "--spacing", "uniform"]
    assert main(["sample", "--workdir", str(runs / "classes"), *common]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["guidance_interval"] == [0.2, 1.0] and document["spacing"] == "uniform"
    assert set(document["modes"]) == {"class2image", "unconditional", "denoising", "guidance"}
    assert document["sampler"] == "heun"
    for mode, written in document["modes"].items():
        files = [runs / "classes/samples/step_1" / f"{mode}.{kind}" for kind in ("png", "txt")]
        assert all(file.stat().st_size for file in files), mode
        assert written["rows"], mode
    classes = document["modes"]["class2image"]["rows"]
    assert [row["label"] for row in classes] == list(range(10))
    assert classes[0]["samples"][0]["nearest"]["distance"] > 0


@pytest.mark.parametrize(
    "count, labels, strips, sweeps", [(3, [0, 3, 6], 3, 1), (25, [*range(10)], 10, 5)]
)
def test_no_more_pictures_than_asked_for(runs, capsys, count, labels, strips, sweeps):
    """Some of the classes, or several of each; a sweep of five weights is drawn whole, once."""
    flags = ["--n", str(count), "--denoise-steps", "2", "--json"]
    assert main(["sample", "--workdir", str(runs / "classes"), *flags]) == 0
    modes = json.loads(capsys.readouterr().out)["modes"]
    assert [row["label"] for row in modes["class2image"]["rows"]] == labels
    assert {len(row["samples"]) for row in modes["class2image"]["rows"]} == {count // len(labels)}
    assert len(modes["unconditional"]["rows"]) == count
    assert (len(modes["denoising"]["rows"]), len(modes["guidance"]["rows"])) == (strips, sweeps)


def test_texts_by_command(runs, capsys):
    common = ["--workdir", str(runs / "texts"), "--denoise-steps", "2", "--json"]
    assert main(["sample", *common, "--n", "2", "--prompt", "red apple"]) == 0
    modes = json.loads(capsys.readouterr().out)["modes"]
    assert list(modes) == ["text2image"]
    assert modes["text2image"]["rows"][0]["prompt"] == "red apple"
    assert len(modes["text2image"]["rows"][0]["samples"]) == 2


@pytest.mark.parametrize("name, label", [("heart", "nearest: 4.2\nheart"), ("", "nearest: 4.2")])
def test_the_nearest_picture_has_its_name_below_its_distance(name, label):
    example = Example("train", name, name, "r1", np.zeros((1, 2, 2, 3), np.uint8))
    assert neighbour_tile(Neighbour(example, 4.21)).label == label


def test_names_of_records_by_command(runs, capsys):
    """Without a prompt: held-out names and a quarter known ones, beside what is nearest to them."""
    flags = ["--workdir", str(runs / "texts"), "--denoise-steps", "2", "--n", "8", "--json"]
    assert main(["sample", *flags, "--mode", "text2image", "--split", "val"]) == 0
    printed = json.loads(capsys.readouterr().out)["modes"]["text2image"]
    folder = runs / "texts/samples/step_1"
    rows = json.loads((folder / "text2image.json").read_text(encoding="utf-8"))["rows"]
    assert rows == printed["rows"]
    assert [row["group"] for row in rows] == ["val"] * 3 + ["train"]
    data = load_config("sit:text", {**TINY, "data.sequence_length": 24}).data
    known = {
        split: {record["id"]: record for record in open_records(data, split)}
        for split in ("train", "val")
    }
    listed = (folder / "text2image.txt").read_text(encoding="utf-8")
    for row in rows:
        record = known[row["group"]][row["record_id"]]
        assert row["prompt"] == record["text"]
        assert ("nearest_of_real" in row) == (row["group"] == "val")
        assert len(row["samples"]) == 2
        for near in [sample["nearest"] for sample in row["samples"]]:
            assert near["text"] == known["train"][near["record_id"]]["text"] and near["text"]
            assert near["distance"] > 0
            assert f"({near['text']}), distance {near['distance']:.1f}" in listed
    row = rows[0]
    difference = lambda own: np.int64(own["image"]) - known["val"][row["record_id"]]["image"]
    distances = [np.sqrt((difference(own) ** 2.0).mean()) for own in known["train"].values()]
    assert row["nearest_of_real"]["distance"] == pytest.approx(min(distances), abs=1e-3)
    reals = [row["nearest_of_real"]["distance"] for row in rows[:3]]
    assert printed["median_distance_of_real"] == pytest.approx(np.median(reals), abs=1e-3)


@pytest.mark.parametrize(
    "run, flags, message",
    [
        ("classes", ["--mode", "text2image"], "use class2image or unconditional"),
        ("texts", ["--mode", "class2image"], "use text2image or unconditional"),
        ("classes", ["--sampler", "eular"], "did you mean 'euler'"),
        ("classes", ["--denoise-steps", "1001"], "--denoise-steps"),
        ("classes", ["--prompt", "shoe", "--mode", "class2image"], "--prompt: goes with"),
        ("classes", ["--shift", "-1"], "--shift: must be positive"),
        ("classes", ["--spacing", "rho"], "--spacing: "),
        ("classes", ["--temperature", "0"], "--temperature: is of sequences"),
        ("classes", ["--top-k", "3"], "--top-k: is of sequences"),
        ("texts", ["--top-p", "0.5"], "--top-p: is of sequences"),
    ],
)
def test_mistakes_of_the_command(runs, capsys, run, flags, message):
    assert main(["sample", "--workdir", str(runs / run), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
