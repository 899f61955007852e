"""Options of single evaluators, in the group ``eval``."""

import dataclasses

from moejax.config.checks import require


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """The evaluator "linear_probe" (train/linear_probe.py)."""

    # Labelled pictures to fit and test on, such as those of another domain; "" takes data.source.
    source: str = ""
    # Training pictures that are looked at, at most; 0: all.
    pictures: int = 10_000
    # Labelled pictures of each class, and how often so many are drawn.
    shots: tuple[int, ...] = (1, 5, 10)
    draws: int = 5
    # Penalty of the few-shot classifiers, for which there are too few labels to choose it by.
    shot_penalty: float = 0.1
    seed: int = 0

    def __post_init__(self):
        require(
            not self.source or ":" in self.source,
            "eval.probe.source",
            f"{self.source!r} is not KIND:NAME",
        )
        require(self.pictures >= 0, "eval.probe.pictures", "must not be negative")
        require(min(self.shots, default=1) > 0, "eval.probe.shots", "must be positive")
        require(len(set(self.shots)) == len(self.shots), "eval.probe.shots", "name each once")
        require(self.draws > 0, "eval.probe.draws", f"must be positive, got {self.draws}")
        require(self.shot_penalty > 0, "eval.probe.shot_penalty", "must be positive")
        require(self.seed >= 0, "eval.probe.seed", "must not be negative")


@dataclasses.dataclass(frozen=True)
class RobustnessConfig:
    """The evaluator "robustness" (train/robustness.py)."""

    # Standard deviations of Gaussian noise, in grey levels of 255, and of the blur, in pixels.
    noise: tuple[float, ...] = (8.0, 16.0, 32.0, 64.0)
    blur: tuple[float, ...] = (0.5, 1.0, 2.0)
    seed: int = 0

    def __post_init__(self):
        for name in ("noise", "blur"):
            levels = getattr(self, name)
            require(
                min(levels, default=1.0) > 0 and len(set(levels)) == len(levels),
                f"eval.robustness.{name}",
                f"name positive levels, each once, got {levels}",
            )
        require(len(self.noise) + len(self.blur) > 0, "eval.robustness.noise", "no level at all")
        require(self.seed >= 0, "eval.robustness.seed", "must not be negative")


@dataclasses.dataclass(frozen=True)
class FidelityConfig:
    """The evaluator "fidelity" (train/fidelity.py)."""

    # Pictures that are drawn, and real ones in each set beside them. A distance means something
    # beside others of the same number alone.
    pictures: int = 1000
    # How often they are compared with other real pictures, for the spread.
    draws: int = 5
    # Training pictures that copies are looked for among, at most; 0: all.
    reference: int = 60_000
    # Of precision, recall, density and coverage.
    neighbours: int = 5
    # Of pictures that are denoised: the sampler and its steps; and the weight of the class.
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.5
    # The workdir of a classifier of the same data, trained by itself; "" asks none.
    classifier: str = ""
    seed: int = 0

    def __post_init__(self):
        for name in ("pictures", "draws", "neighbours", "steps"):
            require(getattr(self, name) > 0, f"eval.fidelity.{name}", "must be positive")
        for name in ("reference", "guidance", "seed"):
            require(getattr(self, name) >= 0, f"eval.fidelity.{name}", "must not be negative")
