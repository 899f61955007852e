"""The groups ``model.depth`` and ``model.recursion`` of a config: which tokens run a block."""

import dataclasses

from moejax.config.checks import require, require_one_of
from moejax.config.moe import BalanceConfig, check_balance

GATES = ("linear", "sigmoid", "tanh_norm", "softmax", "none")
CAUSAL_RULES = ("router", "predictor", "threshold", "none")
# The bias of the router "token" that its controller moves: the last part of its path.
STEP_BIAS = "select_bias_r"


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """Blocks that some of the tokens run and the others skip (moejax/nn/depth.py).

    A kind of block ``"mod"`` runs ``block`` on the share ``capacity``; ``"mod:0.5:moe"`` says both
    itself.
    """

    # The kind of block that "mod" and "recursive" run.
    block: str = "untied"
    # Share of the tokens that compete which runs the block in training; "up" takes one more rather
    # than one less.
    capacity: float = 0.125
    rounding: str = "down"
    # Sequences whose tokens compete; a batch that they do not divide competes as a whole.
    group: int = 1
    # Who competes in them: all ("row"), those of one packed "segment", or of one "run" of tokens of
    # one modality (a picture, a frame), each with its own share.
    within: str = "row"
    # The only modality whose tokens compete, those of the others run every block; "": all compete.
    modality: str = ""
    # Share of a row that a block has room for in training. 0: what it takes, where all of the row
    # compete, else all. Whoever finds no room skips the block, lowest scores first.
    room: float = 0.0
    # Room outside of training over that share, first come first served; caches are of this length.
    # 0: for all.
    eval_room: float = 0.0
    # The weight of what a block does, from a token's score r: r, scale * sigmoid(r),
    # 1 + scale * tanh(r), the second of two probabilities ("softmax"), or 1 ("none").
    gate: str = "linear"
    gate_scale: float = 1.0
    # What is weighed: the "block", or the "ffn" branch inside of it.
    gate_on: str = "block"
    # x + g (block(x) - x) is "delta", x + g block(x) is "whole".
    branch: str = "delta"
    # Tokens that compete and skip the block are multiplied by their weight too (p-MoD's STRing).
    weigh_skipped: bool = False
    # The router: begins with zeros, has a bias, sees normalised tokens, is one for all blocks.
    router_zeros: bool = False
    router_bias: bool = False
    router_norm: bool = False
    router_shared: bool = False
    # A control: tokens are chosen at random, and weighed as ever.
    random_choice: bool = False
    # Steps over which the capacity falls from 1, by a cosine.
    warmup_steps: int = 0
    # Outside of training, where later tokens must not matter, a token runs the block if the sigmoid
    # of a score is above ``threshold``: the router's, which learns to say so ("router") or not
    # ("threshold"), or a second one's, which leaves the model alone ("predictor"). "none" chooses
    # as in training.
    causal_rule: str = "router"
    threshold: float = 0.5
    # Coefficient of the cross-entropy of that score against the choices of training.
    causal_loss: float = 0.01
    # Hidden width of the predictor; 0: half of model.d_model.
    predictor_hidden: int = 0

    def __post_init__(self):
        require(
            self.block.partition(":")[0] not in ("mod", "recursive"),
            "model.depth.block",
            f"{self.block!r} is itself about other blocks; name one that is not",
        )
        require(
            0 < self.capacity <= 1,
            "model.depth.capacity",
            f"must be in (0, 1], got {self.capacity}",
        )
        require(
            self.within != "run" or self.modality != "",
            "model.depth.within",
            "'run' is about tokens of one modality; name it in model.depth.modality",
        )
        require(
            self.gate_on == "block" or self.branch == "delta",
            "model.depth.branch",
            "is 'delta' where model.depth.gate_on is 'ffn'",
        )
        require(
            not self.random_choice or self.causal_rule == "none",
            "model.depth.causal_rule",
            "is 'none' where tokens are chosen at random (model.depth.random_choice)",
        )
        require(0 <= self.room <= 1, "model.depth.room", f"must be in [0, 1], got {self.room}")
        require(
            self.eval_room == 0 or (self.eval_room >= 1 and not self.modality),
            "model.depth.eval_room",
            "is 0 or at least 1, and 0 where model.depth.modality names who competes",
        )
        require_one_of(self.rounding, ("down", "up"), "model.depth.rounding")
        require(self.group > 0, "model.depth.group", f"must be positive, got {self.group}")
        require_one_of(self.within, ("row", "segment", "run"), "model.depth.within")
        require_one_of(self.gate, GATES, "model.depth.gate")
        require_one_of(self.gate_on, ("block", "ffn"), "model.depth.gate_on")
        require_one_of(self.branch, ("delta", "whole"), "model.depth.branch")
        require_one_of(self.causal_rule, CAUSAL_RULES, "model.depth.causal_rule")
        require(0 < self.threshold < 1, "model.depth.threshold", "must be in (0, 1)")
        require(self.causal_loss >= 0, "model.depth.causal_loss", "must not be negative")
        require(self.warmup_steps >= 0, "model.depth.warmup_steps", "must not be negative")
        require(self.predictor_hidden >= 0, "model.depth.predictor_hidden", "must not be negative")

    @property
    def learns_to_decide(self) -> bool:
        return self.causal_rule in ("router", "predictor")


