"""Collectives of compiled programs, counted against what was written by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.analysis.hlo import collectives, largest_buffers, parse, type_bytes

X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
# Of X: 64 x 128 x 4 bytes.
WHOLE = 32_768


def program(function, shape=(8,), names=("x",)) -> str:
    """The optimized HLO of ``function`` in a shard_map whose rows are split over ``names[0]``."""
    types = (AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(shape, names, axis_types=types)
    rows = P(names[0])
    local = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return jax.jit(local).lower(X).compile().as_text()


@pytest.mark.parametrize(
    "kind, function, received",
    [
        # Each device has an eighth and is given the other seven.
        ("all-gather", lambda x: lax.all_gather(x, "x", tiled=True)[:8], WHOLE * 7 / 8),
        # Around the ring twice: sums of eighths, then the eighths of the sum.
        ("all-reduce", lambda x: lax.psum(x, "x"), 2 * (WHOLE / 8) * 7 / 8),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "x", tiled=True), (WHOLE / 8) * 7 / 8),
        ("all-to-all", lambda x: lax.all_to_all(x, "x", 0, 1, tiled=True), (WHOLE / 8) * 7 / 8),
        (
            "collective-permute",
            lambda x: lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            WHOLE / 8,
        ),
    ],
)
def test_count_and_bytes_of_each_kind(kind, function, received):
    found = collectives(program(function), 8)
    assert found.count == {kind: 1}
    assert found.received == {kind: received}
    assert found.loops == {} and found.unread == ()


def test_a_group_is_a_part_of_the_mesh():
    text = program(lambda x: lax.psum(x, "y"), (4, 2), ("x", "y"))
    # Two devices, each with a quarter of the rows.
    assert collectives(text, 8).received == {"all-reduce": 2 * (WHOLE / 4) / 2}


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
    def inner(x, _):
        return lax.psum(x, "x") / 8, None

    def outer(x, _):
        x, _ = lax.scan(inner, x, length=5)
        return lax.ppermute(x, "x", [(0, 1), (1, 0)]), None

    text = program(lambda x: lax.scan(outer, x, length=3)[0])
    found = collectives(text, 8)
    assert found.count == {"all-reduce": 15, "collective-permute": 3}
    assert found.received["collective-permute"] == 3 * WHOLE / 8
    assert found.loops == {3: 1, 5: 1} and found.unread == ()


def test_of_the_branches_of_a_conditional_the_dearest_counts():
    def function(x):
        many = lambda x: lax.psum(x, "x")
        few = lambda x: lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])
        return lax.switch(lax.axis_index("x") % 2, [few, many], x)

    text = program(function)
    assert " conditional(" in text
    found = collectives(text, 8)
    assert found.count == {"all-reduce": 1}
    assert found.received == {"all-reduce": 2 * (WHOLE / 8) * 7 / 8}


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    def body(state):
        x, n = state
        return lax.psum(x, "x") / 8, n + 1

    text = program(lambda x: lax.while_loop(lambda s: s[0].sum() > s[1], body, (x, 0.0))[0])
    found = collectives(text, 8)
    assert found.count == {"all-reduce": 1}
    assert len(found.unread) == 1 and found.unread[0] in text


def test_no_collectives():
    found = collectives(program(lambda x: x + 1), 8)
    assert found.count == {} and found.received == {}


# What libtpu and XLA for GPUs write, where XLA for CPUs writes something else; shortened.
ASYNC = """
%fused_start (p: f32[2,8]) -> (f32[2,8], f32[2,128], u32[]) {
  %p = f32[2,8]{1,0:T(2,128)} parameter(0)
  %all-gather.1 = f32[2,128]{1,0:T(2,128)} all-gather(%p), channel_id=6, replica_groups=mesh['a'=1,'b'=16] {'b'}, dimensions={1}
  ROOT %custom-call.1 = (f32[2,8]{1,0}, f32[2,128]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused_step (p: f32[2,8]) -> f32[2,128] {
  %p = f32[2,8]{1,0:T(2,128)} parameter(0)
  ROOT %all-gather.2 = f32[2,128]{1,0:T(2,128)} all-gather(%p), channel_id=6, replica_groups=mesh['a'=1,'b'=16] {'b'}, dimensions={1}
}

%all-reduce-scatter.3 (p: f32[32,16]) -> f32[2,16] {
  %p = f32[32,16]{1,0} parameter(0)
  %all-reduce.4 = f32[32,16]{1,0} all-reduce(%p), channel_id=7, replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %dynamic-slice.1 = f32[2,16]{1,0} dynamic-slice(%all-reduce.4, %i, %c), dynamic_slice_sizes={2,16}
}

ENTRY %main (p: f32[2,8]) -> f32[2,128] {
  %p = f32[2,8]{1,0:T(2,128)} parameter(0)
  %start = (f32[2,8]{1,0}, f32[2,128]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%fused_start
  %step = f32[2,128]{1,0} fusion(%p), kind=kOutput, calls=%fused_step
  %scatter = f32[2,16]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.3
  %all-gather-start = ((bf16[64,2]{1,0}, s8[1]), (bf16[1024,2]{1,0}, s8[16])) all-gather-start(%a, %b), channel_id=8, replica_groups={}, dimensions={0}
  %all-gather-done = (bf16[1024,2]{1,0}, s8[16]) all-gather-done(%all-gather-start)
  %permute = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
  ROOT %reduce = f32[2,128]{1,0:T(2,128)} all-reduce-start(%d), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""  # noqa: E501


# libtpu does not note how often a loop runs.
LOOP = """
%condition (p.1: (s32[], f32[4])) -> pred[] {
  %bound.1 = s32[]{:T(128)} constant(32)
  %p.1 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %bound.1), direction=LT
}

%body (p.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.2 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %x.2 = f32[4]{0} get-tuple-element(%p.2), index=1
  %sum.2 = f32[4]{0} all-reduce(%x.2), replica_groups={{0,1}}, to_apply=%add
  ROOT %t.2 = (s32[]{:T(128)}, f32[4]{0}) tuple(%i.2, %sum.2)
}

ENTRY %main (p.3: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.3 = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  ROOT %while.3 = (s32[]{:T(128)}, f32[4]{0}) while(%p.3), condition=%condition, body=%body
}
"""


def test_the_condition_tells_how_often_a_loop_runs():
    found = collectives(LOOP, 2)
    assert found.count == {"all-reduce": 32} and found.received == {"all-reduce": 32 * 16}
    assert found.loops == {32: 1} and found.unread == ()
    other = collectives(LOOP.replace("direction=LT", "direction=NE"), 2)
    assert other.count == {"all-reduce": 1} and other.unread == ("while.3",)


def test_asynchronous_exchanges_count_once():
    found = collectives(ASYNC, 16)
    assert found.count == {
        "all-gather": 2,
        "all-reduce": 1,
        "reduce-scatter": 1,
        "collective-permute": 1,
    }
    # In stages: 2 x 128 floats; started: 1024 x 2 halves, and 16 bytes; a group is all devices.
    assert found.received["all-gather"] == (1024 + 4096 + 16) * 15 / 16
    # Of 32 x 16 floats a device keeps 2 x 16.
    assert found.received["reduce-scatter"] == 128 * 15
    assert found.received["collective-permute"] == 16
    assert found.received["all-reduce"] == 2 * 1024 * 3 / 4


def test_bytes_of_types():
    assert type_bytes("f32[2,3]{1,0:T(8,128)S(1)}") == 24
    assert type_bytes("(bf16[7]{0}, (s32[], pred[5]), /*index=2*/s4[3])") == 14 + 4 + 5 + 2
    assert type_bytes("f8e4m3fn[10]") == 10
    assert type_bytes("token[]") == 0


def test_parse_names_instructions_and_the_entry():
    computations = parse(ASYNC)
    assert [one.opcode for one in computations["fused_start"]] == [
        "parameter",
        "all-gather",
        "custom-call",
    ]
    assert [name for name in computations if name.startswith("ENTRY ")] == ["ENTRY main"]


def test_largest_buffers_are_outside_of_fusions():
    def function(x):
        wide = jnp.einsum("ij,kj->ik", x, x)
        return jnp.exp(wide) @ x + 1

    text = jax.jit(function).lower(jax.ShapeDtypeStruct((512, 64), jnp.float32)).compile().as_text()
    sizes = [buffer.bytes for buffer in largest_buffers(text, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 512 * 512 * 4
