"""Counts of choices against hand-made ones; records; heat maps."""

import json
import math
import re
from html import unescape

import numpy as np
import pytest

from moejax.analysis.heatmaps import expert_color, heatmap, ink, shade
from moejax.analysis.routing import (
    NONE,
    LayerCounts,
    PairCounts,
    agreement,
    by_weight,
    co_activation,
    drops_by_position,
    entropy,
    one_hot,
    overlap,
    shuffled_within,
    together,
)
from moejax.analysis.routing_record import RoutingRecord, consecutive_agreement, read_records
from moejax.config.schema import DecoderConfig
from moejax.nn.stack import segments_of
from moejax.train.routing_log import RoutingLayer, routing_layers
from moejax.train.writers import save_arrays

from .routing_records import make_record


def test_choices_stand_in_the_order_of_their_weights():
    ids = np.array([[0, 2, 4], [3, 1, 4], [4, 4, 4]])
    weights = np.array([[0.2, 0.7, 0.0], [0.5, 0.4, 0.0], [0.0, 0.0, 0.0]])
    expected = [[2, 0, NONE], [3, 1, NONE], [NONE, NONE, NONE]]
    assert by_weight(ids, weights, 4).tolist() == expected
    # A weight may be 0, or less, and the choice a choice.
    assert by_weight(np.array([[4, 1]]), np.array([[0.0, -1.0]]), 4).tolist() == [[1, NONE]]


def test_entropies_given_a_key():
    """Id 5: experts 0 and 1 once each, log 2. Id 9: expert 1 twice, 0. Given nothing: 1/4, 3/4."""
    counts = PairCounts(3)
    counts.add(np.array([9, 5]), one_hot(np.array([[1], [0]]), 3))
    counts.add(np.array([5, 9]), one_hot(np.array([[1], [1]]), 3))
    marginal, given = counts.entropies()
    assert marginal == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert given == pytest.approx(0.5 * math.log(2))
    assert counts.keys.tolist() == [5, 9]
    assert counts.counts.tolist() == [[1, 1, 0], [0, 2, 0]]


