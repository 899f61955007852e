"""The diffusion transformer (models/dit.py) in a config."""

import dataclasses
from typing import Any, ClassVar

from moejax.config.checks import require, require_one_of, require_positive
from moejax.config.contrastive import TextSizes, TextTowerConfig, tower_of_texts
from moejax.config.diffusion import Diffusion
from moejax.config.registry import MODEL_CONFIGS
from moejax.config.vision import PatchesConfig
from moejax.errors import UserError

# Of pictures.
CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """What the patches of each block take from the words of a text (moejax/nn/words.py)."""

    # Whether they look at the words, beside being told the mean of them.
    attend: bool = False
    # Experts of the places that words are about, if they look at them.
    num_experts: int = 0
    # Hidden width of an expert, and what lies between its matrices.
    hidden: int = 0
    activation: str = "gelu"
    # A word is about the patches that see it more than so many times as the one that sees it most.
    threshold: float = 0.2
    # Whether a word adds to the other patches what its expert makes of zeros.
    outside: bool = True
    # In training logits get N(0, (noise / num_experts)^2).
    noise: float = 1.0

    def __post_init__(self):
        for name in ("num_experts", "hidden", "noise"):
            require(getattr(self, name) >= 0, f"model.words.{name}", "must not be negative")
        require(0 <= self.threshold < 1, "model.words.threshold", "must be in [0, 1)")
        require(
            self.attend or not self.num_experts,
            "model.words.num_experts",
            "needs model.words.attend=True, which says where a word is",
        )
        require(
            self.hidden > 0 or not self.num_experts,
            "model.words.hidden",
            f"must be positive for the {self.num_experts} experts of places",
        )
        require_one_of(self.activation, ("swiglu", "gelu"), "model.words.activation")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("hidden", "activation", "threshold", "outside", "noise"):
            require(
                self.num_experts > 0 or getattr(self, name) == defaults[name],
                f"model.words.{name}",
                "is of the experts of places, of which there are none (model.words.num_experts); "
                "leave it out",
            )


@MODEL_CONFIGS.register("dit")
@dataclasses.dataclass(frozen=True)
class DiTConfig(PatchesConfig):
    """A denoiser of pictures or of their latents, told how noisy they are and what they show.

    ``image_size`` and ``patch_size`` are in pixels of what is denoised: for latents of a grid of
    8x8, 8.
    """

    one_modality: ClassVar[bool] = False
    modulated: ClassVar[bool] = True

    name: str = "dit"
    # With a second name pictures of which nothing is said are a modality of their own, for what
    # goes by modality (``moe.allowed``, ``moe.score.per_modality``, losses and reports).
    modalities: tuple[str, ...] = ("image",)
    # Numbers of each pixel of what is denoised: 3 of pictures, or those of the latents.
    in_channels: int = CHANNELS
    # As many numbers again are predicted, of the variance.
    learned_range: bool = False
    # Classes that a picture may be said to show; what is said of no class is one row more.
    num_classes: int = 0
    # Tokens of a text that a picture may be said to show, marks and padding included; 0: no texts.
    # They are read by a tower of their own, where ``text`` says in what it differs.
    text_length: int = 0
    vocab_size: int = 4112
    text: TextSizes = dataclasses.field(default_factory=TextSizes)
    words: WordsConfig = dataclasses.field(default_factory=WordsConfig)
    norm: str = "layer"
    norm_eps: float = 1e-6
    ffn_activation: str = "gelu"

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", ("in_channels", "vocab_size"))
        for name in ("num_classes", "text_length"):
            require(getattr(self, name) >= 0, f"model.{name}", "must not be negative")
        require(
            len(self.modalities) <= 2,
            "model.modalities",
            f"name 'image' and, at most, pictures of which nothing is said; got {self.modalities}",
        )
        require(
            self.norm_placement == "pre",
            "model.norm_placement",
            "is 'pre': the condition shifts and scales what goes into a branch",
        )
        require(
            self.depth.group == 1,
            "model.depth.group",
            "is 1: each row is told a condition of its own",
        )
        require(
            self.text_length > 0 or not self.words.attend,
            "model.words.attend",
            "needs texts (model.text_length above 0); leave it False",
        )
        if self.text_length:
            try:
                text = self.text_tower
            except UserError as error:
                # All that it shares with the pictures has passed there.
                raise UserError(str(error).replace("model.", "model.text.")) from error
            require(
                not text.by_modality, "model.untie", "a tower has one modality; leave all False"
            )

    @property
    def reads_words(self) -> bool:
        return self.words.attend

    @property
    def out_channels(self) -> int:
        """Numbers that are predicted for each pixel."""
        return self.in_channels * (2 if self.learned_range else 1)

    @property
    def loss_modalities(self) -> tuple[str, ...]:
        """Pictures of which nothing is said have no loss of their own."""
        return self.modalities[:1]

    @property
    def text_tower(self) -> TextTowerConfig:
        """The tower of texts as a trunk of its own."""
        return tower_of_texts(self, "mean")


def check_denoiser(data: Any, model: Any, objective: Any) -> None:
    """UserError unless pictures are what ``model`` denoises, and ``objective`` is about that."""
    if not isinstance(model, DiTConfig):
        require(
            not data.latents,
            "data.latents",
            f"model {model.name!r} reads pictures or sequences; leave it False",
        )
        return
    require(
        isinstance(objective, Diffusion),
        "objective.name",
        f"{objective.name!r} does not fit model 'dit'; it needs 'diffusion'",
    )
    require(
        model.learned_range == objective.learned_range,
        "model.learned_range",
        f"is {model.learned_range} and objective.learned_range={objective.learned_range}; make the "
        "two equal",
    )
    require(
        data.latents or (model.image_size, model.in_channels) == (data.image_size, CHANNELS),
        "model.image_size",
        f"{model.image_size}, with model.in_channels={model.in_channels}, is not that of pictures "
        f"(data.image_size={data.image_size}, {CHANNELS} channels); for latents set data.latents",
    )
    require(
        not model.text_length or model.text_length == data.sequence_length,
        "model.text_length",
        f"{model.text_length} is not data.sequence_length={data.sequence_length}; make them equal",
    )
