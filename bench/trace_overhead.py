"""What does a trace cost a step?

The empty program and the network of driver_overhead.py, on 1, 2 and 8 virtual devices, in alternating rounds:

    off       no trace
    NVTX      ranges alone, by a stand-in of NVTX that does nothing
    trace     `fastdp.trace`, which keeps the spans; its file is written after the clock has stopped

Each call is 50 steps. `ratio` is the median over rounds of the time with a trace by the time without one.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported

import statistics
import time
from collections.abc import Callable
from typing import Any

import driver_overhead
from report import finish, options, print_table

from fastdp import DataParallel, FunctionProgram, trace
from fastdp.benchmark.rounds import spread, turns
from fastdp.runtime.host.device import HostDevice
from fastdp.tracing import spans

STEPS = 50
WAYS = ("off", "NVTX", "trace")


class NoRanges:
    """Takes NVTX ranges, and does nothing."""

    def push(self, name: str) -> None:
        """Begin a range."""

    def pop(self) -> None:
        """End it."""


def seconds(way: str, step: Callable[[], object]) -> float:
    """Seconds of one step, of many."""
    recording, ranges = trace(os.devnull), NoRanges()
    if way == "trace":
        recording.start()
    elif way == "NVTX":
        spans.start(ranges=ranges)
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    taken = (time.perf_counter() - began) / STEPS
    spans.stop(ranges=ranges if way == "NVTX" else None)
    recording.close()
    return taken


def main() -> None:
    """Measure, print, save."""
    asked = options(__doc__)
    rounds, data, results = 2 if asked.quick else 40, driver_overhead.batch(), {}
    for kind, program in (("empty", driver_overhead.EmptyProgram), ("network", FunctionProgram)):
        for count in (1, 2, 8):
            pool: list[Any] = [HostDevice(index) for index in range(count)]
            functions = (driver_overhead.train, driver_overhead.update, driver_overhead.predict)
            engine = DataParallel(program(driver_overhead.parameters(), *functions), pool)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _, way in turns(WAYS, rounds):
                times[way].append(seconds(way, lambda e=engine: e.train(data, wants_outputs=False)))  # type: ignore[misc]
            found: dict[str, Any] = {way: spread([1e6 * one for one in values], 4) for way, values in times.items()}
            for way in WAYS[1:]:
                pairs = zip(times[way], times["off"], strict=True)
                found[f"{way}, ratio"] = round(statistics.median(traced / plain for traced, plain in pairs), 3)
            results[f"{kind} {count}"] = found
            for device in pool:
                device.close()
    print_table(
        "Microseconds per step (medians), and ratios to no trace",
        ["step", *WAYS, "NVTX, ratio", "trace, ratio"],
        [
            [name, *(f"{found[way]['median']:.0f}" for way in WAYS), *(found[f"{way}, ratio"] for way in WAYS[1:])]
            for name, found in results.items()
        ],
    )
    finish("trace_overhead", results, unit="microseconds per step", save=asked.save)


if __name__ == "__main__":
    main()
