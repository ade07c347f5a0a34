"""The machine of a measurement: processor, memory, GPUs, driver and versions; NVML's utilization and energy."""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import pynvml

from fastdp._version import __version__
from fastdp.runtime.topology import driver, physical_devices

LIBRARIES = (
    "numpy",
    "torch",
    "keras",
    "jax",
    "jaxlib",
    "tensorflow",
    "tensorflow-cpu",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "triton",
)
POLL_SECONDS = 0.1  # NVML's utilization is over its latest 1/6 to 1 second


def hardware() -> dict[str, Any]:
    """The operating system's name of the processor, and the number of cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return {"cpu": model, "cores": os.cpu_count()}


def machine() -> dict[str, Any]:
    """The machine as results keep it: cpu, cores, memory in bytes, system, gpus, driver."""
    installed = driver()
    return {
        **hardware(),
        "memory_nbytes": memory_nbytes(),
        "system": f"{platform.system()} {platform.release()}",
        "gpus": [
            {
                "name": gpu.name,
                "memory_nbytes": gpu.memory_nbytes,
                "compute_capability": list(gpu.compute_capability) if gpu.compute_capability else None,
            }
            for gpu in physical_devices()
        ],
        "driver": installed.version if installed is not None else None,
    }


def memory_nbytes() -> int | None:
    """Bytes of host memory; None where the system does not tell."""
    return _meminfo("MemTotal")


def free_nbytes() -> int | None:
    """Bytes of host memory that programs can still get; None where the system does not tell."""
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int | None:
    file = Path("/proc/meminfo")
    found = re.search(rf"^{field}:\s*(\d+) kB", file.read_text("utf-8"), re.MULTILINE) if file.exists() else None
    return 1024 * int(found[1]) if found else None


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python, fastdp and those of the libraries that are installed."""
    found = {"python": platform.python_version(), "fastdp": __version__}
    for name in dict.fromkeys(libraries):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Meter:
    """Utilization and energy of GPUs during a block, from NVML, which asks the driver.

    Args:
        gpus: how many of the visible GPUs, from the first.

    Attributes:
        joules: energy of these GPUs together from the start of the block to its end; None where NVML does not tell
            (before Volta, or without a driver).
        utilization: per GPU, the mean part of the time in which kernels ran, from 0 to 1; None where NVML does not
            tell. NVML's own figure is over the latest sixth of a second to second.
    """

    def __init__(self, gpus: int) -> None:
        self.joules: float | None = None
        self.utilization: list[float] | None = None
        self._ordinals = [gpu.physical for gpu in physical_devices()[:gpus]] if gpus else []
        self._samples: list[list[float]] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._handles: list[Any] = []
        self._before: list[float] = []

    def __enter__(self) -> Meter:
        if self._ordinals:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(ordinal) for ordinal in self._ordinals]
            self._before = self._energy()
            self._thread = threading.Thread(target=self._poll, name="bench-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join(10)
        after = self._energy()
        if self._before and after:
            self.joules = sum(after) - sum(self._before)
        if self._samples:
            self.utilization = [sum(one) / len(one) for one in zip(*self._samples, strict=True)]
        pynvml.nvmlShutdown()

    def _energy(self) -> list[float]:
        """Joules of each GPU since the driver was loaded; empty where one does not tell."""
        try:
            return [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 for handle in self._handles]
        except pynvml.NVMLError:
            return []

    def _poll(self) -> None:
        """Sample the utilization until the block is over, or until a GPU does not tell."""
        while not self._over.wait(POLL_SECONDS):
            try:
                rates = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100 for handle in self._handles]
            except pynvml.NVMLError:
                self._samples.clear()
                return
            self._samples.append(rates)


def today() -> str:
    """The date and time of now, by ISO 8601 with the offset of the time zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
