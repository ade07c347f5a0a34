"""Times each verb of a training step on each device, and gives medians over the latest steps.

Times are taken on the host thread and on the devices' workers. A GPU's worker launches work and waits for values that
it reads, so its time is not the GPU's; use a profiler for that.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fastdp.tracing.spans import verb

LATEST = 200
VERBS = ("scatter", "compute", "merge", "wait", "communication", "update")


class Watch:
    """The time of each event in one step, in seconds of `time.perf_counter`.

    Each worker writes the entry of its rank; the host thread writes the rest. `rows` holds the row counts of the
    devices that have rows. `early` is the number of gradient buckets that were complete on all devices before the
    slowest device was done. `verb` is what the host thread is at.
    """

    __slots__ = (
        "arrived", "began", "compute_began", "compute_ended", "early", "ended", "finished", "merging", "rows",
        "scattered", "scattering", "update_began", "update_ended", "verb",
    )  # fmt: skip

    def __init__(self, rows: Sequence[int], devices: int) -> None:
        self.rows = list(rows)
        self.early = 0
        self.verb = ""
        self.began = time.perf_counter()
        self.scattering = self.scattered = self.arrived = self.finished = self.ended = self.began
        self.compute_began = [0.0] * len(self.rows)
        self.compute_ended = [0.0] * len(self.rows)
        self.merging = [0.0] * len(self.rows)
        self.update_began = [0.0] * devices
        self.update_ended = [0.0] * devices

    def seconds(self, rank: int) -> dict[str, float]:
        """Seconds by verb of a device that had rows.

        `wait` is the time until the slowest device is done, including reductions in that time. `communication` begins
        after it. A device that does not update itself waits for the first device's update; its `communication` is the
        time before and after that update.
        """
        updating = rank if self.update_ended[rank] else 0
        communication = self.update_began[updating] - self.arrived
        if not all(self.update_ended):  # the new variables are copied from the first device
            communication += self.finished - self.update_ended[0]
        return {
            "scatter": self.scattered - self.scattering,
            "compute": self.compute_ended[rank] - self.compute_began[rank] - self.merging[rank],
            "merge": self.merging[rank],
            "wait": self.arrived - self.compute_ended[rank],
            "communication": communication,
            "update": self.update_ended[rank] - self.update_began[rank],
        }


class TracedWatch(Watch):
    """The watch of a step that is recorded in traces, which get its verbs."""

    __slots__ = ()

    @property
    def verb(self) -> str:
        """What the host thread is at. Only set: traces have the times."""
        raise AttributeError("verb")

    @verb.setter
    def verb(self, name: str) -> None:
        if name:
            verb(name)


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """A device's rows in most of the latest batches, and its median seconds by verb."""

    rows: int
    seconds: dict[str, float]


class Timings:
    """The watches of the latest training steps of an engine."""

    def __init__(self) -> None:
        self.steps = 0
        self._watches: deque[Watch] = deque(maxlen=LATEST)
        self._between: deque[float] = deque(maxlen=LATEST)

    def add(self, watch: Watch) -> None:
        """Record a step that is over."""
        watch.ended = time.perf_counter()
        if self._watches:
            self._between.append(watch.began - self._watches[-1].ended)
        self._watches.append(watch)
        self.steps += 1

    @property
    def latest_work(self) -> list[float]:
        """Seconds of forward and backward in the latest step, for each device that had rows."""
        latest = self._watches[-1]
        return [end - began for began, end in zip(latest.compute_began, latest.compute_ended, strict=True)]

    @property
    def timed(self) -> int:
        """How many steps the medians cover."""
        return len(self._watches)

    @property
    def step(self) -> float:
        """Median seconds of a step in the engine."""
        return statistics.median([watch.ended - watch.began for watch in self._watches] or [0.0])

    @property
    def between(self) -> float:
        """Median seconds from one step to the next: waiting for input, callbacks, metrics."""
        return statistics.median(self._between or [0.0])

    def device(self, rank: int) -> DeviceTimes:
        """One device's times; zeros if it had no rows in any of the steps."""
        mine = [watch for watch in self._watches if rank < len(watch.rows)]
        found = [watch.seconds(rank) for watch in mine]
        seconds = {verb: statistics.median([one[verb] for one in found] or [0.0]) for verb in VERBS}
        return DeviceTimes(statistics.mode([watch.rows[rank] for watch in mine] or [0]), seconds)

    @property
    def early(self) -> int:
        """How many gradient buckets began to be reduced while a device still computed, in most of the steps."""
        return statistics.mode([watch.early for watch in self._watches] or [0])

    @property
    def overhead(self) -> float:
        """Median seconds that a step takes beyond its slowest device's work and the update.

        One device would need little or none of this: scattering, reducing, copying and merging.
        """
        values = []
        for watch in self._watches:
            work = max(end - began for began, end in zip(watch.compute_began, watch.compute_ended, strict=True))
            update = max(end - began for began, end in zip(watch.update_began, watch.update_ended, strict=True))
            values.append(watch.ended - watch.began - work - update)
        return statistics.median(values or [0.0])
