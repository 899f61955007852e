"""What the workdir of a run holds, for reports and tables."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from moejax.analysis.charts import Point
from moejax.errors import UserError
from moejax.train.checkpoint import saved_steps
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


def read_run(workdir: str | os.PathLike) -> Run:
    """What is in ``workdir``. UserError if there is no run, or none that has logged anything."""
    workdir = Path(workdir)
    record = read_record(workdir)
    if record is None:
        raise UserError(f"--workdir {workdir}: no run there (no config.json)")
    run = Run(
        workdir,
        record,
        read_rows(workdir / "metrics.jsonl"),
        saved_steps(workdir / "checkpoints"),
    )
    if not run.rows:
        every = run.field("log.every", 1)
        raise UserError(
            f"{workdir / 'metrics.jsonl'}: has no rows yet; the first is written after "
            f"log.every={every} steps"
        )
    return run
