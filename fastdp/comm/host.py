"""Collectives on host memory: every device reduces one part of the buffers, for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastdp.backend.host import HostDevice
from fastdp.buckets import Bucket, FlatBuffers
from fastdp.shard import split_range

# 256 KiB of fp32: sums stay in a core's cache between the reads of the sources and the writes.
TILE = 1 << 16


class HostCommunicator:
    """Collectives over the given devices, in their order.

    Work goes to the devices' communication streams and is ordered after their compute streams; compute
    that is enqueued later waits for it.
    """

    def __init__(self, devices: Sequence[HostDevice]) -> None:
        self._devices = list(devices)

    def all_reduce(
        self, sources: Sequence[FlatBuffers], targets: Sequence[FlatBuffers], buckets: Sequence[Bucket]
    ) -> None:
        """Sum the given buckets of `sources` into each of `targets` (one per device).

        Each device sums its part of every bucket in rank order and writes it to all targets: every bit is
        computed once, so all replicas hold the same. Sources may be targets. fp16 and bf16 are summed in
        fp32, and rounded once.
        """
        parts = len(self._devices)

        def reduce(rank: int) -> None:
            for bucket in buckets:
                span = slice(bucket.start, bucket.stop)
                ins = [source.buffers[bucket.dtype][span] for source in sources]
                outs = [target.buffers[bucket.dtype][span] for target in targets]
                _reduce_part(ins, outs, bucket.dtype, rank, parts)

        self._everywhere(reduce)

    def broadcast(self, buffers: Sequence[FlatBuffers]) -> None:
        """Copy the first device's buffers to all others; each device pulls its own."""
        self._everywhere(lambda rank: buffers[rank].copy_from(buffers[0]) if rank else None)

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device, after all that was enqueued before and before all that comes."""
        self._everywhere(lambda rank: work() if rank == 0 else None)

    def _everywhere(self, work: Callable[[int], object]) -> None:
        """Run `work(rank)` on every communication stream, ordered against all compute streams."""
        before = [device.compute.record() for device in self._devices]
        after = []
        for rank, device in enumerate(self._devices):
            for event in before:
                device.communication.wait(event)
            device.communication.enqueue(lambda rank=rank: work(rank))  # type: ignore[misc]
            after.append(device.communication.record())
        for device in self._devices:
            for event in after:
                device.compute.wait(event)


def _reduce_part(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], dtype: str, part: int, parts: int
) -> None:
    """Sum part `part` of `parts` of the sources, in rank order, into all targets."""
    start, stop = split_range(len(targets[0]), parts, align=64)[part]
    for low in range(start, stop, TILE):
        tile = slice(low, min(low + TILE, stop))
        if dtype in ("bfloat16", "float16"):
            wide = [_widen(source[tile], dtype) for source in sources]
            total = _narrow(np.add.reduce(wide), dtype)
        elif len(sources) == 1:
            total = sources[0][tile]
        else:
            total = np.add(sources[0][tile], sources[1][tile])
            for source in sources[2:]:
                total += source[tile]
        for target in targets:
            if target is not sources[0] or len(sources) > 1:
                target[tile] = total


def _widen(values: np.ndarray, dtype: str) -> np.ndarray:
    """16-bit floats as fp32."""
    if dtype == "float16":
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 as 16-bit floats, rounded to nearest even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):  # a loss-scaled gradient may overflow: infinity is the answer
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
