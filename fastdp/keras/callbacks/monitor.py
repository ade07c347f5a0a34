"""`Monitor`: throughput, waiting for input, memory and utilization in Keras's progress bar, its history and logs."""

from __future__ import annotations

import datetime
import threading
import time
import weakref
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import keras
import torch

from fastdp.keras.callbacks.logs import Log, make_logs
from fastdp.keras.callbacks.watched import Watched
from fastdp.keras.fit.callbacks import WritesFiles
from fastdp.monitoring.devices import DeviceMeter, DeviceUsage, memory_mb
from fastdp.monitoring.rates import Counts, Rates, Stretch
from fastdp.options import check_flag

FEW_DEVICES = 4  # of so many each has its own number in the progress bar


class Monitor(WritesFiles):
    """Measures a `fit`: of a parallel model, of a plain one under `fastdp.install` or `fastdp run`, or of plain Keras.

    Keras's progress bar and, at the end of an epoch, its history get `samples_per_second` (of training, without
    validation), `input_wait` (the share of the time between two steps, from 0 to 1: waiting for input, and for other
    callbacks), `memory_mb` (of the fullest GPU, or of the process) and `utilization_0`, `utilization_1`, ... (from 0 to
    1; one mean `utilization` for more than four devices). Logs have the same for each device, `steps_per_second`, and
    Keras's own values.

    Args:
        logs: where to write, by epoch: "csv" (monitor.csv), the path of a .csv file, "tensorboard" (logs/monitor), the
            path of a folder for TensorBoard, "wandb", or a list of them. None: nowhere.
        every: also write every so many steps.
        bar: whether the progress bar and the history get the numbers.
        append: go on in a CSV file that is there, and count its steps on; else it is overwritten.
        interval: seconds between two measurements for the progress bar, and between two looks at devices.

    Raises:
        ValueError, TypeError: an unknown log, `every` or `interval` below 1 or 0, or an argument of another kind.
        ImportError: a library for a log is not installed; the message says how to install it.

    Utilization is that of NVML on GPUs, and on virtual devices the share of the time that a worker computes. A CSV file
    is whole after each row. The callback changes no result: steps are captured as without it.

    Example:
        >>> monitor = fastdp.callbacks.Monitor(logs=["csv", "tensorboard"], every=100)  # doctest: +SKIP
        >>> parallel.fit(x, y, callbacks=[monitor])  # doctest: +SKIP
    """

    def __init__(
        self,
        logs: Any = None,
        *,
        every: int | None = None,
        bar: bool = True,
        append: bool = False,
        interval: float = 1.0,
    ) -> None:
        super().__init__()
        self._arguments = {"logs": logs, "every": every, "bar": bar, "append": append, "interval": interval}
        check_flag("bar", bar)
        check_flag("append", append)
        if every is not None and (isinstance(every, bool) or not isinstance(every, Integral) or every < 1):
            raise ValueError(f"`every` must be a number of steps, at least 1, or None. Received: {every!r}.")
        asked: object = interval  # for mypy a float is no Real
        if isinstance(asked, bool) or not isinstance(asked, Real):
            raise TypeError(f"`interval` must be a number of seconds, at least 0. Received: {interval!r}.")
        if not interval >= 0:
            raise ValueError(f"`interval` must be a number of seconds, at least 0. Received: {interval}.")
        self._logs = make_logs(logs, append=append)
        self._every, self._bar, self._interval = every, bar, interval
        # Keras may then call it in another thread at the end of a batch. On GPUs it would wait for each batch else;
        # elsewhere the other thread takes a core from the step, and comes late.
        self.async_safe = torch.cuda.is_available()
        self._lock = threading.Lock()
        self._step = 0
        self._epoch = 0
        self._shown: dict[str, float] = {}
        self._devices: DeviceMeter | None = None
        self._used: list[DeviceUsage] = []
        self._counts = Counts()
        self._closing = weakref.finalize(self, _close, self._logs)

    def set_model(self, model: keras.Model) -> None:
        """Keras calls it at the beginning of `fit`, `evaluate` and `predict`."""
        super().set_model(model)
        self._watched = Watched(model)
        self._devices = DeviceMeter(self._watched.report)

    def close(self) -> None:
        """Close the logs. Another `fit` goes on in them."""
        with self._lock:
            _close(self._logs)
            if self._devices is not None:
                self._devices.close()

    # What Keras calls.

    def on_train_begin(self, logs: Any = None) -> None:
        """Open the logs."""
        self._step = max([self._step, *[log.begin() for log in self._logs]])
        self._counts = Counts()
        self._latest, self._logged = Stretch(self._counts), Stretch(self._counts)
        self._shown = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Let the clock run."""
        self._epoch = epoch
        self._watched.begin_epoch()
        self._rows_before = self._counts.rows or 0.0
        self._whole = Stretch(self._counts)
        self._ended: float | None = time.perf_counter()
        self._measured = self._looked = float("-inf")
        self._counts.resume()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """The time since the last step went into waiting."""
        with self._lock:
            self._batch = batch
            ended, self._ended = self._ended, None
            if ended is not None:
                self._counts.waited += time.perf_counter() - ended

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the step, and measure if it is time."""
        with self._lock:
            now, keras_values = time.perf_counter(), dict(logs or {})
            self._ended = now if batch == self._batch else None  # in another thread it may come late
            self._counts.steps += 1
            self._step += 1
            if self._bar and logs is not None:
                if now - self._measured >= self._interval:
                    self._shown = self._short(self._latest)
                logs.update(self._shown)
            if self._every is not None and self._step % self._every == 0:
                self._write("steps", self._logged, keras_values)
                self._logged.restart()

    def on_test_begin(self, logs: Any = None) -> None:
        """Validation within `fit` is no part of the measurement."""
        self._end_of_training()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Give the history the numbers of the epoch, and write them."""
        self._end_of_training()
        with self._lock:
            keras_values = dict(logs or {})
            if self._bar and logs is not None:
                logs.update(self._short(self._whole))
            self._write("epoch", self._whole, keras_values)

    def on_train_end(self, logs: Any = None) -> None:
        """Close the logs."""
        self.close()

    # Measuring.

    def _end_of_training(self) -> None:
        """Training pauses, for validation or for good: count the rows, which Keras may forget, and stop the clock."""
        with self._lock:
            if self._counts.running:
                self._count_rows()
                self._counts.pause()

    def _count_rows(self) -> None:
        """Take over how many rows have been trained on."""
        if self._counts.running:
            rows = self._watched.epoch_rows
            self._counts.rows = None if rows is None else self._rows_before + rows

    def _read_devices(self, *, anew: bool = False) -> list[DeviceUsage]:
        """What each device uses now, or did at most `interval` seconds ago: looking takes as long as a small step."""
        now = time.perf_counter()
        if self._devices is not None and (anew or now - self._looked >= self._interval):
            self._looked, self._used = now, self._devices.read()
        return self._used

    def _short(self, stretch: Stretch) -> dict[str, float]:
        """The numbers for the progress bar and the history."""
        self._count_rows()
        rates, devices = stretch.rates(), self._read_devices(anew=stretch is self._whole)
        if stretch is self._latest:
            self._measured = time.perf_counter()
            stretch.restart()
        values = {**_speed(rates), "input_wait": rates.input_wait, "memory_mb": memory_mb(devices)}
        return _known({**values, **_few(devices)})

    def _write(self, kind: str, stretch: Stretch, keras_values: Mapping[str, Any]) -> None:
        """Write a row to all logs."""
        if not self._logs:
            return
        self._count_rows()
        rates, devices = stretch.rates(), self._read_devices(anew=stretch is self._whole and not self._bar)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row = {"kind": kind, "time": now, "epoch": self._epoch, "step": self._step}
        numbers = {
            **_speed(rates),
            "steps_per_second": rates.steps_per_second,
            "input_wait": rates.input_wait,
            "memory_mb": memory_mb(devices),
            **{f"memory_mb_{rank}": device.nbytes / 1e6 for rank, device in enumerate(devices)},
            **_utilization(devices),
        }
        for log in self._logs:
            log.write({**row, **_known(numbers), **keras_values})


def _close(logs: list[Log]) -> None:
    """Close logs."""
    for log in logs:
        log.close()


def _speed(rates: Rates) -> dict[str, float | None]:
    """Samples per second, where the rows are known, else steps per second."""
    if rates.samples_per_second is None:
        return {"steps_per_second": rates.steps_per_second}
    return {"samples_per_second": rates.samples_per_second}


def _utilization(devices: list[DeviceUsage]) -> dict[str, float | None]:
    """Of each device."""
    return {f"utilization_{rank}": device.utilization for rank, device in enumerate(devices)}


def _few(devices: list[DeviceUsage]) -> dict[str, float | None]:
    """Of each device if they are few, else their mean."""
    if len(devices) <= FEW_DEVICES:
        return _utilization(devices)
    known = [device.utilization for device in devices if device.utilization is not None]
    return {"utilization": sum(known) / len(known) if known else None}


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are known."""
    return {name: value for name, value in values.items() if value is not None}
