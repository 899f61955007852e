"""Models of pictures and their texts (models/two_towers.py, models/limoe.py) in a config."""

import dataclasses
from typing import Any, ClassVar

from moejax.config.checks import require, require_one_of, require_positive
from moejax.config.registry import MODEL_CONFIGS, OBJECTIVE_CONFIGS
from moejax.config.trunk import TrunkConfig
from moejax.config.vision import AugmentConfig, ViTConfig
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(TrunkConfig):
    """Bidirectional blocks over the tokens of a text (models/text_tower.py)."""

    causal: ClassVar[bool] = False

    modalities: tuple[str, ...] = ("text",)
    vocab_size: int = 0
    # Tokens of a text, marks of its begin and end and padding included.
    text_length: int = 0
    # "class_token" is the first token, the mark of the begin.
    head: str = "mean"

    @property
    def rope_axes(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class TextSizes:
    """Where the tower of texts differs from that of pictures; 0 and "" are as that has them."""

    num_layers: int = 0
    d_model: int = 0
    num_heads: int = 0
    ffn_hidden: int = 0
    ffn_activation: str = ""
    block_pattern: tuple[str, ...] = ("dense",)
    first_blocks: tuple[str, ...] = ()
    last_blocks: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("num_layers", "d_model", "num_heads", "ffn_hidden"):
            require(getattr(self, name) >= 0, f"model.text.{name}", "must not be negative")


@dataclasses.dataclass(frozen=True)
class PairConfig(ViTConfig):
    """What the models of pictures and texts share: a vision transformer, and what texts add."""

    vocab_size: int = 4112
    # Tokens of a text, marks and padding included (data.sequence_length).
    text_length: int = 32
    # Width of the space in which pictures and texts are compared.
    embed_dim: int = 64
    # Factor of the products of embeddings at the begin, the most that it can be (0: anything), and
    # what is added to them, where it is learned.
    initial_scale: float = 1 / 0.07
    max_scale: float = 100.0
    learn_bias: bool = False
    initial_bias: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        sizes = ("vocab_size", "text_length", "embed_dim", "initial_scale")
        require_positive(self, "model", sizes)
        require(self.num_classes == 0, "model.num_classes", "must be 0: pairs have no classes")
        require(
            self.max_scale == 0 or self.max_scale >= self.initial_scale,
            "model.max_scale",
            f"is below model.initial_scale={self.initial_scale:g}; 0 sets no limit",
        )
        require(
            self.learn_bias or self.initial_bias == 0,
            "model.initial_bias",
            "needs model.learn_bias=True",
        )


@MODEL_CONFIGS.register("two_towers")
@dataclasses.dataclass(frozen=True)
class TwoTowersConfig(PairConfig):
    """A vision transformer and a tower of texts; the fields without ``text.`` are the pictures'."""

    name: str = "two_towers"
    text: TextSizes = dataclasses.field(default_factory=TextSizes)

    def __post_init__(self):
        super().__post_init__()
        try:
            text = self.text_tower
        except UserError as error:
            # All that it shares with the tower of pictures has passed there.
            raise UserError(str(error).replace("model.", "model.text.")) from error
        one = "a tower has one modality; leave all False"
        require(not text.by_modality, "model.untie", one)

    @property
    def text_tower(self) -> TextTowerConfig:
        return tower_of_texts(self, self.head)


def tower_of_texts(config: Any, head: str) -> TextTowerConfig:
    """The tower of texts of a model of pictures as a trunk of its own.

    What ``config.text`` does not set is as in the trunk of pictures; ``config`` has ``vocab_size``
    and ``text_length`` too.
    """
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrunkConfig)}
    text: TextSizes = config.text
    hidden = (text.ffn_hidden,) if text.ffn_hidden else config.ffn_hidden
    return TextTowerConfig(
        **shared
        | {
            "name": "text_tower",
            "modalities": ("text",),
            "num_layers": text.num_layers or config.num_layers,
            "d_model": text.d_model or config.d_model,
            "num_heads": text.num_heads or config.num_heads,
            "ffn_hidden": hidden,
            "ffn_activation": text.ffn_activation or config.ffn_activation,
            "block_pattern": text.block_pattern,
            "first_blocks": text.first_blocks,
            "last_blocks": text.last_blocks,
        },
        vocab_size=config.vocab_size,
        text_length=config.text_length,
        head=head,
    )


@MODEL_CONFIGS.register("limoe")
@dataclasses.dataclass(frozen=True)
class LIMoEConfig(PairConfig):
    """One tower for the patches of a picture and the tokens of its text (models/limoe.py)."""

    one_modality: ClassVar[bool] = False

    name: str = "limoe"
    modalities: tuple[str, ...] = ("image", "text")
    block_pattern: tuple[str, ...] = ("dense", "moe")

    def __post_init__(self):
        super().__post_init__()
        require(
            self.modalities == ("image", "text"),
            "model.modalities",
            f"are 'image' and 'text', got {self.modalities}",
        )
        require(
            self.positions != "rope",
            "model.positions",
            "'rope' turns by row and column, which texts have not; use sincos or learned",
        )

    @property
    def loss_modalities(self) -> tuple[str, ...]:
        """A pair has one loss, that of its picture."""
        return ("image",)

    @property
    def num_tokens(self) -> int:
        """What the blocks run on: the tokens of a picture, then those of its text."""
        return super().num_tokens + self.text_length

    @property
    def first_patch(self) -> int:
        return super().num_tokens - self.num_patches


@OBJECTIVE_CONFIGS.register("contrastive")
@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Which text belongs to which picture of the batch (objectives/contrastive.py)."""

    name: str = "contrastive"
    # "clip": one softmax over the batch; "siglip": yes or no for each pair.
    loss: str = "clip"
    # What belongs together: records of one "family", of one "concept" (also in another style or
    # language), or the two of a "pair" alone.
    positives: str = "family"
    # Who is compared: "all" rows, or those of one "cluster" (data.clusters).
    negatives: str = "all"
    # Rows whose logits against the batch are held at a time on a device; 0: all.
    chunk: int = 0
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        require_one_of(self.loss, ("clip", "siglip"), "objective.loss")
        require_one_of(self.positives, ("concept", "family", "pair"), "objective.positives")
        require_one_of(self.negatives, ("all", "cluster"), "objective.negatives")
        require(self.chunk >= 0, "objective.chunk", "must not be negative")
        self.augment.require_whole("a mixed picture has no text")
