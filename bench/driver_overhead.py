"""What does the engine itself cost per step, and where does it go?

A 784-64-10 network written as a FunctionProgram, batch 64, on 1, 2, 4 and 8 virtual devices, compared with the
same functions in a plain loop, in alternating rounds:

    empty      a program with the same parameters that computes nothing: its whole step is the engine
    network    the real network; `plain` is train and update of the whole batch without the engine

BLAS uses one thread everywhere. The report has wall time, and the processor time of all threads together, which hardly
depends on the load of the machine; the time of the empty step by verb on the host thread; and the functions of the host
thread and the workers with the most self time, by cProfile. Only the order of these functions is meaningful, since
profiling slows calls down. "acquire of lock" is waiting.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported

import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import finish, options, print_table

from fastdp import DataParallel, FunctionProgram
from fastdp.benchmark.rounds import alternate, spread
from fastdp.program.base import Result
from fastdp.runtime.host.device import HostDevice

ROWS = 64
DEVICES = (1, 2, 4, 8)
VERBS = ("_begin", "_scatter", "_run", "_reduce", "_update", "_merge")
Arrays = dict[str, np.ndarray]


def parameters() -> Arrays:
    """784-64-10, fp32."""
    generator = np.random.default_rng(0)
    shapes = {"w1": (784, 64), "b1": (64,), "w2": (64, 10), "b2": (10,)}
    return {name: generator.standard_normal(shape, np.float32) * np.float32(0.05) for name, shape in shapes.items()}


def forward(weights: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden activations and class probabilities."""
    hidden = np.maximum(x @ weights["w1"] + weights["b1"], 0)
    scores = hidden @ weights["w2"] + weights["b2"]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, scores / scores.sum(axis=1, keepdims=True)


def train(weights: Arrays, batch: list[np.ndarray]) -> tuple[float, Arrays, list[np.ndarray]]:
    """Cross-entropy and its gradient."""
    x, y = batch
    hidden, probabilities = forward(weights, x)
    rows = np.arange(len(y))
    loss = -np.log(probabilities[rows, y]).mean()
    wrong = probabilities.copy()
    wrong[rows, y] -= 1
    wrong /= len(y)
    back = (wrong @ weights["w2"].T) * (hidden > 0)
    gradients = {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ wrong, "b2": wrong.sum(0)}
    return float(loss), gradients, [probabilities]


def update(weights: Arrays, slots: Arrays, gradients: Arrays) -> tuple[Arrays, Arrays]:
    """Plain SGD."""
    return {name: weights[name] - np.float32(0.01) * gradients[name] for name in weights}, {}


def predict(weights: Arrays, batch: list[np.ndarray]) -> list[np.ndarray]:
    """Class probabilities."""
    return [forward(weights, batch[0])[1]]


class EmptyProgram(FunctionProgram):
    """The same parameters, gradients and outputs, without any work."""

    def train(self, state: Any, batch: Any, context: Any) -> Any:
        """Return a result of the right form."""
        return Result([], np.zeros(1))

    def update(self, state: Any, totals: Any) -> None:
        """Do nothing."""


def batch() -> list[np.ndarray]:
    """Random images and labels."""
    generator = np.random.default_rng(1)
    return [generator.standard_normal((ROWS, 784), np.float32), generator.integers(0, 10, ROWS)]


def plain_step() -> Callable[[], object]:
    """The network's functions in a plain loop."""
    weights, data = parameters(), batch()

    def step() -> None:
        _, gradients, _ = train(weights, data)
        weights.update(update(weights, {}, gradients)[0])

    return step


def engines(program_class: Any, pools: dict[int, list[HostDevice]]) -> dict[int, DataParallel]:
    """One engine per number of devices, each with its own program."""
    return {n: DataParallel(program_class(parameters(), train, update, predict), pools[n]) for n in DEVICES}


