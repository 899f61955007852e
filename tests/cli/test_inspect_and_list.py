"""``moejax inspect`` and ``moejax list``: their JSON and their tables."""

import json

import pytest

from moejax.cli import main as cli
from moejax.cli.list import KINDS


def output(capsys, *argv) -> str:
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def test_inspect_json(capsys):
    got = json.loads(output(capsys, "inspect", "--config", "mot:7b", "--json"))
    assert got["total_params"] == 13_489_430_528
    assert got["active_params"] == 7_013_150_720
    assert sum(got["params_per_modality"].values()) == got["total_params"]
    # 2 FLOPs for each active parameter but the embedding, and attention over 4,096 tokens.
    matmuls = 2 * (got["active_params"] - 65_536 * 4096)
    expected = matmuls + 32 * 4 * 4096 * 4096
    assert got["flops_per_token"] == pytest.approx(expected, rel=1e-3)
    assert got["counted_flops_per_token"] == pytest.approx(got["flops_per_token"], rel=1e-6)
    assert got["training_flops_per_token"] == 3 * got["flops_per_token"]
    assert got["visited_flops_per_token"] >= got["counted_flops_per_token"]
    assert got["specs"]["embedding_vd"] == ["tensor", "fsdp"]
    devices = got["mesh"]["fsdp"]
    assert got["bytes_per_device"] == pytest.approx(4 * got["total_params"] / devices, rel=1e-3)
    assert got["warnings"] == []
    # 32 layers of 32 heads of 128, keys and values, two bytes each; 4,096 slots.
    assert got["decode"]["cache_bytes"] == 32 * 2 * 4096 * 2 * 4096
    assert got["decode"]["weight_bytes"] == 2 * got["active_params"]
    assert got["decode"]["flops"] == got["flops_per_token"]


def test_inspect_of_a_diffusion_transformer(capsys):
    """DiT-MoE's largest: 16.5B parameters, of which a patch meets 3.18B."""
    got = json.loads(output(capsys, "inspect", "--config", "dit_moe:g_16e2a", "--json"))
    assert got["total_params"] == 16_503_108_880
    assert got["active_params"] == 3_180_950_800


def test_inspect_table(capsys):
    text = output(capsys, "inspect", "--config", "mot", "--config.mesh.data=1")
    assert "3,408,640 total, 2,358,656 active for one token" in text
    assert "shared 1.31M, text 1.05M, image 1.05M" in text
    assert "stack/segment_0/block_0/ffn/wi_mdf" in text


def test_inspect_warns_of_large_parameters_left_whole(capsys, monkeypatch):
    from moejax import axes
    from moejax.parallel import rules

    monkeypatch.setitem(rules.RULES, axes.EMBED, None)
    argv = ["inspect", "--config", "mot", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--json"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert any("embedding_vd" in warning for warning in json.loads(out)["warnings"])
    assert "moejax: warning: embedding_vd: more than 1 MiB" in err


def test_inspect_on_devices_that_are_not_here(capsys):
    argv = ("inspect", "--config", "mot:7b", "--mesh", "v5p_4x4x8")
    got = json.loads(output(capsys, *argv, "--config.mesh.data=4", "--json"))
    assert got["topology"] == "v5p:4x4x8"
    # mesh.fsdp is -1 in the config.
    assert (got["mesh"]["data"], got["mesh"]["fsdp"]) == (4, 32)
    assert got["bytes_per_device"] == pytest.approx(4 * got["total_params"] / 32, rel=1e-3)
    # AdamW keeps two numbers for each parameter.
    assert got["state_bytes_per_device"] == pytest.approx(3 * got["bytes_per_device"], rel=1e-3)
    assert got["hbm_bytes_per_device"] > 95 << 30
    text = output(capsys, *argv)
    assert "(mesh fsdp=128)" in text
    assert "v5p:4x4x8 has 95.7 GiB each" in text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mesh", "v5q_4x4x8"], "--mesh v5q_4x4x8: no chip 'v5q'"),
        (
            ["--mesh", "cpu8", "--config.mesh.data=3", "--config.mesh.fsdp=-1"],
            "mesh.fsdp=-1: the other axes need 3 devices, which does not divide the 8",
        ),
    ],
)
def test_inspect_of_a_mesh_that_cannot_be(flags, message, capsys):
    assert cli.main(["inspect", "--config", "mot", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_list_configs_json(capsys):
    rows = json.loads(output(capsys, "list", "configs", "--json"))
    by_name = {(row["name"], row["arg"]): row for row in rows}
    assert len(by_name) == len(rows)
    row = by_name["mot", "7b"]
    assert row["total_params"] == 13_489_430_528
    assert row["active_params"] == 7_013_150_720
    assert "data.batch_size" in row["approximate"]
    keys = {"name", "arg", "paper", "family", "total_params", "active_params", "approximate"}
    assert set(row) == keys
    assert ("quickstart", "dense") in by_name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("models", "decoder"),
        ("blocks", "untied"),
        ("objectives", "next_token"),
        ("sources", "folder"),
        ("optimizers", "adamw"),
        ("evaluators", "routing"),
        ("samplers", "heun"),
        ("routers", "top_k"),
        ("scores", "linear"),
        ("losses", "switch"),
    ],
)
def test_list_registries(capsys, kind, name):
    assert name in [row["name"] for row in json.loads(output(capsys, "list", kind, "--json"))]
    assert f"  {name}" in output(capsys, "list", kind)


def test_list_routers_with_their_options(capsys):
    rows = {row["name"]: row for row in json.loads(output(capsys, "list", "routers", "--json"))}
    assert rows["top_k"]["options"]["normalise"] == "softmax"
    assert rows["top_k"]["options"]["top_k"] == 2
    text = output(capsys, "list", "routers")
    assert text.startswith("routers (model.moe.router.name):\n")
    assert "top_k=2, normalise='softmax', normalise_first=True" in text
    assert max(map(len, text.splitlines())) <= 120
    losses = {row["name"]: row for row in json.loads(output(capsys, "list", "losses", "--json"))}
    assert losses["switch"]["options"] == {"per": "batch"} and losses["switch"]["summary"]


def test_list_everything(capsys):
    assert set(json.loads(output(capsys, "list", "--json"))) == set(KINDS)
    text = output(capsys, "list")
    assert "mot:7b" in text
    assert "13,489,430,528 parameters, 7,013,150,720 active" in text


def test_list_unknown_kind(capsys):
    assert cli.main(["list", "block"]) == 2
    assert "did you mean 'blocks'?" in capsys.readouterr().err
