"""Measures ways to train: starts them, warms them up, lets them take turns, and makes the result."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastdp._version import __version__
from fastdp.benchmark.batch_trials import find_batch
from fastdp.benchmark.machine import Meter, machine, today, versions
from fastdp.benchmark.noise import Noise
from fastdp.benchmark.process import Process, WayError, for_want_of_memory
from fastdp.benchmark.request import Request, Round
from fastdp.benchmark.result import SCHEMA
from fastdp.benchmark.rounds import WarmUp, spread, steps_in, turns, warm_up
from fastdp.benchmark.settings import Settings
from fastdp.benchmark.ways import environment, missing
from fastdp.benchmark.worker import command

Emit = Callable[[dict[str, Any]], None]

WARM_UP_PART = 0.25  # of a round's seconds: a round of the warm-up
WARM_UP_LIMIT = 60.0


@dataclass
class Way:
    """A way whose process is ready, with what was measured of it."""

    request: Request
    process: Process
    warmed: WarmUp | None = None
    rounds: list[Round] = field(default_factory=list)
    trace: str | None = None


def run(settings: Settings, emit: Emit) -> dict[str, Any]:
    """Measure all ways and return the result (`fastdp.benchmark.result`), which the last event holds too.

    Every way is a process of its own. All are started and warmed up one after the other, so that each has the machine
    to itself, and then take turns. A way that fails is left out with its reason, and the others go on; one without
    memory while others hold some is measured again when they are over.

    Args:
        emit: gets an event as it happens: a dict with "event": "started" (ways, settings), "starting" (way), "ready"
            (way, facts), "warm" (way, steps, seconds), "round" (way, number, of, samples_per_second, report), "batch"
            (way, batch, samples_per_second or reason), "failed" (way, reason), "ended" (result).
    """
    emit({"event": "started", "ways": [request.name for request in settings.ways], "target": settings.name})
    batches = None
    if settings.find_batch:
        settings, batches = find_batch(settings, emit)
    measurement = _Measurement(settings, emit)
    measurement.measure()
    result = {**measurement.result(), "batches": batches}
    emit({"event": "ended", "result": result})
    return result


class _Measurement:
    """The ways of one run, those that are over, and the failures."""

    def __init__(self, settings: Settings, emit: Emit) -> None:
        self.settings, self.emit = settings, emit
        self.noise = Noise()
        self.running: dict[str, Way] = {}
        self.over: dict[str, Way] = {}
        self.failed: dict[str, str] = {}
        self.postponed: list[Request] = []

    def measure(self) -> None:
        """All ways together; then one by one those that found no memory beside the others."""
        self._together(self.settings.ways)
        waiting, self.postponed = self.postponed, []
        for request in waiting:
            self._together([request])

    def _together(self, requests: Sequence[Request]) -> None:
        """Start some ways, warm them up, and let them take turns."""
        try:
            for request in requests:
                self._start(request)
            for name in list(self.running):
                self._guarded(name, self._warm_up)
            self._take_turns()
            for name in list(self.running):
                self._guarded(name, self._trace)
            self._close(5.0)
        except BaseException:
            self._close(0.0)  # an interrupt is not kept waiting
            raise

    def _close(self, patience: float) -> None:
        """End all processes, and keep the ways that were measured."""
        while self.running:
            name, way = self.running.popitem()
            if way.rounds:
                self.over[name] = way
            way.process.close(patience)

    def _start(self, request: Request) -> None:
        """Start a way's process and wait until it is ready."""
        reason = missing(request)
        if reason:
            self._fail(request, reason)
            return
        self.emit({"event": "starting", "way": request.name})
        try:
            process = Process(command(request), environment(request), self.settings.timeout)
        except WayError as error:
            self._fail(request, str(error))
            return
        self.running[request.name] = Way(request, process)
        self.emit({"event": "ready", "way": request.name, "facts": process.facts})

    def _guarded(self, name: str, work: Callable[[Way], None]) -> None:
        """Do something with a way; if it fails, end the way and note the reason."""
        try:
            work(self.running[name])
        except WayError as error:
            way = self.running.pop(name)
            way.process.close(0.0)
            self._fail(way.request, str(error))

    def _fail(self, request: Request, reason: str) -> None:
        """Note why a way failed; one that found no memory beside others is tried again."""
        if for_want_of_memory(reason) and self.running and request not in self.postponed:
            self.postponed.append(request)
            return
        self.failed[request.name] = reason
        self.emit({"event": "failed", "way": request.name, "reason": reason})

    def _warm_up(self, way: Way) -> None:
        """Train until the time of a step stays the same."""
        timeout = self.settings.timeout
        way.warmed = warm_up(
            lambda steps: way.process.round(steps, timeout).seconds,
            seconds=WARM_UP_PART * self.settings.seconds,
            limit=WARM_UP_LIMIT,
            patience=timeout,
            settled=lambda: bool(way.process.ask({"settled": True}, timeout, "an answer")["settled"]),
        )
        self.emit({"event": "warm", "way": way.request.name, "steps": way.warmed.steps, "seconds": way.warmed.seconds})

    def _take_turns(self) -> None:
        """Run the rounds, one way after the other, with a sample of the machine's noise before each."""
        for number, name in turns(self.running, self.settings.rounds):
            self.noise.sample()
            self._guarded(name, lambda way, number=number: self._round(way, number))  # type: ignore[misc]

    def _round(self, way: Way, number: int) -> None:
        """One round of one way."""
        assert way.warmed is not None
        steps = self.settings.steps or steps_in(self.settings.seconds, way.warmed.step_seconds)
        timeout = self.settings.timeout + 10 * steps * way.warmed.step_seconds
        with Meter(way.request.devices if way.request.kind == "gpu" else 0) as meter:
            done = way.process.round(steps, timeout)
        way.rounds.append(replace(done, joules=meter.joules, utilization=meter.utilization))
        self.emit(
            {
                "event": "round",
                "way": way.request.name,
                "number": number,
                "of": self.settings.rounds,
                "samples_per_second": way.request.batch * done.steps / done.seconds,
                "report": done.report,
            }
        )

    def _trace(self, way: Way) -> None:
        """Write a trace of some steps, if asked for. The result names the file, which lies beside it."""
        folder = self.settings.traces
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = f"trace-{re.sub(r'[^a-z0-9]+', '-', way.request.name.lower()).strip('-')}.json"
        asked = {"trace": str(folder.resolve() / file)}
        way.trace = file if way.process.ask(asked, self.settings.timeout, "the trace")["trace"] else None

    def result(self) -> dict[str, Any]:
        """The result of what was measured."""
        settings = self.settings
        order = [request.name for request in settings.ways]
        ways = [self.over[name] for name in order if name in self.over]
        facts = ways[0].process.facts if ways else {}
        return {
            "schema": SCHEMA,
            "fastdp": __version__,
            "date": today(),
            "command": list(settings.command),
            "machine": machine(),
            "versions": versions(),
            "noise": self.noise.result(),
            "target": {
                "name": settings.name,
                "title": facts.get("title", settings.name),
                "framework": settings.framework,
                "parameters": facts.get("parameters"),
                "inputs": facts.get("inputs", []),
                "loss": facts.get("loss", ""),
                "optimizer": facts.get("optimizer", ""),
            },
            "settings": {
                "batch": settings.batch,
                "per_device": settings.per_device,
                "precision": settings.precision,
                "data": settings.data,
                "steps": settings.steps,
                "seconds": settings.seconds,
                "rounds": settings.rounds,
                "seed": settings.seed,
            },
            "entries": [_entry(way, ways) for way in ways],
            "failed": [{"name": name, "reason": self.failed[name]} for name in order if name in self.failed],
        }


