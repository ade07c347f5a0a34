"""Records spans of the engine's work on lanes of streams and threads, while a trace or NVTX asks for them.

`now.recorder` is None by default. Code that records looks at it first, which is all that it costs then. A span on a
stream is timed by whoever runs its work: on virtual devices by the worker's clock, on a GPU by two CUDA events, which
the stream itself records (`Stream.timestamp`). A span of a GPU has a second one on the lane of the thread that issues
it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastdp.tracing.protocols import Ranges, Sink, Span, Stream, Timestamp


class _Step:
    """A step that the calling thread has open, and the verb that it is at."""

    __slots__ = ("began", "facts", "name", "verb", "verb_began")

    def __init__(self, name: str, facts: dict[str, Any]) -> None:
        self.name, self.facts = name, facts
        self.verb, self.verb_began = "", 0
        self.began = time.perf_counter_ns()


class _Here(threading.local):
    """What the calling thread is in the middle of."""

    def __init__(self) -> None:
        self.streams: list[Stream | None] = []  # of the spans that are open
        self.steps: list[_Step] = []
        self.ended: tuple[Recorder | None, int] = None, 0  # when its latest step ended, and who recorded it


_here = _Here()


class Recorder:
    """Passes spans on to everybody who asks for them. Made by `start`, and used by any thread.

    Attributes:
        step: the number of the step that runs, in its engine.
    """

    def __init__(self) -> None:
        self.sinks: tuple[Sink, ...] = ()
        self.ranges: tuple[Ranges, ...] = ()
        self.asked: Counter[Ranges] = Counter()  # how many want these ranges
        self.step: int | None = None

    def span(self, name: str, stream: Stream | None = None, **facts: Any) -> OpenSpan:
        """As the function `span`."""
        return OpenSpan(self, name, stream, facts)

    def add(self, name: str, lane: Any, began: int | Timestamp, ended: int | Timestamp, facts: dict[str, Any]) -> None:
        """Add a span that is over. `lane`: a stream, or None for the calling thread."""
        if not self.sinks:
            return
        if lane is None:
            thread = threading.current_thread()
            lane = thread.ident, thread.name
        if self.step is not None:
            facts.setdefault("step", self.step)
        span = Span(name, lane, began, ended, facts)
        for sink in self.sinks:
            sink.add(span)

    def push(self, name: str) -> None:
        """Begin an NVTX range on this thread, if they are on."""
        for ranges in self.ranges:
            ranges.push(name)

    def pop(self) -> None:
        """End it."""
        for ranges in self.ranges:
            ranges.pop()

    # Steps, on the thread that runs them.

    def step_begins(self, program: object, kind: str, number: int, facts: dict[str, Any]) -> None:
        """A step begins; what lies between it and the latest one on this thread was the caller's."""
        for sink in self.sinks:
            sink.step_begins(program, kind)
        recorder, ended = _here.ended
        if recorder is self and not _here.steps:
            self.add("between steps", None, ended, time.perf_counter_ns(), {})
        self.step = number
        name = f"{kind} step"
        self.push(f"{name} {number}")
        _here.steps.append(_Step(name, {"step": number, **facts}))

    def verb(self, name: str) -> None:
        """The open step of this thread comes to its next verb."""
        if _here.steps:  # otherwise the trace began in the middle of the step
            step = _here.steps[-1]
            self._end_verb(step)
            self.push(name)
            step.verb, step.verb_began = name, time.perf_counter_ns()

    def step_ends(self, program: object, kind: str, error: BaseException | None) -> None:
        """The open step of this thread is over, with an error if it failed."""
        if not _here.steps:
            return
        step = _here.steps.pop()
        self._end_verb(step)
        self.pop()
        ended = time.perf_counter_ns()
        if error is not None:
            step.facts["error"] = type(error).__name__
        self.add(step.name, None, step.began, ended, step.facts)
        self.step = _here.steps[-1].facts["step"] if _here.steps else None
        if not _here.steps:
            _here.ended = self, ended
        for sink in self.sinks:
            sink.step_ends(program, kind)

    def _end_verb(self, step: _Step) -> None:
        if step.verb:
            self.pop()
            self.add(step.verb, None, step.verb_began, time.perf_counter_ns(), {"step": step.facts["step"]})
            step.verb = ""


