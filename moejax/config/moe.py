"""The group ``model.moe`` of a config: experts, and the way to them (moejax/nn/moe.py)."""

import dataclasses

from moejax.config.checks import require, require_one_of
from moejax.config.options import Options

# Parameters of a router that controllers move: the last part of their paths.
SELECT_BIAS = "select_bias_e"
CAUSAL_THRESHOLD = "causal_threshold_e"


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """A router (moejax.routing) by name; ``options`` are the keyword arguments of its function."""

    name: str = "top_k"
    options: Options = dataclasses.field(default_factory=Options)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How a token's logits come about (moejax/routing/scores.py)."""

    name: str = "linear"
    # What is scored: the "token", or what its row is told, all of it ("condition") or how noisy it
    # is ("noise"); all tokens of a row then have the same logits.
    input: str = "token"
    # A weight of its own for each modality.
    per_modality: bool = False
    # G_l = W x + W_g G_{l-1}: the logits of the layer before take part.
    gating_residual: bool = False
    # In training scores see tokens times U(1 - jitter, 1 + jitter).
    jitter: float = 0.0
    options: Options = dataclasses.field(default_factory=Options)


@dataclasses.dataclass(frozen=True)
class RouterLossConfig:
    """A loss of the routing (moejax/routing/losses.py), added for each router of each layer."""

    name: str = ""
    coefficient: float = 0.01
    options: Options = dataclasses.field(default_factory=Options)


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """A controller of the bias that takes part in the choice (moejax/routing/balance.py)."""

    name: str = "none"
    rate: float = 1e-3
    options: Options = dataclasses.field(default_factory=Options)


