"""The frozen image tokenizer that a config names, of codes or of latent vectors."""

from moejax.config.schema import Config, DiTConfig
from moejax.data.image_codes import ImageCodec
from moejax.data.latents import PatchCodec
from moejax.errors import UserError
from moejax.models.tokenizer import load_image_codec, load_latent_codec


def load_picture_codec(config: Config) -> ImageCodec:
    """The codec of ``data.image_tokenizer``.

    Raises:
      UserError: it is not there, or its latents are not those of ``model.latents``, or of a model
        that denoises them by themselves.
    """
    model, spec = config.model, config.data.image_tokenizer
    if isinstance(model, DiTConfig):
        return _of_latents(
            spec, (model.in_channels, model.image_size), 1, ("in_channels", "image_size")
        )
    latents = model.latents
    if not latents.channels:
        return load_image_codec(spec)
    fields = ("latents.channels", "latents.grid")
    return _of_latents(spec, (latents.channels, latents.grid), latents.patch, fields)


def _of_latents(
    spec: str, wanted: tuple[int, int], patch: int, fields: tuple[str, str]
) -> PatchCodec:
    """Of so many channels and so many rows, which the ``fields`` of the model say."""
    codec = load_latent_codec(spec)
    channels, side = wanted
    if (codec.channels, tuple(codec.grid)) != (channels, (side, side)):
        rows, columns = codec.grid
        raise UserError(
            f"model.{fields[0]}={channels}, model.{fields[1]}={side}: data.image_tokenizer={spec} "
            f"gives {rows} x {columns} latents of {codec.channels} channels; set model."
            f"{fields[0]}={codec.channels} and model.{fields[1]}={rows}"
        )
    return PatchCodec(codec, patch)
