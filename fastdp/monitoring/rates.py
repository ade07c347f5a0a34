"""Counts steps, rows, time and waiting, and gives rates of any stretch of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """What a stretch of a run did.

    Attributes:
        steps: how many steps.
        seconds: how long they took, with waiting for input, without pauses.
        rows: rows of the batches; None if unknown.
        waited: seconds of waiting for input.
    """

    steps: int
    seconds: float
    rows: float | None
    waited: float

    @property
    def steps_per_second(self) -> float:
        """Zero if no time has passed."""
        return self.steps / self.seconds if self.seconds > 0 else 0.0

    @property
    def samples_per_second(self) -> float | None:
        """None if the rows are unknown."""
        if self.rows is None:
            return None
        return self.rows / self.seconds if self.seconds > 0 else 0.0

    @property
    def input_wait(self) -> float:
        """The share of the time that went into waiting for input, from 0 to 1."""
        return min(1.0, self.waited / self.seconds) if self.seconds > 0 else 0.0


class Counts:
    """The counts of a run so far. The clock stands still in pauses, and at the beginning.

    `rows` is a running total, None as long as it is unknown; whoever knows it sets it.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.rows: float | None = None
        self.waited = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """The time so far, without pauses."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @property
    def running(self) -> bool:
        """Whether the clock runs."""
        return self._since is not None

    def resume(self) -> None:
        """Let the clock run."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock: what follows is no part of the run, such as validation."""
        self._seconds, self._since = self.seconds, None


class Stretch:
    """The rates of a stretch that begins now. `restart` begins the next one."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch now."""
        counts = self._counts
        self._steps, self._rows, self._waited, self._seconds = counts.steps, counts.rows, counts.waited, counts.seconds

    @property
    def seconds(self) -> float:
        """How long it is so far."""
        return self._counts.seconds - self._seconds

    @property
    def steps(self) -> int:
        """How many steps it has so far."""
        return self._counts.steps - self._steps

    def rates(self) -> Rates:
        """The rates so far."""
        counts = self._counts
        rows = None if counts.rows is None else counts.rows - (self._rows or 0.0)
        return Rates(self.steps, self.seconds, rows, counts.waited - self._waited)
