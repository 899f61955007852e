"""The typed form of an experiment config: frozen dataclasses, checked once, used everywhere.

A config file returns an ``ml_collections.ConfigDict`` (easy to write and to override from the
command line); :func:`moejax.config.convert.freeze` turns it into :class:`Config`. ``model`` and
``objective`` hold the dataclass that is registered under their ``name``.
"""

import dataclasses
from typing import Any

from moejax.config.checks import require, require_one_of, require_positive
from moejax.config.contrastive import PairConfig as PairConfig
from moejax.config.contrastive import TwoTowersConfig as TwoTowersConfig
from moejax.config.decoder import DecoderConfig as DecoderConfig
from moejax.config.decoder import LatentConfig as LatentConfig
from moejax.config.diffusion import Diffusion as Diffusion
from moejax.config.diffusion import DiffusionConfig as DiffusionConfig
from moejax.config.diffusion import TimeSampling as TimeSampling
from moejax.config.dit import DiTConfig as DiTConfig
from moejax.config.dit import check_denoiser
from moejax.config.evaluation import FidelityConfig, ProbeConfig, RobustnessConfig
from moejax.config.registry import MODEL_CONFIGS as MODEL_CONFIGS
from moejax.config.registry import OBJECTIVE_CONFIGS as OBJECTIVE_CONFIGS
from moejax.config.tasks import MultitaskConfig as MultitaskConfig
from moejax.config.tasks import TaskViTConfig as TaskViTConfig
from moejax.config.training import OptimConfig, TrainConfig
from moejax.config.trunk import TrunkConfig as TrunkConfig
from moejax.config.trunk import UntieConfig as UntieConfig
from moejax.config.vision import AugmentConfig as AugmentConfig
from moejax.config.vision import ClassificationConfig as ClassificationConfig
from moejax.config.vision import PatchesConfig as PatchesConfig
from moejax.config.vision import ViTConfig as ViTConfig
from moejax.config.vision import check_packed


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What the autoencoders of pictures share (models/autoencoder.py)."""

    name: str = ""
    image_size: int = 32
    patch_size: int = 4
    width: int = 128
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    dtype: str = "float32"
    # Train on randomly moved, mirrored and recoloured pictures (ops/augment.py).
    augment: bool = True

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "width", "encoder_blocks", "decoder_blocks")
        require_positive(self, "model", sizes)
        require(
            self.image_size % self.patch_size == 0,
            "model.patch_size",
            f"{self.patch_size} does not divide model.image_size={self.image_size}",
        )
        require_one_of(self.dtype, ("float32", "bfloat16", "float64"), "model.dtype")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


@MODEL_CONFIGS.register("fsq_autoencoder")
@dataclasses.dataclass(frozen=True)
class FSQAutoencoderConfig(AutoencoderConfig):
    """Image <-> grid of discrete codes by finite scalar quantisation."""

    name: str = "fsq_autoencoder"
    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self):
        super().__post_init__()
        require(len(self.levels) > 0 and min(self.levels) > 1, "model.levels", "need levels >= 2")

    @property
    def encoder_features(self) -> int:
        """Numbers that the encoder gives for each patch."""
        return len(self.levels)


@MODEL_CONFIGS.register("kl_autoencoder")
@dataclasses.dataclass(frozen=True)
class KLAutoencoderConfig(AutoencoderConfig):
    """Image <-> grid of continuous latents with a normal posterior."""

    name: str = "kl_autoencoder"
    latent_channels: int = 8

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", ("latent_channels",))

    @property
    def encoder_features(self) -> int:
        """Numbers that the encoder gives for each patch: means and logarithms of variances."""
        return 2 * self.latent_channels


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "builtin:emoji32"
    # Several sources, each with its share of the records drawn; then ``source`` is not read.
    sources: tuple[tuple[str, float], ...] = ()
    # Where prepared sets lie (local:, tfds:).
    data_dir: str = "~/moejax_data"
    # "tokens": packed sequences for a decoder; "images": pictures for an autoencoder or a
    # classifier; "pairs": pictures with their texts.
    format: str = "tokens"
    batch_size: int = 8
    sequence_length: int = 256
    image_size: int = 32
    # Pictures of these sizes in turn, several in a row of so many patches at the most; (): each
    # picture by itself, of image_size.
    image_sizes: tuple[int, ...] = ()
    max_patches: int = 0
    languages: tuple[str, ...] = ("en",)
    caption: str = "name"
    # Art styles of local:emoji3m; () takes all.
    styles: tuple[str, ...] = ()
    # A file of `moejax convert clusters`: the cluster of each training record of format "pairs".
    clusters: str = ""
    # Which features of a tfds: set are picture, text and label; "" leaves one out.
    image_feature: str = "image"
    text_feature: str = "text"
    label_feature: str = "label"
    # Pictures of a clip (builtin:emoji_clips).
    frames: int = 4
    # Versions of each training picture: the picture itself, and moved, shrunk, mirrored ones.
    variants: int = 1
    text_tokenizer: str = "builtin:bpe4096"
    image_tokenizer: str = "builtin:fsq"
    # Beside pictures come their latents, those of an image_tokenizer without codes.
    latents: bool = False
    # What comes first in a sequence; "random" draws it for each record, the text so often.
    order: str = "random"
    text_first_share: float = 0.5
    # Fraction of training records whose caption is left out, for classifier-free guidance.
    drop_text: float = 0.1
    seed: int = 0
    # Batches made ahead of the training step by a thread.
    prefetch: int = 2

    def __post_init__(self):
        names = ("batch_size", "sequence_length", "image_size", "variants")
        require_positive(self, "data", names)
        require_one_of(self.format, ("tokens", "images", "pairs"), "data.format")
        require(
            bool(self.image_sizes) == (self.max_patches > 0),
            "data.max_patches",
            "rows of several pictures need data.image_sizes and data.max_patches, both",
        )
        for size in self.image_sizes:
            require(
                0 < size <= self.image_size and self.format == "images",
                "data.image_sizes",
                f"{size}: pictures (data.format=images) of data.image_size={self.image_size} are "
                "made smaller, never larger",
            )
        require_one_of(self.order, ("random", "text_first", "image_first"), "data.order")
        require_one_of(self.caption, ("name", "keywords"), "data.caption")
        for name in ("drop_text", "text_first_share"):
            require(0 <= getattr(self, name) <= 1, f"data.{name}", "must be in [0, 1]")
        require(self.frames > 1, "data.frames", f"a clip has at least 2, got {self.frames}")
        require(self.prefetch >= 0, "data.prefetch", "must not be negative")
        require(len(self.languages) > 0, "data.languages", "name at least one language")
        require(":" in self.source, "data.source", f"{self.source!r} is not KIND:NAME")
        for entry in self.sources:
            require(
                len(entry) == 2 and ":" in str(entry[0]) and entry[1] > 0,
                "data.sources",
                f"{entry!r} is not (KIND:NAME, positive weight)",
            )
        require(
            not self.latents or (self.format != "tokens" and not self.image_sizes),
            "data.latents",
            "is of pictures (data.format=images or pairs) of one size",
        )
        for name, default in (("sources", ()), ("variants", 1)):
            unused = self.format == "tokens" or getattr(self, name) == default
            require(unused, f"data.{name}", "needs data.format=tokens")


@OBJECTIVE_CONFIGS.register("next_token")
@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
    """Next token over interleaved text and image codes (objectives/next_token.py)."""

    name: str = "next_token"
    z_loss: float = 1e-5

    def __post_init__(self):
        require(self.z_loss >= 0, "objective.z_loss", "must not be negative")


@OBJECTIVE_CONFIGS.register("transfusion")
@dataclasses.dataclass(frozen=True)
class TransfusionConfig:
    """Next text token, and denoising of the pictures' latents (objectives/transfusion.py)."""

    name: str = "transfusion"
    # "ddpm" predicts the noise on the cosine schedule, "flow" the velocity of straight paths.
    process: str = "ddpm"
    # L = text_weight * L_LM + image_weight * L_image.
    text_weight: float = 1.0
    image_weight: float = 5.0
    z_loss: float = 0.0
    times: TimeSampling = dataclasses.field(default_factory=TimeSampling)
    # Most noise in a picture that comes before its text, as a share of all times. At 0 it is clean,
    # and nothing is to be denoised.
    max_time_image_first: float = 1.0

    def __post_init__(self):
        require_one_of(self.process, ("ddpm", "flow"), "objective.process")
        for name in ("text_weight", "image_weight", "z_loss"):
            require(getattr(self, name) >= 0, f"objective.{name}", "must not be negative")
        require(
            0 <= self.max_time_image_first <= 1,
            "objective.max_time_image_first",
            "must be in [0, 1]",
        )

    @property
    def diffusion(self) -> Diffusion:
        """The process of the pictures."""
        return Diffusion(self.process, times=self.times)