class OpenSpan:
    """A span from entering to leaving. Spans inside it on the same thread are on its stream, unless they name one."""

    __slots__ = ("_began", "_facts", "_name", "_recorder", "_stream", "_timestamp")

    def __init__(self, recorder: Recorder, name: str, stream: Stream | None, facts: dict[str, Any]) -> None:
        self._recorder, self._name, self._stream, self._facts = recorder, name, stream, facts
        self._began = 0
        self._timestamp: Timestamp | None = None

    def __enter__(self) -> OpenSpan:
        outer = _here.streams
        if self._stream is None and outer:
            self._stream = outer[-1]
        stream = self._stream
        outer.append(stream)
        self._recorder.push(self._name)
        if stream is not None and not stream.timed_by_host and self._recorder.sinks:
            self._timestamp = stream.timestamp()
        self._began = time.perf_counter_ns()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        recorder, stream, name = self._recorder, self._stream, self._name
        ended = time.perf_counter_ns()
        recorder.pop()
        _here.streams.pop()
        if stream is None or stream.timed_by_host:
            recorder.add(name, stream, self._began, ended, self._facts)
            return
        timestamp = stream.timestamp() if self._timestamp is not None else None
        if self._timestamp is not None and timestamp is not None:
            recorder.add(name, stream, self._timestamp, timestamp, self._facts)
        recorder.add(name, None, self._began, ended, {**self._facts, "device": stream.lane[1]})


class OpenSpans:
    """A span on several streams of GPUs at once, whose work one thread issues, and on the lane of that thread."""

    __slots__ = ("_began", "_facts", "_name", "_recorder", "_streams", "_timestamps")

    def __init__(self, recorder: Recorder, name: str, streams: Sequence[Stream], facts: dict[str, Any]) -> None:
        self._recorder, self._name, self._streams, self._facts = recorder, name, streams, facts

    def __enter__(self) -> OpenSpans:
        self._recorder.push(self._name)
        self._timestamps = [stream.timestamp() if self._recorder.sinks else None for stream in self._streams]
        self._began = time.perf_counter_ns()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        ended = time.perf_counter_ns()
        self._recorder.pop()
        for stream, began in zip(self._streams, self._timestamps, strict=True):
            end = stream.timestamp() if began is not None else None
            if began is not None and end is not None:
                self._recorder.add(self._name, stream, began, end, dict(self._facts))
        self._recorder.add(self._name, None, self._began, ended, dict(self._facts))


class _Nothing:
    """Stands in for a span while nothing is recorded."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        return None


class _Now:
    """What is recorded at the moment. `epoch` counts recorders: the clocks of GPUs are compared anew for each."""

    __slots__ = ("epoch", "recorder")

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.epoch = 0


NOTHING = _Nothing()
now = _Now()
_lock = threading.Lock()


def span(name: str, stream: Stream | None = None, **facts: Any) -> OpenSpan | _Nothing:
    """A context manager that records what happens inside, if anybody asks for it.

    Args:
        name: of the span.
        stream: whose work the calling thread runs or issues meanwhile. None: that of the span around this one, or the
            calling thread itself.
        facts: shown with the span. For JSON.
    """
    recorder = now.recorder  # read once: another thread may end it at any time
    return NOTHING if recorder is None else OpenSpan(recorder, name, stream, facts)


def spans(name: str, streams: Sequence[Stream], **facts: Any) -> OpenSpans | _Nothing:
    """As `span`, for work of several GPUs that the calling thread issues together."""
    recorder = now.recorder
    return NOTHING if recorder is None else OpenSpans(recorder, name, streams, facts)


def verb(name: str) -> None:
    """Note that the step of the calling thread comes to one of the five verbs, or to the caller's own code."""
    recorder = now.recorder
    if recorder is not None:
        recorder.verb(name)


def start(*, sink: Sink | None = None, ranges: Ranges | None = None) -> None:
    """Record from now on, for one more who asks."""
    with _lock:
        recorder = now.recorder or Recorder()
        if sink is not None:
            recorder.sinks = (*recorder.sinks, sink)
        if ranges is not None:
            recorder.asked[ranges] += 1
            recorder.ranges = tuple(recorder.asked)
        if recorder is not now.recorder:
            now.epoch += 1
            now.recorder = recorder


def stop(*, sink: Sink | None = None, ranges: Ranges | None = None) -> None:
    """End what `start` began. The last one who stops ends the recording."""
    with _lock:
        recorder = now.recorder
        if recorder is None:
            return
        recorder.sinks = tuple(one for one in recorder.sinks if one is not sink)
        if ranges is not None:
            recorder.asked -= Counter([ranges])  # drops those that nobody wants any more
            recorder.ranges = tuple(recorder.asked)
        if not recorder.sinks and not recorder.ranges:
            now.recorder = None
