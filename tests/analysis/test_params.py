"""Parameter counts and bytes against hand counts, on meshes whose devices do not exist."""

import pytest

from moejax.analysis.params import SHARED, abstract_mesh, param_table
from moejax.api import build
from moejax.config import load_config
from moejax.errors import UserError

TINY = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.ffn_hidden": (32,),
    "model.vocab_size": 40,
    "data.batch_size": 32,
    "mesh.data": 1,
}
LAYER = 16 * 48 + 16 * 16 + 3 * 16 * 32 + 2 * 16 + 2 * 8
OUTSIDE = 2 * 40 * 16


def table(name, overrides):
    config = load_config(name, {**TINY, **overrides})
    return param_table(build(config)[0], config)


def test_dense_counts():
    got = table("chameleon", {})
    assert got.total == got.active == OUTSIDE + 2 * LAYER + 16
    assert got.per_modality == {SHARED: got.total, "text": 0, "image": 0}
    assert got.bytes_per_device == 4 * got.total
    # AdamW: two moments, and its count and the schedule's.
    assert 12 * got.total <= got.state_bytes_per_device <= 12 * got.total + 16
    assert sum(row.size for row in got.rows) == got.total


def test_each_tower_counts_for_its_modality():
    got = table("mot", {"model.modalities": ("text", "image", "speech")})
    tower = 2 * LAYER + 16
    assert got.per_modality == {
        SHARED: OUTSIDE,
        **dict.fromkeys(("text", "image", "speech"), tower),
    }
    assert got.total == OUTSIDE + 3 * tower
    assert got.active == OUTSIDE + tower


def test_active_is_that_of_the_widest_tower():
    got = table("mot", {"model.ffn_hidden": (32, 64)})
    text = 2 * LAYER + 16
    image = text + 2 * 3 * 16 * 32
    assert got.per_modality == {SHARED: OUTSIDE, "text": text, "image": image}
    assert got.active == OUTSIDE + image


def test_bytes_on_a_mesh_that_is_not_there():
    one, sixteen = table("mot", {}), table("mot", {"mesh.fsdp": 16})
    assert sixteen.mesh["fsdp"] == 16
    split = sum(row.size for row in sixteen.rows if "fsdp" in row.spec)
    assert sixteen.bytes_per_device == 4 * (split // 16 + one.total - split)
    # Only the norms over a head, which have no axis of the model's width, stay whole.
    whole = [row.name for row in sixteen.rows if "fsdp" not in row.spec]
    assert {name.split("/")[-2] for name in whole} == {"q_norm", "k_norm"}


def test_average_is_part_of_the_state():
    plain, average = table("mot", {}), table("mot", {"optim.ema_decay": 0.9})
    assert average.state_bytes_per_device - plain.state_bytes_per_device == 4 * plain.total


def test_large_parameters_left_whole_are_named(monkeypatch):
    from moejax import axes
    from moejax.parallel import rules

    assert table("mot", {"mesh.fsdp": 4, "model.vocab_size": 40_000}).large_replicated() == []
    monkeypatch.setitem(rules.RULES, axes.EMBED, None)
    got = table("mot", {"mesh.fsdp": 4, "model.vocab_size": 40_000})
    assert got.large_replicated() == ["embedding_vd", "head_dv"]
    # On one device nothing can be split.
    assert table("mot", {"model.vocab_size": 40_000}).large_replicated() == []


def test_mesh_fills_with_the_devices_at_hand():
    config = load_config("mot", {**TINY, "mesh.data": -1, "mesh.fsdp": 2})
    assert dict(abstract_mesh(config).shape)["data"] == 4
    with pytest.raises(UserError, match="d_model"):
        table("mot", {"mesh.fsdp": 32})
