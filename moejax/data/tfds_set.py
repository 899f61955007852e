"""A prepared set of TensorFlow Datasets: where it lies, and which of its features are wanted.

``tensorflow_datasets`` without TensorFlow can read sets in the ArrayRecord format from their folder
alone (``features.json``, ``dataset_info.json``). What it cannot do is left to the user, by the
command that the error message gives.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config.schema import DataConfig
from moejax.errors import UserError, did_you_mean

SPEC = re.compile(r"(?P<name>[A-Za-z]\w*)(/(?P<config>[^/:]+))?(:(?P<version>\d+\.\d+\.\d+))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")
METADATA = ("features.json", "dataset_info.json")


def find_set(rest: str, data_dir: str) -> Path:
    """The folder ``data_dir/NAME[/CONFIG]/VERSION`` of ``NAME[/CONFIG][:VERSION]``.

    Without a version the newest is taken. Raises UserError, with the command that makes the set,
    if it is not there.
    """
    spec = SPEC.fullmatch(rest)
    if not spec:
        raise UserError(
            f"data.source: 'tfds:{rest}' is not tfds:NAME[/CONFIG][:VERSION], such as "
            "'tfds:coco_captions/2014'"
        )
    name, config, version = spec["name"], spec["config"], spec["version"]
    root = Path(data_dir).expanduser()
    public = f"{name}/{config}" if config else name
    build = f"`tfds build {public} --file_format=array_record --data_dir={root}`"
    folder = root / public
    if not (root / name).is_dir():
        raise UserError(
            f"data.source: no set {name!r} in data.data_dir={root}; prepare a public one by "
            f"{build} (needs TensorFlow), your own pictures by `moejax prepare folder DIR "
            f"--name {name} --data-dir {root}`"
        )
    configs = sorted(p.name for p in (root / name).iterdir() if p.is_dir() and _versions(p))
    if not folder.is_dir():
        raise UserError(
            f"data.source: {root / name} has no config {config!r}{did_you_mean(config, configs)}; "
            f"or prepare it by {build} (needs TensorFlow)"
        )
    versions = _versions(folder)
    if not versions and configs and not config:
        raise UserError(
            f"data.source: {folder} holds configs: write "
            f"{' or '.join(f'tfds:{name}/{other}' for other in configs)}"
        )
    if not versions:
        raise UserError(
            f"data.source: {folder} has no finished version (a folder such as 1.0.0): it was not "
            f"prepared to the end; run {build} again (needs TensorFlow)"
        )
    if version and version not in versions:
        raise UserError(
            f"data.source: {folder} has no version {version!r}{did_you_mean(version, versions)}"
        )
    folder /= version or versions[-1]
    for file in METADATA:
        if not (folder / file).is_file():
            raise UserError(
                f"data.source: {folder / file} is missing: the set was not prepared to the end, or "
                f"by TFDS 3 or older; delete {folder} and prepare it again by {build} "
                "(needs TensorFlow)"
            )
    return folder


def _versions(folder: Path) -> list[str]:
    """The versions in a folder, oldest first."""
    names = [p.name for p in folder.iterdir() if VERSION.fullmatch(p.name) and p.is_dir()]
    return sorted(names, key=lambda name: [int(number) for number in name.split(".")])


def open_set(folder: Path) -> Any:
    """The ``tfds.core.DatasetBuilder`` of a prepared set. UserError if it cannot be read here."""
    import tensorflow_datasets as tfds

    try:
        # Where it misses TensorFlow it prints a banner, which the message below makes needless.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder_from_directory(folder)
        formats = {str(item.value) for item in builder.info.available_file_formats()}
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.source: {folder} has features (such as audio and video) that cannot be read "
            f"without {error.name}; pip install {error.name}, or choose another set"
        ) from error
    except Exception as error:  # Of many kinds: bad JSON, classes of another package, ...
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.source: {folder} cannot be read ({why}); install what it asks for, or prepare "
            "the set again"
        ) from error
    if "array_record" not in formats:
        raise UserError(
            f"data.source: {folder} is in the format {' and '.join(sorted(formats))}, which cannot "
            "be read without TensorFlow; convert it where TensorFlow is installed: "
            f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record`"
        )
    return builder


@dataclasses.dataclass(frozen=True)
class Field:
    """A feature of the set that records are made of."""

    keys: tuple[str, ...]  # in the nested dicts
    feature: Any
    lists: int = 0  # how many lists it lies in

    @property
    def class_names(self) -> list[str] | None:
        """The names of a ClassLabel's labels (their numbers if it has no names), else None."""
        return getattr(self.feature, "names", None)

    def value(self, values: dict) -> Any:
        """Finds the field in a decoded example."""
        for key in self.keys:
            values = values[key]
        return values


