"""Kill drill: a run that is killed again and again ends like one that never was.

``kill -9`` strikes five times, each once metrics.jsonl shows a step past a new checkpoint, and once
more while a checkpoint is being written. The log of the run that follows must say from which step
it went on, and the end must equal that of an uninterrupted run: every metrics row in all fields but
those of time, and every saved array bit for bit. Prints what happened and PASS or FAIL (exit code
1).

    python tools/drill.py [--workdir DIR]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moejax.train.checkpoint import Checkpoints, saved_steps  # noqa: E402
from moejax.train.workdir import flatten, read_record  # noqa: E402
from moejax.train.writers import TIME_FIELDS, read_rows  # noqa: E402

KILLS = 5
# Everything that has to survive is switched on: dropout, accumulation, moving average, evaluation.
# Most checkpoints fall between two rows, so that the sums since the last row must survive as well.
OVERRIDES = (
    "model.num_layers=1",
    "model.d_model=32",
    "model.num_heads=2",
    "model.ffn_hidden=(64,)",
    "model.dropout=0.1",
    "data.batch_size=4",
    "data.sequence_length=128",
    "optim.accumulation_steps=2",
    "optim.ema_decay=0.99",
    "train.steps=120",
    "train.checkpoint_every=8",
    "log.every=3",
    "eval.every=30",
    "eval.batches=1",
)


class Failure(Exception):
    """Something that the drill promises did not hold."""


class Run:
    """``moejax train`` in a process of its own; output is appended to ``log``."""

    def __init__(self, workdir: Path, log: Path):
        self.workdir = workdir
        self.rows, self.checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
        self.before = max(saved_steps(self.checkpoints), default=0)
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-m", "moejax", "train", "--config", "quickstart"]
        command += ["--workdir", str(workdir), *(f"--config.{item}" for item in OVERRIDES)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": path}
            )

    def said(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")

    def resumed_from(self) -> int:
        """N of "resumed from step N"; Failure unless it is the newest whole checkpoint."""
        found = re.search(r"resumed from step (\d+)", self.said())
        step = int(found[1]) if found else 0
        if self.before and step != self.before:
            raise Failure(f"resumed from step {step}, the newest checkpoint was {self.before}")
        return step

    def kill_when(self, due: Callable[[], bool], what: str) -> None:
        """``kill -9`` as soon as ``due()``."""
        limit = time.monotonic() + 600
        try:
            while not due():
                if self.process.poll() is not None:
                    raise Failure(f"the run ended before {what}:\n{self.said()}")
                if time.monotonic() > limit:
                    raise Failure(f"waited 600 s for {what}:\n{self.said()}")
                time.sleep(0.001)
        finally:
            self.process.kill()
            self.process.wait()

    def finish(self) -> None:
        if self.process.wait(timeout=600) != 0:
            raise Failure(f"the run failed:\n{self.said()}")

    def past_new_checkpoint(self) -> bool:
        """Does metrics.jsonl show a step past a checkpoint that this process made?"""
        newest = max(saved_steps(self.checkpoints), default=0)
        rows = read_rows(self.rows) if newest > self.before else []
        return bool(rows) and rows[-1]["step"] > newest

    def unfinished(self) -> list[str]:
        """Steps that are being written: orbax renames their folder when it is whole."""
        if not self.checkpoints.is_dir():
            return []
        return [p.name for p in self.checkpoints.iterdir() if ".orbax-checkpoint-tmp" in p.name]


def drill(folder: Path) -> None:
    """Runs the drill in ``folder``. Raises Failure."""
    reference, killed = folder / "reference", folder / "killed"
    print("uninterrupted run ...", flush=True)
    Run(reference, folder / "reference.log").finish()

    log = folder / "killed.log"
    for kill in range(1, KILLS + 1):
        run = Run(killed, log)
        run.kill_when(run.past_new_checkpoint, "a row past a new checkpoint")
        report(f"kill {kill} of {KILLS}", run)
    for _attempt in range(5):
        run = Run(killed, log)
        # A leftover of an earlier kill is cleared away before the first save.
        old = set(run.unfinished())
        run.kill_when(lambda run=run, old=old: bool(set(run.unfinished()) - old), "a save")
        inside = set(run.unfinished()) - old
        report(f"kill inside the save {sorted(inside)}" if inside else "kill after a save", run)
        if inside:
            break
    else:
        raise Failure("no kill struck inside a save in 5 attempts")
    run = Run(killed, log)
    run.finish()
    print(f"last run: resumed from step {run.resumed_from()}, trained to the end", flush=True)
    compare_records(reference, killed)
    compare_rows(reference, killed)
    compare_arrays(reference, killed)


def report(title: str, run: Run) -> None:
    resumed = run.resumed_from()
    start = f"resumed from step {resumed}" if resumed else "started from scratch"
    steps = saved_steps(run.checkpoints)
    last = read_rows(run.rows)[-1]["step"] if read_rows(run.rows) else 0
    print(f"{title}: {start}; rows up to {last}, whole checkpoints {steps}", flush=True)


def compare_records(reference: Path, killed: Path) -> None:
    """Failure if data, versions or devices changed while the drill ran."""
    there, here = (flatten(read_record(workdir) or {}) for workdir in (reference, killed))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise Failure(
                f"{name} changed while the drill ran, from {there.get(name)!r} to "
                f"{here.get(name)!r}: nothing can be compared"
            )


def compare_rows(reference: Path, killed: Path) -> None:
    """Failure unless the metric rows are equal in all fields but those of time."""
    there, here = (
        [
            {name: value for name, value in row.items() if name not in TIME_FIELDS}
            for row in read_rows(workdir / "metrics.jsonl")
        ]
        for workdir in (reference, killed)
    )
    if [row["step"] for row in here] != [row["step"] for row in there]:
        raise Failure("the metric rows are of other steps")
    for a, b in zip(there, here, strict=True):
        differing = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        if differing:
            raise Failure(f"the row of step {a['step']} differs in {', '.join(differing)}")
    fields = sum(len(row) for row in here)
    print(f"metrics.jsonl: {len(here)} rows, {fields} fields, equal but for time")


def compare_arrays(reference: Path, killed: Path) -> None:
    """Failure unless the last checkpoints hold the same bits."""
    loaded = []
    for workdir in (reference, killed):
        checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
        step = checkpoints.latest()
        if step is None:
            raise Failure(f"no checkpoint in {workdir}")
        arrays = checkpoints.arrays(step)
        loaded.append((step, {name: np.asarray(array) for name, array in arrays.items()}))
        checkpoints.close()
    (step, there), (other_step, here) = loaded
    if step != other_step or there.keys() != here.keys():
        raise Failure(f"the last checkpoints differ: step {step} and {other_step}")
    differing = [name for name in there if there[name].tobytes() != here[name].tobytes()]
    if differing:
        raise Failure(f"at step {step} these differ: {', '.join(differing)}")
    print(f"checkpoint of step {step}: {len(here)} arrays, equal bit for bit")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, help="an empty folder to keep the runs in")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moejax_drill_") as temporary:
        folder = args.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--workdir {folder}: is not empty")
        try:
            drill(folder)
        except Failure as failure:
            print(f"FAIL: {failure}")
            return 1
    print(f"PASS in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
