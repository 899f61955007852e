"""The "samples" evaluator in a run that really trains: the same captions at every evaluation."""

import json

import numpy as np
import pytest
from PIL import Image

from moejax.config.schema import Config, DataConfig, DecoderConfig, EvalConfig, TrainConfig
from moejax.data.vocabulary import Vocabulary
from moejax.generate import images
from moejax.generate.api import load_sampler, sample_images
from moejax.generate.sampling import Sampling
from moejax.train.loop import train

from .test_sample_command import SPLITS, TEXTS, make_codec, make_pictures


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    make_pictures(folder / "pictures")
    make_codec(folder / "codec.npz")
    return Config(
        model=DecoderConfig(
            vocab_size=Vocabulary(256, 12, 4).size,
            num_layers=1,
            d_model=16,
            num_heads=2,
            ffn_hidden=(16,),
        ),
        data=DataConfig(
            source=f"folder:{folder / 'pictures'}",
            image_size=8,
            sequence_length=32,
            text_tokenizer="bytes",
            image_tokenizer=str(folder / "codec.npz"),
        ),
        train=TrainConfig(steps=2),
        eval=EvalConfig(metrics=("samples",), every=1),
    )


def test_a_run_shows_the_same_captions_over_time(config, tmp_path, monkeypatch):
    grids = []
    real = images.draw_grid

    def noted(rows, header, **options):
        grids.append(rows)
        return real(rows, header, **options)

    monkeypatch.setattr(images, "draw_grid", noted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(config, tmp_path / "run")
    first, last = grids
    held_out = {text for text, split in zip(TEXTS, SPLITS, strict=True) if split == "val"}
    # The font lacks one of them, and its record's id is shown.
    assert {row.title for row in first} == (held_out - {"लाल"}) | {"r11"}
    for a, b in zip(first, last, strict=True):
        assert a.title == b.title and a.tiles[0].label == "real"
        np.testing.assert_array_equal(a.tiles[0].image, b.tiles[0].image)
    for step in (1, 2):
        path = tmp_path / "run" / "samples" / f"step_{step}" / "val_samples.png"
        assert np.asarray(Image.open(path)).ndim == 3
    # It measures nothing: there is no row of an evaluation.
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert not any(name.startswith("eval/") for row in rows for name in row)

    # Pictures of the run inside its mesh of 8 devices are those of its checkpoint outside.
    captions = ["लाल" if row.title == "r11" else row.title for row in last]
    expected = sample_images(
        load_sampler(tmp_path / "run"), captions, sampling=Sampling(top_p=0.95, guidance=2.0)
    )
    np.testing.assert_array_equal([row.tiles[1].image for row in last], expected)
