"""Times some compiled and some traced steps, and keeps the faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdp.capture.trace import Captured

STEPS = 10  # of each kind


class SpeedTrial:
    """Lets a captured step run compiled, then traced, and keeps the faster.

    Compiling has ended before the trial: step times measured while it runs beside the training say little.

    Args:
        captured: a traced step.
        compiled: the compiled form of the step, used from now on.

    After the trial `why` says why the step stays traced; it is empty if the step stays compiled.
    """

    def __init__(self, captured: Captured[Any], compiled: Callable[..., Sequence[torch.Tensor]]) -> None:
        self._captured, self._compiled = captured, compiled
        self._seconds: list[float] = []
        self.why = ""
        captured.use(compiled)

    def note(self, seconds: float) -> None:
        """Add the duration of a step."""
        if len(self._seconds) == 2 * STEPS:
            return
        self._seconds.append(seconds)
        if len(self._seconds) == STEPS:
            self._captured.use_traced()
        elif len(self._seconds) == 2 * STEPS:
            compiled, traced = statistics.median(self._seconds[:STEPS]), statistics.median(self._seconds[STEPS:])
            if compiled <= traced:
                self._captured.use(self._compiled)
            else:
                self.why = f"a step takes {1e3 * compiled:.2f} ms compiled and {1e3 * traced:.2f} traced"
