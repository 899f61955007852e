"""What the models that are one stack of blocks (nn/stack.py) share in the group ``model``."""

import dataclasses
from typing import Any, ClassVar, Self

from moejax.config.checks import require, require_one_of, require_positive
from moejax.config.depth import DepthConfig, RecursionConfig
from moejax.config.moe import MoEConfig
from moejax.config.towers import Tower, TowersConfig, check_share_attention, check_towers, towers_of

# Kinds of block that run another, model.depth.block.
AROUND_OTHERS = ("mod", "recursive")


@dataclasses.dataclass(frozen=True)
class UntieConfig:
    """Which parameters each modality has of its own (True) or shares with the others (False)."""

    qkv: bool = False
    out: bool = False
    ffn: bool = False
    norms: bool = False
    final_norm: bool = False


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """A stack of blocks over the tokens of some modalities; a model adds what comes in and out."""

    # Whether tokens are generated one after the other, so that none may depend on later ones.
    causal: ClassVar[bool] = True
    # Whether blocks are told a condition of their row (nn/modulation.py).
    modulated: ClassVar[bool] = False

    name: str = ""
    modalities: tuple[str, ...] = ()
    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    # 0 means "as many as num_heads" and "d_model / num_heads".
    num_kv_heads: int = 0
    head_size: int = 0
    # Hidden width of the feed-forward layers: one number for all modalities, or one for each.
    ffn_hidden: tuple[int, ...] = (384,)
    # Between their matrices: "swiglu" (three matrices), or "gelu" (two), shared by all modalities.
    ffn_activation: str = "swiglu"
    untie: UntieConfig = dataclasses.field(default_factory=UntieConfig)
    towers: TowersConfig = dataclasses.field(default_factory=TowersConfig)
    # For each layer, whether tokens see those of other modalities in it; () in all of them.
    share_attention: tuple[bool, ...] = ()
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    depth: DepthConfig = dataclasses.field(default_factory=DepthConfig)
    recursion: RecursionConfig = dataclasses.field(default_factory=RecursionConfig)
    # Kinds of block, cycled over the depth; first/last blocks stand outside of the cycle.
    block_pattern: tuple[str, ...] = ("untied",)
    first_blocks: tuple[str, ...] = ()
    last_blocks: tuple[str, ...] = ()
    # "rms" or "layer", with a scale and no bias.
    norm: str = "rms"
    norm_placement: str = "post_branch"
    norm_eps: float = 1e-5
    qk_norm: str = "rms"
    rope_theta: float = 10_000.0
    # Queries that attention handles at a time, for long rows; 0: all.
    attention_block: int = 0
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False
    kernel_backend: str = "auto"

    def __post_init__(self):
        sizes = ("num_layers", "d_model", "num_heads", "rope_theta", "norm_eps")
        require_positive(self, "model", sizes)
        require(len(self.modalities) > 0, "model.modalities", "name at least one modality")
        require(
            len(set(self.modalities)) == len(self.modalities),
            "model.modalities",
            f"names a modality twice: {self.modalities}",
        )
        require(
            len(self.ffn_hidden) in (1, len(self.modalities)),
            "model.ffn_hidden",
            f"give one width or one for each of {len(self.modalities)} modalities, "
            f"got {len(self.ffn_hidden)}",
        )
        require(min(self.ffn_hidden) > 0, "model.ffn_hidden", "widths must be positive")
        require(
            len(set(self.ffn_hidden)) == 1 or self.untie.ffn,
            "model.ffn_hidden",
            "different widths need model.untie.ffn=True",
        )
        require(self.num_kv_heads >= 0, "model.num_kv_heads", "must not be negative")
        require(self.attention_block >= 0, "model.attention_block", "must not be negative")
        require(
            self.num_heads % self.kv_heads == 0,
            "model.num_kv_heads",
            f"{self.kv_heads} does not divide model.num_heads={self.num_heads}",
        )
        require(
            self.head_size > 0 or self.d_model % self.num_heads == 0,
            "model.num_heads",
            f"{self.num_heads} does not divide model.d_model={self.d_model} "
            "(or set model.head_size)",
        )
        require(
            self.head_dim % (2 * self.rope_axes or 1) == 0,
            "model.head_size",
            f"RoPE over {self.rope_axes} axes needs a multiple of {2 * self.rope_axes}",
        )
        require(0 <= self.dropout < 1, "model.dropout", f"must be in [0, 1), got {self.dropout}")
        require(len(self.block_pattern) > 0, "model.block_pattern", "name at least one block")
        require(
            len(self.first_blocks) + len(self.last_blocks) <= self.num_layers,
            "model.first_blocks",
            f"first and last blocks are more than model.num_layers={self.num_layers}",
        )
        require_one_of(self.norm_placement, ("post_branch", "pre"), "model.norm_placement")
        require_one_of(self.norm, ("rms", "layer"), "model.norm")
        require_one_of(self.ffn_activation, ("swiglu", "gelu"), "model.ffn_activation")
        require(
            self.ffn_activation == "swiglu" or not self.untie.ffn,
            "model.ffn_activation",
            "is 'swiglu' where modalities have feed-forward layers of their own (model.untie.ffn)",
        )
        require_one_of(self.qk_norm, ("none", "rms", "layer"), "model.qk_norm")
        require_one_of(self.dtype, ("float32", "bfloat16", "float64"), "model.dtype")
        require_one_of(self.remat, ("none", "dots", "full"), "model.remat")
        backends = ("auto", "reference", "xla", "tpu", "gpu")
        require_one_of(self.kernel_backend, backends, "model.kernel_backend")
        self.moe.check_modalities(self.modalities)
        pool, period = self.moe.pool_layers, len(self.block_pattern)
        middle = self.num_layers - len(self.first_blocks) - len(self.last_blocks)
        kinds, outside = set(self.block_pattern), set(self.first_blocks + self.last_blocks)
        require(
            pool == 1 or (len(kinds) == 1 and not kinds & outside and ":" not in min(kinds)),
            "model.moe.pool_layers",
            "layers that share their experts are of one kind, which no first or last block is of",
        )
        require(
            pool == 1 or (pool == period and middle % period == 0),
            "model.moe.pool_layers",
            f"{pool} layers share their experts: model.block_pattern names as many blocks (now "
            f"{period}), which divide the {middle} layers that it is repeated over",
        )
        check_share_attention(self)
        check_towers(self)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def rope_axes(self) -> int:
        """Axes of the positions that attention rotates by; 0: it does not."""
        return 1

    @property
    def reads_words(self) -> bool:
        """Whether blocks look at the words of a text that their row is told (nn/words.py)."""
        return False

    @property
    def by_modality(self) -> bool:
        """Whether tokens of one modality meet weights that others do not."""
        return self.untie.qkv or self.untie.out or self.untie.ffn

    @property
    def head_dim(self) -> int:
        return self.head_size or self.d_model // self.num_heads

    @property
    def tower_shapes(self) -> tuple[Tower, ...]:
        """The size of each modality's tower; () where all are alike."""
        return towers_of(self)

    def block_kinds(self) -> tuple[str, ...]:
        """The kind of each of the ``num_layers`` blocks, in order."""
        middle = self.num_layers - len(self.first_blocks) - len(self.last_blocks)
        period = self.block_pattern
        cycled = tuple(period[i % len(period)] for i in range(middle))
        return self.first_blocks + cycled + self.last_blocks

    def base_kinds(self) -> set[str]:
        """The kinds of its blocks without what follows their names."""
        return {kind.partition(":")[0] for kind in self.block_kinds()}

    def for_block(self, kind: str) -> tuple[str, Self]:
        """The name of a kind of block, and the config that the rest of it makes of this one.

        ``"moe:16"`` -> ("moe", with 16 experts), ``"mod:0.5:moe:16"`` -> ("mod", which runs
        "moe:16" on half of the tokens), ``"recursive:dense"``; other kinds as they are.
        """
        base, colon, experts = kind.partition(":")
        if base in AROUND_OTHERS:
            return base, self._for_inner(kind, experts)
        if not colon:
            return base, self
        number = experts.isdecimal() and int(experts) > 0
        require(bool(number), "model.block_pattern", f"{kind!r}: {experts!r} is no number")
        require(
            self.moe.num_experts > 0,
            "model.moe.num_experts",
            f"must be positive where blocks have experts ({kind!r} says only how many)",
        )
        own = dataclasses.replace(self.moe, num_experts=int(experts))
        return base, dataclasses.replace(self, moe=own)

    def _for_inner(self, kind: str, rest: str) -> Self:
        """Of a block around another: ``"0.5:moe:16"`` is a capacity and the kind inside."""
        changes: dict[str, Any] = {}
        first, _, after = rest.partition(":")
        if first[:1].isdecimal():
            mod = kind.partition(":")[0] == "mod"
            require(mod, "model.block_pattern", f"{kind!r}: only 'mod' has a capacity")
            try:
                changes["capacity"] = float(first)
            except ValueError:
                require(False, "model.block_pattern", f"{kind!r}: {first!r} is no number")
            rest = after
        if rest:
            changes["block"] = rest
        own = dataclasses.replace(self, depth=dataclasses.replace(self.depth, **changes))
        return own.for_block(own.depth.block)[1]
