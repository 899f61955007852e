"""The group ``model`` of a config for the decoder (models/decoder.py)."""

import dataclasses

from moejax.config.checks import require, require_one_of, require_positive
from moejax.config.registry import MODEL_CONFIGS
from moejax.config.trunk import TrunkConfig


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Pictures as continuous latent vectors in the sequence (Transfusion, arXiv 2408.11039)."""

    # Channels of the image autoencoder's latents; 0: pictures are codes of the vocabulary.
    channels: int = 0
    # A token is a square of patch x patch latents.
    patch: int = 1
    # Cells of the autoencoder's grid, along each side.
    grid: int = 8
    # From patches to the model's width and back: "linear", or "unet" of this hidden width.
    adapter: str = "linear"
    unet_width: int = 64
    # Patches of one picture see each other in both directions.
    bidirectional: bool = True
    # All patches of a picture have one position in the row, and what follows the next.
    one_position: bool = False
    # Where a patch lies in its picture: "none", or "sincos", a fixed table that is added to it.
    places: str = "none"
    # The modality whose tower reads pictures that are clean (time 0), through a linear map of
    # their own; "": clean pictures are what noisy ones are.
    read_by: str = ""

    def __post_init__(self):
        require(self.channels >= 0, "model.latents.channels", "must not be negative")
        require_positive(self, "model.latents", ("patch", "grid", "unet_width"))
        require_one_of(self.adapter, ("linear", "unet"), "model.latents.adapter")
        require_one_of(self.places, ("none", "sincos"), "model.latents.places")
        require(
            self.grid % self.patch == 0,
            "model.latents.patch",
            f"{self.patch} does not divide model.latents.grid={self.grid}",
        )

    @property
    def size(self) -> int:
        """Numbers in a token's vector."""
        return self.patch**2 * self.channels

    @property
    def tokens_per_image(self) -> int:
        return (self.grid // self.patch) ** 2


@MODEL_CONFIGS.register("decoder")
@dataclasses.dataclass(frozen=True)
class DecoderConfig(TrunkConfig):
    """Early-fusion decoder over one sequence of text, image, ... tokens (models/decoder.py)."""

    name: str = "decoder"
    modalities: tuple[str, ...] = ("text", "image")
    vocab_size: int = 5112
    latents: LatentConfig = dataclasses.field(default_factory=LatentConfig)
    tie_embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", ("vocab_size",))
        require(
            not (self.depth.eval_room and self.latents.channels),
            "model.depth.eval_room",
            "is 0 where pictures are latents, which are denoised beside the cache",
        )
        reader = self.latents.read_by
        require(
            reader in ("", *self.modalities),
            "model.latents.read_by",
            f"{reader!r} is none of model.modalities={self.modalities}",
        )
        for name in ("image", reader) if self.latents.places == "sincos" else ():
            require(
                not name or self.width_of(name) % 4 == 0,
                "model.latents.places",
                f"'sincos' needs widths that 4 divides, got {self.width_of(name)} of {name}",
            )

    @property
    def by_modality(self) -> bool:
        """Patches of latents alone go through the adapter, text alone has logits."""
        return super().by_modality or self.latents.channels > 0

    def width_of(self, modality: str) -> int:
        """Features of the tower of a modality; those of the model if there is no such tower."""
        widths = {tower.name: tower.width for tower in self.tower_shapes}
        return widths.get(modality, self.d_model)
