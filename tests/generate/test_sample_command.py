"""``moejax sample`` on a run that was really trained: its files, its JSON, its refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.core import meta
from PIL import Image

from moejax.cli.main import main
from moejax.config.schema import (
    AutoencodeConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    FSQAutoencoderConfig,
    TrainConfig,
)
from moejax.data.vocabulary import Vocabulary
from moejax.models.autoencoder import FSQAutoencoder
from moejax.models.tokenizer import save_image_codec
from moejax.train.loop import train

SPLITS = ("train",) * 8 + ("val",) * 4
TEXTS = [f"square {i}" for i in range(11)] + ["लाल"]


def make_pictures(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i, (split, text) in enumerate(zip(SPLITS, TEXTS, strict=True)):
        picture = np.broadcast_to(rng.integers(0, 256, 3), (8, 8, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": text, "id": f"r{i}", "split": split})
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    (folder / "captions.jsonl").write_text(lines, encoding="utf-8")


def make_codec(path):
    config = FSQAutoencoderConfig(
        image_size=8, patch_size=4, levels=(4, 3), width=8, encoder_blocks=1, decoder_blocks=1
    )
    batch = {"images": np.zeros((1, 8, 8, 3), np.uint8)}
    params = jax.jit(FSQAutoencoder(config).init)(jax.random.key(0), batch)["params"]
    save_image_codec(path, config, meta.unbox(params))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of one step of training on twelve pictures."""
    folder = tmp_path_factory.mktemp("sample")
    make_pictures(folder / "pictures")
    make_codec(folder / "codec.npz")
    config = Config(
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
        train=TrainConfig(steps=1),
        eval=EvalConfig(metrics=()),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEJAX_CACHE", str(folder / "cache"))
        train(config, folder / "run")
        yield folder / "run"


def files(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def test_all_modes_write_pictures_texts_and_json(run, capsys):
    assert main(["sample", "--workdir", str(run), "--n", "4"]) == 0
    printed = capsys.readouterr().out
    folder = run / "samples" / "step_1"
    modes = ("image2text", "text2image", "unconditional")
    expected = sorted(f"{mode}.{kind}" for mode in modes for kind in ("png", "txt", "json"))
    assert sorted(path.name for path in folder.iterdir()) == expected
    for mode in modes:
        assert str(folder / f"{mode}.png") in printed
        assert Image.open(folder / f"{mode}.png").width > 200
    document = json.loads((folder / "text2image.json").read_text(encoding="utf-8"))
    assert [row["group"] for row in document["rows"]] == ["val", "val"]
    for row in document["rows"]:
        assert row["prompt"] in TEXTS[8:]
        assert row["nearest_of_real"]["distance"] > 0
        assert [
            sample["nearest"]["record_id"] in {f"r{i}" for i in range(8)}
            for sample in row["samples"]
        ] == [True, True]
    text = (folder / "image2text.txt").read_text(encoding="utf-8")
    captions = json.loads((folder / "image2text.json").read_text(encoding="utf-8"))["rows"]
    assert [row["group"] for row in captions] == ["val", "val", "val", "train"]
    for row in captions:
        assert f"[{row['group']}] {row['record_id']}: {row['text']}" in text
        assert f"model: {row['output']}" in text


def test_json_is_one_document_and_seeds_repeat(run, capsys):
    command = ["sample", "--workdir", str(run), "--mode", "unconditional", "--n", "4", "--json"]
    documents = []
    for seed in ("3", "3", "4"):
        assert main([*command, "--seed", seed]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1]
    first, other = (document["modes"]["unconditional"]["rows"] for document in documents[1:])
    assert len(first) == 4
    assert first != other
    assert documents[0]["step"] == 1
    assert list(documents[0]["modes"]) == ["unconditional"]


def test_prompts_of_ones_own_in_any_script(run, capsys):
    command = ["sample", "--workdir", str(run), "--prompt", "赤い", "--prompt", "red", "--n", "4"]
    assert main([*command, "--json", "--temperature", "0"]) == 0
    (mode,) = json.loads(capsys.readouterr().out)["modes"].items()
    assert mode[0] == "text2image"
    rows = mode[1]["rows"]
    assert [(row["prompt"], row["group"], len(row["samples"])) for row in rows] == [
        ("赤い", "prompt", 2),
        ("red", "prompt", 2),
    ]
    # Greedy: both samples of a prompt are one picture.
    assert all(row["samples"][0] == row["samples"][1] for row in rows)
    text = (run / "samples" / "step_1" / "text2image.txt").read_text(encoding="utf-8")
    assert "[prompt] 赤い" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "text2img"], "--mode: no mode 'text2img'; did you mean 'text2image'?"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "x" * 25], "is 25 tokens long, but at most 24 fit"),
        (["--prompt", "x", "--mode", "image2text"], "--prompt: goes with --mode text2image"),
        (["--n", "0"], "--n: must be positive"),
        (["--seed", "-1"], "--seed: must not be negative"),
        (["--temperature", "-1"], "--temperature: must be 0"),
        (["--top-p", "0"], "--top-p: must be in"),
        (["--sampler", "ddim"], "--sampler: is of pictures that are denoised, and has no"),
        (["--shift", "2"], "--shift: is of pictures that are denoised"),
        (["--guidance-interval", "0", "1"], "--guidance-interval: is of pictures that are"),
        (["--denoise-steps", "9"], "--denoise-steps: is of pictures that are denoised"),
        (["--cache-experts"], "--cache-experts: is of a diffusion model of pictures"),
        (["--mode", "guidance"], "--mode guidance: not of model.name=decoder as it is trained"),
        (["--step", "7"], "--step 7: no such checkpoint"),
        (["--split", "test"], "split"),
        (["--modes", "all"], "no flag '--modes'; did you mean '--mode'?"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, capsys, arguments, message):
    before = files(run)
    assert main(["sample", "--workdir", str(run), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert files(run) == before


def test_a_workdir_without_a_run_is_refused(tmp_path, capsys):
    for arguments in ([], ["--workdir", str(tmp_path / "nothing")]):
        assert main(["sample", *arguments]) == 2
        assert "--workdir" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_writes_no_sequences_is_refused(run, tmp_path, capsys):
    record = json.loads((run / "config.json").read_text())
    record["data"]["format"] = "images"
    record["model"] = dataclasses.asdict(FSQAutoencoderConfig())
    record["objective"] = dataclasses.asdict(AutoencodeConfig())
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert main(["sample", "--workdir", str(tmp_path)]) == 2
    assert "model.name=fsq_autoencoder: cannot be sampled from" in capsys.readouterr().err


def test_other_tokenizers_than_at_training_are_told(run, capsys):
    command = ["sample", "--workdir", str(run), "--mode", "unconditional", "--n", "4"]
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().err
    path = run / "config.json"
    before = path.read_text()
    record = json.loads(before)
    record["made_with"]["data_version"] = "0123"
    path.write_text(json.dumps(record))
    try:
        assert main(command) == 0
    finally:
        path.write_text(before)
    assert "tokenizers changed since" in capsys.readouterr().err
