"""Real runs of tiny models on pictures as latents, and on a mixture of sources."""

import json

import jax
import numpy as np
import pytest
from flax.core import meta
from PIL import Image

from moejax.cli.main import main
from moejax.config import freeze, load_config_dict
from moejax.config.schema import KLAutoencoderConfig
from moejax.models.autoencoder import KLAutoencoder
from moejax.models.tokenizer import save_latent_codec
from moejax.train.loop import train
from moejax.train.writers import read_rows

SPLITS = ("train",) * 40 + ("val",) * 20


def make_pictures(folder, seed):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    rows = []
    for i, split in enumerate(SPLITS):
        picture = np.broadcast_to(rng.integers(0, 256, 3), (8, 8, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"square {i}", "split": split})
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two folders of pictures and an image tokenizer of 2 x 2 latents."""
    folder = tmp_path_factory.mktemp("data")
    make_pictures(folder / "one", 0)
    make_pictures(folder / "two", 1)
    config = KLAutoencoderConfig(
        image_size=8, patch_size=4, latent_channels=3, width=8, encoder_blocks=1, decoder_blocks=1
    )
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    params = jax.jit(KLAutoencoder(config).init)(
        jax.random.key(0), {"images": images, "weights": np.ones(6, np.float32)}
    )["params"]
    save_latent_codec(folder / "codec.npz", config, meta.unbox(params), images)
    return folder


def make_config(folder, **train_fields):
    config = load_config_dict("quickstart:transfusion")
    config.model.update(d_model=16, num_layers=1, num_heads=2, ffn_hidden=(24,), vocab_size=300)
    config.model.latents.update(channels=3, grid=2, patch=1, unet_width=8)
    config.data.update(
        source=f"folder:{folder / 'one'}",
        image_tokenizer=str(folder / "codec.npz"),
        text_tokenizer="bytes",
        image_size=8,
        batch_size=8,
        sequence_length=48,
        variants=2,
    )
    config.train.update(steps=4, checkpoint_every=2, **train_fields)
    config.eval.every = 0
    config.log.every = 1
    return config


@pytest.mark.parametrize("adapter", ["linear", pytest.param("unet", marks=pytest.mark.slow)])
def test_a_run_on_latents_trains_evaluates_resumes_and_draws(adapter, folder, tmp_path, capsys):
    config = make_config(folder)
    config.model.latents.adapter = adapter
    whole = train(freeze(config), tmp_path / "whole")
    assert {"eval/image/loss", "eval/image/gaussian_loss", "eval/text/loss"} <= whole.keys()
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert all("train/loss/image" in row for row in rows if "train/loss" in row)

    config.train.steps = 2
    train(freeze(config), tmp_path / "parts")
    config.train.steps = 4
    parts = train(freeze(config), tmp_path / "parts")
    assert {k: v for k, v in parts.items() if "loss" in k} == {
        k: v for k, v in whole.items() if "loss" in k
    }

    capsys.readouterr()
    arguments = ["sample", "--workdir", str(tmp_path / "whole"), "--n", "4", "--json"]
    assert main([*arguments, "--denoise-steps", "3", "--sampler", "heun"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["denoise_steps"], document["sampler"]) == (3, "heun")
    written = {"text2image", "image2text", "unconditional", "denoising", "guidance"}
    assert set(document["modes"]) == written
    for mode in document["modes"].values():
        assert Image.open(mode["files"]["png"]).size[0] > 100
    assert main([*arguments, "--denoise-steps", "0"]) == 2
    assert main([*arguments, "--cache-experts"]) == 2
    assert "--cache-experts: is of a diffusion model of pictures" in capsys.readouterr().err

    fidelity = {"pictures": 20, "draws": 1, "reference": 40, "steps": 2, "sampler": "euler"}
    flags = [f"--config.eval.fidelity.{name}={value}" for name, value in fidelity.items()]
    evaluate = ["eval", "--workdir", str(tmp_path / "whole"), "--metrics", "fidelity", "--json"]
    assert main([*evaluate, *flags]) == 0
    values = json.loads(capsys.readouterr().out)["metrics"]
    assert np.isfinite(values["fidelity/fd_efflite0"]), values


@pytest.mark.slow
def test_a_mixture_reports_the_loss_of_each_source(folder, tmp_path):
    config = make_config(folder)
    one, two = (f"folder:{folder / name}" for name in ("one", "two"))
    config.data.sources = ((one, 3.0), (two, 1.0))
    values = train(freeze(config), tmp_path / "run")
    for name in (one, two):
        assert values[f"eval/source/{name}/text/loss"] > 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    logged = {key for row in rows for key in row}
    assert f"train/loss/source/{one}" in logged
