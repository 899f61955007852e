"""What the workdir of a run holds, for reports and tables."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from moejax.analysis.charts import Point
from moejax.config.schema import EvalConfig
from moejax.errors import UserError
from moejax.train.checkpoint import saved_steps
from moejax.train.evaluate import Patience
from moejax.train.workdir import read_record
from moejax.train.writers import read_rows


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      workdir: the run.
      record: its config.json.
      rows: of metrics.jsonl.
      checkpoints: the steps that are saved.
    """

    workdir: Path
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    checkpoints: list[int]

    @property
    def step(self) -> int:
        return max(row["step"] for row in self.rows)

    @property
    def keys(self) -> list[str]:
        """The names of all values, in the order in which they first come."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def points(self, key: str) -> list[Point]:
        """(step, value) of one name."""
        return [(row["step"], row[key]) for row in self.rows if key in row]

    def last(self, key: str) -> float | None:
        points = self.points(key)
        return points[-1][1] if points else None

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the config such as ``"eval.split"``."""
        group, _, field = name.partition(".")
        return self.record.get(group, {}).get(field, default)

    @property
    def finished(self) -> bool:
        """Whether the last step of the config is saved."""
        total = self.field("train.steps", self.step)
        return bool(self.checkpoints) and self.checkpoints[-1] >= total

    @property
    def patience(self) -> Patience:
        """How far the run is from its early stop."""
        known = {field.name for field in dataclasses.fields(EvalConfig)}
        recorded = {k: v for k, v in self.record.get("eval", {}).items() if k in known}
        return Patience(EvalConfig(**recorded), self.rows)


def is_record(document: Any) -> bool:
    """Whether the content of a config.json is that of a run; other programs have such files too."""
    return (
        isinstance(document, dict)
        and {"model", "data", "train"} <= document.keys()
        and all(isinstance(group, dict) for group in document.values())
    )


def read_run(workdir: str | os.PathLike) -> Run:
    """What is in ``workdir``. UserError if there is no run, or none that has logged anything."""
    workdir = Path(workdir)
    record = read_record(workdir)
    if record is None:
        raise UserError(f"--workdir {workdir}: no run there (no config.json)")
    if not is_record(record):
        raise UserError(f"{workdir / 'config.json'}: is not that of a run; name another folder")
    run = Run(
        workdir,
        record,
        _read_metrics(workdir / "metrics.jsonl"),
        saved_steps(workdir / "checkpoints"),
    )
    if not run.rows:
        every = run.field("log.every", 1)
        raise UserError(
            f"{workdir / 'metrics.jsonl'}: has no rows yet; the first is written after "
            f"log.every={every} steps"
        )
    return run


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, each with a step, and nothing in them but finite numbers."""
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for line, row in enumerate(rows, 1):
        numbers = isinstance(row, dict) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in row.values()
        )
        if not numbers or "step" not in row:
            raise UserError(f"{path}: line {line} is no row of a run (a step and numbers)")
    return rows
