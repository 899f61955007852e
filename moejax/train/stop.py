"""Signals that ask a run to stop."""

import signal
import threading
from typing import Any

import jax
import numpy as np

from moejax.parallel import distributed


class StopSignals:
    """Notes SIGTERM and the first Ctrl-C; a second Ctrl-C interrupts as usual."""

    def __init__(self):
        self.requested = False
        self._asked: jax.Array | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python lets only the main thread set signal handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> bool:
        """Whether to stop after this step; every process of a run calls it once a step.

        Alone: whether a signal came. Of several: whether one had come to any of them a step ago,
        which all know by now without waiting for each other.
        """
        if not distributed.several():
            return self.requested
        before, self._asked = self._asked, distributed.share(np.asarray([self.requested]))
        return before is not None and bool(np.asarray(before).any())

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.requested = True
        signal.signal(number, self._before[number])
