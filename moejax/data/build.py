"""The pipeline that a config describes."""

import dataclasses
from typing import Any

from moejax.config.schema import Config, DataConfig
from moejax.data.image_codes import ImageCodec
from moejax.data.mixture import MixedRecords, MixturePipeline
from moejax.data.packed_images import PackedImagePipeline
from moejax.data.pair_pipeline import PairPipeline
from moejax.data.pipeline import ImagePipeline, RowPipeline
from moejax.data.sources import RecordSource, open_source
from moejax.data.token_pipeline import TokenPipeline
from moejax.errors import UserError


def build_pipeline(config: Config, split: str, *, codec: ImageCodec | None = None) -> RowPipeline:
    """The pipeline of ``config.data`` over one split.

    ``codec`` is the frozen image tokenizer, needed for token sequences with pictures and for
    ``data.latents``.
    Raises UserError for data that cannot be read or does not fit the model.
    """
    if config.data.sources:
        parts = [_of_source(config, spec, split, codec) for spec, _ in config.data.sources]
        return MixturePipeline(config, parts)
    return _of_source(config, config.data.source, split, codec)


def open_records(data: DataConfig, split: str, **fields: Any) -> RecordSource:
    """The records of ``data.source`` or of all of ``data.sources``; ``fields`` replace some."""
    if not data.sources:
        return open_source(data.source, split, data, **fields)
    return MixedRecords([open_source(spec, split, data, **fields) for spec, _ in data.sources])


def _of_source(config: Config, spec: str, split: str, codec: ImageCodec | None) -> Any:
    source = open_source(spec, split, config.data)
    if len(source) == 0:
        raise UserError(f"data.source={spec}: split {split!r} has no records")
    if config.data.image_sizes:
        return PackedImagePipeline(config, source)
    if config.data.format == "images":
        return ImagePipeline(config, source, codec)
    if config.data.format == "pairs":
        return PairPipeline(config, source, codec)
    data = dataclasses.replace(config.data, source=spec, sources=())
    return TokenPipeline(dataclasses.replace(config, data=data), source, codec)
