"""What a benchmark has done so far, put together from its events: the state that displays draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdp.benchmark.entries import Device, devices_of
from fastdp.benchmark.figures import Spread, number, plain, rate, spread_of
from fastdp.benchmark.rounds import spread


@dataclass(slots=True)
class Way:
    """One way to train and how far it is: `state` is waiting, starting, warming up, measured or failed.

    `facts` is what it told when it was ready, `rates` the samples per second of its rounds so far, `devices` and
    `between_seconds` its latest report's, `reason` why it failed.
    """

    name: str
    state: str = "waiting"
    facts: Mapping[str, Any] = field(default_factory=dict)
    warm_steps: float | None = None
    warm_seconds: float | None = None
    number: int = 0
    of: int = 0
    rates: list[float] = field(default_factory=list)
    devices: tuple[Device, ...] = ()
    between_seconds: float | None = None
    reason: str = ""

    @property
    def rate(self) -> Spread | None:
        """Samples per second over the rounds so far."""
        return spread_of({**spread(self.rates), "rounds": self.rates}) if self.rates else None


@dataclass(slots=True)
class State:
    """The target, all ways in their order, and the result once there is one.

    `current` is the way of the latest event, `told` the latest that told of its devices, `batches` what was said of
    batch sizes.
    """

    title: str = "fastdp bench"
    ways: dict[str, Way] = field(default_factory=dict)
    current: Way | None = None
    told: Way | None = None
    batches: list[str] = field(default_factory=list)
    result: Mapping[str, Any] | None = None

    def apply(self, event: Mapping[str, Any]) -> Way | None:
        """Take an event in; returns the way that it is about.

        Raises:
            ValueError: an event of no known kind.
        """
        kind = event.get("event")
        if kind == "started":
            for name in event.get("ways") or ():
                self.way(name)
            if event.get("target"):
                self.title = f"fastdp bench {plain(event['target'])}"
            return None
        if kind == "batch":
            self.batches.append(_batch(event))
            return None
        if kind == "ended":
            self.result = event["result"]
            return None
        if kind not in _CHANGES:
            known = ", ".join(["started", *_CHANGES, "batch", "ended"])
            raise ValueError(f"event must be one of {known}, got {kind!r}")
        way = self.way(event["way"])
        _CHANGES[kind](way, event)
        self.current = way
        if any(device.seconds or device.memory is not None for device in way.devices):
            self.told = way
        return way

    def way(self, name: Any) -> Way:
        """The way of this name, new if it was not announced."""
        shown = plain(name)
        return self.ways.setdefault(shown, Way(shown))


def _batch(event: Mapping[str, Any]) -> str:
    """What became of a batch size."""
    found = number(event.get("samples_per_second"))
    said = f"{rate(found)} samples/s" if found is not None else plain(event.get("reason") or "no reason given")
    return f"batch {plain(event.get('batch'))}: {said}"


def _starting(way: Way, event: Mapping[str, Any]) -> None:
    way.state = "starting"


def _ready(way: Way, event: Mapping[str, Any]) -> None:
    way.state, way.facts = "warming up", event.get("facts") or {}


def _warm(way: Way, event: Mapping[str, Any]) -> None:
    way.state = "warm"
    way.warm_steps, way.warm_seconds = number(event.get("steps")), number(event.get("seconds"))


def _round(way: Way, event: Mapping[str, Any]) -> None:
    way.state = "measured"
    way.number, way.of = int(event.get("number") or 0), int(event.get("of") or 0)
    found = number(event.get("samples_per_second"))
    if found is not None:
        way.rates.append(found)
    report = event.get("report") or {}
    if report.get("verbs"):
        way.devices = devices_of(report["verbs"])
        way.between_seconds = number(report.get("between_seconds"))


def _failed(way: Way, event: Mapping[str, Any]) -> None:
    way.state, way.reason = "failed", plain(event.get("reason") or "no reason given")


_CHANGES = {"starting": _starting, "ready": _ready, "warm": _warm, "round": _round, "failed": _failed}
