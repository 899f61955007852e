"""Metric rows: ``metrics.jsonl``, and TensorBoard or Weights & Biases where the config says so."""

import importlib
import json
import math
import netrc
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlsplit

import numpy as np

from moejax.config import to_dict
from moejax.config.schema import Config, LogConfig
from moejax.errors import UserError

# Fields that differ between two runs that are otherwise equal.
TIME_FIELDS = (
    "wall_time",
    "train/seconds_per_step",
    "train/tokens_per_second",
    "train/examples_per_second",
    "train/input_wait_fraction",
    "train/utilisation",
)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl or a file like it; a last line cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_rows(path: Path, step: int) -> TextIO:
    """The file of rows, open at its end, without those after ``step`` and without a line cut short.

    A new file and a rename: a kill leaves either the old rows or the cut ones.
    """
    rows = [row for row in read_rows(path) if row["step"] <= step]
    cut = path.with_suffix(".jsonl.tmp")
    with cut.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(cut, path)
    return path.open("a", encoding="utf-8")


def check_writers(log: LogConfig) -> None:
    """UserError unless what ``log.tensorboard`` and ``log.wandb`` need is installed and set."""
    # A folder called wandb, as W&B makes them, can be imported too: hence the name looked for.
    wanted = (
        (log.tensorboard, "tensorboard", "tensorboardX", "SummaryWriter"),
        (log.wandb, "wandb", "wandb", "init"),
    )
    for on, extra, package, name in wanted:
        if on and not hasattr(_import(package), name):
            raise UserError(f"log.{extra}: needs {package}; pip install 'moejax[{extra}]'")
    if log.wandb:
        wandb_mode()


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


class Sink(Protocol):
    """Where rows go beside metrics.jsonl. ``note`` is a line for the user, or ""."""

    note: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the finite values of one row."""
        ...

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Takes pictures [h, w, 3] uint8."""
        ...

    def close(self) -> None: ...


