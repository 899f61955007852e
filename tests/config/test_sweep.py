"""Points of a sweep: combinators, the form of the command line, names, and what is refused."""

import pytest

from moejax.config import sweep as hyper
from moejax.config.sweep import parse_sweep, plan_sweep, point_names
from moejax.errors import UserError

RATES = hyper.sweep("config.optim.learning_rate", [1e-3, 3e-3])
SEEDS = hyper.sweep("train.seed", range(2))


def test_combinators():
    assert RATES == [{"optim.learning_rate": 1e-3}, {"optim.learning_rate": 3e-3}]
    assert hyper.product(RATES, SEEDS) == [
        {"optim.learning_rate": 1e-3, "train.seed": 0},
        {"optim.learning_rate": 1e-3, "train.seed": 1},
        {"optim.learning_rate": 3e-3, "train.seed": 0},
        {"optim.learning_rate": 3e-3, "train.seed": 1},
    ]
    assert hyper.zip_(RATES, SEEDS) == [
        {"optim.learning_rate": 1e-3, "train.seed": 0},
        {"optim.learning_rate": 3e-3, "train.seed": 1},
    ]
    assert hyper.chain(RATES, SEEDS) == [*RATES, *SEEDS]
    # No part: one point that changes nothing.
    assert hyper.product() == [{}]


def test_combinators_refuse_what_means_nothing():
    with pytest.raises(UserError, match="train.seed is swept twice"):
        hyper.product(SEEDS, RATES, SEEDS)
    with pytest.raises(UserError, match="zip_ takes parts of equal length, got 2, 3 points"):
        hyper.zip_(RATES, hyper.sweep("train.seed", range(3)))


@pytest.mark.parametrize(
    ("text", "field", "values"),
    [
        ("train.seed=0,1", "train.seed", ["0", "1"]),
        ("config.train.seed = 0 , 1", "train.seed", ["0", "1"]),
        ("model.ffn_hidden=(32,64),128", "model.ffn_hidden", ["(32,64)", "128"]),
        ("model.ffn_hidden=[32,64],(1,2),8", "model.ffn_hidden", ["[32,64]", "(1,2)", "8"]),
        ("data.source=folder:a=b", "data.source", ["folder:a=b"]),
    ],
)
def test_the_form_of_the_command_line(text, field, values):
    assert parse_sweep(text) == hyper.sweep(field, values)


@pytest.mark.parametrize("text", ["train.seed", "train.seed=", "train.seed=1,", "=1,2"])
def test_another_form_is_refused(text):
    with pytest.raises(UserError, match="write --sweep FIELD=VALUE,VALUE"):
        parse_sweep(text)


def test_points_are_loaded_and_named_by_the_values_of_the_config():
    points = hyper.product(parse_sweep("optim.learning_rate=1e-3,3e-3"), SEEDS)
    plan = plan_sweep("quickstart", points, ["train.steps=7"])
    assert [point.name for point in plan] == [
        "learning_rate=0.001,seed=0",
        "learning_rate=0.001,seed=1",
        "learning_rate=0.003,seed=0",
        "learning_rate=0.003,seed=1",
    ]
    assert plan[3].overrides == ("optim.learning_rate=3e-3", "train.seed=1")
    assert plan[3].fields == {"optim.learning_rate": 3e-3, "train.seed": 1}
    config = plan[3].config
    assert (config.optim.learning_rate, config.train.seed, config.train.steps) == (3e-3, 1, 7)


def test_a_tuple_and_a_text_reach_the_config():
    plan = plan_sweep(
        "quickstart",
        hyper.chain(
            hyper.sweep("model.block_pattern", [("untied", "dense")]),
            hyper.sweep("model.first_blocks", [("dense",)]),
            parse_sweep("data.languages=('en','de')"),
            [{}],
        ),
    )
    assert plan[0].config.model.block_pattern == ("untied", "dense")
    assert plan[1].config.model.first_blocks == ("dense",)
    assert plan[2].config.data.languages == ("en", "de")
    assert [point.name for point in plan] == [
        "block_pattern=untied-dense",
        "first_blocks=dense",
        "languages=en-de",
        "base",
    ]


def test_names_are_safe_different_and_short():
    sources = ["folder:a/b", "folder:a_b", "folder:A_B", "folder:c"]
    names = point_names(hyper.sweep("data.source", sources))
    assert names[3] == "source=folder_c"
    # Equal after what a file name may hold, or on a file system that does not tell case.
    assert len({name.casefold() for name in names}) == 4
    assert all(name.startswith("source=folder_") for name in names)
    # The same last word twice: the whole field.
    both = hyper.product(hyper.sweep("train.seed", [0]), hyper.sweep("data.seed", [1]))
    assert point_names(both) == ["train.seed=0,data.seed=1"]
    long = point_names(hyper.sweep("data.source", ["folder:" + "x" * 300, "folder:" + "x" * 301]))
    assert len(set(long)) == 2 and max(map(len, long)) <= 120


@pytest.mark.parametrize(
    ("points", "overrides", "message"),
    [
        ([], [], "--sweep: no points"),
        ([{"train.stepz": 1}], [], r"point 1 \(train.stepz=1\): .*did you mean 'steps'"),
        ([*SEEDS, {"train.seed": -1}], [], r"point 3 \(train.seed=-1\): train.seed: must not"),
        (SEEDS, ["train.seed=3"], "train.seed is set by --config.train.seed too"),
        # 1e-3 and 0.001 are one value.
        (parse_sweep("optim.learning_rate=1e-3,0.001"), [], "2 points are the same"),
    ],
)
def test_every_point_is_checked(points, overrides, message):
    with pytest.raises(UserError, match=message):
        plan_sweep("quickstart", points, overrides)


def test_get_hyper_of_a_config_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from moejax.config import default_config\n"
        "def get_config(arg=''):\n"
        "    return default_config()\n"
        "def get_hyper(hyper):\n"
        "    rates = hyper.sweep('optim.learning_rate', [1e-3, 3e-3])\n"
        "    return hyper.product(rates, hyper.sweep('train.seed', range(3)))\n"
    )
    points = hyper.hyper_points(str(file))
    assert len(points) == 6 and points[1] == {"optim.learning_rate": 1e-3, "train.seed": 1}
    with pytest.raises(UserError, match=r"quickstart.py defines no get_hyper\(hyper\)"):
        hyper.hyper_points("quickstart")
