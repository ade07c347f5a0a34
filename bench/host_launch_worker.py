"""Measures for `host_launch.py`, in a process that has the rig's cards; prints JSON. One argument: the rounds."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from recorded_program import RecordedProgram

import fastdp
from fastdp.benchmark.rounds import alternate, ratio, spread
from fastdp.comm.batch import Batch
from fastdp.runtime import select
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.queue import QueueDevice

COUNTS = (1, 2, 4, 8)
ROWS, COLUMNS = 64, 8
FORMS = {"pieces": False, "whole": True}
ENQUEUING = (
    "memcpyAsync", "memcpyPeerAsync", "memsetAsync", "eventCreateWithFlags", "eventRecord", "streamWaitEvent",
    "graphLaunch", "launchKernel",
)  # fmt: skip


class Nothing:
    """Stands in for CuPy's modules of CUDA's calls: they do nothing, at once."""

    def __init__(self, *modules: Any) -> None:
        for module in modules:
            vars(self).update({name: value for name, value in vars(module).items() if not name.startswith("__")})
        for name in ENQUEUING:
            setattr(self, name, lambda *given: 0)
        present = [0]
        self.getDevice = lambda: present[0]
        self.setDevice = lambda device: present.__setitem__(0, device)
        self.ctxGetCurrent = lambda: 1


class Counting:
    """Stands in for the same modules, and counts calls."""

    def __init__(self, module: Any, counted: Counter[str]) -> None:
        for name in ENQUEUING:
            if hasattr(module, name):
                setattr(self, name, partial(self._call, counted, name, getattr(module, name)))
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @staticmethod
    def _call(counted: Counter[str], name: str, call: Callable[..., Any], *given: Any) -> Any:
        counted[name] += 1
        return call(*given)


def engine(count: int, whole: bool) -> tuple[Any, Any, Callable[[], object]]:
    """An engine on so many cards, its program, and a step."""
    fastdp.set_virtual_devices(count, kind="gpu")
    program = RecordedProgram(ROWS, whole=whole)
    program.update_is_reliable = True
    made = fastdp.DataParallel(program, select.resolve(count), timeout=60.0)
    x = np.ones((ROWS, COLUMNS), "float32")
    program.record(Batch.of([x]).deal(count))

    def step() -> object:
        return made.train(Batch.of([x]), wants_outputs=False)

    for _ in range(6):
        step()
    return made, program, step


def counted(made: Any, step: Callable[[], object]) -> tuple[Counter[str], int]:
    """The calls and wake-ups of one step."""
    calls: Counter[str] = Counter()
    woken: list[str] = []
    rouse = QueueDevice._rouse

    def noted(device: Any) -> None:
        woken.extend([device.name] if device._asleep else [])
        rouse(device)

    before = cupy_api.cudart, cupy_api.driver
    cupy_api.cudart, cupy_api.driver = (Counting(module, calls) for module in before)
    QueueDevice._rouse = noted  # type: ignore[method-assign]
    try:
        step()
    finally:
        QueueDevice._rouse = rouse  # type: ignore[method-assign]
        cupy_api.cudart, cupy_api.driver = before
    return calls, len(woken)


def python_alone(step: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of the processor that a step takes in which CUDA does nothing, without what other threads take."""
    before = cupy_api.cudart, cupy_api.driver, cupy_api.event_status
    nothing = Nothing(*before[:2])
    cupy_api.cudart = cupy_api.driver = nothing  # type: ignore[assignment]
    cupy_api.event_status = lambda event: 0
    try:
        return [_processor_seconds(step) for _ in range(1 + rounds)][1:]
    finally:
        cupy_api.cudart, cupy_api.driver, cupy_api.event_status = before


def _processor_seconds(step: Callable[[], object], steps: int = 20) -> float:
    began = time.thread_time()
    for _ in range(steps):
        step()
    return (time.thread_time() - began) / steps


def measure(rounds: int) -> dict[str, Any]:
    """All figures, by form and count."""
    found: dict[str, Any] = {}
    for form, whole in FORMS.items():
        for count in COUNTS:
            made, program, step = engine(count, whole)
            entry: dict[str, Any] = {}

            def by(host: bool, made: Any = made, step: Callable[[], object] = step) -> object:
                made.host_launch.enabled = host
                return step()

            for name, host in (("host", True), ("workers", False)):
                by(host)
                calls, woken = counted(made, partial(by, host))
                entry[name] = {"wake_ups": woken, "calls": sum(calls.values()), "by_name": dict(calls)}
            wall = alternate({"host": partial(by, True), "workers": partial(by, False)}, rounds=rounds, seconds=0.02)
            for name, values in wall.items():
                entry[name]["wall_us"] = spread([1e6 * value for value in values], 4)
            entry["wall_ratio"] = ratio(wall["host"], wall["workers"])
            made.host_launch.enabled = True
            entry["python_us"] = spread([1e6 * value for value in python_alone(step, rounds)], 4)
            found[f"{form}-{count}"] = entry
            del made, step, by
            gc.collect()
            program.close()
            fastdp.set_virtual_devices(0)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
