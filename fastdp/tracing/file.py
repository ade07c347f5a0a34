"""Writes spans as a file in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and Chrome show."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, cast

from fastdp.tracing.protocols import VERBS, Span, Timestamp

_PROCESS = 1
# The order of a device's lanes.
_STREAMS = ("copy_in", "compute", "communication", "copy_out")
_IN_WORDS = {"copy_in": "copy in", "copy_out": "copy out"}


@contextmanager
def text_of(opened: IO[bytes], path: Path) -> Iterator[IO[str]]:
    """A file to write text to, compressed if its name ends in ".gz". Closes the file in the end."""
    with opened, gzip.open(opened, "wb") if path.suffix == ".gz" else nullcontext(opened) as plain:
        text = io.TextIOWrapper(cast(IO[bytes], plain), encoding="utf-8")
        yield text
        text.flush()
        text.detach()


class Lanes:
    """Numbers lanes, and tells where they stand in the picture: threads first, then devices, stream by stream."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, str, int]] = {}

    def number(self, lane: Any) -> int:
        """The number of a lane: a stream, or a thread by its identity and name."""
        if lane not in self._known:
            number = len(self._known) + 1
            self._known[lane] = (number, *_label(lane, number))
        return self._known[lane][0]

    def metadata(self) -> Iterator[dict[str, Any]]:
        """The events that name and order the process and its lanes."""
        common = {"ph": "M", "pid": _PROCESS}
        yield {**common, "name": "process_name", "args": {"name": "fastdp"}}
        yield {**common, "name": "process_sort_index", "args": {"sort_index": 0}}
        for number, name, place in self._known.values():
            yield {**common, "tid": number, "name": "thread_name", "args": {"name": name}}
            yield {**common, "tid": number, "name": "thread_sort_index", "args": {"sort_index": place}}


def _label(lane: Any, number: int) -> tuple[str, int]:
    """The name of a lane, and its place."""
    if not isinstance(lane, tuple):
        index, device, name = lane.lane
        return f"{device} {_IN_WORDS.get(name, name)}", 1000 + 10 * index + _STREAMS.index(name)
    name = lane[1]
    if name.startswith("fastdp-"):  # a device's worker
        return f"host: worker of {name.removeprefix('fastdp-')}", 500 + number
    return f"host: {name}", number


def write(file: IO[str], spans: Sequence[Span], zero: int, facts: dict[str, Any], notes: Sequence[str]) -> int:
    """Write a whole trace. Returns how many spans were left out, since their GPU has not told when they were.

    Args:
        file: from `text_of`.
        spans: in any order.
        zero: the time that the trace begins at, in nanoseconds of `time.perf_counter_ns`.
        facts: about the trace, under "otherData".
        notes: shown in the trace as marks at its end.
    """
    lanes, left_out, end = Lanes(), 0, zero
    file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
    for span in spans:
        began, ended = nanoseconds(span.began), nanoseconds(span.ended)
        if began is None or ended is None:
            left_out += 1
            continue
        end = max(end, ended)
        event = {
            "ph": "X",
            "pid": _PROCESS,
            "tid": lanes.number(span.lane),
            "name": span.name,
            "cat": "verb" if span.name in VERBS else "span",
            "ts": (began - zero) / 1e3,
            "dur": (ended - began) / 1e3,
            "args": span.facts,
        }
        file.write(json.dumps(event) + ",\n")
    if left_out:
        notes = [*notes, f"{left_out} spans of GPUs are missing: the GPUs were not done with them, or have failed."]
    for note in notes:
        mark = {"ph": "i", "s": "g", "pid": _PROCESS, "tid": 1, "name": note, "ts": (end - zero) / 1e3}
        file.write(json.dumps(mark) + ",\n")
    file.write(",\n".join(map(json.dumps, lanes.metadata())))
    file.write(f'\n], "otherData": {json.dumps({**facts, "notes": list(notes)})}}}\n')
    return left_out


def nanoseconds(time: int | Timestamp) -> int | None:
    """A span's end as nanoseconds; None if its GPU has not told it."""
    return time if isinstance(time, int) else time.nanoseconds
