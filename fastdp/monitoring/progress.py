"""`fastdp.progress`: a progress bar for training loops, with samples per second, waiting for input and memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Generic, Protocol, TypeVar

from fastdp.engine.report import Report
from fastdp.monitoring.devices import DeviceMeter, DeviceUsage, memory_mb
from fastdp.monitoring.lines import Lines
from fastdp.monitoring.rates import Counts, Stretch
from fastdp.monitoring.rich_bars import rich_bars
from fastdp.tracing.spans import span

ItemT = TypeVar("ItemT")
REFRESH = 0.2  # seconds between two looks of the bar
LOOK = 1.0  # seconds between two looks at devices, which take longer


class _Reports(Protocol):
    """A parallel model, or an engine."""

    def report(self) -> Report: ...


class Progress(Generic[ItemT]):
    """An iterable with a progress bar; see `progress`. Each iteration has a bar of its own."""

    def __init__(
        self, items: Iterable[ItemT], parallel: _Reports | None, total: int | None, description: str, every: float
    ) -> None:
        self._items, self._parallel, self._total = items, parallel, total
        self._description, self._every = description, every

    def __len__(self) -> int:
        """The number of items.

        Raises:
            TypeError: the iterable has none, and `total` is not given.
        """
        return self._total if self._total is not None else len(self._items)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[ItemT]:
        """The items. The bar opens with the first one and closes when the loop ends, also by `break` or an error."""
        total = self._total if self._total is not None else _length(self._items)
        bar = (rich_bars() or Lines(self._every)).begin(self._description, total)
        counts = Counts()
        look = _Look(counts, self._parallel)
        try:
            counts.resume()
            counts.rows = 0.0
            items = iter(self._items)
            while True:
                began = time.perf_counter()
                try:
                    with span("input"):
                        item = next(items)
                except StopIteration:
                    return
                finally:
                    counts.waited += time.perf_counter() - began
                rows = rows_of(item)
                yield item
                del item
                counts.steps += 1
                counts.rows = None if rows is None or counts.rows is None else counts.rows + rows
                bar.show(counts.steps, look.words)
        finally:
            look.close()
            bar.end(counts.steps, look.final)


class _Look:
    """What a bar says of a run, measured now and then."""

    def __init__(self, counts: Counts, parallel: _Reports | None) -> None:
        self._counts = counts
        self._latest = Stretch(counts)
        self._whole = Stretch(counts)
        self._meter = DeviceMeter(parallel.report if parallel is not None else lambda: None)
        self._devices: list[DeviceUsage] = []
        self._words = ""
        self._looked = float("-inf")

    def words(self) -> str:
        """The rates since the last look, and the devices; a new look every second."""
        now = time.perf_counter()
        if now - self._looked >= LOOK:
            self._looked = now
            self._devices = self._meter.read()
            self._words = _said(self._latest, self._devices)
            self._latest.restart()
        return self._words

    def final(self) -> str:
        """The rates of the whole loop."""
        return _said(self._whole, self._devices)

    def close(self) -> None:
        """Take the last look at the devices."""
        if self._counts.steps:
            self._devices = self._meter.read()
        self._meter.close()


def _said(stretch: Stretch, devices: list[DeviceUsage]) -> str:
    """Rates and devices in words."""
    rates = stretch.rates()
    speed = rates.samples_per_second
    words = [f"{rates.steps_per_second:,.1f} steps/s" if speed is None else f"{speed:,.0f} samples/s"]
    words.append(f"input wait {rates.input_wait:.0%}")
    memory = memory_mb(devices)
    if memory is not None:
        words.append(f"{memory:,.0f} MB")
    used = [f"{device.utilization:.0%}" for device in devices if device.utilization is not None]
    return ", ".join([*words, *([f"utilization {' '.join(used)}"] if used else [])])


def rows_of(item: Any) -> int | None:
    """The rows of a batch: the length of the first array in it; None if there is none."""
    shape = getattr(item, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    if isinstance(item, Mapping):
        parts: Iterable[Any] = item.values()
    elif isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
        parts = item
    else:
        return None
    return next((rows for rows in map(rows_of, parts) if rows is not None), None)


def _length(items: Any) -> int | None:
    """The number of items; None if they do not tell."""
    try:
        return len(items)
    except TypeError:  # no `__len__`, or one of an iterable data set without a length
        return None


def progress(
    loader: Iterable[ItemT],
    parallel: _Reports | None = None,
    *,
    total: int | None = None,
    description: str = "",
    every: float = 10.0,
) -> Progress[ItemT]:
    """Iterate over batches with a progress bar, on stderr.

    In a terminal, and with the library rich, it is a bar with the time that is left; in a notebook a line that
    changes; elsewhere a line every `every` seconds and one at the end. They tell samples per second, the share of the
    time that the loop waits for the loader, memory, and with `parallel` the utilization of each device.

    Args:
        loader: any iterable. Its items come unchanged and in order; errors of it and of the loop pass through.
        parallel: the parallel model or engine that the loop trains: what `fastdp.wrap` returned.
        total: the number of items, if `len(loader)` does not tell it.
        description: stands before the bar.
        every: seconds between two lines where there is no terminal.

    Returns:
        An iterable. Each iteration over it has a bar of its own; bars may be nested.

    Raises:
        TypeError: `loader` is no iterable, `parallel` has no `report()`, `total` or `every` is no number.
        ValueError: a negative `total` or `every`.

    Memory is that of the fullest GPU, or of the process; rows are those of the first array in a batch.

    Example:
        >>> for x, y in fastdp.progress(loader, parallel=dp):  # doctest: +SKIP
        ...     step(x, y)
    """
    if not any(hasattr(type(loader), method) for method in ("__iter__", "__getitem__")):
        raise TypeError(f"`loader` must be an iterable of batches. Received: a {type(loader).__name__}.")
    if parallel is not None and not callable(getattr(parallel, "report", None)):
        raise TypeError(
            "`parallel` must be what fastdp.wrap returned, or a fastdp.DataParallel. Received: a "
            f"{type(parallel).__name__}, which has no report(). Pass the parallel model, not its step or module."
        )
    for name, value, kind, words in (("total", total, Integral, "a whole number"), ("every", every, Real, "seconds")):
        if value is None and name == "total":
            continue
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"`{name}` must be {words}. Received: {value!r}, a {type(value).__name__}.")
        if value < 0:
            raise ValueError(f"`{name}` must not be negative. Received: {value}.")
    return Progress(loader, parallel, total, description, every)