def check_balance(balance: BalanceConfig, field: str) -> None:
    """UserError by the name of the ``field`` that it is."""
    require_one_of(balance.name, ("none", "sign", "increment"), f"{field}.name")
    require(balance.rate >= 0, f"{field}.rate", "must not be negative")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A layer of experts, wherever the config's blocks have one."""

    # Experts with weights; 0: none, and no block may ask for them.
    num_experts: int = 0
    # Experts of a token, for routers that choose a number of them.
    top_k: int = 2
    # Hidden width of an expert; 0 takes model.ffn_hidden.
    hidden: int = 0
    activation: str = "swiglu"
    # What an expert is: an "mlp" of its own, or a scale and a shift ("film") of features that all
    # share (nn/film.py).
    kind: str = "mlp"
    # Experts without a matmul, numbered after those with weights: nothing, the input, and a mixture
    # of the input with a learned vector.
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    # Hidden width of what every token runs beside its experts: shared experts, or a dense MLP.
    shared_hidden: int = 0
    # 0: shared experts are simply added; n: they are n, and their weights compete with the others'.
    shared_competing: int = 0
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    # For each modality the experts that it may choose; () lets all choose all.
    allowed: tuple[tuple[int, ...], ...] = ()
    # The last so many experts have no score: those of modalities that may choose nothing else
    # (``allowed``), whose tokens go there with weight 1.
    unscored_experts: int = 0
    # Sequences that are routed together, where a router compares tokens; all of them where a
    # (micro)batch has fewer, or with 0.
    routing_group: int = 1
    # Who is dropped where more tokens choose an expert than it has places: "none", the last
    # ("order"), the tokens or the choices of the lowest weight ("priority", "weight"), or those who
    # find no place elsewhere ("recycle").
    capacity: str = "none"
    # Places of all experts over choices of all tokens.
    capacity_factor: float = 1.25
    # Places of an expert are rounded up to a multiple of this.
    capacity_multiple: int = 1
    # Places of an expert with weights over those of one without.
    capacity_tau: float = 1.0
    # What is left of a token's weights has the sum that all had.
    capacity_renormalise: bool = False
    # Outside of training; 0 drops nobody. Above 0 what is dropped depends on tokens that come later
    # and on how many are read at once, so that cached decoding is not the full forward.
    eval_capacity_factor: float = 0.0
    # Who is dropped outside of training, where that is another rule; "" takes the same.
    eval_capacity: str = ""
    # How the experts are run: "dropless", "capacity" (buffers), "dense" (each on every token).
    dispatch: str = "dropless"
    # How tokens meet experts on other devices of the mesh axis "expert": "fsdp" (the weights
    # travel), "ring", "all_to_all", "ragged" (the tokens do; moejax/parallel/exchange.py), "auto"
    # (what moves the fewest bytes). Where all have the same tokens, in decoding, sums travel.
    exchange: str = "auto"
    # Rows of the buffers of all_to_all and ragged over the even share; 0: room for all.
    exchange_buffer: float = 0.0
    # Parts that tokens are exchanged in, so that one can travel while another is computed.
    exchange_chunks: int = 1
    losses: tuple[RouterLossConfig, ...] = ()
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    # Times that a layer's experts are run one after the other, each time with a router of its own.
    iterations: int = 1
    # Layers in a row that share their experts; each has a router over all of them.
    pool_layers: int = 1
    # Training steps over which the experts of the pool's other layers are let in (first, last);
    # outside of training all are open.
    pool_steps: tuple[int, int] = (0, 0)
    # A second router that learns what the first one, which sees all tokens, will choose; its hidden
    # width (0: half of the tokens').
    causal_router: bool = False
    causal_router_hidden: int = 0
    # It says yes above a half (0), or above a moving average with this decay of how sure it is of
    # the last token that an expert takes (moejax/routing/threshold.py).
    causal_router_decay: float = 0.0
    # Experts see their input times top_k.
    scale_input: bool = False
    # All experts begin with the same weights.
    equal_init: bool = False

    def __post_init__(self):
        counts = (
            "num_experts",
            "hidden",
            "zero_experts",
            "copy_experts",
            "constant_experts",
            "shared_hidden",
            "shared_competing",
            "routing_group",
            "unscored_experts",
            "causal_router_hidden",
        )
        for name in counts:
            value = getattr(self, name)
            require(value >= 0, f"model.moe.{name}", f"must not be negative, got {value}")
        positive = ("top_k", "iterations", "pool_layers", "exchange_chunks", "capacity_multiple")
        for name in positive:
            value = getattr(self, name)
            require(value > 0, f"model.moe.{name}", f"must be positive, got {value}")
        require_one_of(self.activation, ("swiglu", "gelu"), "model.moe.activation")
        require_one_of(self.kind, ("mlp", "film"), "model.moe.kind")
        if self.kind == "film":
            require(self.activation == "gelu", "model.moe.activation", "'film' is made with 'gelu'")
            plain = MoEConfig()
            weightless = ("zero_experts", "copy_experts", "constant_experts")
            for name in (*weightless, "scale_input", "pool_layers"):
                same = getattr(self, name) == getattr(plain, name)
                require(
                    same, f"model.moe.{name}", "is not for experts of kind 'film'; leave it out"
                )
        policies = ("none", "order", "priority", "weight", "recycle")
        require_one_of(self.capacity, policies, "model.moe.capacity")
        require_one_of(self.eval_capacity, ("", *policies[1:]), "model.moe.eval_capacity")
        require(
            not self.eval_capacity or self.capacity != "none",
            "model.moe.eval_capacity",
            "needs a model.moe.capacity",
        )
        require(
            self.capacity_factor > 0,
            "model.moe.capacity_factor",
            f"must be positive, got {self.capacity_factor}; model.moe.capacity=none drops nobody",
        )
        require(self.capacity_tau > 0, "model.moe.capacity_tau", "must be positive")
        inputs = ("token", "condition", "noise")
        require_one_of(self.score.input, inputs, "model.moe.score.input")
        require(0 <= self.score.jitter < 1, "model.moe.score.jitter", "must be in [0, 1)")
        decay = self.causal_router_decay
        require(0 <= decay < 1, "model.moe.causal_router_decay", "must be in [0, 1)")
        for name in ("causal_router_hidden", "causal_router_decay"):
            require(
                self.causal_router or not getattr(self, name),
                f"model.moe.{name}",
                "needs model.moe.causal_router=True",
            )
        self._check_unscored()
        require(
            self.eval_capacity_factor >= 0, "model.moe.eval_capacity_factor", "must not be negative"
        )
        require_one_of(self.dispatch, ("dropless", "capacity", "dense"), "model.moe.dispatch")
        require(
            self.dispatch != "capacity" or self.capacity != "none",
            "model.moe.dispatch",
            "buffers need a model.moe.capacity: order, priority, weight or recycle",
        )
        exchanges = ("auto", "fsdp", "ring", "all_to_all", "ragged")
        require_one_of(self.exchange, exchanges, "model.moe.exchange")
        require(self.exchange_buffer >= 0, "model.moe.exchange_buffer", "must not be negative")
        check_balance(self.balance, "model.moe.balance")
        require(
            not self.shared_competing or self.shared_hidden % self.shared_competing == 0,
            "model.moe.shared_competing",
            f"{self.shared_competing} does not divide model.moe.shared_hidden={self.shared_hidden}",
        )
        for i, loss in enumerate(self.losses):
            require(loss.name != "", f"model.moe.losses[{i}].name", "names no loss")
        first_last = self.pool_steps
        require(
            len(first_last) == 2 and 0 <= first_last[0] <= first_last[-1],
            "model.moe.pool_steps",
            f"are a first and a last step, got {first_last}",
        )
        require(
            self.pool_layers > 1 or first_last == (0, 0),
            "model.moe.pool_steps",
            "needs model.moe.pool_layers above 1",
        )
        require(
            not self.shared_competing or self.shared_hidden > 0,
            "model.moe.shared_competing",
            "needs a width, model.moe.shared_hidden",
        )
        names = [loss.name for loss in self.losses]
        require(len(set(names)) == len(names), "model.moe.losses", f"one comes twice: {names}")
        require(
            self.pool_layers == 1
            or not (self.zero_experts or self.copy_experts or self.constant_experts),
            "model.moe.pool_layers",
            "layers that share experts have no experts without weights",
        )

    def _check_unscored(self) -> None:
        unscored, field = self.unscored_experts, "model.moe.unscored_experts"
        if not unscored:
            return
        scored = self.num_experts - unscored
        require(scored > 0, field, f"leaves none of {self.num_experts} experts to choose from")
        apart = all(max(ids) < scored or min(ids) >= scored for ids in self.allowed if ids)
        require(
            bool(self.allowed) and apart,
            field,
            f"needs model.moe.allowed: for each modality experts below {scored}, or from it on",
        )
        others = self.weightless or self.shared_competing or self.pool_layers > 1
        require(
            not others and not self.score.gating_residual,
            field,
            "cannot be beside experts without weights, competing or pooled ones, or "
            "model.moe.score.gating_residual",
        )

    @property
    def pool(self) -> int:
        """Experts with weights that a token can be sent to."""
        return self.num_experts * self.pool_layers

    @property
    def weightless(self) -> int:
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def ffn_share(self) -> float:
        """The share of a token's choices that goes to experts with weights.

        As when all are chosen alike; where places are limited, as when all are full (MoE++, arXiv
        2410.07348: tau N_FFN / (tau N_FFN + N_ZC) of the FLOPs without weightless experts).
        """
        tau = self.capacity_tau if self.capacity != "none" else 1.0
        return tau * self.pool / (tau * self.pool + self.weightless)

    @property
    def columns(self) -> int:
        """Everything a router chooses from."""
        return self.pool + self.weightless + self.shared_competing

    def check_modalities(self, modalities: tuple[str, ...]) -> None:
        """UserError unless ``allowed`` names, for each modality, experts that there are."""
        if not self.allowed:
            return
        require(
            len(self.allowed) == len(modalities),
            "model.moe.allowed",
            f"needs the experts of each of {len(modalities)} modalities, got {len(self.allowed)}",
        )
        choices = self.pool + self.weightless
        for name, ids in zip(modalities, self.allowed, strict=True):
            require(len(ids) > 0, "model.moe.allowed", f"no expert is allowed for {name!r}")
            bad = [i for i in ids if not 0 <= i < choices]
            require(not bad, "model.moe.allowed", f"{name!r}: no expert {bad} of {choices}")
