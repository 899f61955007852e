"""What the "routing" evaluator found at one step: the arrays of ``workdir/arrays``, for reports."""

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.analysis.routing import NONE, agreement

# The arrays' name in ``workdir/arrays/step_N/SPLIT_NAME.npz``.
NAME = "routing"


# An expert with less than this part of the even share of choices counts as dead.
DEAD = 0.01


def _no(*shape: int) -> Any:
    """The default of a field that records of sequences, and older ones, do not have."""
    return dataclasses.field(default_factory=lambda: np.zeros(shape))


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """Counts over a split, and the choices of a few rows of it. Layers of experts only.

    Layers with fewer experts than others have zeros at the end.

    Attributes:
      layers: [l], the numbers of the layers.
      iterations: [l], which of its runs of the experts (model.moe.iterations).
      experts: [l], how many there are to choose from.
      num_ffn: [l], how many of those have weights: the first.
      modalities: [m], their names.
      weightless: [w], names of the experts after those.
      tokens: [m], counted.
      chosen: [l, m, e], choices before any capacity.
      kept: [l, m, e], choices after it.
      together: [l, e, e], tokens that have both experts.
      dropped: [l, 10], choices that were dropped in each tenth of the rows.
      choices: [l, 10], of how many.
      expert_entropy: [l], H(expert), like the following ones in nats.
      token_entropy: [l], H(expert | token id).
      shuffled_token_entropy: [l], the same for ids dealt anew among the tokens of a modality.
      modality_entropy: [l], H(expert | modality).
      row_tokens: [b, t], ids of the vocabulary of some rows, the same at each step.
      row_modality: [b, t].
      row_valid: [b, t] bool, False for padding.
      row_pieces: [b, t], the text of each token.
      row_experts: [l, b, t, k], the choices, the largest weight first; NONE at the end.
      pictures: [p, h, w, 3] uint8, those in the rows.
      places: [p, 2], row and first token of each.
      grid: [2], rows and columns of a picture's tokens.
      classes: [v], names of the classes of labelled pictures; none for a model of sequences.
      by_class: [l, v, e], choices of the tokens of each class's pictures.
      by_patch: [l, p, e], choices of the patch at each place of the grid.
      class_entropy: [l], H(expert | class); NaN where no token is of a picture with a class.
      times: [q], the noise levels that a diffusion model was asked about, from data to noise.
      by_time: [l, q, e], choices of the tokens of pictures at each of them.
      time_entropy: [l], H(expert | noise level).
    """

    layers: np.ndarray
    iterations: np.ndarray
    experts: np.ndarray
    num_ffn: np.ndarray
    modalities: np.ndarray
    weightless: np.ndarray
    tokens: np.ndarray
    chosen: np.ndarray
    kept: np.ndarray
    together: np.ndarray
    dropped: np.ndarray
    choices: np.ndarray
    expert_entropy: np.ndarray
    token_entropy: np.ndarray
    shuffled_token_entropy: np.ndarray
    modality_entropy: np.ndarray
    row_tokens: np.ndarray
    row_modality: np.ndarray
    row_valid: np.ndarray
    row_pieces: np.ndarray
    row_experts: np.ndarray
    pictures: np.ndarray
    places: np.ndarray
    grid: np.ndarray
    classes: np.ndarray = _no(0)
    by_class: np.ndarray = _no(0, 0, 0)
    by_patch: np.ndarray = _no(0, 0, 0)
    class_entropy: np.ndarray = _no(0)
    times: np.ndarray = _no(0)
    by_time: np.ndarray = _no(0, 0, 0)
    time_entropy: np.ndarray = _no(0)

    def arrays(self) -> dict[str, np.ndarray]:
        """For a file."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def read(cls, path: Path) -> "RoutingRecord":
        """From a file; an error of ``np.load`` if it is none, KeyError if of another version."""
        with np.load(path, allow_pickle=False) as file:
            wanted = [
                field.name
                for field in dataclasses.fields(cls)
                if field.name in file or field.default_factory is dataclasses.MISSING
            ]
            return cls(**{name: file[name] for name in wanted})

    @property
    def picture_layers(self) -> list[int]:
        """The places of the layers that are given pictures: all but those of a tower of texts."""
        known = self.by_patch.any()
        return [i for i in range(len(self.layers)) if not known or self.by_patch[i].any()]

    @property
    def layer_names(self) -> list[str]:
        """``"layer 3"``; with its run, where a layer runs its experts several times."""
        several = self.iterations.max(initial=0) > 0
        return [
            f"layer {layer}" + (f", run {iteration + 1}" if several else "")
            for layer, iteration in zip(self.layers, self.iterations, strict=True)
        ]

    def expert_name(self, layer: int, expert: int) -> str:
        """The number of an expert, or the name of one without weights; "none" for NONE."""
        if expert == NONE:
            return "none"
        past = int(expert) - int(self.num_ffn[layer])
        return str(expert) if past < 0 else str(self.weightless[past])

    def expert_names(self) -> list[str]:
        """The columns of a table of all layers: names where they are the same in every layer."""
        widest = int(np.argmax(self.experts))
        same = (self.num_ffn == self.num_ffn[widest]).all()
        names = [self.expert_name(widest, i) for i in range(int(self.experts[widest]))]
        return names if same else list(map(str, range(len(names))))

    def color_index(self, layer: int, expert: int) -> int:
        """A number for the colour of an expert; of one without weights the same in all layers."""
        past = int(expert) - int(self.num_ffn[layer])
        return int(expert) if past < 0 else int(self.num_ffn.max()) + past

    def load(self, modality: int | None = None) -> np.ndarray:
        """[l, e]: the share of the choices (of one modality) that each expert has.

        NaN for experts that a layer does not have, and for a modality without a choice.
        """
        counts = self.chosen.sum(axis=1) if modality is None else self.chosen[:, modality]
        total = counts.sum(axis=-1, keepdims=True)
        share = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
        there = np.arange(counts.shape[-1]) < self.experts[:, None]
        return np.where(there, share, np.nan)

    def dead(self) -> np.ndarray:
        """[l]: experts with weights that have less than ``DEAD`` of the even share of choices."""
        counts = self.chosen.sum(axis=1)
        there = np.arange(counts.shape[-1]) < self.num_ffn[:, None]
        even = np.where(there, counts, 0).sum(axis=-1) / self.num_ffn
        return (there & (counts < DEAD * even[:, None])).sum(axis=-1)

    def class_share(self) -> np.ndarray:
        """[l, v, e]: the share of the choices of a class's tokens that each expert has; NaN where
        the class has no choice, or the layer no such expert.
        """
        return self._shares(self.by_class)

    def patch_share(self) -> np.ndarray:
        """[l, p, e]: the same for the patch at each place of the grid."""
        return self._shares(self.by_patch)

    def time_share(self) -> np.ndarray:
        """[l, q, e]: the same for the tokens of pictures at each noise level."""
        return self._shares(self.by_time)

    def _shares(self, counts_lxe: np.ndarray) -> np.ndarray:
        total = counts_lxe.sum(axis=-1, keepdims=True)
        empty = np.full(counts_lxe.shape, np.nan)
        share = np.divide(counts_lxe, total, out=empty, where=total > 0)
        there = np.arange(counts_lxe.shape[-1]) < self.experts[: len(counts_lxe), None, None]
        return np.where(there, share, np.nan)

    def drop_rate(self) -> np.ndarray:
        """[l, 10]: the share of choices dropped in each tenth of a row; NaN where there is none."""
        empty = np.full(self.choices.shape, np.nan)
        return np.divide(self.dropped, self.choices, out=empty, where=self.choices > 0)

    def agreement(self, other: "RoutingRecord") -> np.ndarray | None:
        """[l]: the share of the rows' tokens whose first expert is the same in both records.

        None where they are about other rows or layers.
        """
        if not (
            np.array_equal(self.row_tokens, other.row_tokens)
            and np.array_equal(self.layers, other.layers)
            and np.array_equal(self.experts, other.experts)
            # Tokens of a vision transformer are known by their place alone.
            and np.array_equal(self.pictures, other.pictures)
        ):
            return None
        return np.asarray(
            [
                agreement(ours[self.row_valid], theirs[self.row_valid])
                for ours, theirs in zip(self.row_experts, other.row_experts, strict=True)
            ]
        )


def read_records(workdir: Path, split: str) -> dict[int, RoutingRecord]:
    """The records of a run by step: of ``split``, or else of the split with the most of them.

    Files that cannot be read, such as one of an older version, are left out.
    """
    found: dict[str, dict[int, RoutingRecord]] = {}
    for path in (workdir / "arrays").glob(f"step_*/*_{NAME}.npz"):
        number = path.parent.name.removeprefix("step_")
        if not number.isdecimal() or path.name.startswith("."):
            continue
        try:
            record = RoutingRecord.read(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            continue
        found.setdefault(path.name.removesuffix(f"_{NAME}.npz"), {})[int(number)] = record
    if not found:
        return {}
    chosen = split if split in found else max(sorted(found), key=lambda name: len(found[name]))
    return dict(sorted(found[chosen].items()))


def consecutive_agreement(
    records: dict[int, RoutingRecord],
) -> tuple[Sequence[str], np.ndarray]:
    """(``"80 to 160"``, ...) and [l, pairs]: agreement of each evaluation with the one before."""
    names, columns = [], []
    steps = sorted(records)
    for before, after in zip(steps, steps[1:], strict=False):
        found = records[after].agreement(records[before])
        if found is not None:
            names.append(f"{before} to {after}")
            columns.append(found)
    return names, np.stack(columns, axis=1) if columns else np.zeros((0, 0))
