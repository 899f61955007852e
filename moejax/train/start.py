"""``train.init_from``: a new run that begins with the parameters of another.

    --config.train.init_from=runs/dense                     # the newest checkpoint of a run
    --config.train.init_from=runs/dense@500                 # that of step 500
    --config.train.init_from=runs/dense/checkpoints/500     # the same by its folder

    --config.train.init_rename="(('^stack/segment_0', 'stack/segment_1'), ('^head_dv$', ''))"
    --config.train.init_broadcast=True                      # shared there, a tower each here
    --config.train.init_towers="(('image', 'text'),)"       # image here begins as text there
    --config.train.init_experts="(0, 0, 1, 1)"              # experts here begin as these there
    --config.train.init_slices=2                            # each of them cut into two

``init_rename`` rewrites the path of a parameter here (``re.sub``) into the one it has there; the
first rule that is found counts, and a path that becomes empty is not loaded. The parameters are
read, not their moving average, nor the state of the optimizer: the new run starts at step 0, its
moving average at the loaded values. A run that is under way never looks back at where it began.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config.training import TrainConfig
from moejax.errors import UserError
from moejax.surgery import init_from
from moejax.train.checkpoint import Checkpoints, saved_steps
from moejax.train.leaves import (
    expert_axis,
    hidden_axis,
    modality_axis,
    named_leaves,
    path_name,
    shape_of,
    towers_of,
)
from moejax.train.progress import format_count
from moejax.train.setup import Setup
from moejax.train.state import StateRecipe, TrainState
from moejax.train.workdir import read_record

REPORT = "init_report.json"
# Parameters that are named when they are not loaded; the report holds all.
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a new run begins; nothing has been read but names and shapes.

    Attributes:
      folder: the folder of checkpoints.
      step: which of them.
      here: the parameters to begin with.
      plan: what is loaded.
    """

    folder: Path
    step: int
    here: dict[str, init_from.Leaf]
    plan: init_from.Plan

    def create(self, recipe: StateRecipe) -> TrainState:
        """The initial state; each parameter is read straight into its place on the mesh."""
        targets = named_leaves(recipe.abstract.params)
        readers: dict[str, list[str]] = {}
        for name, load in self.plan.loads.items():
            for path in load.paths():
                readers.setdefault(path, []).append(name)
        checkpoints = Checkpoints(self.folder, read_only=True)
        try:
            shapes = checkpoints.param_shapes(self.step)
            wanted = {}
            for source, (name, *_) in readers.items():
                target = targets[name]
                # A modality axis can differ in size, and it is never split over devices. So can
                # an expert axis and one of hidden units, which then are read whole.
                load, sharding = self.plan.loads[name], target.sharding
                if load.expert_axis is not None:
                    sharding = _whole(sharding, load.expert_axis)
                hidden_axis = self.here[name].hidden_axis
                if load.slices > 1 and hidden_axis is not None:
                    sharding = _whole(sharding, hidden_axis)
                wanted[source] = jax.ShapeDtypeStruct(
                    shapes[source], target.dtype, sharding=sharding
                )
            loaded = checkpoints.restore_params(self.step, wanted)
        finally:
            checkpoints.close()

        def edit(drawn: Any, kept: dict, spent: dict) -> Any:
            filled = init_from.fill(self.plan, self.here, named_leaves(drawn), {**kept, **spent})
            return jax.tree_util.tree_map_with_path(lambda path, _: filled[path_name(path)], drawn)

        # What becomes one parameter as it is need not be copied.
        whole = {
            source
            for source, names in readers.items()
            if len(names) == 1 and self.plan.loads[names[0]] == init_from.Load(source)
        }
        kept = {source: leaf for source, leaf in loaded.items() if source not in whole}
        spent = {source: leaf for source, leaf in loaded.items() if source in whole}
        return recipe.create(edit, kept, spent)

    def describe(self) -> str:
        """What was loaded and, by name, what was not."""
        plan = self.plan
        lines = [
            f"init_from {plan.label}: loaded {len(plan.loads)} of {plan.parameters} parameters "
            f"({format_count(plan.values)} values)"
        ]
        left = [f"{name}: {why}" for name, why in plan.skipped.items()]
        left += [f"{name}: there only" for name in plan.unused]
        lines += [f"  not loaded  {line}" for line in left[:SHOWN]]
        if left[SHOWN:]:
            lines.append(f"  and {len(left) - SHOWN} more, see {REPORT}")
        return "\n".join(lines)

    def write(self, workdir: Path) -> None:
        """Writes init_report.json in one piece: all that :meth:`describe` says, and the renames."""
        plan = self.plan
        report = {
            "init_from": plan.label,
            "step": self.step,
            "parameters": plan.parameters,
            "values": plan.values,
            "loaded": {name: dataclasses.asdict(load) for name, load in plan.loads.items()},
            "skipped": plan.skipped,
            "unused": plan.unused,
        }
        path = workdir / REPORT
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def plan_start(setup: Setup, workdir: Path) -> Start | None:
    """What ``train.init_from`` gives a run that has no checkpoint yet; None if it is not set.

    A run that was stopped before its first checkpoint begins again from the step that it began
    from, though the other run may have gone on.

    Raises:
      UserError: there is no such checkpoint, nothing of it fits, or a rule does nothing.
    """
    train = setup.config.train
    if not train.init_from:
        for name in ("init_rename", "init_broadcast", "init_towers", "init_experts", "init_slices"):
            if getattr(train, name) != getattr(TrainConfig(), name):
                raise UserError(f"train.{name}: needs train.init_from, a run to begin from")
        return None
    folder, step = _find(train.init_from, _begun_from(workdir))
    modalities = tuple(getattr(setup.config.model, "modalities", ()))
    here = {
        name: init_from.Leaf(
            shape_of(leaf),
            modality_axis(leaf),
            towers_of(name, leaf, modalities),
            expert_axis(leaf),
            hidden_axis(leaf),
            _parts(name, setup.config.model),
        )
        for name, leaf in named_leaves(setup.recipe.boxed).items()
    }
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        shapes = checkpoints.param_shapes(step)
    finally:
        checkpoints.close()
    record = read_record(folder.parent) or {}
    source = init_from.Source(
        label=f"{folder.parent if folder.name == 'checkpoints' else folder}@{step}",
        shapes=shapes,
        modalities=tuple(record.get("model", {}).get("modalities", modalities)),
    )
    rules = init_from.Rules(
        train.init_rename,
        train.init_broadcast,
        train.init_towers,
        train.init_experts,
        train.init_slices,
    )
    return Start(folder, step, here, init_from.plan(here, source, rules, modalities))


