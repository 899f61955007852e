"""Names, axes and towers of parameters: what the rules of a config go by.

Parameters come boxed with the logical names of their axes (as the modules make them), as bare
arrays, or as shapes of either.
"""

import difflib
from collections.abc import Iterable
from typing import Any

import jax
from flax.core import meta

from moejax import axes

# Axes that count parameters of one kind; the rest are the shape of a single parameter.
GROUP_AXES = (axes.LAYERS, axes.MODALITY, axes.EXPERT, axes.LOCAL_EXPERT)


def path_name(path) -> str:
    """``"blocks/ffn/wi_mdf"`` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_box(leaf: Any) -> bool:
    """Whether ``leaf`` is a parameter with the logical names of its axes around it."""
    return isinstance(leaf, meta.AxisMetadata)


def named_leaves(params: Any) -> dict[str, Any]:
    """``{path: parameter}``, the boxes kept."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return {path_name(path): leaf for path, leaf in leaves}


def shape_of(leaf: Any) -> tuple[int, ...]:
    return tuple(meta.unbox(leaf).shape)


def axis_names(leaf: Any) -> tuple[str | None, ...]:
    """Logical names of the axes; None for each that has none."""
    return tuple(getattr(leaf, "names", (None,) * len(shape_of(leaf))))


def own_axes(leaf: Any) -> tuple[int, ...]:
    """The axes that are not in GROUP_AXES: one for a vector, though layers of it are stacked."""
    return tuple(i for i, name in enumerate(axis_names(leaf)) if name not in GROUP_AXES)


def modality_axis(leaf: Any) -> int | None:
    names = axis_names(leaf)
    return names.index(axes.MODALITY) if axes.MODALITY in names else None


def expert_axis(leaf: Any) -> int | None:
    names = axis_names(leaf)
    return names.index(axes.EXPERT) if axes.EXPERT in names else None


def hidden_axis(leaf: Any) -> int | None:
    names = axis_names(leaf)
    return names.index(axes.MLP) if axes.MLP in names else None


def towers_of(name: str, leaf: Any, modalities: tuple[str, ...]) -> tuple[str, ...]:
    """The modality that owns each row of the modality axis; () where the modalities share one.

    Towers of unequal width are parameters of their own, with ``_<modality>`` at their end.
    """
    axis = modality_axis(leaf)
    if axis is None:
        return ()
    size = shape_of(leaf)[axis]
    if size == len(modalities):
        return modalities
    return tuple(modality for modality in modalities if size == 1 and name.endswith(f"_{modality}"))


def nearest_names(pattern: str, names: Iterable[str]) -> str:
    """The end of an error line about a pattern that is found in none of the paths ``names``."""
    names = sorted(names)
    words = sorted({word for name in names for word in (name, *name.split("/"))})
    close = difflib.get_close_matches(pattern, words, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    hint = "; write several as \"('a', 'b')\"" if "," in pattern else ""
    return f"{hint}; the parameters are {', '.join(names[:12])}" + (", ..." if names[12:] else "")
