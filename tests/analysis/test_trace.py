"""Time by scope, from a small trace and program written by hand."""

import gzip
import json

import pytest

from moejax.analysis.trace import PROGRAM, format_times, scope_of, scope_times
from moejax.errors import UserError

BLOCK = "stack/while/body/closed_call/segment_0/untied/block_0/block_0._residual"
PROGRAM_TEXT = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{}}

%body (x: f32[2]) -> f32[2] {{
  %dot.1 = f32[2]{{0}} dot(%x, %y), metadata={{op_name="jit(step)/jvp(Decoder)/{BLOCK}/ffn/dot"}}
  ROOT %fusion.2 = f32[2]{{0}} fusion(%dot.1), kind=kLoop, metadata={{op_name="jit(step)/transpose(jvp(Decoder))/{BLOCK}/ffn/td,df->tf/dot_general" source_line=3}}
}}

ENTRY %main {{
  %while.3 = f32[2]{{0}} while(%a), metadata={{op_name="jit(step)/jvp(Decoder)/stack/while"}}
  %copy.4 = f32[2]{{0}} copy(%while.3)
}}
"""  # noqa: E501


def event(name, ms, module="jit_step"):
    args = {"hlo_op": name, "hlo_module": module}
    return {"ph": "X", "name": name, "dur": 1000 * ms, "args": args}


def write(workdir, events):
    folder = workdir / "profile" / "plugins" / "profile" / "2026_01_01"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    (workdir / "profile" / PROGRAM).write_text(PROGRAM_TEXT)


def test_times_add_up_by_scope(tmp_path):
    events = [
        *(event("dot.1", ms) for ms in (1, 2)),
        event("fusion.2", 5),
        event("copy.4", 1),
        # It spans the operations in its body.
        event("while.3", 9),
        event("dot.1", 100, module="jit_other"),
        {"ph": "X", "name": "python", "dur": 1e6},
        {"ph": "M", "name": "thread_name", "args": {"name": "host"}},
    ]
    write(tmp_path, events)
    times = scope_times(tmp_path)
    ffn = "stack/segment_0/untied/block_0/ffn"
    assert list(times.items()) == [(f"backward {ffn}", 5), (ffn, 3), ("compiler", 1)]
    lines = format_times(times, rows=2).splitlines()
    assert lines[1].split(maxsplit=2) == ["5.00", "55.6%", f"backward {ffn}"]
    assert lines[-1].split() == ["9.00", "100.0%", "all", "operations"]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(step)/jvp(Decoder)/gather", "gather"),
        ("jit(step)/jvp(Decoder)/btd,dv->btv/dot_general", "btd,dv->btv"),
        ("jit(step)/transpose(jvp(objective))/exp", "backward objective"),
        ("jit(step)/optimizer/jit(_where)/select_n", "optimizer"),
        ("jit(step)/jvp(Decoder)/final_norm/reduce_sum", "final_norm"),
        (
            "jit(step)/transpose(jvp(Decoder))/stack/while/body/closed_call/checkpoint/"
            "rematted_computation/segment_0/mine/block_1/attention/jit(f)/cond/branch_0_fun/mul",
            "backward stack/segment_0/mine/block_1/attention",
        ),
    ],
)
def test_scope_of_a_path(path, scope):
    assert scope_of(path) == scope


def test_no_trace(tmp_path):
    with pytest.raises(UserError, match="train with --config.train.profile_steps=3"):
        scope_times(tmp_path)
