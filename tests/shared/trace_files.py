"""Reads trace files, and checks what holds of all of them."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

VERBS = {"scatter", "run", "reduce", "update", "merge"}
# Times in files are microseconds, rounded to nanoseconds.
ROUNDED = 0.002


class TraceFile:
    """A trace: its spans by lane, in the order of their beginnings."""

    def __init__(self, path: Path) -> None:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        whole = json.loads(text)
        self.events: list[dict[str, Any]] = whole["traceEvents"]
        self.facts: dict[str, Any] = whole["otherData"]
        names = {e["tid"]: e["args"]["name"] for e in self.events if e["name"] == "thread_name"}
        places = {e["tid"]: e["args"]["sort_index"] for e in self.events if e["name"] == "thread_sort_index"}
        assert {e["args"]["name"] for e in self.events if e["name"] == "process_name"} == {"fastdp"}
        assert {e["pid"] for e in self.events} == {1}
        assert len(set(places.values())) == len(places) == len(names)
        self.order = sorted(names.values(), key=lambda name: places[next(t for t in names if names[t] == name)])
        self.lanes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in self.events:
            if event["ph"] == "X":
                self.lanes[names[event["tid"]]].append(event)
        for spans in self.lanes.values():
            spans.sort(key=lambda span: (span["ts"], -span["dur"]))

    def check(self) -> TraceFile:
        """Spans of each lane lie one behind the other, or one inside the other, and within the trace."""
        assert self.lanes
        for lane, spans in self.lanes.items():
            open_until: list[tuple[float, str]] = []
            for span in spans:
                began, ended = span["ts"], span["ts"] + span["dur"]
                assert span["dur"] >= 0, (lane, span)
                while open_until and open_until[-1][0] <= began + ROUNDED:
                    open_until.pop()
                assert not open_until or ended <= open_until[-1][0] + ROUNDED, (lane, span, open_until)
                open_until.append((ended, span["name"]))
        return self

    def names(self, lane: str) -> list[str]:
        """The names of the spans of a lane."""
        return [span["name"] for span in self.lanes[lane]]

    def named(self, name: str, lane: str = "") -> list[dict[str, Any]]:
        """All spans of a name, of lanes whose names begin so."""
        return [
            span for own, spans in self.lanes.items() if own.startswith(lane) for span in spans if span["name"] == name
        ]

    def uncertain(self, device: str) -> float:
        """Within how many microseconds a GPU's clock is set against the host's."""
        return float(self.facts["clocks"][device].split("within ")[1].split()[0])

    @property
    def host(self) -> str:
        """The lane of the main thread."""
        return "host: MainThread"


def inside(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    """Whether a span lies within another one."""
    end = outer["ts"] + outer["dur"] + ROUNDED
    return outer["ts"] - ROUNDED <= inner["ts"] and inner["ts"] + inner["dur"] <= end
