"""The rungs that need no accelerator: how a kernel is interpreted, and what that finds."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

# Memory that was not written is NaN in the second and third; a copy is done when it is waited for,
# or at once and races are looked for.
INTERPRETED = {
    "plain": True,
    "on_wait": pltpu.InterpretParams(),
    "eager": pltpu.InterpretParams(dma_execution_mode="eager", detect_races=True),
}


def races_found() -> bool:
    """Whether the last kernel that was interpreted with ``eager`` had a race."""
    races = interpret_pallas_call.races
    return races is not None and races.races_found


def record_races(monkeypatch) -> list:
    """What the race detection of each kernel from now on will have found, in their order."""
    states, make = [], interpret_pallas_call.RaceDetectionState

    def record(*args, **options):
        states.append(make(*args, **options))
        return states[-1]

    monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", record)
    return states
