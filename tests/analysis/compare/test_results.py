"""What the rows of runs say, from metrics.jsonl files written by hand."""

import json
import math

import pytest

from moejax.analysis.compare.arms import arms_of, parse_budget
from moejax.analysis.compare.plan import make_plan
from moejax.analysis.compare.results import (
    ArmResult,
    evaluation_rows,
    final_rows,
    read_evaluations,
    summary_rows,
)
from moejax.analysis.compare.tables import HEAD, cells, final_cells, ratio_text

TINY = ["model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.ffn_hidden=(32,)"]


def make(schedule="constant", seeds=2):
    specs = arms_of("quickstart:dense,quickstart", [])
    budget = parse_budget("steps=8")
    return make_plan(
        specs, budget, seeds=seeds, evaluations=4, schedule=schedule, rates=(1e-3,), overrides=TINY
    )


def write(folder, losses, seconds=0.5):
    """One row for every second step, each with the losses of (text, image); None leaves one out."""
    folder.mkdir(parents=True)
    rows = []
    for i, pair in enumerate(losses):
        row = {"step": 2 * (i + 1), "wall_time": 0.0, "train/loss": 1.0}
        if seconds is not None:
            row["train/seconds_per_step"] = seconds
        rows.append(row)
        values = zip(("text", "image"), pair, strict=True)
        found = {f"eval/{name}/loss": loss for name, loss in values if loss is not None}
        found["eval/text/accuracy"] = i / 8
        rows.append({"step": 2 * (i + 1), "wall_time": 0.0, **found})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)


def result(plan, index, tmp_path, all_losses, **options):
    """The arm ``index`` whose seeds have those losses."""
    arm = plan.arms[index]
    runs = []
    for seed, losses in enumerate(all_losses):
        run = arm.run(1e-3, seed)
        write(tmp_path / run.folder, losses, **options)
        runs.append((run, read_evaluations(tmp_path / run.folder, run.config)))
    return ArmResult(arm, ((1e-3, 5.0),), 1e-3, tuple(runs))


FALLING = [(6.0, 5.0), (5.5, 4.5), (5.2, 4.2), (5.0, 4.0)]
BETTER = [(5.8, 5.1), (5.2, 4.6), (4.9, 4.3), (4.7, 4.1)]


def test_rows_and_cells(tmp_path):
    plan = make()
    baseline = result(plan, 0, tmp_path, [FALLING, [(a + 0.1, b + 0.1) for a, b in FALLING]])
    arm = result(plan, 1, tmp_path, [BETTER, [(a + 0.1, b + 0.1) for a, b in BETTER]])
    text, image = summary_rows([baseline, arm], plan.modalities)
    # 5.0 lies two thirds of the way (in the logarithm) from step 4 to step 6.
    expected = 4 * (6 / 4) ** (2 / 3) / 8
    assert text.ratio.mean == pytest.approx(expected) and text.ratio.censored == 0
    assert text.seconds.mean == pytest.approx(expected)
    assert (text.verdict, image.verdict) == ("better", "worse")
    assert image.ratio.censored == 2 and image.reverse.censored == 0
    document = image.document()
    assert document["ratio"] == pytest.approx(1.0)
    assert document["high"] is None and document["censored"] == 2
    assert len(cells(image)) == len(HEAD)
    assert ratio_text(image.ratio) == "> 1.00 (2 of 2 not reached)"
    rows = evaluation_rows([baseline, arm], plan.modalities)
    assert len(rows) == 2 * 2 * 2 * 4
    last = rows[-1]
    assert (last["step"], last["seconds"]) == (8, 4.0)
    assert last["loss"] == pytest.approx(4.2)
    assert last["flops"] == 8 * plan.arms[1].flops_per_step


def test_other_metrics_are_read_at_the_end(tmp_path):
    plan, losses = make(), [FALLING, FALLING[:3]]
    baseline = result(plan, 0, tmp_path, losses)
    arm = result(plan, 1, tmp_path, [BETTER, BETTER])
    rows = final_rows([baseline, arm], ["text/accuracy"])
    assert [row["value"] for row in rows] == [3 / 8, 2 / 8, 3 / 8, 3 / 8]
    assert [(row["arm"], row["seed"]) for row in rows][:3] == [
        ("quickstart:dense", 0),
        ("quickstart:dense", 1),
        ("quickstart", 0),
    ]
    own, other = final_cells([baseline, arm], ["text/accuracy"])
    # Two seeds: Student's t of one degree of freedom is 12.706, the paired differences 0 and 1/8.
    spread = 12.706 * 0.0625
    assert own[:2] == ("text/accuracy", "quickstart:dense") and own[3] == ""
    assert own[2] == f"0.3125 [{0.3125 - spread:.4f}, {0.3125 + spread:.4f}]"
    assert other[2] == "0.3750 [0.3750, 0.3750]"
    assert other[3] == f"+0.0625 [{0.0625 - spread:+.4f}, {0.0625 + spread:+.4f}]"


def test_losses_after_the_decay_do_not_count(tmp_path):
    """Of 8 steps the last fifth decays: the evaluation at step 8 stands in the table of all."""
    plan = make("wsd", seeds=1)
    found = result(plan, 0, tmp_path, [FALLING]).runs[0][1]
    assert found.stable == 3
    assert found.curve("text", 1.0).lowest == 5.2
    assert found.score == (5.2 + 4.2) / 2
    assert found.losses["text"][-1] == 5.0


def test_what_was_not_finite_is_infinite(tmp_path):
    plan = make()
    losses = [(6.0, None), (None, 4.5), (5.2, 4.2), (5.0, 4.0)]
    found = result(plan, 0, tmp_path, [losses]).runs[0][1]
    assert found.losses == {
        "text": (6.0, math.inf, 5.2, 5.0),
        "image": (math.inf, 4.5, 4.2, 4.0),
    }
    assert found.score == 4.5
    empty = [(None, None)] * 4
    write(tmp_path / "failed", empty)
    assert read_evaluations(tmp_path / "failed", plan.arms[0].config) is None


def test_a_time_that_is_not_known_is_left_out(tmp_path):
    plan = make()
    baseline = result(plan, 0, tmp_path, [FALLING, FALLING], seconds=None)
    arm = result(plan, 1, tmp_path, [BETTER, BETTER])
    row = summary_rows([baseline, arm], plan.modalities)[0]
    assert row.seconds is None and row.document()["seconds_ratio"] is None
    assert "not known" in cells(row)
    assert row.ratio.mean < 1
