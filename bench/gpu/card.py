"""A card to measure on: a stream, a clock, and graphs of many launches; and the lines that measurements become."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

ROUNDS = 7
GRAPH_SECONDS = 2e-3  # work in one graph
SLOWEST = 1e12  # bytes per second, to choose how often a graph repeats a launch


def emit(**line: Any) -> None:
    """Print one measurement or one skipped item (`skipped`), and append it to FASTDP_GPU_LOG for the stage."""
    text = json.dumps(line)
    print(text, flush=True)
    path = os.environ.get("FASTDP_GPU_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


class EventClock:
    """Seconds between two points of a stream, by CUDA events."""

    how = "CUDA events"

    def __init__(self, device: Any, stream: int) -> None:
        self._cuda = importlib.import_module("cupy").cuda.runtime
        self._stream = stream
        self._ends = self._cuda.eventCreate(), self._cuda.eventCreate()

    def seconds(self, work: Callable[[], object]) -> float:
        """Enqueue `work()` and wait for it."""
        self._cuda.eventRecord(self._ends[0], self._stream)
        work()
        self._cuda.eventRecord(self._ends[1], self._stream)
        self._cuda.eventSynchronize(self._ends[1])
        return float(self._cuda.eventElapsedTime(*self._ends)) / 1e3

    def close(self) -> None:
        """Destroy the events."""
        for event in self._ends:
            self._cuda.eventDestroy(event)


class WallClock:
    """Seconds by the host's clock, with the stream synchronized before and after."""

    how = "wall"

    def __init__(self, device: Any, stream: int) -> None:
        self._device, self._stream = device, stream

    def seconds(self, work: Callable[[], object]) -> float:
        """Run `work()` and wait for it."""
        self._device._wait_for(self._stream)
        began = time.perf_counter()
        work()
        self._device._wait_for(self._stream)
        return time.perf_counter() - began

    def close(self) -> None:
        """Does nothing."""


class Card:
    """A device with a stream and a clock for measuring.

    Args:
        device: a CudaDevice.
        clock: EventClock or WallClock.
        rounds: number of values in each median.
    """

    def __init__(self, device: Any, clock: type[Any] = EventClock, rounds: int = ROUNDS) -> None:
        self.device, self.rounds = device, rounds
        self.runtime = importlib.import_module("fastdp.runtime.cuda.cupy_api")
        self.stream = self.runtime.stream_create(device.ordinal)
        with self.current():
            self.clock = clock(device, self.stream)

    def current(self) -> AbstractContextManager[None]:
        """Make the card current in the thread."""
        return self.runtime.on(self.device.ordinal)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Destroy stream and events."""
        self.clock.close()
        self.runtime.stream_destroy(self.stream)

    def address(self, array: Any) -> int:
        """The device address of an array."""
        return int(self.runtime.array_pointer(array))

    def measure(self, works: Mapping[str, tuple[int, Callable[[], object]]]) -> dict[str, list[float]]:
        """Seconds per launch of each work, one value per round. `works` maps to (bytes moved, enqueue function)."""
        graphs: dict[str, tuple[int, int]] = {}
        with self.current():
            for name, (nbytes, enqueue) in works.items():
                enqueue()  # loads the kernel
                self.device._wait_for(self.stream)
                times = max(1, min(200, int(GRAPH_SECONDS * SLOWEST / max(1, nbytes))))
                self.runtime.capture_begin(self.stream)
                for _ in range(times):
                    enqueue()
                graph = self.runtime.capture_end(self.stream)
                graphs[name] = self.runtime.graph_instantiate(graph), times
                self.runtime.graph_destroy(graph)
            found: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(self.rounds + 1):
                for name, (graph, times) in graphs.items():
                    replay = lambda graph=graph: self.runtime.graph_launch(graph, self.stream)  # noqa: E731
                    found[name].append(self.clock.seconds(replay) / times)
            for graph, _ in graphs.values():
                self.runtime.graph_exec_destroy(graph)
        return {name: values[1:] for name, values in found.items()}
