"""Rows of several pictures: who is where, and each picture once an epoch."""

import dataclasses

import numpy as np
import pytest

from moejax.config.schema import Config, DataConfig
from moejax.config.vision import AugmentConfig, ClassificationConfig, ViTConfig
from moejax.data.packed_images import PackedImagePipeline
from moejax.data.packing import first_fit
from moejax.errors import UserError
from moejax.ops.patchify import unpatchify

PATCH = 4


class Greys(list):
    """Picture i is of grey i."""

    name = "made:greys"
    version = "1"
    categories = ("even", "odd")

    def __init__(self, count, split="train"):
        self.split = split
        super().__init__(
            {"id": str(i), "label": i % 2, "image": np.full((16, 16, 3), i, np.uint8)}
            for i in range(count)
        )


def make_config(**data) -> Config:
    fields = {"image_sizes": (16, 8, 12), "max_patches": 20, "batch_size": 2, "image_size": 16}
    return Config(
        model=ViTConfig(image_size=16, patch_size=PATCH, num_classes=2, d_model=16, num_heads=2),
        data=DataConfig(format="images", **{**fields, **data}),
        objective=ClassificationConfig(),
    )


def test_first_fit_by_hand():
    lengths = np.asarray([16, 9, 4, 9, 16, 4, 1])
    # 16+4; 9+9+1 (the second 4 finds 2 left); 16+4.
    assert first_fit(lengths, 20) == [[0, 2], [1, 3, 6], [4, 5]]
    assert first_fit(np.zeros(0, int), 20) == []
    with pytest.raises(ValueError, match="an item of 21 tokens does not fit in 20"):
        first_fit(np.asarray([3, 21]), 20)


def test_first_fit_holds_each_item_once_and_wastes_little():
    lengths = np.random.default_rng(0).choice([4, 9, 16, 64], 2000)
    bins = first_fit(lengths, 100)
    assert sorted(np.concatenate(bins)) == list(range(2000))
    loads = np.asarray([lengths[held].sum() for held in bins])
    assert loads.max() <= 100 and loads.mean() > 90


def test_a_row_holds_its_pictures():
    pipeline = PackedImagePipeline(make_config(), Greys(30))
    for index in range(pipeline.rows_per_epoch):
        row, records = pipeline.row(index), pipeline.row_records(index)
        # Five places, for as many of the smallest as fit.
        assert row["labels"].shape == row["weights"].shape == row["index"].shape == (5,)
        assert row["weights"].sum() == len(records) == row["image_id"].max()
        assert (row["labels"][len(records) :] == -1).all()
        for i, number in enumerate(records):
            here = row["image_id"] == i + 1
            side = int(np.sqrt(here.sum()))
            assert side in (4, 2, 3) and row["labels"][i] == number % 2
            assert row["index"][i] == number
            picture = unpatchify(row["patches"][here].reshape(1, side, side, -1), PATCH)
            assert picture.shape == (1, 4 * side, 4 * side, 3) and (picture == number).all()
            places = np.indices((side, side)).reshape(2, -1).T
            np.testing.assert_array_equal(row["places"][here], places)
        assert not row["patches"][row["image_id"] == 0].any()


def test_epochs():
    pipeline = PackedImagePipeline(make_config(), Greys(30))
    rows = pipeline.rows_per_epoch
    epochs = [[pipeline.row_records(e * rows + i) for i in range(rows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(30))
    assert epochs[0] != epochs[1]
    # The same places in another epoch, for other pictures.
    assert [*map(len, epochs[0])] == [*map(len, epochs[1])]
    again = PackedImagePipeline(make_config(), Greys(30))
    np.testing.assert_array_equal(again.batch(7)["patches"], pipeline.batch(7)["patches"])
    held_out = PackedImagePipeline(make_config(), Greys(30, "val"))
    batches = list(held_out.eval_batches())
    indices = np.concatenate([b["index"][b["weights"] > 0] for b in batches])
    assert sorted(indices) == list(range(30))
    assert (
        len({pipeline.version, PackedImagePipeline(make_config(max_patches=21), Greys(30)).version})
        == 2
    )


def test_mistakes():
    mistakes = {
        "data.max_patches: rows of several pictures need": {"max_patches": 0},
        "data.max_patches: 15 is less than the 16 patches": {"max_patches": 15},
        "data.image_sizes: 20: pictures .* never larger": {"image_sizes": (20,)},
        "data.image_sizes: model.patch_size=4 does not divide 10": {"image_sizes": (10,)},
    }
    for message, fields in mistakes.items():
        with pytest.raises(UserError, match=message):
            make_config(**fields)
    config = make_config()
    with pytest.raises(UserError, match="model.positions: 'learned' places"):
        learned = dataclasses.replace(config.model, positions="learned")
        dataclasses.replace(config, model=learned)
    moe = config.model.moe
    soft = dataclasses.replace(
        moe, num_experts=2, router=dataclasses.replace(moe.router, name="soft")
    )
    with pytest.raises(UserError, match="model.moe.router.name: 'soft' would mix"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, moe=soft))
    with pytest.raises(UserError, match="objective.augment: pictures that share a row"):
        flipped = ClassificationConfig(augment=AugmentConfig(flip="all"))
        dataclasses.replace(config, objective=flipped)
