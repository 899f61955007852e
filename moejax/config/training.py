"""The groups ``optim`` and ``train`` of a config."""

import dataclasses

from moejax.config.checks import require, require_one_of, require_patterns, require_positive


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters that are optimized in a way of their own."""

    # A pattern that is looked for in the path of a parameter.
    match: str = ""
    # "" takes optim.name.
    name: str = ""
    # Times optim.learning_rate.
    scale: float = 1.0
    # Negative takes optim.weight_decay.
    weight_decay: float = -1.0


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 20
    # Last learning rate as a fraction of the peak, and the share of steps that wsd decays over.
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    # Parameters in whose path one of these patterns is found are not decayed (train/optim.py).
    no_decay: tuple[str, ...] = ("norm", "bias", "scale", "router")
    clip_norm: float = 1.0
    accumulation_steps: int = 1
    # 0 keeps no moving average.
    ema_decay: float = 0.0
    # After each step an expert is mixed with the mean of the others, which gets this weight: from 0
    # on, linearly over share_steps updates (0: train.steps). 0 leaves experts alone.
    share_rate: float = 0.0
    share_steps: int = 0
    # What is never changed: PATTERN for whole parameters, PATTERN@MODALITY for that modality's
    # tower of them (train/freeze.py).
    freeze: tuple[str, ...] = ()
    # Parameters with an optimizer, a rate or a decay of their own. The first group whose pattern is
    # found counts; on the command line "({'match': 'norm', 'scale': 0.1},)".
    groups: tuple[GroupConfig, ...] = ()

    def __post_init__(self):
        require_positive(self, "optim", ("learning_rate", "eps", "accumulation_steps"))
        schedules = ("cosine", "linear", "constant", "wsd")
        require_one_of(self.schedule, schedules, "optim.schedule")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "final_fraction", "share_steps"):
            require(getattr(self, name) >= 0, f"optim.{name}", "must not be negative")
        for name in ("b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", "must be in [0, 1)")
        require(0 <= self.share_rate <= 1, "optim.share_rate", "must be in [0, 1]")
        require(0 < self.decay_fraction <= 1, "optim.decay_fraction", "must be in (0, 1]")
        require_patterns(self.no_decay, "optim.no_decay")
        require("" not in self.freeze, "optim.freeze", "an empty rule; write () for none")
        require_patterns((rule.partition("@")[0] or rule for rule in self.freeze), "optim.freeze")
        for i, group in enumerate(self.groups):
            require_patterns((group.match,), f"optim.groups[{i}].match")
            require(group.scale > 0, f"optim.groups[{i}].scale", "must be positive (optim.freeze)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 200
    seed: int = 0
    checkpoint_every: int = 100
    checkpoint_keep: int = 2
    # Stop after so many steps in a row whose gradient is not finite.
    max_skipped: int = 10
    # Compiled programs are kept for the next start: in this folder, or for "" in that of
    # JAX_COMPILATION_CACHE_DIR, or else in moejax's own (train/compilation.py). "none" keeps none.
    compilation_cache_dir: str = ""
    # A workdir, WORKDIR@STEP or a folder of one checkpoint whose parameters a new run begins with,
    # as far as they fit (surgery/init_from.py).
    init_from: str = ""
    # ((pattern, replacement), ...): where to look for a parameter, by its path here. The first rule
    # whose pattern is found counts; a path that becomes empty is not loaded.
    init_rename: tuple[tuple[str, str], ...] = ()
    # Repeat a weight that is shared there into each tower that it has here.
    init_broadcast: bool = False
    # ((tower here, tower there), ...), by modality; the others take the tower of their own name.
    init_towers: tuple[tuple[str, str], ...] = ()
    # For each expert here which row it begins as: of the experts there, or (with init_rename) of
    # the towers of an MLP. (0, 0, 1, 1) copies each of two twice.
    init_experts: tuple[int, ...] = ()
    # Each of these rows is cut by hidden units into so many experts, one after the other.
    init_slices: int = 1
    # A jax.profiler trace of profile_steps steps from profile_start on; 0 steps: none.
    profile_start: int = 10
    profile_steps: int = 0

    def __post_init__(self):
        names = ("steps", "checkpoint_every", "checkpoint_keep", "max_skipped")
        require_positive(self, "train", names)
        require(self.seed >= 0, "train.seed", "must not be negative")
        require(self.profile_steps >= 0, "train.profile_steps", "must not be negative")
        for name in ("init_rename", "init_towers"):
            for i, pair in enumerate(getattr(self, name)):
                message = f"{pair!r} is no pair; write \"(('a', 'b'),)\""
                require(len(pair) == 2, f"train.{name}[{i}]", message)
        require_patterns((pair[0] for pair in self.init_rename), "train.init_rename")
        require(self.init_slices > 0, "train.init_slices", "must be positive")
        require(
            self.init_slices == 1 or len(self.init_experts) > 0,
            "train.init_slices",
            "needs train.init_experts, the copies that are cut",
        )
        for i, row in enumerate(self.init_experts):
            require(row >= 0, f"train.init_experts[{i}]", f"must not be negative, got {row}")
