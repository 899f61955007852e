"""Which slices and numbers of GPUs there are, and on how many hosts."""

import pytest

from moejax.errors import UserError
from moejax.parallel.machines import parse_machines


@pytest.mark.parametrize(
    ("text", "chips", "hosts"),
    [
        ("v5p:4x4x8", 128, 32),
        ("v5p:2x2x1", 4, 1),
        ("v5p:16x16x24", 6144, 1536),
        ("v4:2x4x4", 32, 8),
        ("v5e:1x1", 1, 1),
        ("v5e:2x4", 8, 1),
        ("v5e:16x16", 256, 64),
        ("v6e:4x4", 16, 4),
        ("h100:16", 16, 2),
        ("h200:8", 8, 1),
        ("l4:1", 1, 1),
        ("v5p_4x4x8", 128, 32),
        ("h200x8", 8, 1),
    ],
)
def test_chips_and_hosts(text, chips, hosts):
    machines = parse_machines(text)
    assert (machines.chips, machines.hosts) == (chips, hosts)
    assert machines.hosts * machines.chips_per_host == chips


def test_nodes_of_gpus_may_be_fewer_than_full():
    machines = parse_machines("h100:16", nodes=4)
    assert (machines.hosts, machines.chips_per_host) == (4, 4)
    assert parse_machines("v5p:4x4x8", nodes=32).hosts == 32


@pytest.mark.parametrize(
    ("text", "nodes", "message"),
    [
        ("v5q:4x4", None, "--topology v5q:4x4: no kind 'v5q'; did you mean 'v5p'?"),
        ("v5p", None, "write the kind and its size, such as v5p:4x4x8"),
        ("h100:0", None, "such as h100:16"),
        ("h100:4x4", None, "write the number of GPUs, such as h100:16"),
        ("v5e:4x2", None, "no slice of that shape; choose from: 1x1, 2x2"),
        ("v5e:4x4x4", None, "no slice of that shape; choose from: 1x1, 2x2"),
        ("v5p:4x4", None, "AxBxC of multiples of 4"),
        ("v5p:4x8x4", None, "A <= B <= C"),
        ("v5p:4x4x6", None, "multiples of 4"),
        ("v5p:16x16x28", None, "up to 16x16x24"),
        ("v4:16x16x16", None, "up to 12x16x16"),
        ("h100:9", None, "9 GPUs make no 2 equal nodes"),
        ("h100:16", 3, "16 GPUs make no 3 equal nodes"),
        ("h100:16", 1, "at most 8"),
        ("v5p:4x4x8", 16, "--nodes 16: v5p:4x4x8 has 32 hosts; leave --nodes out"),
    ],
)
def test_what_there_is_not_is_refused(text, nodes, message):
    with pytest.raises(UserError) as error:
        parse_machines(text, nodes)
    assert message in str(error.value)
