"""What a run uses now: host memory of the process, and utilization and memory of GPUs by NVML."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pynvml

from fastdp.runtime.topology import physical_devices

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_PAGES = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class CardUsage:
    """A GPU now: the share of the latest second or less in which it ran kernels, and bytes in use by all processes.

    Either is None where the driver does not tell.
    """

    utilization: float | None
    nbytes: int | None


class CardMeter:
    """Reads NVML for some GPUs. Without a driver it reads nothing.

    Args:
        ordinals: CUDA's ordinals of the GPUs, as in "cuda:N".

    NVML stays initialized until `close()`, or until the object is gone.
    """

    def __init__(self, ordinals: Sequence[int]) -> None:
        physical = {device.index: device.physical for device in physical_devices()} if ordinals else {}
        known = [ordinal for ordinal in ordinals if ordinal in physical]
        self._handles = {}
        self.close: Callable[[], object] = _nothing
        if known:
            pynvml.nvmlInit()
            self.close = weakref.finalize(self, pynvml.nvmlShutdown)
            self._handles = {ordinal: pynvml.nvmlDeviceGetHandleByIndex(physical[ordinal]) for ordinal in known}

    def read(self) -> dict[int, CardUsage]:
        """What each GPU does now, by ordinal."""
        return {ordinal: CardUsage(_utilization(handle), _nbytes(handle)) for ordinal, handle in self._handles.items()}


def _nothing() -> None:
    """NVML was not needed."""


def _utilization(handle: object) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError:  # not of MIG instances, nor of some drivers
        return None


def _nbytes(handle: object) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None


def host_nbytes() -> int | None:
    """The resident memory of this process, in bytes; its peak where the system tells only that; None if neither."""
    if _PAGES.exists():
        return int(_PAGES.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
