"""What do training steps of a model's own cost on two devices, against plain Keras?

Models as their users write them (`custom_step_models.py`): a tiny `train_step`, a Siamese network with batch 16, a
gradient penalty, distillation, a graph attention network whose rows meet, and PixelCNN's masked convolutions. Each
trains by `fit` in plain Keras, on all devices (`fastdp run --always`), and as `fastdp run` does it, which may choose
one device. Each way has a process, and they take turns. A step's time is that between the ends of two batches, after
the decision of `run`. With arguments (names of cases) only these are measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from custom_step_models import CASES, batches, built
from report import finish, options, print_table

import fastdp
from fastdp.benchmark.rounds import spread

DEVICES = 2
DECISION = 26  # steps until `fastdp run` has decided
WAYS = ("keras", "always", "run")


class Ends(keras.callbacks.Callback):
    """The times at which batches end."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def step_seconds(model: keras.Model, name: str, steps: int) -> float:
    """The median of the seconds between the ends of batches."""
    ends = Ends()
    data = batches(name, steps)
    model.fit((one for one in data), steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[ends])
    return float(statistics.median(np.diff(ends.times)[2:]))


def serve(name: str, way: str) -> None:
    """Train as one of `WAYS`, as many steps as each line of standard input says."""
    if way != "keras":
        fastdp.set_virtual_devices(DEVICES)
        fastdp.install(gpus=DEVICES, always=way == "always")
    model = built(name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(step_seconds(model, name, int(line)), flush=True)


def measured(name: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step by way, one figure a round."""
    workers: dict[str, Any] = {}
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        for way in WAYS:
            command = [sys.executable, "-W", "ignore", __file__, "--worker", name, way]
            workers[way] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for way in WAYS:
            workers[way].stdout.readline()
            _asked(workers[way], DECISION + 2)
        for _ in range(rounds):
            for way in WAYS:
                found[way].append(_asked(workers[way], steps))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return found


def _asked(worker: Any, steps: int) -> float:
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    """Measure, print, save."""
    chosen = [name for name in sys.argv[1:] if name in CASES]
    sys.argv[1:] = [name for name in sys.argv[1:] if name not in CASES]
    asked = options(__doc__)
    rounds, steps = (1, 6) if asked.quick else (5, 12)
    results: dict[str, Any] = {}
    for name in chosen or list(CASES):
        seconds = measured(name, rounds, steps)
        results[name] = {way: spread(found, 5) for way, found in seconds.items()}
        for way in WAYS[1:]:
            ratios = [mine / theirs for mine, theirs in zip(seconds[way], seconds["keras"], strict=True)]
            results[name][f"{way}_ratio"] = round(statistics.median(ratios), 2)
    print_table(
        "Milliseconds of a training step on two devices (median), and the ratio to plain Keras",
        ["model", "Keras", "all devices", "fastdp run", "ratio all", "ratio run"],
        [
            [name, *(f"{1e3 * ways[way]['median']:.2f}" for way in WAYS), *(ways[f"{way}_ratio"] for way in WAYS[1:])]
            for name, ways in results.items()
        ],
    )
    finish("custom_steps", results, libraries=("torch", "keras"), unit="seconds", devices=DEVICES, save=asked.save)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(*sys.argv[2:4])
    else:
        main()