@OBJECTIVE_CONFIGS.register("autoencode")
@dataclasses.dataclass(frozen=True)
class AutoencodeConfig:
    """Reconstruction of pictures (objectives/autoencode.py)."""

    name: str = "autoencode"
    l1: float = 0.1
    l2: float = 1.0
    # Divergence of the posterior from the standard normal, of models that have one.
    kl: float = 0.0

    def __post_init__(self):
        for name in ("l1", "l2", "kl"):
            require(getattr(self, name) >= 0, f"objective.{name}", "must not be negative")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices on each mesh axis; -1 fills, at most once."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1
    expert_exchange: str = "auto"

    def axes(self) -> dict[str, int]:
        names = ("data", "fsdp", "expert", "tensor", "sequence")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self):
        for name, size in self.axes().items():
            require(size == -1 or size > 0, f"mesh.{name}", f"must be positive or -1, got {size}")
        fills = [f"mesh.{name}" for name, size in self.axes().items() if size == -1]
        require(len(fills) <= 1, " and ".join(fills), "only one axis can be -1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    # Steps between evaluations while training; 0 evaluates after the last step only.
    every: int = 0
    # Evaluators: NAME, NAME@SPLIT or NAME@SPLIT/EVERY where split and every are to be others than
    # the two fields here; the values of another split are called eval/SPLIT/...
    metrics: tuple[str, ...] = ("likelihood",)
    split: str = "val"
    # Batches per evaluation; 0 is the whole split.
    batches: int = 0
    # The checkpoint with the lowest value of this metric is kept too (with a minus sign in front,
    # as in "-psnr", the highest); "" keeps the newest only.
    best_metric: str = ""
    # The run stops after so many evaluations in a row without a better best_metric; 0: never.
    patience: int = 0
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    robustness: RobustnessConfig = dataclasses.field(default_factory=RobustnessConfig)
    fidelity: FidelityConfig = dataclasses.field(default_factory=FidelityConfig)

    def __post_init__(self):
        require(self.every >= 0, "eval.every", "must not be negative")
        require(self.patience >= 0, "eval.patience", "must not be negative")
        require(
            not self.patience or self.best_metric.strip("-") != "",
            "eval.patience",
            "needs eval.best_metric, the value that is to get better",
        )
        require(self.batches >= 0, "eval.batches", "must not be negative")
        require_one_of(self.split, ("train", "val", "test"), "eval.split")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 10
    # Writers beside metrics.jsonl, each an extra: pip install 'moejax[tensorboard,wandb]'.
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "moejax"

    def __post_init__(self):
        require_positive(self, "log", ("every",))


@dataclasses.dataclass(frozen=True)
class AboutConfig:
    """What a config says of itself; the counts are checked by a test."""

    name: str = ""
    paper: str = ""
    family: str = ""
    total_params: int = 0
    active_params: int = 0
    # Fields whose value the sources do not fix.
    approximate: tuple[str, ...] = ()
    # pytest node id of the test that fails when the distinguishing option is turned off.
    mechanism_test: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. See the fields of each group."""

    model: Any = dataclasses.field(default_factory=DecoderConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: Any = dataclasses.field(default_factory=NextTokenConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    about: AboutConfig = dataclasses.field(default_factory=AboutConfig)

    def __post_init__(self):
        require(
            self.data.batch_size % self.optim.accumulation_steps == 0,
            "optim.accumulation_steps",
            f"{self.optim.accumulation_steps} does not divide "
            f"data.batch_size={self.data.batch_size}",
        )
        moe = getattr(self.model, "moe", None)
        if moe is not None and moe.num_experts and moe.routing_group:
            rows = self.data.batch_size // self.optim.accumulation_steps
            require(
                rows % moe.routing_group == 0 or rows < moe.routing_group,
                "model.moe.routing_group",
                f"{moe.routing_group} does not divide the {rows} rows of a microbatch "
                "(0 takes all of them)",
            )
        require(
            self.data.format != "tokens" or isinstance(self.model, DecoderConfig),
            "data.format",
            f"model {self.model.name!r} reads no token sequences; use data.format=images",
        )
        if self.data.image_sizes:
            check_packed(self.data, self.model, self.objective)
        objective = self.objective.name
        _check_pairs(self)
        require(
            self.data.format == "tokens" or objective not in ("next_token", "transfusion"),
            "data.format",
            f"objective {objective!r} needs tokens, got {self.data.format!r}",
        )
        require(
            self.data.format != "tokens" or objective != "diffusion",
            "data.format",
            "objective 'diffusion' needs pictures, got 'tokens'",
        )
        check_denoiser(self.data, self.model, self.objective)
        if hasattr(self.model, "latents"):
            continuous = self.model.latents.channels > 0
            require(
                continuous == (objective == "transfusion"),
                "objective.name",
                f"{objective!r} does not fit model.latents.channels="
                f"{self.model.latents.channels}; 'transfusion' needs latents, 'next_token' codes",
            )

    @property
    def images_per_row(self) -> int:
        """Places for pictures in a row of a batch of pictures."""
        if not self.data.image_sizes:
            return 1
        return self.data.max_patches // (min(self.data.image_sizes) // self.model.patch_size) ** 2


def _check_pairs(config: Config) -> None:
    """UserError unless data, model and objective all are about pairs, or none of them is."""
    pairs = isinstance(config.model, PairConfig)
    told_texts = isinstance(config.model, DiTConfig) and config.model.text_length > 0
    require(
        (pairs or told_texts) == (config.data.format == "pairs"),
        "data.format",
        f"{config.data.format!r} does not fit model {config.model.name!r}; models of pictures and "
        "texts (two_towers, limoe; dit with model.text_length) need 'pairs', and no others do",
    )
    objective = config.objective.name
    require(
        pairs == (objective == "contrastive"),
        "objective.name",
        f"{objective!r} does not fit model {config.model.name!r}; models of pictures and texts "
        "(two_towers, limoe) need 'contrastive', and no others do",
    )
    require(
        not pairs or config.objective.negatives == "all" or bool(config.data.clusters),
        "objective.negatives",
        "'cluster' needs data.clusters, the file that says which",
    )
    require(
        not pairs or config.optim.accumulation_steps == 1,
        "optim.accumulation_steps",
        "must be 1: the contrastive loss compares all rows of a batch with each other",
    )
