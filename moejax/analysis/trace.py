"""Where the time of a training step goes, by the named scopes of the program.

Reads what ``train.profile_steps`` leaves in ``WORKDIR/profile``: a trace, whose events name single
operations of the compiled step, and the program, which says what scope each operation is from. A
scope is the path of modules in the model, or a ``jax.named_scope``. Prints the table by

    python -m moejax.analysis.trace runs/quickstart
"""

import collections
import gzip
import json
import os
import re
import sys
from pathlib import Path

from moejax.errors import UserError

# The program of the step, beside the trace (train/loop.py writes it).
PROGRAM = "step.hlo.txt"

# The scope that was the outermost one when a gradient was taken.
_GRADIENT = re.compile(r"(?:transpose\()?jvp\((\w*)\)+")
# Parts of an operation's path that jax adds for its own transformations and control flow.
_NOT_A_SCOPE = re.compile(
    r".*\(.*|.*\._.*|while|body|cond|closed_call|branch_\d+_fun|checkpoint|rematted_computation|"
    r"remat\d*|custom_[jv][vj]p_call\w*|shard_map|pjit"
)
_OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
# Their events span those of the operations inside.
_CONTROL_FLOW = re.compile(r"(while|call|conditional|async-\w+)(\.\d+)?")


def scope_times(workdir: str | os.PathLike) -> dict[str, float]:
    """Milliseconds in all traced steps by scope, the longest first.

    A scope reads ``"backward stack/segment_0/untied/block_0/attention"``; operations of no scope
    go by their own name, those that the compiler made by itself (copies, mostly) by "compiler".
    With several devices, or threads on a CPU, times add up.

    Raises:
      UserError: there is no trace of a run there.
    """
    folder = Path(workdir) / "profile"
    traces = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    program = folder / PROGRAM
    if not traces or not program.exists():
        raise UserError(
            f"{workdir}: no trace in {folder}; train with --config.train.profile_steps=3"
        )
    text = program.read_text(encoding="utf-8")
    scopes = {name: scope_of(path) for name, path in _OPERATION.findall(text)}
    module = text.partition(",")[0].removeprefix("HloModule ")
    with gzip.open(traces[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        about = event.get("args", {})
        name = about.get("hlo_op", "")
        if about.get("hlo_module") == module and not _CONTROL_FLOW.fullmatch(name):
            times[scopes.get(name, "compiler")] += event["dur"] / 1000
    return dict(times.most_common())


def scope_of(path: str) -> str:
    """The scope of an operation by its path, with "backward" in front where it is of the gradient.

    ``jit(step)/transpose(jvp(Decoder))/stack/while/body/block_0/attention/dot_general`` ->
    ``backward stack/block_0/attention``.
    """
    *parts, operation = path.split("/")
    parts = [_GRADIENT.sub(r"\1", part) for part in parts]
    # The class of the whole model, which Linen puts in front, is left out.
    named = [p for p in parts if p and not p[0].isupper() and not _NOT_A_SCOPE.fullmatch(p)]
    # An einsum names its operations by its equation: part of the module that it is in.
    modules = [part for part in named if "->" not in part]
    scope = "/".join(modules or named) or operation
    return f"backward {scope}" if "transpose(" in path else scope


def format_times(times: dict[str, float], rows: int = 25) -> str:
    """A table of the ``rows`` longest scopes, with their share of the whole."""
    total = sum(times.values())
    lines = [f"{'ms':>10}  {'share':>6}  scope"]
    for scope, ms in list(times.items())[:rows]:
        lines.append(f"{ms:10.2f}  {ms / total:6.1%}  {scope}")
    lines.append(f"{total:10.2f}  {1:6.1%}  all operations")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m moejax.analysis.trace WORKDIR")
    try:
        print(format_times(scope_times(sys.argv[1])))
    except UserError as error:
        sys.exit(f"moejax: error: {error}")
