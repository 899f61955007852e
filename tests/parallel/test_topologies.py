"""Topologies by name, and what is known of their chips."""

import pytest

from moejax.errors import UserError
from moejax.parallel.topologies import (
    CHIPS,
    PRESETS,
    data_sheet_peak,
    parse_topology,
)


@pytest.mark.parametrize(
    "text, name, devices",
    [
        ("cpu1", "cpu:1", 1),
        ("cpu8", "cpu:8", 8),
        ("cpu:8", "cpu:8", 8),
        ("h200x8", "h200:8", 8),
        ("h100:16", "h100:16", 16),
        ("v5e_4x4", "v5e:4x4", 16),
        ("v5p_4x4x8", "v5p:4x4x8", 128),
        ("v5p:4x4x8", "v5p:4x4x8", 128),
        ("v6e_16x16", "v6e:16x16", 256),
    ],
)
def test_names(text, name, devices):
    topology = parse_topology(text)
    assert (topology.name, topology.num_devices) == (name, devices)
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5q:4x4x8", "no chip 'v5q'; did you mean 'v5p'"),
        ("v5p", "write CHIP:SHAPE"),
        ("cpu", "did you mean 'cpu8'"),
        ("", "write CHIP:SHAPE"),
        ("v5p:4x8", "the shape of v5p is 3 number(s), such as v5p_4x4x8"),
        ("v6e:16", "the shape of v6e is 2 number(s), such as v6e_16x16"),
        ("h100:2x8", "the shape of h100 is 1 number(s), such as h100:8"),
        ("cpu0", "the shape of cpu is 1 number(s), such as cpu1"),
        ("v5e:3x4", "a host has 2x2 chips"),
        ("v5p:4x3x4", "a host has 2x2 chips"),
        ("h200:12", "a multiple of 8"),
    ],
)
def test_mistakes_name_the_flag_and_the_mend(text, message):
    with pytest.raises(UserError) as raised:
        parse_topology(text, "--mesh")
    assert str(raised.value).startswith(f"--mesh {text}: ")
    assert message in str(raised.value)


def test_every_preset_is_a_topology_and_every_chip_of_an_accelerator_has_a_peak():
    assert {parse_topology(preset).chip.name for preset in PRESETS} <= set(CHIPS)
    for chip in CHIPS.values():
        assert (data_sheet_peak(chip.device_kind) is None) == (chip.platform == "cpu")
    # The longest name that fits: a "TPU v5 lite" is no "TPU v5".
    assert data_sheet_peak("TPU v5 lite") == 197e12 and data_sheet_peak("TPU v5") == 459e12
    assert parse_topology("v5e:4x4").peak_flops == 16 * 197e12


def test_simulated_devices_share_the_memory_of_the_machine():
    assert parse_topology("cpu8").memory == parse_topology("cpu1").memory // 8 > 1 << 24


def test_gpus_of_a_host():
    shape = lambda text: parse_topology(text).description()[1]["topology"]
    assert shape("h200:4") == "1x1x4"
    assert shape("h200:8") == "1x1x8"
    assert shape("h100:16") == "1x2x8"
    target_of = lambda text: parse_topology(text).description()[1]["target_config"]
    targets = {"h100": target_of("h100:8"), "h200": target_of("h200:8")}
    for chip, target in targets.items():
        assert f"device_memory_size: {CHIPS[chip].memory}\n" in target
        assert f'device_description_str: "{CHIPS[chip].device_kind}"' in target
    assert "memory_bandwidth: 4800000000000" in targets["h200"]
