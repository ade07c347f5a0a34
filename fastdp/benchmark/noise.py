"""How quiet the machine is: a fixed piece of work, timed again and again while nothing is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastdp.benchmark.rounds import spread

REPEATS = 5  # in each gap between rounds
LOOP_SECONDS = 0.01  # of one piece of work, about
NOISY_SPREAD = 0.05  # interquartile range by median
NOISY_CORES = 0.25  # cores that other programs keep busy


class Noise:
    """Times the idle loop in the gaps between rounds, when all workers wait.

    One thread multiplies small arrays for about 10 ms, always the same number of times. On a quiet machine it takes the
    same time each time. How many cores other programs keep busy meanwhile comes from the system's own counters, where
    it has them (Linux): a loop of one thread does not notice them while a core is free.
    """

    def __init__(self) -> None:
        self._array = np.ones(4096, np.float32)
        self._count = 1
        self._seconds: list[float] = []
        self._busy, self._ticks = 0.0, 0.0
        self._loop()  # warms up
        self._count = max(1, round(LOOP_SECONDS / max(self._loop(), 1e-6)))

    def sample(self) -> None:
        """Time the loop a few times; takes about 50 ms."""
        before, own = _ticks(), _own_seconds()
        self._seconds += [self._loop() for _ in range(REPEATS)]
        after = _ticks()
        if before is not None and after is not None and after[1] > before[1]:
            self._ticks += after[1] - before[1]
            mine = (_own_seconds() - own) * os.sysconf("SC_CLK_TCK")
            self._busy += max(0.0, after[0] - before[0] - mine)

    def _loop(self) -> float:
        """Seconds of one piece of work."""
        began = time.perf_counter()
        for _ in range(self._count):
            np.add(self._array, 1.0, out=self._array)
        return time.perf_counter() - began

    @property
    def busy_cores(self) -> float | None:
        """How many cores other programs kept busy during the samples; None where the system does not tell."""
        return (os.cpu_count() or 1) * self._busy / self._ticks if self._ticks else None

    def result(self) -> dict[str, Any]:
        """The loop's median and quartiles in seconds, its relative spread, and the verdict in words."""
        if not self._seconds:
            self.sample()
        found = spread(self._seconds)
        relative = (found["q3"] - found["q1"]) / found["median"]
        busy = self.busy_cores
        reasons = []
        if relative > NOISY_SPREAD:
            reasons.append(f"the same work takes {100 * relative:.0f} % longer at some times than at others")
        if busy is not None and busy > NOISY_CORES:
            reasons.append(f"other programs keep {busy:.1f} of {os.cpu_count()} cores busy")
        return {
            "idle_loop": {"median_seconds": found["median"], "q1": found["q1"], "q3": found["q3"]},
            "relative_spread": round(relative, 4),
            "busy_cores": None if busy is None else round(busy, 2),
            "verdict": f"noisy: {'; '.join(reasons)}" if reasons else "quiet",
        }


def _ticks() -> tuple[float, float] | None:
    """The system's counters: ticks in which cores were busy, and all ticks; None where there are none."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, idle, waiting, *others = map(int, stat.read_text("utf-8").split("\n")[0].split()[1:])
    busy = user + nice + system + sum(others[:3])
    return float(busy), float(busy + idle + waiting)


def _own_seconds() -> float:
    """Processor time of this process."""
    return time.process_time()