class MetricWriter:
    """Appends rows; opening it cuts the rows after the step that a run resumes from.

    Args:
      workdir: the run.
      step: the step that the state is at; later rows are dropped.
      sinks: where else rows and pictures go.
    """

    def __init__(self, workdir: Path, step: int, sinks: Sequence[Sink] = ()):
        self.workdir, self.sinks = workdir, sinks
        self.path = workdir / "metrics.jsonl"
        self._file = append_rows(self.path, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row; NaN and infinity, which JSON does not have, are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        row = {"step": step, "wall_time": time.time(), **finite}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for sink in self.sinks:
            sink.write(step, finite)

    def sync(self) -> None:
        """Returns once the rows are where a checkpoint of this moment is.

        A mounted bucket takes what was written only now, or when the file is closed.
        """
        os.fsync(self._file.fileno())

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> list[Path]:
        """Writes ``samples/step_STEP/NAME.png`` (see :func:`save_images`), and to the sinks."""
        paths = save_images(self.workdir, step, images)
        named = {f"eval/{name}": image for name, image in images.items()}
        for sink in self.sinks:
            if named:
                sink.images(step, named)
        return paths

    def close(self) -> None:
        self._file.close()
        for sink in self.sinks:
            sink.close()


def save_images(workdir: Path, step: int, images: Mapping[str, np.ndarray]) -> list[Path]:
    """Writes each picture [h, w, 3] uint8 to ``workdir/samples/step_STEP/NAME.png``.

    A slash in a name becomes an underscore.
    """
    if not images:
        return []
    from PIL import Image

    from moejax.generate.images import save_png

    paths = []
    for name, image in images.items():
        path = workdir / "samples" / f"step_{step}" / f"{name.replace('/', '_')}.png"
        save_png(Image.fromarray(image), path)
        paths.append(path)
    return paths


def save_arrays(
    workdir: Path, step: int, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> list[Path]:
    """Writes each set of arrays to ``workdir/arrays/step_STEP/NAME.npz``, in one piece.

    A slash in a name becomes an underscore.
    """
    paths = []
    for name, members in arrays.items():
        path = workdir / "arrays" / f"step_{step}" / f"{name.replace('/', '_')}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **dict(members))  # pyright: ignore[reportArgumentType]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths


def open_sinks(config: Config, workdir: Path, step: int) -> list[Sink]:
    """The sinks that ``config.log`` asks for, at the step that the run goes on from."""
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoard(workdir, step))
    if config.log.wandb:
        sinks.append(WandB(config, workdir))
    return sinks


class TensorBoard:
    """``workdir/tensorboard``, by tensorboardX; what came after ``step`` is purged there."""

    note = ""

    def __init__(self, workdir: Path, step: int):
        import tensorboardX

        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class WandB:
    """A run of Weights & Biases, gone on with under the id in ``workdir/wandb_run_id``.

    Never asks for anything: without an account, or where the server does not answer, the run is
    written to ``workdir/wandb`` for ``wandb sync``. Steps are a value like the others, because the
    server refuses rows below its last step, and a run that was killed writes some of them again.
    """

    def __init__(self, config: Config, workdir: Path):
        self._wandb: Any = _import("wandb")
        run_id = _wandb_run_id(workdir / "wandb_run_id")
        mode, why = wandb_mode()
        options = {
            "project": config.log.wandb_project,
            "id": run_id,
            "name": workdir.resolve().name,
            "dir": str(workdir),
            "config": to_dict(config),
        }
        try:
            self._run = self._open(mode, options)
        except self._wandb.errors.Error as error:
            if mode != "online":
                raise
            # The service still holds the id of the run that could not begin.
            self._wandb.teardown(exit_code=1)
            mode, why = "offline", f"no connection ({' '.join(str(error).split())}); "
            self._run = self._open(mode, options)
        self.note = ""
        if mode == "offline":
            folder = workdir / "wandb"
            self.note = f"W&B: {why}written offline; upload with: wandb sync {folder}/offline-run-*"
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _open(self, mode: str, options: dict[str, Any]) -> Any:
        # Seconds; finish_timeout came after the first version that is supported.
        limits = {"init_timeout": 30.0, "finish_timeout": 300.0}
        known = self._wandb.Settings.model_fields
        settings = {name: value for name, value in limits.items() if name in known}
        return self._wandb.init(
            **options,
            mode=mode,
            # Offline there is nothing to look up; `wandb sync` joins the parts by their id.
            resume="allow" if mode == "online" else None,
            # The console stays the run's own: W&B would wrap stdout and the progress bar.
            settings=self._wandb.Settings(console="off", **settings),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        drawn = {name: self._wandb.Image(image) for name, image in images.items()}
        self._run.log({"step": step, **drawn})

    def close(self) -> None:
        self._run.finish()


def wandb_mode(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """("online", "offline" or "disabled", why): what WANDB_MODE and the account allow.

    ``wandb.init`` asks at the terminal where it finds no account, so it is looked for here. The
    reason is "" where WANDB_MODE gives it.

    Raises:
      UserError: WANDB_MODE is something else.
    """
    asked = environ.get("WANDB_MODE", "").lower()
    if asked in ("offline", "dryrun", "disabled"):
        return asked.replace("dryrun", "offline"), ""
    if asked not in ("", "online", "run", "shared"):
        raise UserError(f"WANDB_MODE: {asked!r} is none of online, offline, disabled")
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online", ""
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for file in filter(None, (environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if host in netrc.netrc(os.path.expanduser(file)).hosts:
                return "online", ""
        except (OSError, netrc.NetrcParseError):
            continue
    return "offline", "no account on this machine (wandb login); "


def _wandb_run_id(path: Path) -> str:
    """The id in ``path``; made at the first start."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        run_id = secrets.token_hex(4)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{run_id}\n", encoding="utf-8")
    os.replace(temporary, path)
    return run_id
