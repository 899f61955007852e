"""Begin a model from the parameters of another: which are taken, from where, and into which towers.

Pure: :func:`plan` compares names and shapes, :func:`fill` puts arrays in their places. What is not
found there, or has another shape, stays as it was drawn, and the plan says why.

A parameter with a modality axis has a tower for each modality, or one that all share. Towers are
matched by the names of the modalities, so that the order and number of modalities may differ. A
weight that is shared there can be repeated into every tower here (a dense model becomes a
Mixture-of-Transformers; LMFusion, arXiv 2412.15188, begins its image tower as a copy of the text
tower).

The experts of a parameter with an expert axis can each begin as a row of what is there: of one MLP,
of the MLPs of the modalities, or of fewer experts (upcycling; MoMa, arXiv 2407.21770, section 2.5).
Each such copy can be cut by hidden units into experts that together are what it was (the
granularity decomposition of Dynamic-DINO, arXiv 2507.17436).

Blocks are matched by their number in the stack where two models of one depth are cut into other
segments (moejax/surgery/layers.py).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import UserError, did_you_mean
from moejax.surgery.layers import Rows, block_of, recut
from moejax.train.leaves import nearest_names


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of the model that is to begin.

    Attributes:
      shape: its shape.
      modality_axis: which axis counts towers; None if none does.
      towers: the modality of each row of that axis; () if the modalities share one.
      expert_axis: which axis counts experts; None if none does.
      hidden_axis: which axis counts hidden units; None if none does.
      hidden_parts: how many lie side by side there for each hidden unit: 2 for gate and up.
    """

    shape: tuple[int, ...]
    modality_axis: int | None = None
    towers: tuple[str, ...] = ()
    expert_axis: int | None = None
    hidden_axis: int | None = None
    hidden_parts: int = 1


@dataclasses.dataclass(frozen=True)
class Source:
    """The parameters that are there.

    Attributes:
      label: what to call it in messages, ``"runs/dense@500"``.
      shapes: of each parameter by its path.
      modalities: of its model, in order.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    modalities: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """How names, towers and experts differ: the fields ``train.init_*`` of the same names."""

    rename: tuple[tuple[str, str], ...] = ()
    broadcast: bool = False
    towers: tuple[tuple[str, str], ...] = ()
    experts: tuple[int, ...] = ()
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class Load:
    """One parameter that is loaded.

    Attributes:
      source: its path there.
      rows: for each row of the modality axis the row there, or None where it stays as drawn. None
        for all of it: taken over as it is.
      expert_axis: where it is given, rows are those of this axis.
      slices: into how many experts each of the rows is cut.
      layers: where the blocks there lie in other segments: for each layer here the path there and
        its row, in place of ``source``, which then is what it would be called here.
    """

    source: str
    rows: tuple[int | None, ...] | None = None
    expert_axis: int | None = None
    slices: int = 1
    layers: Rows = ()

    def paths(self) -> tuple[str, ...]:
        """The paths there that are read, each once."""
        return tuple(dict.fromkeys(path for path, _ in self.layers)) or (self.source,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is loaded.

    Attributes:
      label: of the source.
      loads: by path here.
      skipped: why not, by path here (``PATH@MODALITY`` for one tower).
      unused: paths there that nothing here reads.
      parameters: how many there are here.
      values: how many numbers are loaded.
    """

    label: str
    loads: dict[str, Load]
    skipped: dict[str, str]
    unused: tuple[str, ...]
    parameters: int
    values: int