def _entry(way: Way, ways: Sequence[Way]) -> dict[str, Any]:
    """What the result keeps of a way."""
    request, report, facts = way.request, way.rounds[-1].report, way.process.facts
    assert way.warmed is not None
    step_seconds = [done.seconds / done.steps for done in way.rounds]
    known = {**facts, **report}
    return {
        "name": request.name,
        "library": request.library,
        "devices": request.devices,
        "kind": request.kind,
        "mode": request.mode,
        "batch": request.batch,
        "parameters": facts.get("parameters"),
        "samples_per_second": _spread([request.batch / seconds for seconds in step_seconds]),
        "step_seconds": _spread(step_seconds),
        "efficiency": _efficiency(way, ways),
        "warm_up": {"steps": way.warmed.steps, "seconds": round(way.warmed.seconds, 3), "steady": way.warmed.steady},
        "first_step_seconds": facts.get("first_step_seconds"),
        "capture_seconds": known.get("capture_seconds"),
        "compile_seconds": known.get("compile_seconds"),
        "how": known.get("how", ""),
        "why": known.get("why", ""),
        "verbs": known.get("verbs", []),
        "between_seconds": known.get("between_seconds"),
        "overhead_seconds": known.get("overhead_seconds"),
        "peak_host_nbytes": known.get("peak_host_nbytes"),
        "buckets": known.get("buckets", []),
        "utilization": _utilization(way.rounds),
        "joules_per_sample": _joules(way),
        "trace": way.trace,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all rounds."""
    found = spread(values)
    rounds = [float(f"{value:.6g}") for value in values]
    return {"median": found["median"], "q1": found["q1"], "q3": found["q3"], "rounds": rounds}


def _efficiency(way: Way, ways: Sequence[Way]) -> float | None:
    """Throughput per device by that of one device, of the same library and mode; the median over the rounds."""
    alike = (way.request.library, way.request.mode)
    for one in ways:
        if one.request.devices == 1 and (one.request.library, one.request.mode) == alike:
            pairs = zip(way.rounds, one.rounds, strict=False)
            rates = [_rate(way.request, mine) / _rate(one.request, base) for mine, base in pairs]
            return round(statistics.median(rates) / way.request.devices, 4)
    return None


def _rate(request: Request, done: Round) -> float:
    """Samples per second of a round."""
    return request.batch * done.steps / done.seconds


def _utilization(rounds: Sequence[Round]) -> list[float] | None:
    """The median over the rounds, per GPU."""
    found = [done.utilization for done in rounds if done.utilization is not None]
    return [round(statistics.median(one), 3) for one in zip(*found, strict=True)] if found else None


def _joules(way: Way) -> float | None:
    """Energy of all GPUs per sample, the median over the rounds."""
    found = [done.joules / (way.request.batch * done.steps) for done in way.rounds if done.joules is not None]
    return float(f"{statistics.median(found):.4g}") if found else None
