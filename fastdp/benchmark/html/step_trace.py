"""Reads the latest training step of a Chrome trace as lanes of spans, for the timeline of a report."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdp.benchmark.entries import VERBS
from fastdp.benchmark.figures import number, plain
from fastdp.benchmark.html.charts import Span

_MOST_BYTES = 200_000_000  # a trace of a few steps has some MB
_MOST_SPANS = 2000  # in the picture: more would make the page heavy and the spans too thin to see

# The verb whose color spans of these first words have.
_SAME = {
    **dict.fromkeys(("run", "forward", "backward", "segment", "graph"), "compute"),
    **dict.fromkeys(("reduce", "all-reduce", "broadcast"), "communication"),
    **dict.fromkeys(("between",), "input"),
    **dict.fromkeys(("stage",), "scatter"),
}


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One step: a name and spans for each lane, its seconds, and how many short spans were left out."""

    lanes: tuple[tuple[str, tuple[Span, ...]], ...]
    seconds: float
    left_out: int


@dataclass(frozen=True, slots=True)
class _Event:
    """A span of the file, in microseconds; `step` is the number of its step, where it says one."""

    name: str
    lane: tuple[str, str]
    begin: float
    length: float
    step: float | None

    @property
    def end(self) -> float:
        return self.begin + self.length

    @property
    def is_step(self) -> bool:
        """Whether this span is a whole step, such as `train step`."""
        return self.name.split(" ")[-1] == "step"


def read_step(path: Path) -> StepTrace:
    """The latest whole training step in a trace: what says that it belongs to it, or lies inside; else all of the file.

    Args:
        path: a Chrome trace, such as `fastdp.trace` writes; one whose name ends in ".gz" is compressed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large, or no Chrome trace.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{path.name} has more than {_MOST_BYTES // 10**6} MB: open it in Perfetto")
    loaded = json.loads(text)
    raw = loaded.get("traceEvents") if isinstance(loaded, dict) else loaded
    if not isinstance(raw, list):
        raise ValueError(f"{path.name} is no Chrome trace: it has no list traceEvents")
    raw = [one for one in raw if isinstance(one, dict)]
    events = [event for event in map(_event, raw) if event is not None]
    if not events:
        raise ValueError(f"{path.name} is an empty trace: it has no complete spans")
    return _step(events, *_lanes(raw))


def _step(
    events: Sequence[_Event], names: Mapping[tuple[str, str], str], places: Mapping[tuple[str, str], float]
) -> StepTrace:
    steps = [event for event in events if event.is_step]
    trained = [event for event in steps if event.name.startswith("train")] or steps
    inside = [event for event in events if not event.is_step]
    if trained:
        latest = max(trained, key=lambda event: event.begin)
        inside = [event for event in inside if _belongs(event, latest)]
    begin = min((event.begin for event in inside or trained), default=0.0)
    taken = max((event.end for event in inside or trained), default=0.0) - begin or 1.0
    kept = sorted(inside, key=lambda event: -event.length)[:_MOST_SPANS]
    found: dict[tuple[str, str], list[Span]] = {}
    for event in sorted(kept, key=lambda event: (event.begin, -event.length)):  # outer spans first, below inner ones
        span = Span(event.name, (event.begin - begin) / 1e6, event.length / 1e6, color_of(event.name))
        found.setdefault(event.lane, []).append(span)
    ordered = sorted(found, key=lambda lane: (places.get(lane, 0.0), names.get(lane, "")))
    rows = tuple((names.get(lane, " ".join(lane)), tuple(found[lane])) for lane in ordered)
    return StepTrace(rows, taken / 1e6, len(inside) - len(kept))


def _belongs(event: _Event, step: _Event) -> bool:
    """Whether a span is of a step. On a GPU it may end after the host's step: then its number tells."""
    if event.step is not None and step.step is not None:
        return event.step == step.step
    return step.begin <= event.begin < step.end


def color_of(name: str) -> str:
    """The color of the verb that a span's name begins with; a neutral one for others."""
    words = name.lower().replace("_", " ").split(" ")
    verb = _SAME.get(words[0], _SAME.get(words[-1], words[0]))
    return f"var(--{verb})" if verb in (*VERBS, "input") else "var(--other)"


def _event(raw: Mapping[str, Any]) -> _Event | None:
    """A complete span; None for other events, and for what has no times."""
    begin, length = number(raw.get("ts")), number(raw.get("dur"))
    if raw.get("ph") != "X" or begin is None or length is None or length < 0:
        return None
    args = raw.get("args")
    step = number(args.get("step")) if isinstance(args, dict) else None
    return _Event(plain(raw.get("name")), _lane(raw), begin, length, step)


def _lane(raw: Mapping[str, Any]) -> tuple[str, str]:
    """The process and the thread of an event; text, since a file may hold anything."""
    return plain(raw.get("pid")), plain(raw.get("tid"))


def _lanes(events: Sequence[Mapping[str, Any]]) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], float]]:
    """The names and the places of lanes, as the trace's metadata tell. Of several processes the names are told too."""
    processes: dict[str, str] = {}
    threads: dict[tuple[str, str], str] = {}
    places: dict[tuple[str, str], float] = {}
    for event in events:
        args = event.get("args")
        if event.get("ph") != "M" or not isinstance(args, dict):
            continue
        if event.get("name") == "process_name":
            processes[_lane(event)[0]] = plain(args.get("name"))
        elif event.get("name") == "thread_name":
            threads[_lane(event)] = plain(args.get("name"))
        elif event.get("name") == "thread_sort_index":
            places[_lane(event)] = number(args.get("sort_index")) or 0.0
    if len(processes) > 1:
        threads = {lane: f"{processes.get(lane[0], lane[0])}: {name}" for lane, name in threads.items()}
    return threads, places
