"""All-reduces through host memory, for GPUs that have neither NCCL nor each other's memory for a dtype."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.host.reduction import sum_for
from fastdp.runtime.cuda.device import CudaDevice


class HostSum:
    """Sums buckets of GPUs on the host, waiting for each copy. Correct but slow, with a warning once.

    Args:
        devices: one per rank.
    """

    def __init__(self, devices: Sequence[CudaDevice]) -> None:
        self._devices = list(devices)
        self._add = sum_for(devices)
        self._told = False

    def __call__(self, targets: Sequence[FlatBuffers], bucket: Bucket) -> None:
        """Sum one bucket on all ranks, on their communication streams."""
        if not self._told:
            self._told = True
            warnings.warn(
                f"{bucket.dtype} gradients of these GPUs are added up in host memory, which is slow: these GPUs have "
                "neither a common NCCL nor direct access to each other's memory for that dtype. Install NCCL (pip "
                "install nvidia-nccl-cu12 or -cu13), or use float32.",
                stacklevel=2,
            )
        span = slice(bucket.start, bucket.stop)
        ends = [target.buffers[bucket.dtype][span] for target in targets]
        values = []
        for device, end in zip(self._devices, ends, strict=True):
            # On the rank's own stream, so that the read comes after everything that stream waits for.
            values.append(device.read(end, device.communication))
        total = self._add(values, bucket.dtype)
        for device, end in zip(self._devices, ends, strict=True):
            device.write(end, total, device.communication)
