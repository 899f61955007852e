"""Benchmarks: rows as documented, from implementations that agree; never how fast."""

import dataclasses
import json

import jax
import pytest

from moejax.analysis.bench import BENCHES, DIRECTIONS, SKEWS, bench, kernels
from moejax.analysis.bench.run import _check_agreement
from moejax.cli.main import main

KEYS = {
    "bench",
    "case",
    "skew",
    "direction",
    "implementation",
    "baseline",
    "ms_median",
    "ratio",
    "device",
    "versions",
}


@pytest.mark.parametrize("name", BENCHES)
def test_json_rows(name, capsys):
    assert main(["bench", name, "--json", "--cases", "tiny", "--repeats", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = BENCHES[name].implementations
    assert len(rows) == len(SKEWS) * len(DIRECTIONS) * len(names)
    assert {(r["skew"], r["direction"], r["implementation"]) for r in rows} == {
        (skew, direction, other) for skew in SKEWS for direction in DIRECTIONS for other in names
    }
    for row in rows:
        assert set(row) == KEYS
        assert row["bench"] == name and row["case"] == "tiny" and row["baseline"] == "dense_mlp"
        assert row["ms_median"] > 0 and row["ratio"] > 0
        if row["implementation"] == row["baseline"]:
            assert row["ratio"] == 1


def test_kernels_beside_a_dense_matmul(capsys):
    flags = ["--json", "--cases", "tiny", "--repeats", "1", "--implementations", "auto,ragged_dot"]
    assert main(["bench", "kernels", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["skew"], r["direction"], r["implementation"]) for r in rows} == {
        (skew, direction, other)
        for skew in kernels.SKEWS
        for direction in DIRECTIONS
        for other in ("dense_matmul", "auto", "ragged_dot")
    }
    assert all(set(row) == KEYS and row["baseline"] == "dense_matmul" for row in rows)


@pytest.mark.slow
def test_decoding_beside_a_dense_model(capsys):
    assert main(["bench", "decode", "--json", "--cases", "tiny", "--repeats", "1"]) == 0
    rows = {row["implementation"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["dense", "mod", "mor", "mor_sharing"]
    for name, row in rows.items():
        assert set(row) == KEYS | {"tokens", "ran", "flops_ratio"}
        assert (row["baseline"], row["direction"], row["tokens"]) == ("dense", "decode", 8)
        assert row["flops_ratio"] < 1 or name == "dense"
    # An eighth of 16 tokens; two thirds of the tokens, then one third.
    assert rows["mod"]["ran"] == pytest.approx(1 / 8, abs=0.05)
    assert rows["mor"]["ran"] == pytest.approx(1 / 2, abs=0.1)


@pytest.mark.parametrize("name", [*kernels.ROWS, *kernels.TOKENS, "router"])
def test_kernels_beside_a_copy(name):
    """A copy reads and writes each of its rows: together as many as the kernel has to move."""
    case = dataclasses.replace(kernels.CASES[name], small=(512, 64, 0))
    runs = kernels.programs(case, "zipf", "float32")["fwd"]
    assert list(runs) == ["copy", "auto"]
    copied, found = runs["copy"](), runs["auto"]()
    moved, shape = {
        # Of 1,024 choices of 512 tokens.
        "dispatch": (2 * 1024, (1024, 64)),
        "combine": (1024 + 512, (512, 64)),
        # Of 64 of 512 tokens; those are copied, for the operand stays as it is.
        "gather": (2 * 64, (8, 8, 64)),
        "scatter": (2 * 512 + 3 * 64, (8, 64, 64)),
        "router": (2 * 512, (512, 8)),
    }[name]
    assert copied.shape == (moved // 2, 64)
    assert jax.tree.leaves(found)[0].shape == shape


def test_groups_of_the_skews():
    case = kernels.CASES["E8"]
    for skew in kernels.SKEWS:
        sizes = kernels.group_sizes(case, skew)
        assert sizes.sum() == case.shape[0] and len(sizes) == 8
    assert list(kernels.group_sizes(case, "worst")) == [0] * 7 + [case.shape[0]]


def test_table_of_chosen_implementations(capsys):
    flags = ["--cases", "tiny", "--repeats", "1", "--implementations", "auto"]
    assert main(["bench", "moe_layer", *flags]) == 0
    out = capsys.readouterr().out
    assert "dense_mlp" in out and "auto" in out and "ragged_dot" not in out


def test_slow_implementations_are_named_and_left_out(monkeypatch):
    case = BENCHES["moe_layer"].cases["tiny"]
    slow = dataclasses.replace(case, slow=("ragged_dot",))
    monkeypatch.setitem(BENCHES["moe_layer"].cases, "tiny", slow)
    said = []
    rows = bench("moe_layer", cases=["tiny"], repeats=1, say=said.append)
    assert "ragged_dot" not in {row["implementation"] for row in rows}
    assert "without ragged_dot" in said[0]


def test_disagreement_is_an_error():
    programs = {
        (direction, name): (lambda value=value: [value])
        for direction in DIRECTIONS
        for name, value in (("dense_mlp", 5.0), ("auto", 1.0), ("ragged_dot", 1.1))
    }
    with pytest.raises(AssertionError, match="ragged_dot and auto differ by 1.0e-01"):
        _check_agreement(programs, "float32")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a NAME: moe_layer, untied_ffn"),
        (["moe_layers"], "did you mean 'moe_layer'"),
        (["moe_layer", "--cases", "Z"], "--cases 'Z'"),
        (["moe_layer", "--implementations", "dense"], "--implementations 'dense'"),
        (["moe_layer", "--repeats", "0"], "--repeats 0"),
        (["moe_layer", "--dtype", "int8"], "--dtype int8"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
