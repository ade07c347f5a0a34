"""Feeds Keras's `fit`, `evaluate` and `predict`: batches in host memory, read ahead by a thread, waits counted."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import keras
from keras.src.backend.common import global_state

from fastdp.data.batch_copies import Repeats, each_copied
from fastdp.data.loaders import waiting
from fastdp.data.read_ahead import AHEAD
from fastdp.data.ring import Ring
from fastdp.data.thread_settings import modes_of_caller
from fastdp.keras.fit.array_batches import ArrayBatches
from fastdp.keras.fit.host_batches import CutBatches, batches_of
from fastdp.keras.fit.sources import Source, hold, source_of
from fastdp.tracing.spans import span


class Feed:
    """Where one of Keras's iterators over epochs gets its batches from.

    Args:
        epochs: Keras's iterator. From now on its tensors are made in host memory, from where each GPU gets its own
            rows; otherwise Keras would copy each batch to its default device, and the engine would copy it back.
        timeout: seconds that one batch may take; then fetching it is a DeviceTimeoutError.
        count: how many batches a thread may read ahead. None: two, where making a batch takes long enough for that.
        others: callbacks, which run between the batches.

    Nothing is read beyond an epoch: a generator that goes on in the next one is where Keras would leave it. Batches
    that were read when a loop ends in the middle of an epoch are kept for the next loop over the same generator.
    """

    def __init__(self, epochs: Any, timeout: float, count: int | None, others: list[Any]) -> None:
        self._epochs = weakref.ref(epochs)
        self._timeout = timeout
        self.source: Source = source_of(epochs.data_adapter, others)
        self._chosen = count is not None
        self._count = (AHEAD if count is None else count) if self.source.by is None else 0
        # What is not read ahead Keras uses up before the next batch is made.
        self.owns = not self.source.copies or (self._count > 0 and self._may_read())
        self._repeats = Repeats()
        self._ring: Ring[Any] | None = None
        self._began = self._ended = 0.0
        self.batches = self.read_ahead = 0
        self._slow = False  # whether a thread has been found to pay
        self.waited = 0.0
        begin = beginning(epochs)
        epochs._get_iterator = lambda: self._begun(begin)

    def _begun(self, begin: Callable[[], Any]) -> Iterator[Any]:
        """The batches of one of Keras's iterators, in the block that is open on this thread, if one is."""
        if _here.feeds is not None and self not in _here.feeds.all:
            _here.feeds.all.append(self)
        return self._batches(batches_of(begin(), new=self.source.new))

    def entry(self) -> dict[str, Any]:
        """How batches came, for the report of a `fit`."""
        source, guard = self.source, self.source.guard
        if source.by is not None:
            how = f"{source.name}, {source.by}"
        elif not self._count:
            how = f"{source.name}, not read ahead: prefetch is 0"
        elif guard is not None and guard.why is not None:
            how = f"{source.name}, not read ahead, since {guard.why}"
        elif not self._chosen and not self._slow:
            how = f"{source.name}, not read ahead: batches are made faster than a thread would hand them over"
        else:
            how = f"{source.name}, read ahead by a thread, up to {self._count} batches"
        entry = {"array": "x", "how": how, "batches": self.batches, "read_ahead": self.read_ahead}
        return {**entry, "waited_seconds": self.waited, **self.shares()}

    def shares(self) -> dict[str, float]:
        """The wait per step in seconds, and its share of the time from the first batch to the last."""
        counted = {"waited_seconds": self.waited, "batches": self.batches}
        return waiting(counted, self._ended - self._began)

    def give_back(self, batch: Any) -> None:
        """Somebody took this batch and did not use it: it comes first when the generator goes on."""
        if self.source.generator is not None:
            hold(self.source.generator, [batch])

    def close(self) -> None:
        """End the thread. What it has read of a generator is kept for the next loop over it."""
        ring, self._ring = self._ring, None
        if ring is None:
            return
        left = ring.leave()
        generator = self.source.generator
        if generator is not None and left is not None:
            hold(generator, left, first=False)

    def _may_read(self) -> bool:
        guard = self.source.guard
        return guard is None or guard.why is None

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Keras's batches of one iterator, by a ring."""
        if self._ring is not None:
            self._ring.close()
        if isinstance(batches, CutBatches) and not self._count:
            return self._cut(batches)
        if self.source.copies and self.owns:
            batches = each_copied(batches, None, self._repeats, copies=True)
        name = f"the data set ({self.source.name})"
        self._ring = Ring(batches, self._count, name, self._timeout, _on_cpu())
        return self._fed(self._ring)

    def _fed(self, ring: Ring[Any]) -> Iterator[Any]:
        guard = self.source.guard
        if guard is not None:
            guard.begin()
            guard.why = guard.why or modes_of_caller()
        while True:
            began = time.perf_counter()
            waited, ahead = ring.waited, ring.read_ahead
            try:
                data = ring.take(lambda: self._further(ring.taken))
            except StopIteration:
                return
            self._note(began, ring.waited - waited)
            self.read_ahead += ring.read_ahead - ahead
            yield data
            del data
            if guard is not None and self._left(ring.taken) == 0:
                guard.begin()

    def _cut(self, batches: CutBatches) -> Iterator[Any]:
        """Batches that need neither a device of Keras's nor a watchdog."""
        end = object()
        while True:
            began = time.perf_counter()
            with span("input"):
                data = next(batches, end)
            if data is end:
                return
            self._note(began, time.perf_counter() - began)
            yield data

    def _note(self, began: float, waited: float) -> None:
        """A batch has come."""
        self._began = self._began or began
        self._ended = time.perf_counter()
        if _here.feeds is not None:
            _here.feeds.latest = self
        self.waited += waited
        self.batches += 1

    def _further(self, taken: int) -> int:
        """How many batches may be read ahead now."""
        if not self._count:
            return 0
        guard = self.source.guard
        if guard is not None:
            guard.why = guard.why or self._repeats.found
            if not guard.allows():
                return 0
        self._slow = self._slow or (self._ring is not None and self._ring.worth)
        return self._left(taken) if self._chosen or self._slow else 0

    def _left(self, taken: int) -> int:
        """How many batches of the epoch are left; where nobody knows, as many as may be read ahead."""
        epochs = self._epochs()
        if epochs is None:
            return 0
        left, steps, total = self._count, epochs.steps_per_epoch, epochs._num_batches
        if steps:
            several = epochs.steps_per_execution
            left = -taken % (-(-steps // several) * several)
        return min(left, max(0, total - taken)) if total else left


def beginning(epochs: Any) -> Callable[[], Any]:
    """`epochs._get_iterator` for code that replaces it, without a strong reference to `epochs`.

    A reference cycle would leave the iterator over the data to the garbage collector, which may run in the middle of a
    step on a device's thread. There the iterator of a torch DataLoader waits five seconds for each worker process.
    """
    replaced: Callable[[], Any] | None = vars(epochs).get("_get_iterator")
    if replaced is not None:
        return replaced
    begin, owner = type(epochs)._get_iterator, weakref.ref(epochs)
    return lambda: begin(owner())


def feed(epochs: Any, timeout: float, count: int | None = 0, others: list[Any] | None = None) -> Feed:
    """The feed of Keras's iterator; it is made once, because Keras keeps the iterator over validation data."""
    known: Feed | None = getattr(epochs, "_fastdp_feed", None)
    if known is None:
        known = epochs._fastdp_feed = Feed(epochs, timeout, count, others or [])
    return known


class Feeds:
    """The feeds of one call of `fit`, `evaluate` or `predict`.

    Args:
        timeout, count: as for `Feed`.
        callbacks: those of the call.
        waits: whether iterators of Keras's are fed from the moment when the loop begins (`begin_here`): for loops that
            are Keras's own. Before that, Keras may take a batch to build the model, and go back.

    Attributes:
        all: the feeds; the first is that of the call's own data.
        latest: the one that a batch came from last.
    """

    def __init__(self, timeout: float, count: int | None, callbacks: Any, *, waits: bool = False) -> None:
        self.waits, self.begun = waits, False
        self.latest: Feed | None = None
        self._timeout, self._count = timeout, count
        given = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
        self._callbacks = keras.tree.flatten(given) if given else []
        self.all: list[Feed] = []

    def add(self, epochs: Any) -> None:
        """Feed this iterator of Keras's."""
        one = feed(epochs, self._timeout, self._count, self._callbacks)
        if one not in self.all:
            self.all.append(one)


class _Here(threading.local):
    feeds: Feeds | None = None


_here = _Here()


@contextmanager
def feeding(timeout: float, count: int | None, callbacks: Any, *, waits: bool = False) -> Iterator[Feeds]:
    """Iterators of Keras's that are made in this block, on this thread, are fed; threads end with it.

    The arguments are those of `Feeds`.
    """
    outer, feeds = _here.feeds, Feeds(timeout, count, callbacks, waits=waits)
    _here.feeds = feeds
    try:
        yield feeds
    finally:
        _here.feeds = outer
        for one in feeds.all:
            one.close()


def feed_here(epochs: Any, timeout: float) -> None:
    """Feed an iterator of Keras's, ahead where the call that runs on this thread says so."""
    if _here.feeds is not None:
        _here.feeds.add(epochs)
    else:
        feed(epochs, timeout)


def begin_here() -> None:
    """The loop of the innermost block begins, on this thread."""
    if _here.feeds is not None:
        _here.feeds.begun = _here.feeds.waits


def begun_iterator(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keras's `_get_iterator` of an iterator over epochs, fed where a loop of Keras's own has begun."""

    def _get_iterator(self: Any) -> Any:
        feeds = _here.feeds
        if feeds is None or not feeds.begun or hasattr(self, "_fastdp_feed"):
            return original(self)
        feeds.add(self)
        return self._get_iterator()

    return _get_iterator


def moved_by_keras() -> bool:
    """Whether the latest batch on this thread was made in host memory where Keras's own loop would have moved it."""
    feeds = _here.feeds
    return feeds is not None and feeds.waits and feeds.latest is not None and feeds.latest.source.moves


def _on_cpu() -> Callable[[], AbstractContextManager[None]]:
    """A maker of contexts in which Keras makes tensors in host memory, with what Keras keeps for the present thread."""
    kept, thread = dict(vars(global_state.GLOBAL_STATE_TRACKER)), threading.get_ident()

    @contextmanager
    def scope() -> Iterator[None]:
        if threading.get_ident() != thread:
            vars(global_state.GLOBAL_STATE_TRACKER).update(kept)
        with keras.device("cpu"):
            yield

    return scope


def input_report(data: Any, feeds: Feeds) -> list[dict[str, Any]]:
    """How the batches of a `fit` came, for its report: an entry for each array in a file, else one for all.

    Args:
        data: the `x` of the `fit`.
        feeds: the block's; the first is that of the training data.
    """
    if not feeds.all:
        return []
    first = feeds.all[0]
    if not isinstance(data, ArrayBatches):
        return [first.entry()]
    reading = data.reading
    counted = {"waited_seconds": reading.waited, "batches": reading.taken, "read_ahead": reading.read_ahead}
    return [{**entry, **counted, **first.shares()} for entry in data.describe() or [first.entry()]]
