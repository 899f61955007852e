"""Checkpoints: asynchronous, atomic, the newest and the best kept. The one user of orbax.

Layout of ``checkpoints/<step>/``: the items ``params``, ``ema`` (when one is kept), ``rest`` (all
other fields of the TrainState, and the metric sums since the last row) and ``layout``, a JSON of
``{"format", "step", "mesh", "metrics", "arrays": {"params/head_dv": "float32[128,5112]", ...}}``. A
step folder appears by one rename, so a folder with a bare number is whole.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import serialization

from moejax.errors import UserError
from moejax.parallel import distributed
from moejax.train.evaluate import metric_score
from moejax.train.optim import path_name
from moejax.train.state import TrainState

FORMAT = 1
# Where orbax moves a step that is no longer kept: one rename, so that a kill in the middle of a
# deletion cannot leave half a step under its number.
_TRASH = ".deleted"


def saved_steps(folder: Path) -> list[int]:
    """The whole checkpoints under ``folder``, oldest first; needs no orbax."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())


class Checkpoints:
    """Saves and restores the checkpoints of one run.

    Args:
      folder: ``WORKDIR/checkpoints``.
      keep: how many of the newest to keep.
      best_metric: evaluation metric whose lowest checkpoint is kept as well, or with a minus sign
        in front ("-psnr") the highest; "" for none.
      read_only: touch nothing: the run may be under way.
    """

    def __init__(
        self, folder: Path, *, keep: int = 1, best_metric: str = "", read_only: bool = False
    ):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = folder.resolve()
        self._read_only = read_only
        self._best_metric = best_metric
        # step -> score of the checkpoints that were evaluated, the lowest is the best.
        self._measured: dict[int, float] = {}
        self._empty_trash()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Preserve(keep, self._measured),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                todelete_subdir=_TRASH,
            ),
        )
        if best_metric:
            for step in self._manager.all_steps():
                self._measure(step, self._layout(step)["metrics"])

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> float:
        """The lowest score among the checkpoints; inf if none was evaluated."""
        return min(self._measured.values(), default=math.inf)

    def score(self, metrics: dict[str, float] | None) -> float:
        """``best_metric`` in ``metrics``, turned so that less is better; inf if it is not there."""
        return metric_score(self._best_metric, metrics or {})

    def save(
        self,
        step: int,
        state: TrainState,
        sums: Any,
        mesh: jax.sharding.Mesh,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts to write ``state`` and the metric sums ``sums``; returns once they are copied.

        ``metrics`` are those of an evaluation of this very state, if there was one.
        """
        args = self._ocp.args
        # Only one save at a time; the one before may still be moving old steps to the trash.
        self.wait()
        self._empty_trash()
        items = _items(state, sums)
        layout = {
            "format": FORMAT,
            "step": step,
            "mesh": dict(mesh.shape),
            "arrays": _arrays(items),
            "metrics": metrics or {},
        }
        self._measure(step, layout["metrics"])
        saved = {name: args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(
            step,
            args=args.Composite(**saved, layout=args.JsonSave(layout)),
            force=True,
        )

    def restore(self, step: int, abstract: TrainState, sums: Any) -> tuple[TrainState, Any]:
        """The (state, metric sums) of ``step``, with the shapes and shardings of the arguments.

        Raises:
          UserError: the checkpoint holds other arrays than ``abstract``.
        """
        items = _items(abstract, sums)
        self._check(step, items)
        restored = self._restore(step, items)
        rest = restored["rest"]
        tree = {
            **rest["state"],
            "params": restored["params"],
            "ema": restored.get("ema", {}),
        }
        state: Any = serialization.from_state_dict(abstract, _refill(_state_dict(abstract), tree))
        sums = serialization.from_state_dict(sums, _refill(_state_dict(sums), rest.get("sums", {})))
        return state, sums

    def restore_eval_params(self, step: int, abstract: TrainState) -> Any:
        """The parameters to evaluate with at ``step``, nothing else is read."""
        name = "ema" if abstract.ema else "params"
        items = {name: getattr(abstract, name)}
        self._check(step, items)
        return self._restore(step, items)[name]

    def arrays(self, step: int) -> dict[str, jax.Array]:
        """All that was saved at ``step`` by path (``"params/head_dv"``), whole on one device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        items: dict[str, Any] = {}
        kinds = self._layout(step)["arrays"]
        for path, kind in kinds.items():
            shape, dtype = _shape_and_dtype(kind)
            _put(items, path, jax.ShapeDtypeStruct(shape, dtype, sharding=device))
        restored = jax.tree_util.tree_leaves_with_path(self._restore(step, items))
        return {path_name(path): leaf for path, leaf in restored}

    def param_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that was saved at ``step``, by path (``"head_dv"``)."""
        layout = self._layout(step)
        self._check_format(step, layout)
        return {
            path.removeprefix("params/"): _shape_and_dtype(kind)[0]
            for path, kind in layout["arrays"].items()
            if path.startswith("params/")
        }

    def restore_params(
        self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Some parameters of ``step`` by path, in the types and shardings of ``wanted``."""
        args, tree = self._ocp.args, {}
        for path, leaf in wanted.items():
            _put(tree, path, leaf)
        restore = args.PyTreeRestore(
            tree,
            restore_args=self._ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )
        restored = self._manager.restore(step, args=args.Composite(params=restore))["params"]
        return {
            path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
        }

    def wait(self) -> None:
        """Blocks until the save under way is on disk; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
        self._empty_trash()

    def _restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        args = self._ocp.args
        wanted = {name: args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._manager.restore(step, args=args.Composite(**wanted))
        return {name: restored[name] for name in items}

    def _check(self, step: int, items: dict[str, Any]) -> None:
        # Orbax answers a wrong shape with thousands of lines; the layout answers with one.
        where = self.folder / str(step)
        if step not in self._manager.all_steps():
            steps = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise UserError(
                f"--step {step}: no such checkpoint in {self.folder}; there are: {steps}"
            )
        layout = self._layout(step)
        self._check_format(step, layout)
        there = {
            name: kind for name, kind in layout["arrays"].items() if name.partition("/")[0] in items
        }
        here = _arrays(items)
        # "params/..." says more than its average or its moments, which differ with it.
        for name in sorted(there.keys() | here.keys(), key=lambda n: (n[:7] != "params/", n)):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"{where}: {name} is {there.get(name, 'missing')} in the checkpoint and "
                    f"{here.get(name, 'missing')} in the config; use the config that the run was "
                    "made with, or another --workdir"
                )

    def _check_format(self, step: int, layout: dict) -> None:
        if layout["format"] != FORMAT:
            raise UserError(
                f"{self.folder / str(step)}: checkpoint format {layout['format']}, this moejax "
                f"reads {FORMAT}; train again in another --workdir"
            )

    def _layout(self, step: int) -> dict:
        args = self._ocp.args
        try:
            wanted = args.Composite(layout=args.JsonRestore())
            return self._manager.restore(step, args=wanted)["layout"]
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise UserError(
                f"{self.folder / str(step)}: is no checkpoint of moejax, or was damaged; delete "
                "this folder to go on from the one before"
            ) from error

    def _measure(self, step: int, metrics: dict[str, float]) -> None:
        score = self.score(metrics)
        if math.isfinite(score):
            self._measured[step] = score

    def _empty_trash(self) -> None:
        if not self._read_only and distributed.primary():
            shutil.rmtree(self.folder / _TRASH, ignore_errors=True)


class _Preserve:
    """Orbax preservation policy: the ``keep`` newest steps and the one measured lowest."""

    def __init__(self, keep: int, measured: dict[int, float]):
        self.keep = keep
        self.measured = measured

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = set(steps[-self.keep :])
        kept.update(sorted(set(steps) & self.measured.keys(), key=self.measured.__getitem__)[:1])
        return [step in kept for step in steps]


def _items(state: TrainState, sums: Any) -> dict[str, Any]:
    tree = _state_dict(state)
    items = {"params": tree.pop("params")}
    ema = tree.pop("ema")
    if ema:
        items["ema"] = ema
    items["rest"] = _drop_empty({"state": tree, "sums": _state_dict(sums)})
    return items


def _state_dict(tree: Any) -> Any:
    # Named tuples and structs become dicts, so that what is on disk has names of its own.
    return serialization.to_state_dict(tree)


def _drop_empty(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    pruned = {key: _drop_empty(value) for key, value in tree.items()}
    return {key: v for key, v in pruned.items() if not (isinstance(v, dict) and not v)}


def _refill(like: Any, tree: Any) -> Any:
    """Puts back the empty dicts of ``like`` that :func:`_drop_empty` took out of ``tree``."""
    if not isinstance(like, dict):
        return tree
    return {key: _refill(value, tree.get(key, {})) for key, value in like.items()}


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """``tree["a"]["b"] = leaf`` for the path ``"a/b"``."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def _shape_and_dtype(kind: str) -> tuple[tuple[int, ...], Any]:
    """``"float32[2,3]"`` -> ((2, 3), float32)."""
    dtype, _, shape = kind.rstrip("]").partition("[")
    return tuple(int(size) for size in shape.split(",") if size), jax.numpy.dtype(dtype)


def _arrays(items: dict[str, Any]) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return {
        path_name(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves
    }
