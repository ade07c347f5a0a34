"""The boxes that `fastdp plan` knows, and how fast their GPUs add up gradients.

The figures are published ones, with their sources. All boxes hold eight GPUs. An all-reduce of `nbytes` over n GPUs
takes `latency + 2 (n - 1) / n nbytes / bandwidth`, with the bus bandwidth of nccl-tests (github.com/NVIDIA/nccl-tests,
doc/PERFORMANCE.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MOST_GPUS = 8


@dataclass(frozen=True)
class Link:
    """What an all-reduce between the GPUs of a box takes.

    Attributes:
        latency: seconds of an all-reduce that do not depend on its size.
        bandwidths: bus bandwidth in bytes per second by the number of GPUs it was published for. Of other numbers the
            next larger one counts.
        source: where the figures come from.
    """

    latency: float
    bandwidths: Mapping[int, float]
    source: str

    def bandwidth(self, gpus: int) -> float:
        """Bus bandwidth in bytes per second between so many GPUs."""
        larger = [count for count in self.bandwidths if count >= gpus]
        return self.bandwidths[min(larger) if larger else max(self.bandwidths)]

    def seconds(self, nbytes: int, gpus: int) -> float:
        """Seconds to all-reduce one bucket."""
        if gpus == 1:
            return 0.0
        return self.latency + 2 * (gpus - 1) / gpus * nbytes / self.bandwidth(gpus)


@dataclass(frozen=True)
class Box:
    """A machine with eight GPUs."""

    name: str
    title: str
    link: Link


# All-reduces of 8 A100 80 GB on NVSwitch by nccl-tests, NCCL 2.18.1, as (bytes, microseconds): nccl-tests issue 149.
A100_POINTS = ((8 << 20, 154.5), (32 << 20, 352.3), (128 << 20, 1149.0), (512 << 20, 4166.0))

_A100 = Link(98e-6, {8: 231e9}, "8 A100 80 GB on NVSwitch, fitted to 32 and 512 MiB: nccl-tests issue 149")
_H100 = Link(98e-6, {8: 476e9}, "8 H100 on NVSwitch, 476 GB/s: nccl-tests issue 290; latency assumed: that of 8 A100")
_H200 = Link(98e-6, {8: 475e9}, "8 H200 on NVSwitch, 475 GB/s: nccl-tests issue 272; latency assumed: that of 8 A100")
_PCIE5 = Link(
    42e-6,
    {4: 35e9, 8: 28e9},
    "RTX 5090 on PCIe 5.0, 35 GB/s of 4 and 28 GB/s of 8: nccl issue 1639; latency of 8 RTX 4090: nccl issue 1530",
)
_PCIE4 = Link(
    42e-6,
    {4: 17.5e9, 8: 14e9},
    "assumed: half of what is published for PCIe 5.0, as is the rate of the link; latency of 8 RTX 4090: nccl issue "
    "1530",
)

BOXES = {
    box.name: box
    for box in (
        Box("dgx-a100", "DGX A100: 8 A100, NVLink 3 and NVSwitch", _A100),
        Box("dgx-h100", "DGX H100: 8 H100, NVLink 4 and NVSwitch", _H100),
        Box("dgx-h200", "DGX H200: 8 H200, NVLink 4 and NVSwitch", _H200),
        Box("pcie5", "8 GPUs on PCIe 5.0 x16, no NVLink", _PCIE5),
        Box("pcie4", "8 GPUs on PCIe 4.0 x16, no NVLink", _PCIE4),
    )
}


def own_box(bus_gbps: float, latency_us: float) -> Box:
    """A box of the user's own, by its bus bandwidth in GB/s and its latency in microseconds."""
    source = f"given: {bus_gbps:g} GB/s, {latency_us:g} us"
    return Box("own", "a box of your own", Link(latency_us / 1e6, {MOST_GPUS: bus_gbps * 1e9}, source))