def plan(here: Mapping[str, Leaf], source: Source, rules: Rules, modalities=()) -> Plan:
    """Decides for each parameter ``here`` what of ``source`` it begins with.

    ``modalities`` are those of the model that is to begin.

    Raises:
      UserError: a rule that does nothing, a modality that does not exist, or nothing to load.
    """
    _check_modalities(rules, source, modalities)
    names = _renamed(here, rules.rename)
    loads, skipped, used = {}, {}, set()
    by_layer = recut(
        {name: leaf.shape for name, leaf in here.items()}, source.shapes, names.values()
    )
    for name, leaf in here.items():
        there, seen, layers = names[name], source, ()
        # A rule that names another block means that one; else a block is known by its number.
        if by_layer is not None and block_of(there) == block_of(name) != "":
            layers, shape = by_layer.get(there, ((), ()))
            seen = dataclasses.replace(source, shapes={there: shape} if layers else {})
        found = _load(leaf, there, seen, rules, used)
        if isinstance(found, str):
            skipped[name] = found
            continue
        loads[name] = dataclasses.replace(found, layers=layers)
        for tower, row in zip(leaf.towers, found.rows or (), strict=False):
            if row is None:
                skipped[f"{name}@{tower}"] = "no such tower there"
    for i, (ours, theirs) in enumerate(rules.towers):
        if ours not in used:
            raise UserError(
                f"train.init_towers[{i}]: ({ours!r}, {theirs!r}) does nothing: no parameter of "
                f"{source.label} that is loaded into this tower has towers; see init_broadcast"
            )
    if rules.experts and all(load.expert_axis is None for load in loads.values()):
        count = len(rules.experts) * rules.slices
        raise UserError(
            f"train.init_experts: does nothing: no parameter of {count} experts is "
            f"loaded from {source.label}; see init_rename, or write a row for each expert"
            + (", of which init_slices are made" if rules.slices > 1 else "")
        )
    if not loads:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise UserError(
            f"train.init_from: nothing of {source.label} fits this model ({reasons}, ...); "
            "see train.init_rename"
        )
    read = {path for load in loads.values() for path in load.paths()}
    return Plan(
        label=source.label,
        loads=loads,
        skipped=skipped,
        unused=tuple(sorted(set(source.shapes) - read)),
        parameters=len(here),
        values=sum(_values(here[name], load) for name, load in loads.items()),
    )


