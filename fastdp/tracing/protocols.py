"""What a trace is made of: spans, the streams that they lie on, and who gets them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

VERBS = ("scatter", "run", "reduce", "update", "merge")


class Timestamp(Protocol):
    """A point in a GPU's work. `nanoseconds`: when, on the host's clock (`time.perf_counter_ns`); None if unknown."""

    nanoseconds: int | None


class Stream(Protocol):
    """A stream of a device, as far as traces know it.

    Attributes:
        lane: the index and the name of its device, and its own name.
        timed_by_host: whether the thread that runs its work does that work itself, so that its clock tells the time.
    """

    timed_by_host: bool

    @property
    def lane(self) -> tuple[int, str, str]: ...

    def timestamp(self) -> Timestamp | None:
        """The present point of its work; None while it is being captured."""

    def read_timestamps(self, seconds: float) -> str:
        """Wait for the timestamps of its device. Returns what is known of their clock, in words."""


class Span(NamedTuple):
    """What happened on a lane, from when to when (nanoseconds of `time.perf_counter_ns`, or a GPU's timestamps)."""

    name: str
    lane: Stream | tuple[int, str]  # a stream, or a thread by its identity and name
    began: int | Timestamp
    ended: int | Timestamp
    facts: dict[str, Any]


class Sink(Protocol):
    """What gets the spans."""

    def add(self, span: Span) -> None:
        """Take a span that is over. Called on any thread."""

    def step_begins(self, program: object, kind: str) -> None:
        """A step of a program is about to begin on this thread."""

    def step_ends(self, program: object, kind: str) -> None:
        """It is over, and its thread holds no locks."""


class Ranges(Protocol):
    """NVTX ranges of the calling thread."""

    def push(self, name: str) -> None:
        """Begin a range inside those that are open."""

    def pop(self) -> None:
        """End the innermost range."""
