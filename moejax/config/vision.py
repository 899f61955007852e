"""Models of patches, the vision transformer, and what it is trained for, in a config."""

import dataclasses
from typing import ClassVar

from moejax.config.checks import require, require_one_of, require_positive
from moejax.config.registry import MODEL_CONFIGS, OBJECTIVE_CONFIGS
from moejax.config.trunk import TrunkConfig

POSITIONS = ("sincos", "learned", "rope")
HEADS = ("class_token", "map", "mean")


@dataclasses.dataclass(frozen=True)
class PatchesConfig(TrunkConfig):
    """A stack of blocks over the patches of square pictures, all of which see each other."""

    causal: ClassVar[bool] = False
    one_modality: ClassVar[bool] = True

    modalities: tuple[str, ...] = ("image",)
    image_size: int = 32
    patch_size: int = 4
    # Where a patch lies: a fixed table of sines ("sincos") or a "learned" one, added to the
    # patches, or a rotation of queries and keys by row and column ("rope").
    positions: str = "sincos"
    block_pattern: tuple[str, ...] = ("dense",)
    norm_placement: str = "pre"
    qk_norm: str = "none"

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", ("image_size", "patch_size"))
        require(
            self.image_size % self.patch_size == 0,
            "model.patch_size",
            f"{self.patch_size} does not divide model.image_size={self.image_size}",
        )
        require_one_of(self.positions, POSITIONS, "model.positions")
        require(
            self.positions != "sincos" or self.d_model % 4 == 0,
            "model.d_model",
            f"'sincos' positions need a multiple of 4, got {self.d_model}",
        )
        require(
            len(self.modalities) == 1 or not self.one_modality,
            "model.modalities",
            f"a picture has one modality, got {self.modalities}",
        )

    @property
    def rope_axes(self) -> int:
        return 2 if self.positions == "rope" else 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def num_tokens(self) -> int:
        """What the blocks run on."""
        return self.num_patches

    @property
    def first_patch(self) -> int:
        """Its place among these: behind the class token and registers."""
        return self.num_tokens - self.num_patches


@MODEL_CONFIGS.register("vit")
@dataclasses.dataclass(frozen=True)
class ViTConfig(PatchesConfig):
    """Vision transformer: the patches of a picture through blocks of any kind (models/vit.py)."""

    name: str = "vit"
    # Tokens without a patch that take part in attention and are thrown away at the end.
    registers: int = 0
    # What stands for the picture: a token of its own, the answer to one learned query ("map"), or
    # the mean of the patches.
    head: str = "mean"
    # 0: the features of the picture are all that is asked for.
    num_classes: int = 0
    # Where the classes' biases begin: -log(classes) suits a sigmoid of each.
    class_bias: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("registers", "num_classes"):
            require(getattr(self, name) >= 0, f"model.{name}", "must not be negative")
        require_one_of(self.head, HEADS, "model.head")

    @property
    def num_tokens(self) -> int:
        """What the blocks run on: the class token, registers, patches."""
        return (self.head == "class_token") + self.registers + self.num_patches


def check_packed(data, model, objective) -> None:
    """UserError unless pictures of ``data.image_sizes`` can share a row of ``model``."""
    require(
        isinstance(model, ViTConfig),
        "data.image_sizes",
        f"model {model.name!r} reads pictures of one size; leave it empty",
    )
    for size in data.image_sizes:
        require(
            size % model.patch_size == 0,
            "data.image_sizes",
            f"model.patch_size={model.patch_size} does not divide {size}",
        )
    largest = (max(data.image_sizes) // model.patch_size) ** 2
    require(
        data.max_patches >= largest,
        "data.max_patches",
        f"{data.max_patches} is less than the {largest} patches of the largest picture",
    )
    require(
        model.positions != "learned",
        "model.positions",
        "'learned' places are those of one grid, and data.image_sizes has several; use 'sincos' or "
        "'rope'",
    )
    require(
        not (model.moe.num_experts and model.moe.router.name == "soft"),
        "model.moe.router.name",
        "'soft' would mix the pictures of a row (data.image_sizes); use another router",
    )
    augment = getattr(objective, "augment", AugmentConfig())
    require(
        augment == AugmentConfig(),
        "objective.augment",
        "pictures that share a row (data.image_sizes) are not changed; leave crop_padding 0, flip "
        "'none' and the others 0",
    )


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training pictures (moejax/ops/augment.py), by the rng of the step."""

    # A picture is moved by at most so many pixels each way, its edge repeated: a crop of the
    # picture with such a padding.
    crop_padding: int = 0
    # Half of the pictures are mirrored, of those that their source allows it for ("allowed"), or
    # of all ("all"); "none".
    flip: str = "none"
    # Each is multiplied by a factor from [1 - s, 1 + s], drawn for each picture.
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    # Each picture gets a share of another one, and as much of its label, by Beta(mixup, mixup).
    mixup: float = 0.0

    def __post_init__(self):
        require(self.crop_padding >= 0, "objective.augment.crop_padding", "must not be negative")
        for name in ("brightness", "contrast", "saturation"):
            strength = getattr(self, name)
            require(0 <= strength <= 1, f"objective.augment.{name}", f"{strength} is not in [0, 1]")
        require(self.mixup >= 0, "objective.augment.mixup", "must not be negative")
        require_one_of(self.flip, ("none", "allowed", "all"), "objective.augment.flip")

    def require_whole(self, reason: str) -> None:
        """UserError, with the reason, where pictures are mixed."""
        require(self.mixup == 0, "objective.augment.mixup", f"{reason}; leave it 0")


@OBJECTIVE_CONFIGS.register("classification")
@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """The class of a picture (objectives/classification.py)."""

    name: str = "classification"
    # "softmax": one class of all; "sigmoid": yes or no for each class.
    loss: str = "softmax"
    # Share of the target that all classes have alike.
    label_smoothing: float = 0.0
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        require_one_of(self.loss, ("softmax", "sigmoid"), "objective.loss")
        require(
            0 <= self.label_smoothing < 1,
            "objective.label_smoothing",
            f"must be in [0, 1), got {self.label_smoothing}",
        )