def fill(
    plan: Plan, here: Mapping[str, Leaf], drawn: Mapping[str, Any], loaded: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters to begin with: ``drawn``, with what ``plan`` takes from ``loaded``.

    Args:
      plan: from :func:`plan`.
      here: as given to :func:`plan`.
      drawn: arrays by path, freshly initialised.
      loaded: the arrays there, by path there.
    """
    filled = dict(drawn)
    for name, load in plan.loads.items():
        there = loaded[load.source] if not load.layers else _layers(load.layers, loaded)
        if load.rows is None:
            filled[name] = there
            continue
        axis = here[name].modality_axis if load.expert_axis is None else load.expert_axis
        assert axis is not None, "only towers and experts are rows to choose"
        rows = [
            jax.lax.slice_in_dim(drawn[name], i, i + 1, axis=axis)
            if row is None
            else jax.lax.slice_in_dim(there, row, row + 1, axis=axis)
            for i, row in enumerate(load.rows)
        ]
        if load.slices > 1:
            rows = [part for row in rows for part in _hidden_slices(row, here[name], load.slices)]
        filled[name] = jnp.concatenate(rows, axis)
    return filled


def _layers(layers: Rows, loaded: Mapping[str, Any]) -> Any:
    """The rows of the layers, one after the other."""
    return jnp.stack([loaded[path][row] for path, row in layers])


def _hidden_slices(row: Any, leaf: Leaf, slices: int) -> list[Any]:
    """An MLP's weight cut by hidden units into equal parts, each with its gate and its up."""
    axis, parts = leaf.hidden_axis, leaf.hidden_parts
    assert axis is not None, "experts have hidden units"
    width = row.shape[axis] // (parts * slices)
    cut = lambda i: jax.lax.slice_in_dim(row, i * width, (i + 1) * width, axis=axis)
    return [
        jnp.concatenate([cut(part * slices + i) for part in range(parts)], axis)
        for i in range(slices)
    ]


def _check_modalities(rules: Rules, source: Source, modalities: tuple[str, ...]) -> None:
    for i, pair in enumerate(rules.towers):
        sides = (("this model", modalities), (source.label, source.modalities))
        for tower, (where, known) in zip(pair, sides, strict=True):
            if tower not in known:
                near = did_you_mean(tower, known) if known else "; it has none"
                raise UserError(f"train.init_towers[{i}]: {where} has no modality {tower!r}{near}")


def _renamed(here: Mapping[str, Leaf], rules: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The path there of each parameter here; "" for one that is left out."""
    names, used = {name: name for name in here}, set()
    for name in here:
        for i, (pattern, replacement) in enumerate(rules):
            if not re.search(pattern, name):
                continue
            try:
                names[name] = re.sub(pattern, replacement, name)
            except (re.error, IndexError) as error:
                raise UserError(
                    f"train.init_rename[{i}]: {replacement!r} is no replacement: {error}"
                ) from error
            used.add(i)
            break
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise UserError(
                f"train.init_rename[{i}]: {pattern!r} is found in no parameter that an earlier "
                f"rule has not renamed{nearest_names(pattern, here)}"
            )
    return names


def _load(leaf: Leaf, name: str, source: Source, rules: Rules, used: set[str]) -> Load | str:
    """How ``leaf`` is loaded from ``name``, or why it is not; notes the tower rules in ``used``."""
    if not name:
        return "left out by train.init_rename"
    if name not in source.shapes:
        return f"no {name} there"
    there, axis = source.shapes[name], leaf.modality_axis
    other = f"{_text(there)} there, {_text(leaf.shape)} here"
    experts = leaf.expert_axis
    moved = rules.slices > 1 or rules.experts not in ((), tuple(range(len(rules.experts))))
    if moved and "/router" in name and there == leaf.shape:
        return "its columns are for the experts there in another order"
    if experts is not None and leaf.shape[experts] == len(rules.experts) * rules.slices > 0:
        whole = _uncut(leaf, rules.slices)
        return _from_rows(leaf, name, source, rules) if _fits(whole, there, experts) else other
    if axis is None or len(there) != len(leaf.shape):
        return Load(name) if there == leaf.shape else other
    if not _fits(leaf, there, axis):
        return other
    size = there[axis]
    if size == 1:
        return _from_one(leaf, name, source, rules)
    if size != len(source.modalities):
        return Load(name) if there == leaf.shape else other
    if not leaf.towers:
        return f"{size} towers there, shared here"
    wanted = {**{tower: tower for tower in leaf.towers}, **dict(rules.towers)}
    used.update(tower for tower, _ in rules.towers if tower in leaf.towers)
    rows = tuple(
        source.modalities.index(wanted[tower]) if wanted[tower] in source.modalities else None
        for tower in leaf.towers
    )
    if rows == tuple(range(size)):
        return Load(name)
    if set(rows) == {None}:
        return f"towers of {', '.join(source.modalities)} there, of {', '.join(leaf.towers)} here"
    return Load(name, rows)


def _fits(leaf: Leaf, there: tuple[int, ...], axis: int) -> bool:
    """Whether shapes differ in nothing but the size of ``axis``."""
    without = lambda shape: (len(shape), *shape[:axis], *shape[axis + 1 :])
    return without(there) == without(leaf.shape)


def _uncut(leaf: Leaf, slices: int) -> Leaf:
    """The leaf as its experts would be if none had been cut."""
    if slices == 1 or leaf.hidden_axis is None:
        return leaf
    shape = list(leaf.shape)
    shape[leaf.hidden_axis] *= slices
    return dataclasses.replace(leaf, shape=tuple(shape))


def _from_rows(leaf: Leaf, name: str, source: Source, rules: Rules) -> Load:
    """Each expert from the row there that ``train.init_experts`` says."""
    axis = leaf.expert_axis
    assert axis is not None
    size = source.shapes[name][axis]
    for i, row in enumerate(rules.experts):
        if row >= size:
            raise UserError(
                f"train.init_experts[{i}]: {name} of {source.label} has no row {row}; "
                f"it has {size}, counted from 0"
            )
    return Load(name, rules.experts, axis, slices=rules.slices)


def _from_one(leaf: Leaf, name: str, source: Source, rules: Rules) -> Load | str:
    """From a weight that all modalities there share, or that is the tower of the only one."""
    axis = leaf.modality_axis
    assert axis is not None
    towers = leaf.shape[axis]
    if towers == 1:
        return Load(name)
    if rules.broadcast:
        return Load(name, (0,) * towers)
    if len(source.modalities) == 1 and source.modalities[0] in leaf.towers:
        return Load(name, tuple(0 if t == source.modalities[0] else None for t in leaf.towers))
    return f"shared there, {towers} towers here; train.init_broadcast=True repeats it"


def _values(leaf: Leaf, load: Load) -> int:
    size = math.prod(leaf.shape)
    if load.rows is None:
        return size
    return size // len(load.rows) * sum(row is not None for row in load.rows)


def _text(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
