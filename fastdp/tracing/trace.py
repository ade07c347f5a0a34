"""`fastdp.trace`, and the traces of some steps that parallel models make: they record spans, and write a file."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fastdp._version import __version__
from fastdp.options import check_flag
from fastdp.tracing import file, spans
from fastdp.tracing.nvtx import ranges
from fastdp.tracing.protocols import Span, Stream
from fastdp.warn import warn_user

MAX_SPANS = 500_000
# That the end of a trace waits for the times of work that GPUs are not done with, all of them together.
SECONDS = 10.0


class Trace:
    """A recording of what parallel models do, written to a file when it ends.

    Made by `fastdp.trace`, which begins to record when it is entered, and by the method `trace` of parallel models,
    which begins at once. Thread-safe.

    Args:
        path: of the file. It is made when recording begins.
        max_spans: the most spans that are kept. What comes later is left out, and the trace says so.
        nvtx: also mark NVTX ranges.
        steps: end by itself after so many steps; None: at `close`.
        counts: whether a program's steps are among these.

    Attributes:
        path: as given.
        steps: how many steps have been counted.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_spans: int = MAX_SPANS,
        nvtx: bool = False,
        steps: int | None = None,
        counts: Callable[[object], bool] = lambda program: True,
    ) -> None:
        if isinstance(max_spans, bool) or not isinstance(max_spans, int) or max_spans < 1:
            raise ValueError(f"`max_spans` must be a positive number of spans. Received: max_spans={max_spans!r}")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"`steps` must be a positive number of steps, or None. Received: steps={steps!r}")
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"`path` must be the path of a file. Received: path={path!r}")
        check_flag("nvtx", nvtx)
        self.path = Path(path)
        self.steps = 0
        self._wanted, self._counts = steps, counts
        self._max_spans = max_spans
        self._ranges = ranges() if nvtx else None
        self._spans: list[Span] = []
        self._file: IO[bytes] | None = None
        self._left_out = 0
        self._zero, self._began = 0, ""
        self._closing = threading.Lock()
        self._process = 0

    # Recording.

    def start(self) -> Trace:
        """Make the file, and begin to record.

        Raises:
            OSError: the file cannot be written.
            RuntimeError: this trace has been recorded already.
        """
        if self._zero:
            raise RuntimeError(f"The trace in {self.path} has been recorded already. Make another one.")
        try:
            self._file = self.path.open("wb")
        except OSError as error:
            raise type(error)(
                error.errno, f"The trace cannot be written: {error.strerror}. Pass a path to a file", str(self.path)
            ) from error
        self._zero, self._process = time.perf_counter_ns(), os.getpid()
        self._began = datetime.datetime.now(datetime.timezone.utc).isoformat()
        spans.start(sink=self, ranges=self._ranges)
        atexit.register(self._end_by_itself)
        return self

    @property
    def recording(self) -> bool:
        """Whether it records at the time of the call."""
        return self._file is not None

    def add(self, span: Span) -> None:
        """Keep a span, if there is room."""
        if len(self._spans) < self._max_spans:
            self._spans.append(span)
        else:
            self._left_out += 1

    def step_begins(self, program: object, kind: str) -> None:
        """End before a step that is one too many."""
        if self._is_over() and kind != "backward" and self._counts(program):
            self._end_by_itself()

    def step_ends(self, program: object, kind: str) -> None:
        """Count a step. That of a call waits for its backward pass, or for the next step."""
        if not self.recording or not self._counts(program):
            return
        self.steps += kind not in ("backward", "fold")
        if kind != "call" and self._is_over():
            self._end_by_itself()

    def _is_over(self) -> bool:
        return self.recording and self._wanted is not None and self.steps >= self._wanted

    # The end.

    def close(self) -> bool:
        """End the recording and write the file. Returns whether it did: not if that has been done.

        Raises:
            OSError: the file could not be written.
        """
        with self._closing:
            opened, self._file = self._file, None
            if opened is None or os.getpid() != self._process:  # a forked process has nothing to write
                return False
            spans.stop(sink=self, ranges=self._ranges)
            atexit.unregister(self._end_by_itself)
            with file.text_of(opened, self.path) as text:
                self._write(text)
            return True

    def _write(self, text: IO[str]) -> None:
        streams: dict[str, Stream] = {}
        for span in self._spans:
            if not isinstance(span.lane, tuple):
                streams.setdefault(span.lane.lane[1], span.lane)
        end = time.monotonic() + SECONDS
        clocks = {name: stream.read_timestamps(max(0.0, end - time.monotonic())) for name, stream in streams.items()}
        notes = []
        if self._left_out:
            notes.append(f"The trace ends here: max_spans={self._max_spans}, and {self._left_out} more were left out.")
        facts = {
            "made by": f"fastdp {__version__}",
            "began": self._began,
            "steps": self.steps,
            "clocks": clocks,
        }
        file.write(text, self._spans, self._zero, facts, notes)
        self._spans.clear()

    def _end_by_itself(self) -> None:
        """End after the last step that was asked for, or with the process, and say so. A full disk ends no training."""
        try:
            written = self.close()
        except OSError as error:
            warn_user(f"fastdp could not write the trace to {self.path}: {error}")
            return
        if written:
            steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
            sys.stderr.write(f"fastdp: {self.path} has the trace of {steps}. Open it on https://ui.perfetto.dev\n")

    def __enter__(self) -> Trace:
        return self if self.recording else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            warn_user(f"fastdp could not write the trace to {self.path}: {failure}")  # the error is what counts


