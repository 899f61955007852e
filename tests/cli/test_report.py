"""``moejax report``: everything of a run in one file, and nothing from anywhere else."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from moejax.analysis.charts import Level, Line, line_chart, thin, tick_label, ticks
from moejax.analysis.report import MOST_PICTURES, spread
from moejax.cli.main import main
from moejax.config import load_config, to_dict

VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the charts by title, and the text of the tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.charts, self.cells = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if "data-chart" in attributes:
            self.charts[attributes["aria-label"]] = json.loads(attributes["data-chart"])
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def lines(self, chart):
        return {line["name"]: line["points"] for line in self.charts[chart]["lines"]}

    def row(self, first):
        """The cells from ``first`` on."""
        return self.cells[self.cells.index(first) :]


def rows():
    """20 training rows, evaluations at 20 and 40 with a baseline, at 30 on another split."""
    for step in range(2, 42, 2):
        yield {
            "step": step,
            "wall_time": 1.7e9 + step,
            "train/loss": 9 - step / 10,
            "train/loss/text": 8 - step / 10,
            "train/loss/image": 7.0,
            "train/loss/z": 100.0,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 1.5,
            "train/skipped": 0,
            "train/tokens_per_second": 1000.0,
            "train/input_wait_fraction": 0.01,
        }
        if step in (20, 40):
            yield {
                "step": step,
                "wall_time": 1.7e9 + step,
                "eval/loss": 6.0 + step / 100,
                "eval/text/loss": 5.0 + step / 100,
                "eval/text/unigram_loss": 6.5,
                "eval/image/accuracy": 0.25,
            }
        if step == 30:
            yield {"step": step, "wall_time": 1.7e9 + step, "eval/train/text/loss": 4.0}


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)


@pytest.fixture
def workdir(tmp_path):
    """The files of a run of 40 steps, hostile in its name."""
    workdir = tmp_path / "run"
    config = to_dict(
        load_config("quickstart", {"train.steps": 40, "eval.best_metric": "text/loss"})
    )
    config["about"]["name"] = "<script>alert(1)</script> & co"
    record = {**config, "made_with": {"jax": "0.0.1", "device_kind": "abacus"}}
    for step in (20, 40):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "data").write_bytes(b"x" * 1_500_000)
    (workdir / "config.json").write_text(json.dumps(record))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for step in range(10, 10 + 4 * (MOST_PICTURES + 3), 4):
        folder = workdir / "samples" / f"step_{step}"
        folder.mkdir(parents=True)
        Image.fromarray(picture(step)).save(folder / "val_samples.png")
    return workdir


@pytest.fixture
def page(workdir, capsys):
    assert main(["report", "--workdir", str(workdir), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    path = workdir / "report" / "index.html"
    assert document == {"path": str(path), "steps": 40}
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_comes_from_elsewhere(page, workdir):
    """No address in any attribute or style; and the page forbids what is not in it."""
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
    text = (workdir / "report" / "index.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"https?:|//[a-z]+\.", text)
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    ]


def test_names_cannot_write_html(page):
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_charts_hold_the_rows_with_their_baseline(page):
    assert page.lines("text") == {
        "train": [[step, 8 - step / 10] for step in range(2, 42, 2)],
        "val": [[20, 5.2], [40, 5.4]],
        "train split": [[30, 4.0]],
    }
    assert page.charts["text"]["levels"] == [{"name": "unigram baseline", "value": 6.5}]
    assert page.lines("all targets")["val"] == [[20, 6.2], [40, 6.4]]
    assert page.lines("z") == {"train": [[step, 100.0] for step in range(2, 42, 2)]}
    assert page.lines("image accuracy") == {"val": [[20, 0.25], [40, 0.25]]}
    assert page.charts["image accuracy"]["percent"]
    assert {"learning rate", "tokens a second"} <= page.charts.keys()
    assert "input wait, share of the steps' time" in page.charts
    assert "steps skipped" not in page.charts, "none was"


def test_pictures_are_inside_and_spread_over_the_steps(page):
    shown = [attributes for tag, attributes in page.tags if tag == "img"]
    steps = [int(attributes["alt"].removeprefix("step ")) for attributes in shown]
    assert len(steps) == MOST_PICTURES
    assert steps[0] == 10 and steps[-1] == 10 + 4 * (MOST_PICTURES + 2)
    for step, attributes in zip(steps, shown, strict=True):
        content = base64.b64decode(attributes["src"].partition(",")[2])
        assert content.startswith(b"\x89PNG")
        assert step == steps[0] or attributes["src"] != shown[0]["src"]


def test_tables(page, workdir):
    text = (workdir / "report" / "index.html").read_text(encoding="utf-8")
    assert "trained to step 40" in text
    assert page.row("eval/text/loss")[1:4] == ["5.4", "6.5000 (unigram baseline)", "40"]
    assert page.row("20")[:4] == ["20", "1.5 MB", "5.2", "best"]
    assert page.row("20")[4:8] == ["40", "1.5 MB", "5.4", "newest"]
    # What differs from the defaults comes first, with the default beside it.
    assert page.row("train.steps")[1:3] == ["40", "200"]
    assert page.cells.index("train.steps") < page.cells.index("train.seed")
    assert page.row("device kind")[1] == "abacus"
    assert page.row("last row")[1] == "2023-11-14 22:14:00 UTC"


def test_status_of_a_run_that_is_not_at_its_end(workdir, capsys):
    record = json.loads((workdir / "config.json").read_text())

    def status(**fields):
        for name, value in fields.items():
            group, _, field = name.partition("__")
            record[group][field] = value
        (workdir / "config.json").write_text(json.dumps(record))
        assert main(["report", "--workdir", str(workdir)]) == 0
        assert "report/index.html" in capsys.readouterr().out
        return (workdir / "report" / "index.html").read_text(encoding="utf-8")

    assert "at step 40 of 100: under way, or stopped" in status(train__steps=100)
    stopped = status(eval__patience=1)
    assert "stopped early at step 40 of 100: text/loss is no better than 5.2000" in stopped
    # A model of a package that is not imported has no defaults to compare with.
    assert "model.d_model" in status(model__name="unheard_of")


@pytest.mark.parametrize(
    ("prepare", "flags", "message"),
    [
        (None, ["--workdir", "{}/nowhere"], "nowhere: no run there (no config.json)"),
        ("empty", ["--workdir", "{}/run"], "metrics.jsonl: has no rows yet"),
        (None, [], "--workdir: name the folder of a run"),
        (None, ["--workdir", "{}/run", "--out", "{}/run"], "is a folder; name a file"),
        (None, ["--workdir", "{}/run", "--out", "{}/run/config.json"], "no report; name another"),
        (None, ["--workdir", "{}/run", "--out", "{}/run/config.json/x"], "cannot be written"),
    ],
)
def test_mistakes(workdir, tmp_path, capsys, prepare, flags, message):
    if prepare == "empty":
        (workdir / "metrics.jsonl").write_text("")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["report", *(flag.format(tmp_path) for flag in flags)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("moejax: error: ") and message in line
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_out_names_the_file_and_an_older_report_is_replaced(workdir, tmp_path):
    out = tmp_path / "deep" / "mine.html"
    for _ in range(2):
        assert main(["report", "--workdir", str(workdir), "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["mine.html"]
    assert not (workdir / "report").exists()


def test_ticks_are_round_and_inside():
    assert ticks(0, 1330, 6) == [0, 250, 500, 750, 1000, 1250]
    assert ticks(2.1, 8.9, 4) == [4, 6, 8]
    assert ticks(-0.03, 0.011, 4) == [-0.02, 0]
    labels = [tick_label(value) for value in (12500, 0.003, 2.0, 3e-5)]
    assert labels == ["12.5k", "0.003", "2", "3e-05"]
    assert tick_label(0.0005, percent=True) == "0.05%"


def test_long_lines_are_thinned_by_means():
    points = [(float(x), float(x % 2)) for x in range(3000)]
    shown = thin(points)
    assert len(shown) <= 300 and shown[-1] == points[-1]
    assert all(0.4 < y < 0.6 for _, y in shown[:-1])
    assert thin(points[:300]) == points[:300]


def test_a_chart_of_one_point_and_of_equal_values():
    """No division by an empty range; marks lie inside the picture."""
    text = line_chart("one", [Line("val", [(5, 2.0)], "red", dots=True)], [Level("base", 2.0)])
    (x,), (y,) = (re.findall(rf'<circle[^>]*c{axis}="([\d.]+)"', text) for axis in "xy")
    assert 46 < float(x) <= 390 and 10 <= float(y) <= 186
    assert "nan" not in line_chart("flat", [Line("train", [(1, 0.0), (2, 0.0)], "red")], zero=True)


def test_spread_keeps_both_ends():
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread([1, 2], 4) == [1, 2]