@dataclasses.dataclass(frozen=True)
class RecursionConfig:
    """Layers that are run several times (moejax/nn/recursive.py), as a kind of block "recursive".

    ``layers`` blocks of the kind ``model.depth.block`` are run ``steps`` times one after the other.
    """

    steps: int = 1
    layers: int = 1
    # Who runs each step: all ("none"); of those that ran the step before the best by its own router
    # ("expert"); as many steps as one router gives a token at the start ("token").
    router: str = "none"
    # Share of the row's tokens that runs each step of the router "expert"; (): 1, then
    # (steps - 1) / steps, ..., 1 / steps.
    capacities: tuple[float, ...] = ()
    # Later steps use the keys and values of the first.
    share_kv: bool = False
    # Those of the tokens that run a later step are replaced by their own.
    update_kv: bool = False
    # Of the router "token": room in training over the even share (0: for all), whether each step is
    # weighed and not only the last, the coefficients of its losses, and a controller of a bias that
    # takes part in the choice instead of the first of them.
    room: float = 0.0
    gate_steps: bool = False
    balance_loss: float = 0.1
    z_loss: float = 1e-5
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)

    def __post_init__(self):
        for name in ("steps", "layers"):
            value = getattr(self, name)
            require(value > 0, f"model.recursion.{name}", f"must be positive, got {value}")
        require_one_of(self.router, ("none", "expert", "token"), "model.recursion.router")
        require(
            not self.capacities or self.router == "expert",
            "model.recursion.capacities",
            "are of model.recursion.router='expert'",
        )
        require(
            (not self.room and not self.gate_steps) or self.router == "token",
            "model.recursion.room",
            "and gate_steps are of model.recursion.router='token'",
        )
        check_balance(self.balance, "model.recursion.balance")
        require(
            self.balance.name == "none" or self.router == "token",
            "model.recursion.balance.name",
            "moves a bias of model.recursion.router='token'",
        )
        require(
            not self.balance.options, "model.recursion.balance.options", "are of model.moe.balance"
        )
        require(
            self.share_kv or not self.update_kv,
            "model.recursion.update_kv",
            "needs model.recursion.share_kv=True",
        )
        shares = self.shares
        require(
            len(shares) == self.steps,
            "model.recursion.capacities",
            f"needs one share for each of {self.steps} steps, got {len(shares)}",
        )
        falling = all(a >= b for a, b in zip((1.0, *shares), shares, strict=False))
        require(
            falling and min(shares) > 0,
            "model.recursion.capacities",
            f"must not rise, and be in (0, 1], got {shares}",
        )
        require(
            not self.share_kv or shares[0] == 1,
            "model.recursion.share_kv",
            "needs all tokens in the first step",
        )
        for name in ("room", "balance_loss", "z_loss"):
            require(getattr(self, name) >= 0, f"model.recursion.{name}", "must not be negative")

    @property
    def shares(self) -> tuple[float, ...]:
        return self.capacities or tuple((self.steps - i) / self.steps for i in range(self.steps))