def test_a_token_with_two_experts_counts_twice():
    counts = PairCounts(2)
    counts.add(np.array([1, 2]), one_hot(np.array([[0, 1], [1, NONE]]), 2))
    marginal, given = counts.entropies()
    assert marginal == pytest.approx(-(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3)
    assert given == pytest.approx(2 / 3 * math.log(2))
    assert all(math.isnan(value) for value in PairCounts(2).entropies())


def test_entropy_of_counts():
    np.testing.assert_allclose(entropy(np.array([[2, 2], [3, 0], [0, 0]])), [math.log(2), 0, 0])


def test_shuffling_stays_within_groups():
    values, groups = np.arange(200), np.arange(200) % 2
    dealt = shuffled_within(values, groups, np.random.default_rng(0))
    assert (dealt % 2 == groups).all() and sorted(dealt) == values.tolist()
    assert (dealt != values).mean() > 0.9 and values.tolist() == list(range(200))


def test_co_activation():
    """Expert 0 has three tokens, one of them with 1 and two with 2; 3 has none."""
    ids = np.array([[0, 1], [0, 2], [2, 0], [1, NONE]])
    counts = together(one_hot(ids, 4))
    assert counts.tolist() == [[3, 1, 2, 0], [1, 2, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]]
    nan = math.nan
    np.testing.assert_allclose(
        co_activation(counts),
        [[nan, 1 / 3, 2 / 3, 0], [1 / 2, nan, 0, 0], [1, 0, nan, 0], [nan] * 4],
    )


def test_drops_by_tenth_of_a_row():
    """20 places, two in a tenth. Dropped: one choice at place 3, both of place 19; padding not."""
    chosen = np.zeros((2, 20, 2), int) + np.array([0, 1])
    kept = chosen.copy()
    kept[0, 3, 1] = NONE
    kept[1, 19] = NONE
    kept[0, 10] = NONE
    valid = np.ones((2, 20), bool)
    valid[0, 10:12] = False
    dropped, choices = drops_by_position(chosen, kept, valid)
    assert dropped.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert choices.tolist() == [8, 8, 8, 8, 8, 4, 8, 8, 8, 8]


def test_agreement_and_overlap():
    first = np.array([[0, 1], [2, 3], [1, NONE], [NONE, NONE], [3, NONE]])
    second = np.array([[0, 2], [3, 2], [1, 0], [NONE, NONE], [NONE, NONE]])
    # First choices of tokens that have one in both: same, other, same.
    assert agreement(first, second) == pytest.approx(2 / 3)
    # 1 of 2, 2 of 2, 1 of 2, no experts at all, 0 of 1.
    assert overlap(first, second) == pytest.approx((0.5 + 1 + 0.5 + 0) / 4)
    none = np.full((2, 1), NONE)
    assert math.isnan(agreement(none, none)) and math.isnan(overlap(none, none))


def test_layer_counts_leave_padding_out():
    counts = LayerCounts(3, 2)
    chosen = np.array([[[0, 1], [2, 1], [0, 1]]])
    kept = np.array([[[0, NONE], [2, 1], [0, NONE]]])
    valid = np.array([[True, True, False]])
    modality = np.array([[0, 1, 1]])
    for _ in range(2):
        counts.add(chosen, kept, valid, np.array([[7, 8, 9]]), np.array([8, 7]), modality)
    assert counts.chosen.tolist() == [[2, 2, 0], [0, 2, 2]]
    assert counts.kept.tolist() == [[2, 0, 0], [0, 2, 2]]
    assert np.diagonal(counts.together).tolist() == [2, 4, 2]
    assert (counts.dropped.sum(), counts.choices.sum()) == (2, 8)
    assert counts.by_token.keys.tolist() == [7, 8]
    assert counts.by_token.entropies()[1] == pytest.approx(math.log(2))


def test_layers_of_a_model_in_the_order_of_the_depth():
    """untied, then (moe, untied, moe) twice: layers 1, 3, 4, 6; each runs its experts twice."""
    config = DecoderConfig(
        num_layers=7, first_blocks=("untied",), block_pattern=("moe", "untied", "moe")
    )
    assert len(segments_of(config)) == 2
    name = "segment_1/block_{}/moe/router{}".format
    depths = {name(block, run): 2 for block in (0, 2) for run in ("", "_1")}
    found = routing_layers(config, depths)
    assert [(layer.layer, layer.iteration) for layer in found] == [
        (layer, run) for layer in (1, 3, 4, 6) for run in (0, 1)
    ]
    assert found[0] == RoutingLayer(1, 0, name(0, ""), 0)
    assert found[-1] == RoutingLayer(6, 1, name(2, "_1"), 1)
    assert routing_layers(config, {"mine": 2}) == [
        RoutingLayer(0, 0, "mine", 0),
        RoutingLayer(1, 0, "mine", 1),
    ]


def test_record_from_files(tmp_path):
    """Of eval.split, else of the split with the most; what cannot be read is left out."""
    first, second = make_record(seed=0), make_record(seed=1)
    save_arrays(tmp_path, 10, {"val/routing": first.arrays()})
    save_arrays(tmp_path, 20, {"val/routing": second.arrays(), "test/routing": second.arrays()})
    folder = tmp_path / "arrays" / "step_20"
    assert sorted(path.name for path in folder.iterdir()) == [
        "test_routing.npz",
        "val_routing.npz",
    ]
    records = read_records(tmp_path, "val")
    assert list(records) == [10, 20]
    for name, value in first.arrays().items():
        np.testing.assert_array_equal(getattr(records[10], name), value)
    assert list(read_records(tmp_path, "test")) == [20]
    assert list(read_records(tmp_path, "train")) == [10, 20]
    (tmp_path / "arrays" / "step_20" / "val_routing.npz").write_bytes(b"PK no archive")
    np.savez(tmp_path / "arrays" / "step_10" / "val_routing.npz", layers=np.arange(2))
    assert read_records(tmp_path, "val").keys() == {20}, "test is what is left"
    assert read_records(tmp_path / "nowhere", "val") == {}


def test_record_names_shares_and_agreement():
    record = make_record(seed=0)
    assert record.layer_names == ["layer 1", "layer 3"]
    assert record.expert_names() == ["0", "1", "2", "zero 0"]
    assert record.expert_name(0, 3) == "zero 0" and record.expert_name(0, NONE) == "none"
    np.testing.assert_allclose(record.load().sum(axis=1), 1)
    np.testing.assert_allclose(record.load(1), record.chosen[:, 1] / 40)
    same = record.agreement(record)
    assert same is not None and same.tolist() == [1, 1]
    other = make_record(seed=1)
    valid = record.row_valid
    expected = [
        np.mean(record.row_experts[i][valid][:, 0] == other.row_experts[i][valid][:, 0])
        for i in range(2)
    ]
    names, values = consecutive_agreement({10: record, 30: other})
    assert names == ["10 to 30"]
    np.testing.assert_allclose(values[:, 0], expected)
    moved = RoutingRecord(**{**other.arrays(), "row_tokens": other.row_tokens + 1})
    assert record.agreement(moved) is None
    assert consecutive_agreement({10: record, 30: moved})[0] == []


def test_layers_with_fewer_experts_have_none_at_the_end():
    record = make_record(seed=0)
    arrays = {**record.arrays(), "experts": np.array([4, 3]), "num_ffn": np.array([3, 2])}
    record = RoutingRecord(**arrays)
    assert np.isnan(record.load()[1, 3]) and np.isfinite(record.load()[0]).all()
    assert record.expert_names() == ["0", "1", "2", "3"], "names that do not fit every layer"
    # Expert 2 gives nothing in the second layer, and has the colour of that in the first.
    assert record.expert_name(1, 2) == "zero 0"
    assert [record.color_index(1, e) for e in (NONE, 1, 2)] == [NONE, 1, 3]
    assert record.color_index(0, 3) == 3


def test_heatmap_holds_its_values_and_its_scale():
    values = np.array([[0.0, 0.5], [1.0, math.nan]])
    text = heatmap("a < b", values, ["x", "y"], ["u", "v"], columns_title="step")
    data = json.loads(unescape(re.search(r'data-map="([^"]*)"', text)[1]))
    assert data["values"] == [[0, 0.5], [1, None]]
    assert (data["rows"], data["columns"], data["percent"]) == (["x", "y"], ["u", "v"], True)
    assert "a &lt; b" in text and "100%" in text
    # Four cells in four shades, each of half the width.
    left, _, width, height = data["box"]
    cells = re.findall(r'<path [^>]*fill="(#\w+)" d="M([\d.]+) [\d.]+h([\d.]+)v([\d.]+)', text)
    assert len({color for color, *_ in cells}) == 4
    assert {float(w) for _, _, w, _ in cells} == {width / 2}
    assert {float(h) for *_, h in cells} == {height / 2}
    assert "nan" not in heatmap("none", np.full((1, 1), math.nan), ["x"], ["u"])


def test_colours():
    assert shade(0) == (255, 255, 255) and shade(2) == shade(1) and shade(math.nan) != shade(0)
    brightness = [sum(shade(i / 20)) for i in range(21)]
    assert brightness == sorted(brightness, reverse=True)
    assert len({expert_color(i) for i in range(16)}) == 16
    assert len({expert_color(i) for i in range(64)}) == 64
    assert {ink(expert_color(i)) for i in range(16)} == {"#000", "#fff"}
