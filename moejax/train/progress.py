"""What a run says while it goes: lines on stdout, and a bar with ETA where stderr is a terminal."""

import sys
import time
from collections.abc import Sequence


class Progress:
    """Prints the progress of ``total`` steps, the first ``start`` of them done before.

    ``losses`` are those worth a place on a line (all, if empty); ``quiet`` prints nothing (the
    other processes of a multi-host run).
    """

    def __init__(self, total: int, start: int, *, losses: Sequence[str] = (), quiet: bool = False):
        self.losses = losses
        self.total = total
        self.start = start
        self.quiet = quiet
        self._began = time.monotonic()
        self._paused = 0.0
        self._bar = sys.stderr.isatty() and not quiet
        self._drawn = 0.0
        self._suffix = ""

    def say(self, text: str) -> None:
        """Prints a line, clear of the bar."""
        if self.quiet:
            return
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(text, flush=True)

    def begin(self) -> None:
        """Starts the clock of the ETA (after the first step)."""
        self.start += 1
        self._began = time.monotonic()

    def step(self, step: int) -> None:
        """Redraws the bar, a few times per second at most."""
        now = time.monotonic()
        if not self._bar or now - self._drawn < 0.2:
            return
        width = 24
        full = width * step // self.total
        bar = "#" * full + "-" * (width - full)
        line = f"\r\x1b[K[{bar}] {step}/{self.total}  {self._suffix}  ETA {self.eta(step)}"
        print(line, end="", file=sys.stderr, flush=True)
        self._drawn = now

    def row(self, step: int, values: dict[str, float]) -> None:
        """Reports a metrics row."""
        self._suffix = describe(values, self.losses)
        if not self._bar:
            self.say(f"step {step}/{self.total}  {self._suffix}  ETA {self.eta(step)}")

    def eta(self, step: int) -> str:
        """``"3:20"``: minutes and seconds until the last step, at the pace so far."""
        done = step - self.start
        if done <= 0:
            return "?"
        return format_seconds((time.monotonic() - self._began) / done * (self.total - step))

    def close(self) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn, self._bar = 0.0, False


def format_seconds(seconds: float) -> str:
    """``200`` -> ``"3:20"``, ``3700`` -> ``"1:01:40"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(values: dict[str, float], losses: Sequence[str] = ()) -> str:
    """``"loss 5.31 (text 4.9)  lr 1e-03  12.1k tokens/s  input wait 0.1%  utilisation 31%"``."""
    parts = []
    if "train/loss" in values:
        each = [
            f"{name.removeprefix('train/loss/')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("train/loss/")
            and (not losses or name.removeprefix("train/loss/") in losses)
        ]
        parts.append(f"loss {values['train/loss']:.4f}" + (f" ({', '.join(each)})" if each else ""))
    if "train/learning_rate" in values:
        parts.append(f"lr {values['train/learning_rate']:.1e}")
    if values.get("train/skipped"):
        parts.append(f"skipped {values['train/skipped']}")
    for unit in ("tokens", "examples"):
        rate = values.get(f"train/{unit}_per_second")
        if rate is not None:
            parts.append(f"{format_count(rate)} {unit}/s")
    if "train/input_wait_fraction" in values:
        parts.append(f"input wait {values['train/input_wait_fraction']:.1%}")
    if "train/utilisation" in values:
        parts.append(f"utilisation {values['train/utilisation']:.0%}")
    return "  ".join(parts)


def format_count(value: float) -> str:
    """``1234567`` -> ``"1.23M"``."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"
