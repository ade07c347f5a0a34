"""One training run of the demo: the curves, the time of its warm steps, and what each device did."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdp.api import wrap
from fastdp.cli.demo.digits import SEED, TRAIN_ROWS, Digits, build_model
from fastdp.cli.optional import load
from fastdp.shard import split_rows


@dataclass
class DeviceWork:
    """Rows and time of one device in a step on a full batch."""

    name: str
    rows: int
    milliseconds: float


@dataclass
class Run:
    """One training run: values per epoch, test accuracy and the trained template."""

    model: Any
    history: dict[str, list[float]]
    accuracy: float
    samples_per_second: float
    devices: list[DeviceWork]
    report: str

    @property
    def label(self) -> str:
        """Its name in tables and legends."""
        return f"{len(self.devices)} device" + "s" * (len(self.devices) > 1)


def train(digits: Digits, devices: int, *, epochs: int, batch_size: int, verbose: int | str) -> Run:
    """Train a new model with fixed seeds on the first `devices` devices."""
    model = build_model()
    runner = wrap(model, gpus=devices)
    optimizer = load("keras", "keras").optimizers.SGD(0.1, momentum=0.9, nesterov=True)
    runner.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    batches = load("fastdp.keras.fit.array_batches", "keras").ArrayBatches
    clock = _clock(TRAIN_ROWS // batch_size)
    history = runner.fit(
        batches(digits.x_train, digits.y_train, batch_size=batch_size, seed=SEED),
        validation_data=batches(digits.x_test, digits.y_test, batch_size=batch_size, shuffle=False),
        shuffle=False,  # ArrayBatches has its own order
        epochs=epochs,
        verbose=verbose,
        callbacks=[clock],
    ).history
    work = _work(runner, batch_size, clock.steps)
    speed = warm_speed(batch_size, clock.seconds)
    return Run(model, history, history["val_accuracy"][-1], speed, work, str(runner.report()))


def warm_speed(rows: int, seconds: Sequence[float]) -> float:
    """Rows per second in the later half of the steps: the earlier ones are traced, and then compiled."""
    return rows / statistics.median(seconds[len(seconds) // 2 :])


def _work(runner: Any, batch_size: int, steps: list[list[float]]) -> list[DeviceWork]:
    """The median milliseconds of forward and backward on each device."""
    shards = split_rows(batch_size, len(runner.devices))
    return [
        DeviceWork(device.name, rows.count, 1e3 * statistics.median(seconds[rank] for seconds in steps))
        for rank, (device, rows) in enumerate(zip(runner.devices, shards, strict=False))
    ]


def _clock(full_batches: int) -> Any:
    """A Keras callback that records the seconds of each step on a full batch, with its input, and those per device."""
    callback_class = load("keras", "keras").callbacks.Callback

    class Clock(callback_class):  # type: ignore[misc, valid-type]
        def on_train_begin(self, logs: Any = None) -> None:
            self.seconds: list[float] = []
            self.steps: list[list[float]] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._ended = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            before, self._ended = self._ended, time.perf_counter()
            if batch < full_batches:
                self.seconds.append(self._ended - before)
                self.steps.append(self.model.engine.times.latest_work)

    return Clock()