def processor_time(step: Callable[[], object], steps: int) -> float:
    """Processor time of all threads in microseconds per step: the median of five runs."""
    values = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(steps):
            step()
        values.append(1e6 * (time.process_time() - began) / steps)
    return round(statistics.median(values), 1)


def by_verb(engine: DataParallel, steps: int) -> dict[str, float]:
    """Median microseconds of each verb on the host thread; `_merge` includes the wait for the devices."""
    seconds: dict[str, list[float]] = {verb: [] for verb in VERBS}

    def timed(verb: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                seconds[verb].append(time.perf_counter() - began)

        return call

    for verb in VERBS:
        setattr(engine, verb, timed(verb, getattr(engine, verb)))
    data = batch()
    for _ in range(steps):
        engine.train(data, wants_outputs=False)
    for verb in VERBS:
        delattr(engine, verb)
    return {verb: round(1e6 * statistics.median(values), 1) for verb, values in seconds.items()}


def hot_functions(engine: DataParallel, steps: int, most: int = 12) -> list[tuple[str, float, float]]:
    """The functions with the most self time, in microseconds per step, over the host thread and all workers."""
    profiles: list[cProfile.Profile] = []

    def start() -> None:
        profiles.append(cProfile.Profile())
        profiles[-1].enable()

    for device in engine.devices:
        device.compute.enqueue(start)
        device.synchronize(60)
    start()
    data = batch()
    for _ in range(steps):
        engine.train(data, wants_outputs=False)
    profiles[-1].disable()
    for device, profile in zip(engine.devices, profiles, strict=False):
        device.compute.enqueue(profile.disable)
        device.synchronize(60)
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for profile in profiles:
        for (file, line, name), (_, count, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
            where = name if file == "~" else f"{Path(file).parent.name}/{Path(file).name}:{line} {name}"
            seconds[where] += own
            calls[where] += count
    return [(where, 1e6 * own / steps, calls[where] / steps) for where, own in seconds.most_common(most)]


def main() -> None:
    """Measure, print, save."""
    asked = options(__doc__)
    rounds, seconds, steps = (1, 0.0, 20) if asked.quick else (15, 0.1, 500)
    pools = {count: [HostDevice(index) for index in range(count)] for count in DEVICES}
    empty, network, data = engines(EmptyProgram, pools), engines(FunctionProgram, pools), batch()
    calls: dict[Any, Callable[[], object]] = {"plain": plain_step()}
    for kind, made in (("empty", empty), ("network", network)):
        for count, engine in made.items():
            calls[f"{kind} {count}"] = lambda e=engine: e.train(data, wants_outputs=False)
    times = alternate(calls, rounds=rounds, seconds=seconds)
    micro = {name: spread([1e6 * value for value in values], 4) for name, values in times.items()}
    processor = {name: processor_time(step, max(1, steps // 5)) for name, step in calls.items()}
    print_table(
        "Microseconds per step: wall time (median), and processor time of all threads",
        ["step", "wall", "processor"],
        [[name, f"{micro[name]['median']:.0f}", f"{processor[name]:.0f}"] for name in calls],
    )
    verbs = {count: by_verb(engine, steps) for count, engine in empty.items()}
    print_table(
        "The empty step by verb, microseconds of the host thread",
        ["devices", *VERBS],
        [[count, *found.values()] for count, found in verbs.items()],
    )
    hot = {count: hot_functions(empty[count], steps) for count in (1, 4)}
    for count, found in hot.items():
        lines = [[where, f"{own:.1f}", f"{number:.1f}"] for where, own, number in found]
        print_table(f"Profile of the empty step, {count} device(s)", ["function", "us/step", "calls/step"], lines)
    for pool in pools.values():
        for device in pool:
            device.close()
    results = {"wall": micro, "processor": processor, "host_thread_by_verb": verbs}
    finish("driver_overhead", results, unit="microseconds per step", save=asked.save)


if __name__ == "__main__":
    main()
