"""The entries of a result as pictures and tables read them: typed, and None where a figure is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdp.benchmark.figures import Spread, number, plain, plural, spread_of

# In the order of a step. `input` is the time between two steps, `other` what no clock covers.
PARTS = ("input", "scatter", "compute", "merge", "wait", "communication", "update", "other")
VERBS = PARTS[1:-1]
_DEVICES = re.compile(r"\d+ devices?")


@dataclass(frozen=True, slots=True)
class Device:
    """One device of an entry: rows of a batch, median seconds by verb, bytes by kind, and peak bytes."""

    name: str
    rows: int | None
    seconds: dict[str, float]
    nbytes: dict[str, float]
    peak_nbytes: float | None

    @property
    def memory(self) -> float | None:
        """The peak where it is known, else the bytes that the engine holds for the model; None where neither is."""
        if self.peak_nbytes is not None:
            return self.peak_nbytes
        return sum(self.nbytes.values()) if self.nbytes else None


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured way to train. Seconds, bytes and samples per second; None where the result does not say."""

    name: str
    library: str
    devices: int
    kind: str
    mode: str
    batch: int | None
    rate: Spread | None
    step: Spread | None
    efficiency: float | None
    warm_up_steps: float | None
    warm_up_seconds: float | None
    first_step_seconds: float | None
    capture_seconds: float | None
    compile_seconds: float | None
    how: str
    why: str
    per_device: tuple[Device, ...]
    between_seconds: float | None
    overhead_seconds: float | None
    peak_host_nbytes: float | None
    utilization: tuple[float | None, ...]
    joules_per_sample: float | None
    trace: str | None

    @property
    def series(self) -> str:
        """What entries that differ only in the number of devices have in common: the name without that number."""
        return ", ".join(part for part in self.name.split(", ") if not _DEVICES.fullmatch(part)) or self.name

    @property
    def mean_utilization(self) -> float | None:
        """The mean over the devices that report it."""
        known = [one for one in self.utilization if one is not None]
        return sum(known) / len(known) if known else None

    def parts(self, device: Device) -> dict[str, float]:
        """Seconds of one step on a device by part, in the order of `PARTS`, without parts that took no time.

        `other` is what the step takes beyond its parts: work of the host, and the differences between medians.
        """
        seconds = {"input": self.between_seconds or 0.0} | {verb: device.seconds.get(verb, 0.0) for verb in VERBS}
        known = sum(seconds.values())
        if self.step is not None:
            seconds["other"] = self.step.median - known
        return {part: seconds[part] for part in PARTS if seconds.get(part, 0.0) > 0}


def entries_of(result: Mapping[str, Any]) -> list[Entry]:
    """The entries of a result, in its order."""
    return [_entry(raw) for raw in result.get("entries") or []]


def _entry(raw: Mapping[str, Any]) -> Entry:
    warm_up = raw.get("warm_up") or {}
    devices = _whole(raw.get("devices"))
    return Entry(
        name=plain(raw.get("name") or f"{raw.get('library')}, {plural(devices or 0, 'device')}"),
        library=plain(raw.get("library") or ""),
        devices=devices or 0,
        kind=plain(raw.get("kind") or ""),
        mode=plain(raw.get("mode") or ""),
        batch=_whole(raw.get("batch")),
        rate=_positive(spread_of(raw.get("samples_per_second"))),
        step=_positive(spread_of(raw.get("step_seconds"))),
        efficiency=number(raw.get("efficiency")),
        warm_up_steps=number(warm_up.get("steps")),
        warm_up_seconds=number(warm_up.get("seconds")),
        first_step_seconds=number(raw.get("first_step_seconds")),
        capture_seconds=number(raw.get("capture_seconds")),
        compile_seconds=number(raw.get("compile_seconds")),
        how=plain(raw.get("how") or ""),
        why=plain(raw.get("why") or ""),
        per_device=devices_of(raw.get("verbs")),
        between_seconds=number(raw.get("between_seconds")),
        overhead_seconds=number(raw.get("overhead_seconds")),
        peak_host_nbytes=number(raw.get("peak_host_nbytes")),
        utilization=tuple(number(one) for one in raw.get("utilization") or ()),
        joules_per_sample=number(raw.get("joules_per_sample")),
        trace=raw.get("trace") if isinstance(raw.get("trace"), str) else None,
    )


def tried_of(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The batch sizes that a result says were tried; the schema leaves open what it holds of them."""
    tried = (result.get("batches") or {}).get("tried")
    return [one for one in tried if isinstance(one, Mapping)] if isinstance(tried, list) else []


def _positive(spread: Spread | None) -> Spread | None:
    """A spread whose median can be divided by."""
    return spread if spread is not None and spread.median > 0 else None


def devices_of(verbs: Sequence[Mapping[str, Any]] | None) -> tuple[Device, ...]:
    """The devices of an entry's, or a report's, list `verbs`."""
    return tuple(
        Device(
            plain(raw.get("device") if raw.get("device") is not None else rank),
            _whole(raw.get("rows")),
            _numbers(raw.get("seconds")),
            _numbers(raw.get("nbytes")),
            number(raw.get("peak_nbytes")),
        )
        for rank, raw in enumerate(verbs or ())
    )


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    """The known numbers of a mapping, by safe names."""
    found = {plain(name): number(value) for name, value in (values or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)
