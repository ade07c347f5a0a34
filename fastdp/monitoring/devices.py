"""Memory and utilization of each device of a run, from its report and NVML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastdp.engine.report import DeviceReport, Report
from fastdp.monitoring.usage import CardMeter, CardUsage, host_nbytes

_WORK = ("compute", "merge", "update")


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """One device.

    Attributes:
        name: such as "cuda:0" or "virtual:1".
        nbytes: of a GPU: the memory in use on it, by all processes; else the model's memory of this device.
        utilization: from 0 to 1. Of a GPU: the share of the latest time in which it ran kernels, by NVML. Of a virtual
            device: the share of the time that its worker computes and updates, in the latest steps. None if unknown.
    """

    name: str
    nbytes: int
    utilization: float | None
    on_gpu: bool = False


class DeviceMeter:
    """Reads what the devices of a run use.

    Args:
        report: returns the run's report; None while there is none.
    """

    def __init__(self, report: Callable[[], Report | None]) -> None:
        self._report = report
        self._cards: CardMeter | None = None
        self._ordinals: list[int] = []

    def read(self) -> list[DeviceUsage]:
        """What each device uses now, in the order of the rows; empty before the first step."""
        report = self._report()
        if report is None:
            return []
        ordinal_of = {name: int(card.name.split(":")[1]) for card in report.cards for name in card.devices}
        usage = self._meter(sorted(set(ordinal_of.values()))).read() if ordinal_of else {}
        return [_usage(report, device, usage.get(ordinal_of.get(device.name, -1))) for device in report.devices]

    def close(self) -> None:
        """Let go of NVML. A later `read` begins anew."""
        if self._cards is not None:
            self._cards.close()
        self._cards = None

    def _meter(self, ordinals: list[int]) -> CardMeter:
        """NVML's meter for these GPUs."""
        if self._cards is None or ordinals != self._ordinals:
            self.close()
            self._cards, self._ordinals = CardMeter(ordinals), ordinals
        return self._cards


def _usage(report: Report, device: DeviceReport, card: CardUsage | None) -> DeviceUsage:
    """One device: a GPU by NVML, a virtual one by its times."""
    if card is not None:
        nbytes = card.nbytes if card.nbytes is not None else device.peak_nbytes or 0
        return DeviceUsage(device.name, nbytes, card.utilization, on_gpu=True)
    on_gpu = device.peak_nbytes is not None
    return DeviceUsage(
        device.name,
        device.peak_nbytes if device.peak_nbytes is not None else sum(device.nbytes.values()),
        None if on_gpu else _busy(report, device),
        on_gpu,
    )


def _busy(report: Report, device: DeviceReport) -> float | None:
    """The share of the time that a device's worker has work; None before the first step."""
    whole = report.step_seconds + report.between_seconds
    return min(1.0, sum(device.seconds[verb] for verb in _WORK) / whole) if report.timed and whole > 0 else None


def memory_mb(devices: list[DeviceUsage]) -> float | None:
    """The memory of the fullest GPU, or of the process, in MB; None if the system tells neither."""
    if any(device.on_gpu for device in devices):
        return max(device.nbytes for device in devices) / 1e6
    nbytes = host_nbytes()
    return None if nbytes is None else nbytes / 1e6
