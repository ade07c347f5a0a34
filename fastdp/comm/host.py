"""Collectives on host memory: every device reduces one part of the buffers, for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastdp.backend.queue import QueueDevice, joined
from fastdp.buckets import Bucket, FlatBuffers, storage_dtype
from fastdp.shard import split_range

# 256 KiB of fp32: sums stay in a core's cache between the reads of the sources and the writes.
TILE = 1 << 16

# Waking a device's worker costs more than adding so few numbers: a device's part is a multiple of this.
GRAIN = 1 << 12
# What is copied in about the time that it takes to wake a thread.
SMALL_NBYTES = 1 << 19


class HostCommunicator:
    """Collectives over the given devices, in their order.

    Work goes to the devices' communication streams and is ordered after their compute streams; compute
    that is enqueued later waits for it.
    """

    def __init__(self, devices: Sequence[QueueDevice]) -> None:
        self._devices = list(devices)

    def all_reduce(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into each of `targets` (one per device).

        Each device sums its part of every bucket in rank order and writes it to all targets: every bit is
        computed once, so all replicas hold the same. Sources may be targets. fp16 and bf16 are summed in
        fp32, and rounded once. Infinities and NaNs are values like others: they raise no warning.

        Args:
            sources: what to add up; one per device, or fewer where some have nothing to add.
            targets: where the sums go.
            buckets: which parts of them.
            once: run on the first device in the same pass, ordered as by `once()`.

        Raises:
            TypeError: a dtype that is stored but cannot be added here (float8).
        """
        refuse_unknown(buckets)
        parts = len(self._devices)

        def reduce(rank: int) -> None:
            if once is not None and rank == 0:
                once()
            with np.errstate(over="ignore", invalid="ignore"):
                for bucket in buckets:
                    span = slice(bucket.start, bucket.stop)
                    ins = [source.buffers[bucket.dtype][span] for source in sources]
                    outs = [target.buffers[bucket.dtype][span] for target in targets]
                    part = split_range(bucket.stop - bucket.start, parts, GRAIN)[rank]
                    _reduce_span(ins, outs, bucket.dtype, *part)

        # Of every bucket, not of the longest: rounded up to grains, a longer one may have fewer parts.
        pieces = [split_range(bucket.stop - bucket.start, parts, GRAIN) for bucket in buckets]
        busy = max((sum(start < stop for start, stop in piece) for piece in pieces), default=0)
        self._in_order(range(max(1, busy)), reduce)

    def reduce_scatter(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into `targets`, in each its own rank's part alone (`Bucket.part`).

        What lies outside its own part is undefined afterwards. Arguments, errors, order and bits as in `all_reduce`.
        """
        refuse_unknown(buckets)
        ranks = len(self._devices)

        def reduce(rank: int) -> None:
            if once is not None and rank == 0:
                once()
            with np.errstate(over="ignore", invalid="ignore"):
                for bucket in buckets:
                    part = bucket.part(rank, ranks)
                    ins = [source.buffers[bucket.dtype][part.start : part.stop] for source in sources]
                    outs = [targets[rank].buffers[bucket.dtype][part.start : part.stop]]
                    _reduce_span(ins, outs, bucket.dtype, 0, part.stop - part.start)

        self._in_order(range(ranks), reduce)

    def all_gather(self, buffers: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> None:
        """Copy each rank's own part of the given buckets (`Bucket.part`) from its buffers to all others'. Any dtype."""
        ranks = len(self._devices)

        def pull(rank: int) -> None:
            for bucket in buckets:
                for peer in (*range(rank + 1, ranks), *range(rank)):
                    buffers[rank].copy_part(buffers[peer], bucket.part(peer, ranks))

        if ranks > 1:
            self._in_order(range(ranks), pull)

    def broadcast(self, buffers: Sequence[FlatBuffers]) -> None:
        """Copy the first device's buffers to all others; each device pulls its own.

        Small ones are all copied by the first: waking a thread costs more than copying a few pages.
        """
        others = range(1, len(self._devices))

        def copy_to(ranks: Sequence[int]) -> None:
            for rank in ranks:
                buffers[rank].copy_from(buffers[0])

        if buffers[0].nbytes * len(others) > SMALL_NBYTES:
            self._in_order(others, lambda rank: copy_to([rank]))
        elif others:
            self.once(lambda: copy_to(others))

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Nothing is needed beforehand."""

    def check(self) -> None:
        """Nothing fails here unnoticed."""

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device, after all that was enqueued before and before all that comes."""
        self._in_order([0], lambda rank: work())

    def _in_order(self, ranks: Sequence[int], work: Callable[[int], object]) -> None:
        """Run `work(rank)` on these communication streams, ordered against the compute streams of all devices."""
        before = joined([device.compute.record() for device in self._devices])
        after = []
        for rank in ranks:
            stream = self._devices[rank].communication
            stream.wait(before)
            stream.enqueue(lambda rank=rank: work(rank))  # type: ignore[misc]
            after.append(stream.record())
        done = joined(after)
        for device in self._devices:
            device.compute.wait(done)


def refuse_unknown(buckets: Sequence[Bucket]) -> None:
    """Raise TypeError for a dtype that is stored as bytes and cannot be added up (float8)."""
    for dtype in {bucket.dtype for bucket in buckets}:
        if dtype != "bfloat16" and storage_dtype(dtype).name != dtype:
            raise TypeError(f"Gradients of dtype {dtype} cannot be all-reduced. Use float32, bfloat16 or float16.")


def _reduce_span(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], dtype: str, start: int, stop: int
) -> None:
    """Sum elements [start, stop) of the sources, in rank order, into all targets."""
    for low in range(start, stop, TILE):
        tile = slice(low, min(low + TILE, stop))
        if len(sources) == 1:
            total = sources[0][tile]
        elif dtype in ("bfloat16", "float16"):
            wide = _widen(sources[0][tile], dtype)
            for source in sources[1:]:
                wide += _widen(source[tile], dtype)
            total = _narrow(wide, dtype)
        else:
            total = np.add(sources[0][tile], sources[1][tile])
            for source in sources[2:]:
                total += source[tile]
        for target in targets:
            if len(sources) > 1 or not np.may_share_memory(target, total):
                target[tile] = total


def sum_in_order(values: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    """The sum of equally long vectors in their order, as the all-reduce computes it."""
    total = np.empty_like(values[0])
    with np.errstate(over="ignore", invalid="ignore"):
        _reduce_span(values, [total], dtype, 0, len(total))
    return total


def _widen(values: np.ndarray, dtype: str) -> np.ndarray:
    """16-bit floats as fp32."""
    if dtype == "float16":
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 as 16-bit floats, rounded to nearest even."""
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
