"""Metric rows: ``metrics.jsonl``, and TensorBoard where ``log.tensorboard`` is on."""

import json
import math
import os
import time
from pathlib import Path

from moejax.errors import UserError

# Fields that differ between two runs that are otherwise equal.
TIME_FIELDS = (
    "wall_time",
    "train/tokens_per_second",
    "train/examples_per_second",
    "train/input_wait_fraction",
    "train/utilisation",
)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def check_tensorboard() -> None:
    """UserError unless the package behind ``log.tensorboard`` is installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise UserError(
            "log.tensorboard: needs tensorboardX; pip install 'moejax[tensorboard]'"
        ) from error


class MetricWriter:
    """Appends rows; opening it cuts the rows after the step that a run resumes from.

    Args:
      workdir: the run.
      step: the step that the state is at; later rows are dropped.
      tensorboard: whether to write ``workdir/tensorboard`` as well.
    """

    def __init__(self, workdir: Path, step: int, *, tensorboard: bool = False):
        self.path = workdir / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        # A new file and a rename: a kill leaves either the old rows or the cut ones.
        cut = self.path.with_suffix(".jsonl.tmp")
        with cut.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(cut, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one row; NaN and infinity, which JSON does not have, are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        row = {"step": step, "wall_time": time.time(), **finite}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
