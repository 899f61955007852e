"""Every mistake of a user ends in one line that names field or file, exit 2, and no workdir."""

import json

import numpy as np
import pytest
from PIL import Image

from moejax.cli.main import main
from moejax.data.sources import open_source

SMALL = [
    "--config.model.num_layers=1",
    "--config.model.d_model=32",
    "--config.data.batch_size=8",
    "--config.train.steps=2",
    "--config.eval.batches=1",
]


def write_folder(folder, rows=None, count=6):
    """Real pictures with captions; ``rows`` replaces the lines of captions.jsonl."""
    folder.mkdir()
    records = open_source("builtin:emoji32", "train")
    lines = []
    for i in range(count):
        name = f"{i}.png"
        Image.fromarray(np.asarray(records[i * 50]["image"])).save(folder / name)
        lines.append(json.dumps({"image": name, "text": records.text_at(i * 50)}).encode())
    (folder / "captions.jsonl").write_bytes(b"\n".join(lines if rows is None else rows))
    return folder


def bad_folder(kind, folder):
    good = [b'{"image": "%d.png", "text": "a"}' % i for i in range(4)]
    if kind == "empty":
        folder.mkdir()
    elif kind == "latin-1":
        write_folder(folder, [*good, '{"image": "4.png", "text": "café"}'.encode("latin-1")])
    elif kind == "missing image":
        write_folder(folder, [*good, b'{"image": "nowhere.png", "text": "b"}'])
    elif kind == "corrupt image":
        picture = write_folder(folder) / "2.png"
        picture.write_bytes(picture.read_bytes()[:200])
    return folder


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.optim.learning_rat=1"], "optim has no field 'learning_rat'; did you mean"),
        (["--config.data.batch_size=-8"], "data.batch_size: must be positive, got -8"),
        (["--config.data.text_tokenizer=nowhere.json"], "nowhere.json"),
        (["--config.data.image_tokenizer=nowhere.npz"], "nowhere.npz"),
        (["--config.data.source=folder:nowhere"], "nowhere"),
        (
            ["--config.model.kernel_backend=tpu"],
            "kernel_backend=tpu: the platform",
        ),
        (["--config.mesh.data=3"], "mesh.data=3: makes 3 device(s), but there are 8"),
        (["--config.data.batch_size=9"], "data.batch_size=9: 9 rows do not divide over 8"),
        (["--config.data.sequence_length=40"], "data.sequence_length=40"),
        (["--config.model.vocab_size=100"], "model.vocab_size=100"),
        (["--config.eval.metrics=likelyhood"], "likelyhood"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_a_mistake_in_the_config(flags, message, tmp_path, capsys):
    refused(flags, message, tmp_path, capsys)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty", "captions.jsonl"),
        ("latin-1", "captions.jsonl line 5"),
        ("missing image", "nowhere.png"),
        ("corrupt image", "2.png"),
    ],
)
def test_a_mistake_in_a_folder(kind, message, tmp_path, capsys):
    folder = bad_folder(kind, tmp_path / "pictures")
    refused([f"--config.data.source=folder:{folder}"], message, tmp_path, capsys)


def test_a_config_that_is_not_there(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main(["train", "--config", "nowhere.py", "--workdir", str(workdir)]) == 2
    assert "no file 'nowhere.py'" in capsys.readouterr().err
    assert not workdir.exists()


def refused(flags, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    command = ["train", "--config", "quickstart", "--workdir", str(workdir)]
    assert main(command + [*SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: error: ") and error.count("\n") == 1, error
    assert message in error
    assert not workdir.exists()


@pytest.mark.slow
def test_a_folder_of_ones_own_trains_with_one_changed_flag(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures", count=12)
    workdir = tmp_path / "run"
    command = ["train", "--config", "quickstart", "--workdir", str(workdir), *SMALL]
    assert main([*command, f"--config.data.source=folder:{folder}"]) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert rows[-1]["step"] == 2 and np.isfinite(rows[-1]["eval/image/loss"])
