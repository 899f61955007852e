"""How training draws the times of a diffusion process."""

import dataclasses

from moejax.config.checks import require, require_one_of


@dataclasses.dataclass(frozen=True)
class TimeSampling:
    """How training draws t.

    ``uniform``, or ``logit_normal``: ``sigmoid(mean + std * normal)`` (arXiv 2403.03206, section
    3.1). Then ``t' = shift * t / (1 + (shift - 1) t)``: a shift above 1 favours noisy times.
    """

    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        known = ("uniform", "logit_normal")
        require_one_of(self.distribution, known, "objective.times.distribution")
        for name in ("std", "shift"):
            value = getattr(self, name)
            require(value > 0, f"objective.times.{name}", f"must be positive, got {value}")
