"""The interfaces of a device, its streams and its events.

A device runs work on *streams*. Work on one stream runs in order. Streams run independently; only *events*
order them against each other: `stream.record()` returns an event that completes when all work enqueued so
far has, and `other.wait(event)` holds back work that is enqueued on `other` afterwards.

A failure propagates the same way. Once work on a stream has raised, the stream skips the rest, and every
event recorded on it carries the exception to its waiters, so nothing downstream of a failure ever runs.
`recover()` clears the stream when the caller has handled the failure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Work = Callable[[], Any]


class Event(Protocol):
    """A point in a stream's work."""

    @property
    def done(self) -> bool:
        """True once all work before the event has run, or was skipped."""

    @property
    def error(self) -> BaseException | None:
        """The exception raised by work before this event, if any."""

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the host until the event is done; re-raise the error it carries."""

    def finish(self, timeout: float | None = None) -> None:
        """Block the host until the event is done; do not raise the error it carries."""


class Stream(Protocol):
    """An ordered queue of work on one device."""

    def enqueue(self, work: Work) -> None:
        """Run `work()` after everything enqueued before it."""

    def record(self) -> Event:
        """An event that is done when everything enqueued before it is."""

    def wait(self, event: Event) -> None:
        """Hold back everything enqueued from now on until `event` is done."""

    def recover(self) -> None:
        """Clear a failure. Call it only when the stream has nothing left to run."""


class Device(Protocol):
    """One device: memory and four streams."""

    name: str
    index: int
    compute: Stream
    copy_in: Stream
    copy_out: Stream
    communication: Stream

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """Uninitialized device memory, 64-byte aligned, owned by the returned array."""

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the host until all four streams are idle."""

    def close(self) -> None:
        """Stop the device's worker. Idempotent."""
