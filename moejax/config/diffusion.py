"""The process of a diffusion model, and what such a model is trained for, in a config."""

import dataclasses

from moejax.config.checks import require, require_one_of, require_positive
from moejax.config.registry import OBJECTIVE_CONFIGS
from moejax.config.vision import AugmentConfig

# What a network may predict, of each process; the first is what it predicts by default.
PREDICTIONS = {
    "flow": ("velocity", "x0"),
    "ddpm": ("eps", "velocity", "x0"),
    "edm": ("preconditioned",),
}
# How times may be drawn: those of [0, 1], and those of the noise level sigma.
SHARES = ("uniform", "logit_normal")
LEVELS = ("log_normal", "log_logistic")


@dataclasses.dataclass(frozen=True)
class TimeSampling:
    """How training draws t.

    Of "flow" and "ddpm" ``uniform``, or ``logit_normal``: ``sigmoid(mean + std * normal)`` (arXiv
    2403.03206, section 3.1). Then ``t' = shift * t / (1 + (shift - 1) t)``: a shift above 1 favours
    noisy times.

    Of "edm", whose t is sigma, ``log_normal``: ``exp(mean + std * normal)`` (arXiv 2206.00364,
    table 1: mean -1.2, std 1.2), or ``log_logistic``: ``exp(mean + std * logistic)`` between
    ``sigma_min`` and ``sigma_max``, as MoDE (arXiv 2412.12953) has it.
    """

    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        require_one_of(self.distribution, SHARES + LEVELS, "objective.times.distribution")
        require_positive(self, "objective.times", ("std", "shift"))
        for name in ("mean", "std"):
            default = getattr(TimeSampling, name)
            require(
                self.distribution != "uniform" or getattr(self, name) == default,
                f"objective.times.{name}",
                f"has no effect on 'uniform'; leave it {default}, or set the distribution",
            )


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """All that there is to say about a process; moejax/ops/diffusion.py has its mathematics."""

    # "flow": straight paths from data to noise; "ddpm": 1,000 steps of noise that keep the
    # variance; "edm": data and sigma times noise, with the network's input and output scaled.
    process: str = "flow"
    # Of "ddpm": "cosine", or "linear" (DiT's, beta from 1e-4 to 0.02).
    schedule: str = "cosine"
    # "": the process's own, PREDICTIONS. "velocity" is the slope of the path ("v" of "ddpm").
    prediction: str = ""
    # Of "flow": which way the network's time runs. "to_noise": 0 is data, 1 is noise, and the
    # velocity eps - x0; "to_data": 0 is noise, 1 is data, and the velocity x0 - eps.
    direction: str = "to_noise"
    # Of "ddpm": the second half of the output's channels says how large the variance of a step is.
    learned_range: bool = False
    # Of "edm": the standard deviation of the data, and the noise levels that samplers begin and end
    # with.
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    times: TimeSampling = dataclasses.field(default_factory=TimeSampling)

    def __post_init__(self):
        require_one_of(self.process, tuple(PREDICTIONS), "objective.process")
        require_one_of(self.schedule, ("cosine", "linear"), "objective.schedule")
        require_one_of(self.predicts, PREDICTIONS[self.process], "objective.prediction")
        require_one_of(self.direction, ("to_noise", "to_data"), "objective.direction")
        for name, process in (
            ("schedule", "ddpm"),
            ("direction", "flow"),
            ("learned_range", "ddpm"),
            ("sigma_data", "edm"),
            ("sigma_min", "edm"),
            ("sigma_max", "edm"),
        ):
            default = getattr(Diffusion, name)
            require(
                self.process == process or getattr(self, name) == default,
                f"objective.{name}",
                f"is of process {process!r}; leave it {default} for {self.process!r}",
            )
        require_positive(self, "objective", ("sigma_data",))
        require(
            0 < self.sigma_min < self.sigma_max,
            "objective.sigma_min",
            f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}",
        )
        require_one_of(
            self.times.distribution,
            LEVELS if self.process == "edm" else SHARES,
            "objective.times.distribution",
        )
        require(
            self.process != "edm" or self.times.shift == 1,
            "objective.times.shift",
            "leave it 1 for 'edm': it would add log(shift) to the mean",
        )

    @property
    def predicts(self) -> str:
        """What the network predicts."""
        return self.prediction or PREDICTIONS[self.process][0]


@OBJECTIVE_CONFIGS.register("diffusion")
@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Diffusion):
    """Denoising of pictures or their latents (objectives/diffusion.py)."""

    name: str = "diffusion"
    # How often a training picture loses its label, and its text, for classifier-free guidance;
    # where it has both each by itself.
    label_dropout: float = 0.1
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.label_dropout <= 1, "objective.label_dropout", "must be in [0, 1]")
        self.augment.require_whole("a mixed picture would be learned as one of its class")
