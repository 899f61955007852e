"""Collectives and large buffers of a compiled program, read from its optimized HLO text.

A device of a group of n receives, by the ring algorithm (in bytes, R the size of the result on one
device): all-gather ``R (n-1)/n``, all-reduce ``2 R (n-1)/n``, reduce-scatter ``R (n-1)``,
all-to-all and ragged-all-to-all ``R (n-1)/n``, collective-permute and -broadcast ``R``.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Bytes that a device receives: of the result's bytes and the size of the group.
_RECEIVED = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
    "collective-broadcast": lambda size, n: size,
}
_SUB_BYTE = {"pred": 1, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``name = type opcode(...), attributes``; ``text`` is what follows the opcode."""

    name: str
    type: str
    opcode: str
    text: str


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What one run of the program exchanges.

    Attributes:
      count: kind -> how often it runs.
      received: kind -> bytes that one device receives.
      loops: {times: number of loops with collectives whose trip count is that}.
      unread: names of the loops with collectives whose trip count could not be read; their bodies
        are counted once.
    """

    count: dict[str, int]
    received: dict[str, float]
    loops: dict[int, int]
    unread: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """The result of an instruction: ``shape`` as HLO writes it, and the module it is from."""

    shape: str
    bytes: int
    opcode: str
    scope: str


def collectives(text: str, num_devices: int) -> Collectives:
    """Counts the collectives of an optimized HLO module; a loop's body as often as it runs.

    The trip count is what the compiler has noted (``known_trip_count``), else the bound that the
    condition compares a counter from zero with. Of the branches of a conditional the dearest
    counts. An exchange that the compiler has cut into stages counts once.
    """
    computations = parse(text)
    total = _Sum()
    entry = next((name for name in computations if name.startswith("ENTRY ")), None)
    if entry is not None:
        total = _count(computations, entry, num_devices)
    return Collectives(
        count={kind: total.count[kind] for kind in KINDS if kind in total.count},
        received={kind: total.received[kind] for kind in KINDS if kind in total.received},
        loops=dict(sorted(total.loops.items())),
        unread=tuple(sorted(total.unread)),
    )


def largest_buffers(text: str, number: int = 10) -> list[Buffer]:
    """The largest results of instructions outside of fusions, one of each shape.

    Which of them live at the same time is not known; the compiler may keep several in one place.
    """
    found: dict[str, Buffer] = {}
    computations = parse(text)
    fused = {
        called
        for body in computations.values()
        for one in body
        if one.opcode in ("fusion", "reduce", "sort", "scatter", "map", "reduce-window")
        for called in _called(one)
    }
    for name, body in computations.items():
        if name.removeprefix("ENTRY ") in fused:
            continue
        for one in body:
            if one.opcode in _NO_BUFFER or one.type.startswith("("):
                continue
            scope = re.search(r'op_name="([^"]*)"', one.text)
            shape = re.sub(r"\{.*", "", one.type)
            buffer = Buffer(shape, type_bytes(one.type), one.opcode, scope[1] if scope else "")
            found.setdefault(shape, buffer)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:number]


# Names for what is there already, or scalars and pieces of it.
_NO_BUFFER = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "optimization-barrier"}


def parse(text: str) -> dict[str, list[Instruction]]:
    """Computation -> its instructions; the entry's name begins with ``"ENTRY "``."""
    computations: dict[str, list[Instruction]] = {}
    body: list[Instruction] | None = None
    for line in text.splitlines():
        if body is None or not line.startswith(" "):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            body = computations.setdefault((head[1] or "") + head[2], []) if head else None
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            kind, rest = _split_type(found[2])
            opcode, _, after = rest.partition("(")
            body.append(Instruction(found[1], kind, opcode.strip(), after))
    return computations


def type_bytes(kind: str) -> int:
    """Bytes of an array or of all the arrays of a tuple, ``(f32[2,3]{1,0}, s32[])``: 28."""
    return sum(_array_bytes(dtype, dims) for dtype, dims in _arrays(kind))