def _parts(name: str, model: Any) -> int:
    """How many columns of an expert's first matrix belong to one hidden unit."""
    moe = getattr(model, "moe", None)
    gated = moe is not None and moe.activation == "swiglu"
    return 2 if gated and name.endswith("/experts/wi_edf") else 1


def _whole(sharding: NamedSharding, axis: int) -> NamedSharding:
    """``sharding`` with ``axis`` on every device."""
    parts = [part for i, part in enumerate(sharding.spec) if i != axis]
    parts.insert(axis, None)
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


def _begun_from(workdir: Path) -> int | None:
    try:
        return int(json.loads((workdir / REPORT).read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{workdir / REPORT}: cannot be read; use another --workdir") from error


def _find(spec: str, begun_from: int | None) -> tuple[Path, int]:
    """The folder of checkpoints and the step that ``train.init_from`` names."""
    path, chosen = Path(spec).expanduser(), None
    name, _, number = spec.rpartition("@")
    if not path.is_dir() and number.isdecimal():
        path, chosen = Path(name).expanduser(), int(number)
    field = f"train.init_from={spec}"
    if not path.is_dir():
        raise UserError(f"{field}: there is no folder {path}")
    if chosen is None and path.name.isdecimal() and (path / "layout").exists():
        return path.parent, int(path.name)
    steps = saved_steps(path / "checkpoints")
    if not steps:
        raise UserError(f"{field}: no checkpoint in {path}; name a --workdir that was trained")
    step = chosen if chosen is not None else begun_from if begun_from is not None else steps[-1]
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"{field}: no step {step} in {path}; there are: {there}")
    return path / "checkpoints", step
