"""Times a model's steps on all devices and on one, and lets one do where sharing them out does not pay.

Both ways give the same results, so steps of both kinds may follow each other. Small steps are slower on several
devices: to hand out rows, to wait for the last replica and to merge takes longer than the others' rows save.
"""

from __future__ import annotations

import statistics
from typing import Any

import keras
import torch
from keras.src.backend.torch.core import get_device

WARM_STEPS = 4  # on all devices, at first: they try out rows and allocate
BLOCK_STEPS, SETTLING_STEPS = 5, 2  # in turns; the first steps after a change wake other threads
BLOCKS = 4
ADVANTAGE = 1.1  # steps on one device must be faster by this factor


class DeviceTrial:
    """Decides by the clock whether steps of one kind run on all devices.

    Attributes:
        on_all: whether the next step runs on all devices.

    Steps with another number of rows than most are not counted, since they take another time.
    """

    def __init__(self) -> None:
        self.on_all = True
        self._steps = 0
        self._rows = 0
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def is_over(self) -> bool:
        """Whether it is decided."""
        return self._steps >= WARM_STEPS + BLOCKS * BLOCK_STEPS

    def note(self, seconds: float, rows: int) -> str:
        """Add the duration of a step; returns what is to be said when one device is found to be faster."""
        if self.is_over:
            return ""
        if self._steps < WARM_STEPS:
            self._rows = max(rows, self._rows)
        elif rows != self._rows:
            return ""
        elif (self._steps - WARM_STEPS) % BLOCK_STEPS >= SETTLING_STEPS:
            self._seconds[self.on_all].append(seconds)
        self._steps += 1
        block, rest = divmod(self._steps - WARM_STEPS, BLOCK_STEPS)
        if rest or block < 0:
            return ""
        if not self.is_over:
            self.on_all = block % 2 == 1  # one device first
            return ""
        alone, together = (statistics.median(self._seconds[on_all]) for on_all in (False, True))
        self.on_all = alone * ADVANTAGE >= together
        return "" if self.on_all else f"take {1e3 * alone:.1f} ms on one device and {1e3 * together:.1f}"


def wait_for_gpu() -> None:
    """Wait for what plain Keras has enqueued, so that a step's time is that of its work."""
    if get_device() == "cuda":
        torch.cuda.synchronize()


def first_rows(data: Any) -> int:
    """The rows of a batch: those of its first array."""
    return next((leaf.shape[0] for leaf in keras.tree.flatten(data) if len(getattr(leaf, "shape", ()))), 0)