def _split_type(text: str) -> tuple[str, str]:
    """``"(f32[2], f32[3]) add(...)"`` -> the type and what follows it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _arrays(kind: str) -> list[tuple[str, str]]:
    return re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", kind)


def _array_bytes(dtype: str, dims: str) -> int:
    bits = re.search(r"\d+", dtype)
    size = _SUB_BYTE.get(dtype, int(bits[0]) / 8 if bits else 0)
    return math.ceil(size * math.prod(int(n.strip("<=")) for n in dims.split(",") if n))


class _Sum:
    def __init__(self):
        self.count: dict[str, int] = {}
        self.received: dict[str, float] = {}
        self.loops: dict[int, int] = {}
        self.unread: set[str] = set()

    def add(self, kind: str, received: float) -> None:
        self.count[kind] = self.count.get(kind, 0) + 1
        self.received[kind] = self.received.get(kind, 0.0) + received

    def include(self, other: "_Sum", times: int = 1) -> None:
        for kind, count in other.count.items():
            self.count[kind] = self.count.get(kind, 0) + times * count
            self.received[kind] = self.received.get(kind, 0.0) + times * other.received[kind]
        for trips, loops in other.loops.items():
            self.loops[trips] = self.loops.get(trips, 0) + loops
        self.unread |= other.unread

    def total(self) -> float:
        return sum(self.received.values())


def _count(computations: dict[str, list[Instruction]], name: str, num_devices: int) -> _Sum:
    """Collectives of one computation and of those that it calls."""
    found, stages = _Sum(), set()
    for one in computations.get(name, ()):
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            found.add(kind, _received(kind, one, num_devices))
        elif one.opcode == "while":
            inner = _count(computations, _attribute(one, "body"), num_devices)
            if inner.count:
                times = _trip_count(computations, one)
                if times is None:
                    inner.unread.add(one.name)
                else:
                    inner.loops[times] = inner.loops.get(times, 0) + 1
                found.include(inner, 1 if times is None else times)
        elif one.opcode == "conditional":
            branches = [_count(computations, branch, num_devices) for branch in _called(one)]
            found.include(max(branches, key=_Sum.total, default=_Sum()))
        elif one.opcode == "fusion":
            for kind, inner in _fused(computations, one):
                # The stages of one exchange have one channel.
                channel = kind, re.findall(r"channel_id=(\d+)", inner.text) or [inner.name]
                if str(channel) not in stages:
                    stages.add(str(channel))
                    found.add(kind, _received(kind, inner, num_devices))
        elif one.opcode in ("call", "async-start"):
            for called in _called(one):
                found.include(_count(computations, called, num_devices))
    return found


def _fused(computations, fusion: Instruction) -> Iterator[tuple[str, Instruction]]:
    """(kind, collective) of a fusion; an all-reduce of which a slice is kept is a reduce-scatter.

    A reduce-scatter's type is that of the slice, so this one's is that of the fusion's result.
    """
    for called in _called(fusion):
        for one in computations.get(called, ()):
            if one.opcode == "fusion":
                yield from _fused(computations, one)
            elif one.opcode == "all-reduce" and "all-reduce-scatter" in called + fusion.name:
                yield "reduce-scatter", dataclasses.replace(one, type=fusion.type)
            elif one.opcode in KINDS:
                yield one.opcode, one


def _received(kind: str, one: Instruction, num_devices: int) -> float:
    result = one.type
    if one.opcode.endswith("-start") and kind != "all-reduce" and result.startswith("("):
        # (operands, results, contexts ...)
        _, others = _split_type(result[1:])
        result = _split_type(others)[0]
    return _RECEIVED[kind](type_bytes(result), _group_size(one.text, num_devices))


def _group_size(text: str, num_devices: int) -> int:
    """Devices of a group, of every form that ``replica_groups`` is written in."""
    found = re.search(r"replica_groups=(\{\{[\d,]*|\[[\d,]+\]<=|mesh\[[^\]]*\]\s*\{[^}]*\})", text)
    if found is None:
        return num_devices
    groups = found[1]
    if groups.startswith("{{"):
        return len(groups[2:].split(","))
    if groups.startswith("["):
        # [groups, devices of one]<=[...]
        return int(groups[1:].split("]")[0].split(",")[-1])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
    names = re.findall(r"'(\w+)'", groups[groups.index("]") :])
    return math.prod(int(sizes[name]) for name in names)


def _trip_count(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    condition = computations.get(_attribute(loop, "condition"), ())
    bounds = {}
    for one in condition:
        if one.opcode == "constant" and (value := re.match(r"(\d+)\)", one.text)):
            bounds[one.name] = int(value[1])
        if one.opcode == "compare" and "direction=LT" in one.text:
            names = re.findall(r"%([\w.\-]+)", one.text.split(")")[0])
            if len(names) == 2 and names[1] in bounds:
                return bounds[names[1]]
    return None


def _attribute(one: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", one.text)
    return found[1] if found else ""


def _called(one: Instruction) -> list[str]:
    """The computations that an instruction names (``calls``, ``to_apply``, branches)."""
    several = re.search(r"branch_computations=\{([^}]*)\}", one.text)
    if several:
        return re.findall(r"%?([\w.\-]+)", several[1])
    names = ("calls", "to_apply", "true_computation", "false_computation")
    return [called for name in names if (called := _attribute(one, name))]
