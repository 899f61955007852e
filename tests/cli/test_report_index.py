"""``moejax report --index``: every run below a folder in one page, broken ones named."""

import json
from pathlib import Path
from urllib.parse import unquote

import pytest

from moejax.analysis.index_page import MOST_DRAWN
from moejax.cli.main import main
from moejax.config import load_config, to_dict

from .test_report import Page


class IndexPage(Page):
    """Also the links, address by text, and the rows of all tables."""

    def __init__(self, text):
        self.links, self.rows = {}, []
        super().__init__(text)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        super().handle_data(data)
        if self.open and self.open[-1] == "a" and not self.tags[-1][1]["href"].startswith("#"):
            self.links[data] = self.tags[-1][1]["href"]
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def table(self, title):
        """{first cell: {title of the column: cell}} of the first table that begins so."""
        start = next(i for i, row in enumerate(self.rows) if row[0] == title)
        head, *rows = self.rows[start:]
        ends = [i for i, row in enumerate(rows) if row[0] in ("run", "comparison")]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows[: (ends or [None])[0]]}


@pytest.fixture(scope="module")
def record():
    config = to_dict(load_config("quickstart", {"train.steps": 40}))
    return json.dumps({**config, "made_with": {"jax": "0.0.1"}})


def write_run(workdir, record, losses, *, steps=(20, 40), saved=(), wall_time=1.7e9, **fields):
    """A run whose evaluations have ``losses`` (at step 40), 1 more at step 20."""
    document = json.loads(record)
    for name, value in fields.items():
        group, _, field = name.partition("__")
        document[group][field] = value
    rows = []
    for step in steps:
        time = wall_time + 3 * step
        speed = {"train/tokens_per_second": 1000.0 + step}
        evaluated = {f"eval/{name}/loss": loss + 2 - step / 20 for name, loss in losses.items()}
        rows.append({"step": step, "wall_time": time, **speed})
        rows.append({"step": step, "wall_time": time, "eval/loss": 9.0, **evaluated})
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(document))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in saved:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)


@pytest.fixture
def runs(tmp_path, record):
    """Runs in several states, a comparison, and files of other programs."""
    runs = tmp_path / "runs"
    write_run(
        runs / "b" / "one",
        record,
        {"text": 5.0, "image": 6.0},
        saved=(20, 40),
        optim__learning_rate=0.003,
        train__seed=7,
        about__total_params=3_015_424,
        about__active_params=2_162_048,
    )
    write_run(
        runs / "b" / "two",
        record,
        {"text": 4.0, "speech": 3.0},
        saved=(20,),
        model__modalities=["text", "image", "speech"],
        about__total_params=0,
    )
    write_run(runs / "a: <b>", record, {}, about__name="<i>&amp;")
    compared = runs / "compare" / "runs" / "arm" / "rate=0.003,seed=0"
    write_run(compared, record, {"text": 5.5}, eval__patience=1, eval__best_metric="loss")
    for name in ("plan.json", "summary.json", "index.html"):
        (runs / "compare" / name).write_text("{}")
    for name in ("a: <b>", "b/one"):
        (runs / name / "report").mkdir()
        (runs / name / "report" / "index.html").write_text("a report")
    # What lies in a run belongs to it.
    write_run(runs / "b" / "one" / "samples" / "inner", record, {"text": 1.0})
    (runs / "tokenizer").mkdir()
    (runs / "tokenizer" / "config.json").write_text('{"model": "of another program"}')
    return runs


def index_of(runs, *flags):
    assert main(["report", "--index", str(runs), *flags]) == 0
    return IndexPage((runs / "index.html").read_text(encoding="utf-8"))


def test_a_row_for_each_run_in_the_order_of_the_paths(runs, capsys):
    page = index_of(runs, "--json")
    assert json.loads(capsys.readouterr().out) == {"path": str(runs / "index.html"), "runs": 4}
    table = page.table("run")
    compared = "compare/runs/arm/rate=0.003,seed=0"
    assert list(table) == ["a: <b>", "b/one", "b/two", compared]
    one = table["b/one"]
    assert one == {
        "run": "b/one",
        "config": "quickstart",
        "status": "done",
        "step": "40",
        "text loss": "5.0000",
        "image loss": "6.0000",
        "speech loss": "",
        "loss": "",
        "params (M)": "3.02",
        "active (M)": "2.16",
        "learning rate": "0.003",
        "seed": "7",
        "tokens a second": "1,030",
        "minutes": "1.0",
        "split": "val",
        "family": "mixture-of-transformers",
        "paper": "arXiv 2411.04996",
    }
    assert table["b/two"]["status"] == "step 40 of 40", "its last step is not saved"
    assert table["b/two"]["speech loss"] == "3.0000" and table["b/two"]["params (M)"] == ""
    assert table[compared]["status"] == "stopped early"
    # Where no modality has a loss of its own, that of all targets stands for them.
    assert table["a: <b>"]["loss"] == "9.0000" and table["a: <b>"]["text loss"] == ""


def test_charts_hold_the_losses_of_the_runs(runs):
    page = index_of(runs)
    text = {
        "b/one": [[20, 6.0], [40, 5.0]],
        "b/two": [[20, 5.0], [40, 4.0]],
        "compare/runs/arm/rate=0.003,seed=0": [[20, 6.5], [40, 5.5]],
    }
    assert page.lines("text") == text
    assert page.lines("speech") == {"b/two": [[20, 4.0], [40, 3.0]]}
    assert page.lines("all targets") == {"a: <b>": [[20, 9.0], [40, 9.0]]}
    colors = {
        chart: {line["name"]: line["color"] for line in page.charts[chart]["lines"]}
        for chart in ("text", "image")
    }
    assert colors["image"]["b/one"] == colors["text"]["b/one"] != colors["text"]["b/two"]


