"""The communicator of virtual devices: buffers are reduced in pieces, each by one thread for all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fastdp.buffers import Bucket, FlatBuffers, storage_dtype
from fastdp.comm.host.reduction import TILE, HostReduction, sum_in_order
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.queue import QueueDevice, QueueEvent, joined

# What is copied in about the time that it takes to wake a thread.
SMALL_NBYTES = 1 << 19


class HostCommunicator:
    """Collectives over the given devices, in their order.

    Work goes to the devices' communication streams and is ordered after their compute streams; compute
    that is enqueued later waits for it.
    """

    def __init__(self, devices: Sequence[QueueDevice]) -> None:
        self._devices = list(devices)

    def begin(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        *,
        warm: bool = True,
    ) -> HostReduction:
        """A reduction whose buckets may be announced one by one, and that `finish` ends. Arguments and errors as of
        `all_reduce`; whether the step is `warm` makes no difference here."""
        refuse_unknown(buckets)
        return HostReduction(self._devices, sources, targets, buckets)

    def finish(
        self, reduction: HostReduction, once: Callable[[], object] | None = None, readers: int | None = None
    ) -> None:
        """Reduce the rest when all replicas are done.

        Args:
            reduction: as `begin` gave it.
            once: as of `all_reduce`.
            readers: how many devices, the first ones, have their compute wait for the sums; None for all. The others'
                must wait for something that comes after, before they compute again.
        """
        if len(self._devices) == 1 and not reduction.pieces:
            if once is not None:
                self.once(once)
            return

        def work(rank: int) -> None:
            if once is not None and rank == 0:
                once()
            reduction.work(range(len(reduction._buckets)))

        # More threads than cores, or than pieces, would only have to be woken.
        helpers = min(len(self._devices), CORES, reduction.pieces)
        end = self._before_and_after(range(max(1, helpers)), work)
        if not end.notify(lambda: reduction.close(end.error)):
            reduction.close(end.error)
        for device in self._devices[:readers]:
            device.compute.wait(reduction.over)

    def all_reduce(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into each of `targets`.

        Each piece of a bucket is summed once, in rank order, and written to all targets: every bit is
        computed once, so all replicas hold the same. Sources may be targets. fp16 and bf16 are summed in
        fp32, and rounded once. Infinities and NaNs are values like others: they raise no warning.

        Args:
            sources: what to add up; one per device, or fewer where some have nothing to add.
            targets: where the sums go; one per device, or fewer where the others do not need them.
            buckets: which parts of them.
            once: run on the first device in the same pass, ordered as by `once()`.

        Raises:
            TypeError: a dtype that is stored but cannot be added here (float8).
        """
        self.finish(self.begin(sources, targets, buckets), once)

    def reduce_scatter(
        self,
        sources: Sequence[FlatBuffers],
        targets: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        once: Callable[[], object] | None = None,
    ) -> None:
        """Sum the given buckets of `sources` into `targets`, in each its own rank's part alone (`Bucket.part`).

        What lies outside its own part is undefined afterwards. There is a target for each device. Other arguments,
        errors, order and bits as in `all_reduce`.
        """
        refuse_unknown(buckets)
        ranks = len(self._devices)

        def reduce(rank: int) -> None:
            if once is not None and rank == 0:
                once()
            with np.errstate(over="ignore", invalid="ignore"):
                for bucket in buckets:
                    part = bucket.part(rank, ranks)
                    for low in range(part.start, part.stop, TILE):
                        tile = slice(low, min(low + TILE, part.stop))
                        values = [source.buffers[bucket.dtype][tile] for source in sources]
                        targets[rank].buffers[bucket.dtype][tile] = sum_in_order(values, bucket.dtype)

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

    def broadcast(self, buffers: Sequence[FlatBuffers], readers: int | None = None) -> None:
        """Copy the first device's buffers to all others.

        A piece is read once and written to all. The first device's worker copies, with as many others as there are
        cores; a little is copied by the first alone: waking a thread costs more than copying a few pages.

        Args:
            buffers: one per device.
            readers: as given to `finish` right before: only these devices have computed since.
        """
        first, others = buffers[0], buffers[1:]
        if not others:
            return
        pieces = [(dtype, at) for dtype, buffer in first.buffers.items() for at in range(0, buffer.size, TILE)]

        def copy(rank: int) -> None:
            while pieces:
                try:
                    dtype, at = pieces.pop()
                except IndexError:  # another worker took the last one
                    return
                span = slice(at, at + TILE)
                for other in others:
                    other.buffers[dtype][span] = first.buffers[dtype][span]

        little = first.nbytes * len(others) <= SMALL_NBYTES
        self._in_order(range(1 if little else min(len(buffers), CORES, max(1, len(pieces)))), copy, readers)

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Nothing is needed beforehand."""

    def check(self) -> None:
        """Nothing fails here unnoticed."""

    def recover(self) -> None:
        """Nothing is left of a step that failed."""

    def once(self, work: Callable[[], object]) -> None:
        """Run `work()` on the first device, after all that was enqueued before and before all that comes."""
        if len(self._devices) == 1:
            self._devices[0].compute.enqueue(work)
        else:
            self._in_order([0], lambda rank: work())

    def _in_order(self, ranks: Sequence[int], work: Callable[[int], object], computing: int | None = None) -> None:
        """Run `work(rank)` on these communication streams, ordered against the compute streams of all devices."""
        done = self._before_and_after(ranks, work, computing)
        for device in self._devices:
            device.compute.wait(done)

    def _before_and_after(
        self, ranks: Sequence[int], work: Callable[[int], object], computing: int | None = None
    ) -> QueueEvent:
        """Run `work(rank)` on these communication streams after all compute so far; gives the event of their end.

        `computing`: how many devices, the first ones, have any compute to wait for.
        """
        before = joined([device.compute.record() for device in self._devices[:computing]])
        after = []
        for rank in ranks:
            stream = self._devices[rank].communication
            stream.wait(before)
            stream.enqueue(partial(work, rank))
            after.append(stream.record())
        return joined(after)


def refuse_unknown(buckets: Sequence[Bucket]) -> None:
    """Raise TypeError for a dtype that is stored as bytes and cannot be added up (float8)."""
    for dtype in {bucket.dtype for bucket in buckets}:
        if not _can_be_added(dtype):
            raise TypeError(f"Gradients of dtype {dtype} cannot be all-reduced. Use float32, bfloat16 or float16.")


@functools.cache
def _can_be_added(dtype: str) -> bool:
    return dtype == "bfloat16" or storage_dtype(dtype).name == dtype
