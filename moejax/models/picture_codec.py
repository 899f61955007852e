"""The frozen image tokenizer that a decoder's config names, of codes or of latent vectors."""

from moejax.config.schema import Config
from moejax.data.image_codes import ImageCodec
from moejax.data.latents import PatchCodec
from moejax.errors import UserError
from moejax.models.tokenizer import load_image_codec, load_latent_codec


def load_picture_codec(config: Config) -> ImageCodec:
    """The codec of ``data.image_tokenizer``.

    Raises:
      UserError: it is not there, or its latents are not those of ``model.latents``.
    """
    latents, spec = config.model.latents, config.data.image_tokenizer
    if not latents.channels:
        return load_image_codec(spec)
    codec = load_latent_codec(spec)
    if (codec.channels, tuple(codec.grid)) != (latents.channels, (latents.grid,) * 2):
        rows, columns = codec.grid
        raise UserError(
            f"model.latents: data.image_tokenizer={spec} gives {rows} x {columns} latents of "
            f"{codec.channels} channels; set model.latents.channels={codec.channels} and "
            f"model.latents.grid={rows}"
        )
    return PatchCodec(codec, latents.patch)
