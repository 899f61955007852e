"""The section "Routing" of a report: from files alone, with nothing from anywhere else."""

import dataclasses
import json
import re
from html import unescape

import numpy as np
import pytest

from moejax.cli.main import main
from moejax.config import load_config, to_dict
from moejax.train.writers import save_arrays

from ..analysis.routing_records import make_record
from .test_report import Page

FIELDS = {"train.steps": 40, "model.moe.num_experts": 3, "model.block_pattern": ("moe",)}


def write_run(workdir, fields):
    """Rows and the loads of 40 steps; no arrays."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(load_config("quickstart", fields))))
    rows, loads = [], []
    for step in range(2, 42, 2):
        rows.append({"step": step, "train/loss": 5.0, "train/router/max_violation": step / 10})
        layer = {"load": [[step, 60 - step, 0, 10], [10, 0, 20, 0]], "dropped": 3}
        loads.append({"step": step, "layers": [{"layer": n, **layer} for n in (1, 3)]})
    rows.append({"step": 40, "eval/routing/token_entropy": 0.5, "eval/text/loss": 3.0})
    rows[-1]["eval/routing/shuffled_token_entropy"] = 0.75
    for name, lines in (("metrics", rows), ("routing", loads)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return workdir


@pytest.fixture
def workdir(tmp_path):
    workdir = write_run(tmp_path / "run", FIELDS)
    for step in (20, 40):
        save_arrays(workdir, step, {"val/routing": make_record(seed=step).arrays()})
    return workdir


def report(workdir):
    assert main(["report", "--workdir", str(workdir)]) == 0
    return (workdir / "report" / "index.html").read_text(encoding="utf-8")


def maps(text):
    """The heat maps by title; the last of several of one title."""
    found = re.findall(r'aria-label="([^"]*)" data-map="([^"]*)"', text)
    return {unescape(title): json.loads(unescape(data)) for title, data in found}


def section(text):
    return re.search(r'<section id="routing">.*?</section>', text, re.S)[0]


def test_everything_is_there_and_comes_from_nowhere_else(workdir):
    text = report(workdir)
    page = Page(text)
    body = section(text)
    for title in (
        "Load over time",
        "Experts by layer and modality, at step 40",
        "Routing by token",
        "Drop rate by position",
        "Experts chosen together",
        "Tokens by expert",
        "Pictures by expert",
        "Agreement between evaluations",
    ):
        assert f"<h3>{title}</h3>" in body
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    assert not re.search(r"https?:|//[a-z]+\.|url\(", text)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "moejax eval" not in body


def test_experts_of_pictures_by_class_and_place(tmp_path):
    workdir = write_run(tmp_path / "run", FIELDS)
    of_classes = np.array([[[30, 10, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 5]]])
    of_places = np.zeros((2, 4, 4))
    of_places[:, :, 1], of_places[:, 3, 0] = 3, 1
    record = dataclasses.replace(
        make_record(seed=40),
        classes=np.array(["<bag>", "shoe"]),
        by_class=of_classes,
        by_patch=of_places,
        class_entropy=np.array([0.5, 0.25]),
    )
    save_arrays(workdir, 40, {"val/routing": record.arrays()})
    text = report(workdir)
    shown = maps(text)
    assert shown["layer 1, classes"]["rows"] == ["<bag>", "shoe"]
    assert shown["layer 1, classes"]["values"] == [[0.75, 0.25, 0, 0], [None] * 4]
    assert shown["layer 3, classes"]["values"] == [[0.25] * 4, [0, 0, 0, 1]]
    assert shown["layer 3, expert 1"]["values"] == [[1, 1], [1, 0.75]]
    # Of 40, 0, 0 choices of experts with weights two have less than a hundredth of 13.3.
    assert "0.500, 0.250 nats by layer, in which 0, 2 experts have less than 1%" in text
    assert "<bag>" not in text


def test_experts_of_pictures_by_noise_level(tmp_path):
    workdir = write_run(tmp_path / "run", FIELDS)
    of_times = np.array([[[30, 10, 0, 0], [0, 0, 0, 8]], [[2, 2, 2, 2], [0, 0, 5, 0]]])
    record = dataclasses.replace(
        make_record(seed=40),
        times=np.array([0.125, 0.875]),
        by_time=of_times,
        time_entropy=np.array([0.375, 0.125]),
    )
    save_arrays(workdir, 40, {"val/routing": record.arrays()})
    text = report(workdir)
    shown = maps(text)
    assert "<h3>Experts by noise level</h3>" in section(text)
    assert "<h3>Experts by class</h3>" not in text
    assert shown["layer 1, times"]["rows"] == ["0.125", "0.875"]
    assert shown["layer 1, times"]["columns"] == ["0", "1", "2", "zero 0"]
    assert shown["layer 1, times"]["values"] == [[0.75, 0.25, 0, 0], [0, 0, 0, 1]]
    assert shown["layer 3, times"]["values"] == [[0.25] * 4, [0, 0, 1, 0]]
    assert "0.375, 0.125 nats by layer" in text


def test_charts_of_training_and_evaluation(workdir):
    text = report(workdir)
    page = Page(text)
    assert page.lines("max violation")["train"][0] == [2, 0.2]
    assert page.lines("token entropy") == {"val": [[40, 0.5]]}
    assert page.charts["token entropy"]["levels"] == [{"name": "shuffled tokens", "value": 0.75}]
    # These are of this section, and of no other.
    assert text.count('aria-label="token entropy"') == 1
    assert "routing token entropy" not in text


def test_maps_hold_the_shares(workdir):
    record = make_record(seed=40)
    found = maps(section(report(workdir)))
    np.testing.assert_allclose(found["all tokens"]["values"], record.load(), rtol=1e-3)
    np.testing.assert_allclose(found["image"]["values"], record.load(1), rtol=1e-3)
    assert found["text"]["columns"] == ["0", "1", "2", "zero 0"]
    assert found["text"]["rows"] == ["layer 1", "layer 3"]
    dropped = found["choices dropped"]["values"]
    assert dropped[0] == [0] * 9 + [1] and dropped[1] == [0] * 9 + [None]
    (agreement,) = np.transpose(found["same first expert"]["values"])
    np.testing.assert_allclose(agreement, record.agreement(make_record(seed=20)), rtol=1e-3)
    assert found["same first expert"]["columns"] == ["20 to 40"]
    # Of expert 0's 25 tokens, 5 have each other expert.
    assert found["layer 1"]["values"][0] == [None, 0.2, 0.2, 0.2]


def test_loads_over_time(workdir):
    text = section(report(workdir))
    titled = re.search(r'aria-label="layer 1" data-map="([^"]*)"', text)
    data = json.loads(unescape(titled[1]))
    assert data["rows"] == ["0", "1", "2", "3"]
    assert data["columns"] == [str(step) for step in range(2, 42, 2)]
    assert [row[4] for row in data["values"]] == [0.2, 0.5, 0.2, 0.1]


def test_tokens_and_patches_have_the_colours_of_the_legend(workdir):
    record = make_record(seed=40)
    text = section(report(workdir))
    legend = re.findall(r'background:([^;]+);[^>]*title="expert ([^",]*)"', text)
    color = {3 if name == "zero 0" else int(name): rgb for rgb, name in legend}
    assert len(set(color.values())) == 4
    # "red" of row 0 is place 2, whose first expert is the one without weights.
    chips = re.findall(r'background:([^;]+);[^>]*title="(layer \d: [^"]*)">([^<]*)<', text)
    reds = [(rgb, title) for rgb, title, piece in chips if piece.strip() == "red"]
    second = record.row_experts[:, 0, 2, 1]
    assert reds == [
        (color[3], f"layer {layer}: expert zero 0, {record.expert_name(0, e)}")
        for layer, e in zip((1, 3), second, strict=True)
    ]
    pieces = [piece for *_, piece in chips]
    assert len(pieces) == 2 * 6 and "a&lt;b" in pieces and "EOI" not in pieces
    # The picture's four tokens begin at place 7, once for each layer.
    squares = re.findall(r'<rect x="(\d+)" y="(\d+)" [^>]*fill="([^"]+)"><title>', text)
    assert [(int(x) > 0, int(y) > 0) for x, y, _ in squares[:4]] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    expected = [color[int(e)] for layer in range(2) for e in record.row_experts[layer, 0, 7:11, 0]]
    assert [rgb for *_, rgb in squares] == expected


def test_without_arrays_it_says_how_to_make_them(tmp_path):
    workdir = write_run(tmp_path / "run", FIELDS)
    text = section(report(workdir))
    assert f"<code>moejax eval --workdir {workdir} --metrics routing</code>" in text
    assert "Load over time" in text and "Tokens by expert" not in text


def test_a_dense_model_has_no_such_section(tmp_path):
    workdir = write_run(tmp_path / "run", {"train.steps": 40})
    assert 'id="routing"' not in report(workdir)