def choose_fields(features: Any, data: DataConfig, source: str) -> dict[str, Field]:
    """The fields ``image``, ``text``, ``label``, ``id`` and ``family`` as far as they are wanted.

    ``id`` and ``family`` are taken only from sets that have both as texts, which are those that
    ``moejax prepare folder`` makes.
    """
    fields = {}
    for kind in ("image", "label", "text"):
        option = f"{kind}_feature"
        path = getattr(data, option)
        is_default = path == getattr(DataConfig, option)
        if not path:
            continue
        field = _find(features, path)
        if field is None and kind == "label" and is_default:
            continue
        if field is None and kind == "text" and is_default and "label" in fields:
            # A classification set: the label's name is the text.
            field = fields["label"] if fields["label"].class_names else None
        if field is None:
            raise UserError(
                f"data.{option}: {source} has no feature {path!r}"
                f"{did_you_mean(path, _paths(features))} (data.{option}='' leaves it out)"
            )
        if wrong := _why_not(kind, field):
            raise UserError(f"data.{option}: {path!r} of {source} {wrong}")
        fields[kind] = field
    own = {name: _find(features, name) for name in ("id", "family")}
    if all(field and not field.lists and _is_text(field) for field in own.values()):
        fields |= own
    return fields


def _is_text(field: Field) -> bool:
    feature = field.feature
    return field.class_names is None and feature.shape == () and feature.np_dtype in (object, str)


def _why_not(kind: str, field: Field) -> str:
    """Why a feature cannot serve as ``kind``; ``""`` if it can."""
    import tensorflow_datasets as tfds

    feature, what = field.feature, f"is {field.feature!r}"
    if kind == "text":
        if field.lists <= 1 if _is_text(field) else field.class_names and not field.lists:
            return ""
        what += " in a list of lists" if field.lists > 1 else " in a list" if field.lists else ""
        return f"{what}; name a text, a list of texts, or a label"
    if field.lists:
        return f"is a part of a list; name a single {kind}"
    if kind == "label":
        scalar = feature.shape == () and np.issubdtype(feature.np_dtype, np.integer)
        return "" if scalar else f"{what}; name a ClassLabel or an integer"
    if isinstance(feature, tfds.features.Image):
        return "" if feature.np_dtype in (np.uint8, np.uint16) else f"{what}; its pixels are floats"
    shape = tuple(feature.shape or ())
    pixels = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if pixels and feature.np_dtype == np.uint8:
        return ""
    return f"{what}; name an Image, or a uint8 tensor [height, width, 1, 3 or 4]"


def _find(features: Any, path: str) -> Field | None:
    """The feature at ``a/b/c``; a key may itself hold slashes, as in ``image/filename``."""
    import tensorflow_datasets as tfds

    # Exactly Sequence: its subclasses (Video, Dataset) are decoded in ways of their own.
    if type(features) is tfds.features.Sequence:
        inner = _find(features.feature, path)
        return inner and dataclasses.replace(inner, lists=inner.lists + 1)
    if not path:
        is_dict = isinstance(features, tfds.features.FeaturesDict)
        return None if is_dict else Field((), features)
    if not isinstance(features, tfds.features.FeaturesDict):
        return None
    parts = path.split("/")
    for end in range(len(parts), 0, -1):
        key = "/".join(parts[:end])
        if key in features:
            inner = _find(features[key], "/".join(parts[end:]))
            return inner and dataclasses.replace(inner, keys=(key, *inner.keys))
    return None


def _paths(features: Any) -> list[str]:
    """The paths of all features."""
    import tensorflow_datasets as tfds

    if type(features) is tfds.features.Sequence:
        return _paths(features.feature)
    if not isinstance(features, tfds.features.FeaturesDict):
        return [""]
    return [f"{key}/{path}".rstrip("/") for key in features for path in _paths(features[key])]


def subset(features: Any, fields: Iterable[Field]) -> Any:
    """The features of ``fields`` alone, for ``deserialize_example_np``; pictures stay encoded."""
    return _narrow(features, [field.keys for field in fields])


def _narrow(features: Any, paths: list[tuple[str, ...]]) -> Any:
    import tensorflow_datasets as tfds

    # tfds.decode.PartialDecoding would do the same, but asks TensorFlow for dtypes.
    if type(features) is tfds.features.Sequence:
        return tfds.features.Sequence(_narrow(features.feature, paths))
    if isinstance(features, tfds.features.FeaturesDict):
        inner = {key: [path[1:] for path in paths if path[0] == key] for key in features}
        return tfds.features.FeaturesDict(
            {key: _narrow(features[key], rest) for key, rest in inner.items() if rest}
        )
    # Stored as a string of bytes, which is how a text is decoded too.
    return tfds.features.Text() if isinstance(features, tfds.features.Image) else features
