"""``routing.jsonl``: how many tokens each expert had in training, a line for each log point."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config.schema import DiTConfig, TwoTowersConfig
from moejax.train.step import StepMetrics
from moejax.train.writers import append_rows

_NAME = re.compile(r"(\w+/)?segment_(\d+)/block_(\d+)/.*?router(?:_(\d+))?")


@dataclasses.dataclass(frozen=True, order=True)
class RoutingLayer:
    """A router of a model, in the order of the depth.

    Attributes:
      layer: its number; those of a tower of texts come after those of the tower of pictures. Of
        models that are no stack of blocks, in the order of the names.
      iteration: which run of the layer's experts it is for (model.moe.iterations).
      name: the key of its sums in the model's aux (moejax.objectives.routing.routings).
      index: its place in them.
    """

    layer: int
    iteration: int
    name: str
    index: int


def has_experts(model: Any) -> bool:
    """Whether a model config asks for experts."""
    moe = getattr(model, "moe", None)
    return moe is not None and moe.num_experts > 0


def routing_layers(model: Any, depths: Mapping[str, int]) -> list[RoutingLayer]:
    """The routers of a model config whose aux holds ``depths[name]`` of them under each name."""
    from moejax.nn.stack import segments_of

    found, stacks = [], _stacks(model)
    for order, (name, depth) in enumerate(depths.items()):
        match = _NAME.fullmatch(name)
        if match is None or (match[1] or "") not in stacks:
            first, stride, iteration = order, len(depths), 0
        else:
            below, trunk = stacks[match[1] or ""]
            segment = segments_of(trunk)[int(match[2])]
            first, stride = below + segment.first + int(match[3]), len(segment.kinds)
            iteration = int(match[4] or 0)
        found += [RoutingLayer(first + i * stride, iteration, name, i) for i in range(depth)]
    return sorted(found)


def _stacks(model: Any) -> dict[str, tuple[int, Any]]:
    """By what the names of a stack's sums begin with: the layers before it, and its config."""
    if isinstance(model, TwoTowersConfig) or (isinstance(model, DiTConfig) and model.text_length):
        return {"image/": (0, model), "text/": (model.num_layers, model.text_tower)}
    return {"": (0, model)}


class RoutingLog:
    """Appends to ``routing.jsonl``; opening it cuts the lines after the step resumed from.

    A line is ``{"step": 20, "layers": [{"layer": 1, "load": [[90, 30], [5, 35]], "dropped": 4},
    ...]}`` with the choices of each modality's tokens for each expert since the line before, and
    how many of those a capacity took away. A model without experts has no such file.
    """

    def __init__(self, workdir: Path, step: int, model: Any):
        self.model = model
        path = workdir / "routing.jsonl"
        self._file = append_rows(path, step) if has_experts(model) else None

    def write(self, step: int, sums: StepMetrics) -> None:
        """Writes the line of a log point."""
        if self._file is None or "routing" not in sums.losses.statistics:
            return
        self._file.write(json.dumps({"step": step, "layers": loads(self.model, sums)}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """As of :class:`moejax.train.writers.MetricWriter`."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def loads(model: Any, sums: StepMetrics) -> list[dict[str, Any]]:
    """The layers of a line."""
    statistics = {
        name: jax.device_get(routing["statistics"])
        for name, routing in sums.losses.statistics["routing"].items()
    }
    depths = {name: len(routing["chosen_me"]) for name, routing in statistics.items()}
    rows = []
    for router in routing_layers(model, depths):
        routing = statistics[router.name]
        chosen_me, kept_me = routing["chosen_me"][router.index], routing["kept_me"][router.index]
        routed = chosen_me.shape[1] - model.moe.shared_competing
        row: dict[str, Any] = {"layer": router.layer}
        if model.moe.iterations > 1:
            row["iteration"] = router.iteration
        row["load"] = _counts(chosen_me[:, :routed])
        row["dropped"] = _counts(chosen_me.sum() - kept_me.sum())
        rows.append(row)
    return rows


def _counts(values: np.ndarray) -> Any:
    """Whole numbers where they are: a soft router's loads are sums of weights."""
    values = np.asarray(values, np.float64)
    whole = np.rint(values)
    if np.array_equal(whole, values):
        return whole.astype(np.int64).tolist()
    return np.round(values, 3).tolist()