def test_the_newest_runs_are_drawn_where_there_are_too_many(tmp_path, record):
    for i in range(MOST_DRAWN + 2):
        # The later the name, the older the run.
        write_run(tmp_path / f"run{i:02}", record, {"text": 5.0}, wall_time=1.7e9 - 1000 * i)
    page = index_of(tmp_path)
    assert len(page.table("run")) == MOST_DRAWN + 2
    assert list(page.lines("text")) == [f"run{i:02}" for i in range(MOST_DRAWN)]
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"The {MOST_DRAWN} runs with the newest rows; 2 more are left out." in text


@pytest.mark.parametrize("out", ["index.html", "../elsewhere/all.html"])
def test_links_lead_to_the_files_from_where_the_page_lies(runs, out):
    path = runs / out
    assert main(["report", "--index", str(runs), "--out", str(path)]) == 0
    page = IndexPage(path.read_text(encoding="utf-8"))
    # b/two has no report, and the comparison's run neither.
    wanted = {
        "a: <b>": runs / "a: <b>" / "report" / "index.html",
        "b/one": runs / "b" / "one" / "report" / "index.html",
        "compare": runs / "compare" / "index.html",
    }
    found = {text: path.parent / unquote(address) for text, address in page.links.items()}
    assert {text: file.resolve() for text, file in found.items()} == wanted
    # A colour or a hash in a name begins neither a scheme nor a fragment.
    assert not any(set(":#?<") & set(address) for address in page.links.values())
    assert page.table("comparison")["compare"]["runs"] == "1"


def test_names_cannot_write_html(runs):
    page = index_of(runs)
    tags = [tag for tag, attributes in page.tags if not attributes]
    assert tags.count("b") == 1, "the status"
    assert "i" not in tags
    assert page.table("run")["a: <b>"]["config"] == "<i>&amp;"


def test_broken_runs_are_named_and_stop_nothing(runs, record, capsys):
    broken = {
        "cut": ("config.json", '{"model": ', "cut/config.json: cannot be read"),
        "empty": ("metrics.jsonl", "", "metrics.jsonl: has no rows yet"),
        "list": ("metrics.jsonl", "[]\n", "metrics.jsonl: line 1 is no row of a run"),
        "nan": ("metrics.jsonl", '{"step": 1, "eval/text/loss": NaN}\n', "line 1 is no row"),
        "noise": ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl: cannot be read"),
        "none": ("metrics.jsonl", None, "metrics.jsonl: has no rows yet"),
        "words": ("metrics.jsonl", '{"step": 1, "eval/text/loss": "low"}\n', "line 1 is no row"),
    }
    for name, (file, content, _) in broken.items():
        write_run(runs / name, record, {"text": 5.0})
        if content is None:
            (runs / name / file).unlink()
        else:
            content = content if isinstance(content, bytes) else content.encode()
            (runs / name / file).write_bytes(content)
    page = index_of(runs)
    assert "11 runs below" in capsys.readouterr().out
    assert len(page.table("run")) == 4
    faults = page.rows[[row[1] for row in page.rows].index("what is wrong") + 1 :]
    assert [name for name, _ in faults] == list(broken)
    for (name, fault), (_, _, wanted) in zip(faults, broken.values(), strict=True):
        assert wanted in fault, name


def test_only_a_page_of_its_own_kind_is_replaced(runs, capsys):
    first = index_of(runs).cells
    assert index_of(runs).cells == first
    page = (runs / "index.html").read_bytes()
    # The report of a run, or of a comparison, is no index either.
    assert main(["report", "--workdir", str(runs / "b/two")]) == 0
    report = runs / "b" / "two" / "report" / "index.html"
    foreign = runs / "compare" / "index.html"
    for path in (report, foreign):
        before = path.read_bytes()
        assert main(["report", "--index", str(runs), "--out", str(path)]) == 2
        assert path.read_bytes() == before
    assert main(["report", "--index", str(runs / "compare")]) == 2
    assert main(["report", "--workdir", str(runs / "b/two"), "--out", f"{runs}/index.html"]) == 2
    assert (runs / "index.html").read_bytes() == page
    *indices, other = capsys.readouterr().err.strip().splitlines()
    assert all("is there already and no index; name another file" in line for line in indices)
    assert len(indices) == 3 and "is there already and no report" in other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--index", "{}/nowhere"], "--index {}/nowhere: no such folder; name a folder with runs"),
        (["--index", "{}/b/one/config.json"], "config.json: is a file; name a folder with runs"),
        (["--index", "{}/tokenizer"], "--index {}/tokenizer: no run below it"),
        (["--index", "{}", "--workdir", "{}/b/one"], "--index: lists all the runs below a folder"),
        (["--index", "{}", "--out", "{}/b"], "--out {}/b: is a folder; name a file"),
    ],
)
def test_mistakes(runs, capsys, flags, message):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert main(["report", *(flag.format(runs) for flag in flags)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("moejax: error: ") and message.format(runs) in line
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*")}


def test_a_run_itself_can_be_named(runs, monkeypatch):
    monkeypatch.chdir(runs / "b" / "one")
    assert main(["report", "--index", "."]) == 0
    assert IndexPage(Path("index.html").read_text(encoding="utf-8")).links == {
        ".": "report/index.html"
    }