def trace(path: str | os.PathLike[str], *, max_spans: int = MAX_SPANS, nvtx: bool = False) -> Trace:
    """Record what all parallel models of this process do inside a `with` block, and write it to a file.

    The file is a Chrome trace (JSON) for https://ui.perfetto.dev and chrome://tracing, compressed if its name ends in
    ".gz". It has a lane for each stream of each device (copy in, compute, communication, copy out) and for each thread
    of the host: the five verbs of each step (scatter, run, reduce, update, merge), buckets and collectives, captured
    segments, waits of the host, and what lies between the steps. Each span has the number of its step. On virtual
    devices the times are those of the workers. On GPUs the lanes of streams have the GPU's own times, by CUDA events.

    Traces may be nested, and recorded from several threads: each has all that happens while it is open. A block that
    ends by an exception writes its file too.

    Args:
        path: of the file, which is made when the block is entered.
        max_spans: the most spans that are kept in memory (some 400 bytes each). What comes later is left out, and the
            trace says so.
        nvtx: also mark NVTX ranges of the same names on the host's threads, for Nsight Systems (package `nvtx`).
            FASTDP_NVTX=1 marks them without a trace.

    Raises:
        OSError: the file cannot be written; when the block is entered, or at its end if the disk is full.
        ImportError: `nvtx`, and the package is not installed.
        ValueError: `max_spans` is not a positive number.
        TypeError: `path` is no path, or `nvtx` no bool.

    Example:
        >>> with fastdp.trace("step.json"):  # doctest: +SKIP
        ...     parallel.fit(x, y, batch_size=256, steps_per_epoch=5)
    """
    return Trace(path, max_spans=max_spans, nvtx=nvtx)


class Traceable:
    """The method `trace` of parallel models."""

    _program: Any  # of an engine

    def trace(
        self, path: str | os.PathLike[str], steps: int | None = 5, *, max_spans: int = MAX_SPANS, nvtx: bool = False
    ) -> Trace:
        """Record the next steps, and write them to a file, which is what `fastdp.trace` writes.

        Recording begins at once. After so many steps of this model it ends by itself, and a line on stderr says so; if
        the process ends before, the file has what there was. Steps are those of training, testing and predicting, and
        calls of the model, each with its backward pass. The trace has what other parallel models do meanwhile as well.

        As a context manager, the result ends the recording with the block, if it has not ended before.

        Args:
            path: of the file, which is made at once.
            steps: how many. None: all until the result's `close()`, or the end of the block.
            max_spans, nvtx: as in `fastdp.trace`.

        Returns:
            The recording; `recording` tells whether it goes on.

        Raises:
            OSError: the file cannot be written. At the end of the recording that is a warning.
            ImportError, ValueError: as in `fastdp.trace`; `steps` is not a positive number.

        Example:
            >>> parallel.trace("step.json", steps=3)  # doctest: +SKIP
            >>> parallel.fit(x, y, batch_size=256)  # doctest: +SKIP
            fastdp: step.json has the trace of 3 steps. Open it on https://ui.perfetto.dev
        """
        return Trace(path, steps=steps, counts=self._is_traced, max_spans=max_spans, nvtx=nvtx).start()

    def _is_traced(self, program: object) -> bool:
        """Whether the steps of a program are steps of this model. Here: of this engine."""
        return program is self._program
