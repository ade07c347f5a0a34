"""Tells a benchmark's progress in plain lines, for pipes, logs, notebooks and simple terminals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TextIO

from fastdp.benchmark.display.output import encodable, write_blocks
from fastdp.benchmark.display.result import result_blocks
from fastdp.benchmark.display.state import State, Way
from fastdp.benchmark.figures import count, duration, number, plain, plural, rate


class Lines:
    """One line for each event, and the final tables. A context manager and a function of events.

    Args:
        stream: where to write. It stays open.
        console: a console of rich on the same stream, for the tables; None where rich is not installed.
    """

    def __init__(self, stream: TextIO, console: Any) -> None:
        self._stream, self._console = stream, console
        self._state = State()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to put back."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Tell an event.

        Raises:
            ValueError: an event of no known kind.
        """
        way = self._state.apply(event)
        if event["event"] == "ended":
            self._stream.write("\n")
            write_blocks(result_blocks(event["result"]), self._stream, self._console)
        else:
            encoding = getattr(self._stream, "encoding", None)
            for line in self._lines(event, way):
                self._stream.write(encodable(line, encoding) + "\n")
        self._stream.flush()  # a pipe's reader follows along

    def _lines(self, event: Mapping[str, Any], way: Way | None) -> list[str]:
        """The text of an event."""
        if way is not None:
            return [f"{way.name}: {_SAID[event['event']](way)}"]
        if event["event"] == "batch":
            return [self._state.batches[-1]]
        ways = self._state.ways
        how = "taking turns" if len(ways) > 1 else "in rounds"
        return [f"{self._state.title}: {plural(len(ways), 'way')} to train, {how}", *(f"  {name}" for name in ways)]


def _ready(way: Way) -> str:
    facts = way.facts
    said = ["ready"]
    if number(facts.get("parameters")) is not None:
        said.append(f"{count(number(facts['parameters']))} parameters")
    for key, words in (("first_step", "first step"), ("capture", "captured in"), ("compile", "compiled in")):
        if number(facts.get(f"{key}_seconds")) is not None:
            said.append(f"{words} {duration(number(facts[f'{key}_seconds']))}")
    return ", ".join([*said, *(plain(facts[key]) for key in ("how", "why") if facts.get(key))])


def _warm(way: Way) -> str:
    if way.warm_steps is None:
        return "warm"
    return f"warm after {plural(int(way.warm_steps), 'step')}, {duration(way.warm_seconds)}"


def _round(way: Way) -> str:
    latest = way.rates[-1] if way.rates else None
    return f"round {way.number} of {way.of}, {rate(latest)} samples/s"


_SAID: dict[str, Callable[[Way], str]] = {
    "starting": lambda way: "starting",
    "ready": _ready,
    "warm": _warm,
    "round": _round,
    "failed": lambda way: f"failed: {way.reason}",
}
